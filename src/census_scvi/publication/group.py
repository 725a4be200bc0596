"""Atomic addition of members to a TileDB group: readers see either no new member or the complete one.

tiledbsoma writes the record of a group's members in place, in two appends. A reader between the two cannot open the
group. After a kill or a full disk between the two, no reader can, and the files of the new member block the next
attempt. A group is a folder of records, each of which adds members; later records win. Therefore this module writes the
member elsewhere and renames it into place. It does the same with the record, which TileDB itself writes to a group in a
temporary folder. In a bucket every object appears atomically, and the objects are put in the order in which readers
need them.
"""

from __future__ import annotations

import re
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import tiledbsoma
from fsspec import AbstractFileSystem

from census_scvi.census.storage import soma_context, storage
from census_scvi.errors import UserError
from census_scvi.files.atomic import new_file, remove, sync, sync_tree
from census_scvi.files.uri import local_path

# Folder of the records of a TileDB group, named __<first ms>_<last ms>_<32 hexadecimal digits>_<format version>.
_RECORDS = "__group"
_RECORD_NAME = re.compile(r"__\d+_(\d+)_[0-9a-f]{32}_\d+")
# Maximum seconds by which the clock of another writer may be ahead of ours.
_MOST_AHEAD = 10.0

Kind = type[tiledbsoma.Collection] | type[tiledbsoma.DataFrame] | type[tiledbsoma.SparseNDArray]


def make_member(group_uri: str, member: str, kind: Kind, create: Callable[[str], Any]) -> str:
    """Create a collection or array in the folder of a group, not yet as a member; keep an existing complete one.

    Parameters
    ----------
    group_uri
        The group.
    member
        Name of the folder to create.
    kind
        Class of the member.
    create
        Creates an empty member at a URI and returns it open.

    Returns
    -------
    The URI of the member.

    Raises
    ------
    UserError
        A folder of that name exists and holds something else.
    """
    uri = f"{group_uri.rstrip('/')}/{member}"
    if kind.exists(uri, context=soma_context(uri)):
        return uri
    if (path := local_path(uri)) is None:
        _put_made(uri, create)
        return uri
    partial = path.with_name(f"{path.name}.partial")
    _clear_half_made(path)
    remove(partial)
    create(str(partial)).close()
    sync_tree(partial)
    partial.rename(path)
    sync(path.parent)
    return uri


def _put_made(uri: str, create: Callable[[str], Any]) -> None:
    """Create the member locally and upload its files; this completes a partial upload by any publisher."""
    system, target = storage(uri)
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "made"
        create(str(made)).close()
        for file in sorted(path for path in made.rglob("*") if path.is_file()):
            system.put_file(str(file), f"{target}/{file.relative_to(made).as_posix()}")


def _clear_half_made(path: Path) -> None:
    """Remove the empty member that a killed writer left; UserError if it is not empty."""
    if not path.exists():
        return
    if any(path.glob("__commits/*")) or any(path.glob("[!_]*/__schema")):
        raise UserError(f"{path} is in the way: it cannot be opened and belongs to no group; move it")
    remove(path)


def name_member(group_uri: str, name: str, member: str, kind: Kind) -> str:
    """Point a name in a group to a member in its folder, in one step; the name may be new or existing.

    Parameters
    ----------
    group_uri
        The group.
    name
        The name that readers use.
    member
        The subfolder of the group that the name points to from now on.
    kind
        Class of the member.

    Returns
    -------
    Path of the new record, for `withdraw`.

    Raises
    ------
    UserError
        The group has a record from a clock that is ahead of this one.
    """
    version, data = _record(name, member, kind)
    system, group = storage(group_uri)
    last = max(_times(system, group), default=0)
    now = time.time_ns() // 10**6
    if last > now + 1000 * _MOST_AHEAD:
        raise UserError(
            f"{group_uri} was last written {(last - now) / 1000:.0f} seconds from now: the clock of this machine or of"
            " its writer is wrong; nothing was published"
        )
    when = max(now, last + 1)
    record = f"{group}/{_RECORDS}/__{when}_{when}_{uuid.uuid4().hex}_{version}"
    if (path := local_path(group_uri)) is None:
        system.pipe_file(record, data)
    else:
        aside = path / f".{name}.record.partial"
        with new_file(aside, "wb") as file:
            file.write(data)
        sync(aside)
        aside.rename(record)
        sync(path / _RECORDS)
    time.sleep(max(when / 1000 - time.time(), 0))  # readers ignore records from the future
    return record


def withdraw(group_uri: str, record: str) -> None:
    """Undo `name_member`."""
    storage(group_uri)[0].rm_file(record)


def _times(system: AbstractFileSystem, group: str) -> list[int]:
    """Time of each record of a group, in ms since 1970."""
    try:
        paths = system.ls(f"{group}/{_RECORDS}", detail=False, refresh=True)
    except FileNotFoundError:  # a bucket has no empty folders
        return []
    return [int(name[1]) for path in paths if (name := _RECORD_NAME.fullmatch(Path(path).name))]


def _record(name: str, member: str, kind: Kind) -> tuple[str, bytes]:
    """TileDB's group record for a member in the folder of the group: format version, and the record."""
    with tempfile.TemporaryDirectory() as scratch:
        with tiledbsoma.Collection.create(f"{scratch}/group") as group:
            if kind is tiledbsoma.Collection:
                group.add_new_collection(name, uri=member)
            else:  # a group does not distinguish kinds of arrays
                group.add_new_sparse_ndarray(name, uri=member, type=pa.float32(), shape=(1, 1))
        (record,) = (Path(scratch) / "group" / _RECORDS).iterdir()
        return record.name.rpartition("_")[2], record.read_bytes()
