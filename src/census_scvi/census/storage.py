"""How TileDB accesses a Census in an object store: region, signed requests, and the settings of `census.tiledb`."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import tiledbsoma

from census_scvi.config.messages import suggestion
from census_scvi.errors import UserError
from census_scvi.files.tiledb_py import tiledb_py
from census_scvi.files.uri import file_system, local_path

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

if "tiledb" in sys.modules:
    tiledb_py()  # so that errors in tiledbsoma stay what they are without it

# The default, 1 GiB per column, uses 8 GB for a gene selection over 90,000 cells, and is slower.
_BUFFERS = {
    "soma.init_buffer_bytes": 16 * 2**20,
    "py.init_buffer_bytes": 16 * 2**20,
    "sm.mem.total_budget": 2 * 2**30,
}
# Public buckets of CZI.
_PUBLIC_BUCKETS = ("cellxgene-census-public-us-west-2", "cellxgene-contrib-public")
_PUBLIC_REGION = "us-west-2"
# Prefixes of settings that TileDB does not list: settings of tiledb-py and tiledbsoma, and custom headers.
_FREE = ("py.", "soma.", "vfs.s3.custom_headers.", "rest.custom_headers.")
_OF_FSSPEC = {
    "vfs.s3.aws_access_key_id": "key",
    "vfs.s3.aws_secret_access_key": "secret",
    "vfs.s3.aws_session_token": "token",
}

_current: dict[str, str] = {}


def use_settings(settings: Mapping[str, str]) -> None:
    """Apply the setting `census.tiledb` to everything that `soma_context` and `storage` open from now on.

    Raises
    ------
    UserError
        A key is not a setting of TileDB, or TileDB refuses a value.
    """
    known = tiledbsoma.SOMATileDBContext().native_context.config()
    for key in settings:
        if key not in known and not key.startswith(_FREE):
            raise UserError(f"census.tiledb: {key} is not a setting of TileDB{suggestion(key, sorted(known))}")
    try:
        _ = tiledbsoma.SOMATileDBContext(tiledb_config=dict(settings)).native_context
    except (RuntimeError, tiledbsoma.SOMAError) as error:
        reason = str(error).rpartition("Error: ")[2].rpartition("Config: ")[2]
        raise UserError(f"census.tiledb ({', '.join(settings)}) is refused by TileDB: {reason}") from None
    _current.clear()
    _current.update(settings)


def soma_context(uri: str | None) -> Any:
    """Context for tiledbsoma to open a location; None: a release of the public Census."""
    return _context(_bucket(uri) if uri else _PUBLIC_BUCKETS[0], tuple(_current.items()))


@lru_cache
def _context(bucket: str | None, given: tuple[tuple[str, str], ...]) -> Any:
    if bucket is None:
        return tiledbsoma.SOMATileDBContext().replace(tiledb_config=_BUFFERS | dict(given))
    import cellxgene_census  # its import takes as long as that of tiledbsoma, and is not needed for a disk

    of_store = _store_settings(bucket, tuple(dict(given)))
    return cellxgene_census.get_default_soma_context(tiledb_config=_BUFFERS | of_store | dict(given))


def storage(uri: str) -> tuple[AbstractFileSystem, str]:
    """The fsspec file system of a location, with the same access settings as TileDB, and the path in it."""
    bucket = _bucket(uri)
    if bucket is None:
        return file_system(uri)
    settings = _store_settings(bucket, tuple(_current)) | _current
    options: dict[str, Any] = {name: settings[key] for key, name in _OF_FSSPEC.items() if key in settings}
    if address := settings.get("vfs.s3.endpoint_override"):
        scheme = settings.get("vfs.s3.scheme", "https")
        options["endpoint_url"] = address if "://" in address else f"{scheme}://{address}"
    if settings["vfs.s3.no_sign_request"] == "true":
        options["anon"] = True
    return file_system(uri, client_kwargs={"region_name": settings["vfs.s3.region"]}, **options)


def _bucket(uri: str) -> str | None:
    scheme, separator, rest = uri.partition("://")
    if local_path(uri) is not None or not separator or scheme.lower() not in ("s3", "s3a"):
        return None
    return rest.partition("/")[0]


@lru_cache
def _store_settings(bucket: str, given: tuple[str, ...]) -> dict[str, str]:
    """TileDB settings of a bucket: its region, and whether requests are signed.

    The buckets of CZI are public. Other buckets use the AWS environment. Without credentials, requests are not signed,
    so that other public buckets can be read. The setting `census.tiledb` has priority over these values.
    """
    if bucket in _PUBLIC_BUCKETS:
        return {"vfs.s3.region": _PUBLIC_REGION, "vfs.s3.no_sign_request": "true"}
    import botocore.exceptions
    import botocore.session

    try:
        session = botocore.session.get_session()
        region = os.environ.get("AWS_REGION") or session.get_config_variable("region") or _PUBLIC_REGION
        signed = any(key.startswith("vfs.s3.aws_") for key in given) or session.get_credentials() is not None
    except botocore.exceptions.BotoCoreError as error:
        raise UserError(f"the AWS settings for s3://{bucket} cannot be used: {error}") from None
    return {"vfs.s3.region": region, "vfs.s3.no_sign_request": str(not signed).lower()}


def refused_by_store(error: Exception) -> str | None:
    """Response of the object store to a request that failed, and what to do; None if the error is not from a store."""
    answer = re.search(r"\[HTTP Response Code: (-?\d+)\](?: \[Exception: (\w*)\])?", str(error))
    if answer is None:
        return None
    advice = (
        "it answers too many requests, and TileDB has tried several times; run the same command again later"
        if answer[1] in _BUSY
        else "credentials and region come from the AWS environment (AWS_PROFILE, AWS_ACCESS_KEY_ID, AWS_REGION, ~/.aws)"
        " or from census.tiledb"
    )
    return f"the store answers {answer[2] or 'with an error'} (HTTP {answer[1]}); {advice}"


_BUSY = ("429", "503")
