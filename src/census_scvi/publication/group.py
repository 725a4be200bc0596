"""New members of a TileDB group in one step: readers see the group without the member, or with all of it.

tiledbsoma writes the record of a group's members in place and in two appends. A reader between them, or any reader
after a kill or a full disk there, cannot open the group any more. And what it made of a member before that stays in the
way of the next attempt. But a group is a folder of records, each adding members, of which a later one wins: so a member
is made elsewhere and renamed to its place, and so is the one record that names it, which TileDB itself makes in a
group in a temporary folder. In a bucket an object is there or not, and objects are put in the order in
which they are needed.
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

# Where a TileDB group keeps its records: __<first ms>_<last ms>_<32 hexadecimal digits>_<version of the format>.
_RECORDS = "__group"
_RECORD_NAME = re.compile(r"__\d+_(\d+)_[0-9a-f]{32}_\d+")
# How far a clock may be ahead of ours, in seconds.
_MOST_AHEAD = 10.0

Kind = type[tiledbsoma.Collection] | type[tiledbsoma.DataFrame] | type[tiledbsoma.SparseNDArray]


def make_member(group_uri: str, member: str, kind: Kind, create: Callable[[str], Any]) -> str:
    """Create a collection or array in the folder of a group, not yet a member of it; a complete one is kept.

    Parameters
    ----------
    group_uri
        The group.
    member
        Name of the folder to make.
    kind
        The class of the member.
    create
        Makes an empty one at a URI and returns it open.

    Returns
    -------
    The URI of the member.

    Raises
    ------
    UserError
        A folder of that name holds something else.
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
    """Make it here and put its files there: whatever a killed or another publisher has put, they complete it."""
    system, target = storage(uri)
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "made"
        create(str(made)).close()
        for file in sorted(path for path in made.rglob("*") if path.is_file()):
            system.put_file(str(file), f"{target}/{file.relative_to(made).as_posix()}")


def _clear_half_made(path: Path) -> None:
    """Remove the empty member that a killed writer left; UserError if it has contents."""
    if not path.exists():
        return
    if any(path.glob("__commits/*")) or any(path.glob("[!_]*/__schema")):
        raise UserError(f"{path} is in the way: it cannot be opened and belongs to no group; move it")
    remove(path)


def name_member(group_uri: str, name: str, member: str, kind: Kind) -> str:
    """Let a name in a group mean a member of its folder, in one step, whether the name was there or not.

    Parameters
    ----------
    group_uri
        The group.
    name
        The name that readers use.
    member
        The folder in the group's that it means from now on.
    kind
        The class of the member.

    Returns
    -------
    Path of the record that says so, for `withdraw`.

    Raises
    ------
    UserError
        The group was written by a clock that is ahead of this one.
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
    time.sleep(max(when / 1000 - time.time(), 0))  # until then readers do not see it
    return record


def withdraw(group_uri: str, record: str) -> None:
    """Undo `name_member`."""
    storage(group_uri)[0].rm_file(record)


def _times(system: AbstractFileSystem, group: str) -> list[int]:
    """When each record of a group was written, in ms since 1970."""
    try:
        paths = system.ls(f"{group}/{_RECORDS}", detail=False, refresh=True)
    except FileNotFoundError:  # a bucket has no empty folders
        return []
    return [int(name[1]) for path in paths if (name := _RECORD_NAME.fullmatch(Path(path).name))]


def _record(name: str, member: str, kind: Kind) -> tuple[str, bytes]:
    """TileDB's entry in a group for a member of its folder: version of the format, and the record."""
    with tempfile.TemporaryDirectory() as scratch:
        with tiledbsoma.Collection.create(f"{scratch}/group") as group:
            if kind is tiledbsoma.Collection:
                group.add_new_collection(name, uri=member)
            else:  # to a group all arrays are the same
                group.add_new_sparse_ndarray(name, uri=member, type=pa.float32(), shape=(1, 1))
        (record,) = (Path(scratch) / "group" / _RECORDS).iterdir()
        return record.name.rpartition("_")[2], record.read_bytes()
