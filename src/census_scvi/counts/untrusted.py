"""Refuse HDF5 files that refer to other files, or that declare much more data than they contain."""

from __future__ import annotations

from collections.abc import Iterator

import h5py
import numpy as np

from census_scvi.errors import UserError

# Datasets up to this size in bytes are read without a comparison of declared and stored size.
_HARMLESS = 2**26
# Highest possible ratio of declared to stored bytes: gzip in HDF5 compresses zeros to about 1/1030 of their size.
_MOST_COMPRESSED = 1100


def check_file(file: h5py.File) -> None:
    """Refuse a file that refers to other files, or whose declared sizes are absurd; reads no values.

    Raises
    ------
    UserError
        The file has an external or dangling link, external storage, a virtual dataset, or datasets that declare much
        more than the file stores; the error has the name of the dataset.
    """
    declared = 0
    for name, dataset in _datasets(file):
        where = f"{file.filename}: {name}"
        if dataset.external:
            raise UserError(f"{where} stores its values in another file ({dataset.external[0][0]}); {_REWRITE}")
        if dataset.is_virtual:
            sources = sorted({source.file_name for source in dataset.virtual_sources()})
            raise UserError(f"{where} is a virtual dataset of other files ({', '.join(sources[:3])}); {_REWRITE}")
        size = _size(dataset)
        declared += size
        if size > _HARMLESS and size > 2 * _stored(dataset):
            raise UserError(
                f"{where} declares {_readable(size)} ({dataset.shape} of {dataset.dtype}), but the file contains"
                f" {_readable(dataset.id.get_storage_size())} of it: it is damaged, or built to fill the memory"
            )
    on_disk = file.id.get_filesize()
    if declared > max(2**30, _MOST_COMPRESSED * on_disk):
        raise UserError(
            f"{file.filename} declares {_readable(declared)} in a file of {_readable(on_disk)}: it is damaged, or built"
            " to fill the memory"
        )


_REWRITE = (
    "files that refer to other files are not read: open it where it was created and write it again as one file:"
    " anndata.read_h5ad(old).write_h5ad(new)"
)


def _datasets(file: h5py.File) -> Iterator[tuple[str, h5py.Dataset]]:
    """Yield every dataset once, with its name; UserError if a link points outside the file or is broken."""
    seen = {h5py.h5o.get_info(file.id).addr}
    waiting: list[tuple[str, h5py.Group]] = [("", file)]
    while waiting:
        prefix, group = waiting.pop()
        for name in group:
            path = f"{prefix}/{name}".lstrip("/")
            link = _local_link(file, group, name, path)
            try:
                member = group[name]
            except (OSError, KeyError, RuntimeError) as error:  # RuntimeError: circular links
                where = f" is a link to {link.path}, which" if isinstance(link, h5py.SoftLink) else ""
                raise UserError(f"{file.filename}: {path}{where} is missing; the file is damaged ({error})") from error
            address = h5py.h5o.get_info(member.id).addr
            if address in seen:  # a second name of the same object, or a cycle
                continue
            seen.add(address)
            if isinstance(member, h5py.Group):
                waiting.append((path, member))
            elif isinstance(member, h5py.Dataset):
                yield path, member


def _local_link(file: h5py.File, group: h5py.Group, name: str, path: str) -> h5py.HardLink | h5py.SoftLink:
    """Link from the group to its member; UserError if it is external or of an unknown kind."""
    try:
        link = group.get(name, getlink=True)
    except TypeError:  # a user-defined link class, which needs a plugin
        raise UserError(f"{file.filename}: {path} is a link of an unknown kind; {_REWRITE}") from None
    if isinstance(link, h5py.ExternalLink):
        raise UserError(f"{file.filename}: {path} is a link to another file ({link.filename}); {_REWRITE}")
    return link


def _size(dataset: h5py.Dataset) -> int:
    """Size of the dataset in memory in bytes, without integer overflow."""
    return int(np.prod([int(n) for n in dataset.shape or (0,)], dtype=object)) * dataset.dtype.itemsize


def _stored(dataset: h5py.Dataset) -> int:
    """Uncompressed size, in bytes, of the values for which the file has storage."""
    if dataset.chunks is None:
        return int(dataset.id.get_storage_size())
    chunk = int(np.prod(dataset.chunks, dtype=object)) * dataset.dtype.itemsize
    return int(dataset.id.get_num_chunks()) * chunk


def _readable(size: int) -> str:
    for unit, of in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= of:
            return f"{size / of:,.1f} {unit}"
    return f"{size} bytes"
