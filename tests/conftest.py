"""Fixtures shared by the tests."""

import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import fsspec
import pytest
import torch
from hypothesis import settings
from pipeline import Run

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

# What scib-metrics compiles for each shape of its arrays is kept for other processes and for the next run.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# Property-based tests draw the same examples on every machine and in every run; `make fuzz` draws new ones.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("fuzz", max_examples=1000, deadline=None, print_blob=True)
settings.load_profile("fixed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file comes first, so that no worker is left alone with it."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")


@pytest.fixture(scope="session")
def demo_census(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a small demo Census: 1,500 human and 500 mouse cells, 600 genes each; built once a worker."""
    from census_scvi.local_census.demo.cells import write_demo_census

    uri = tmp_path_factory.mktemp("demo") / "census"
    write_demo_census(uri, seed=0, scale=0.25, n_genes=600)
    return str(uri)


@pytest.fixture(scope="session")
def protein_census(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The demo Census with counts of up to 12 proteins in its datasets of blood and lung; built once a worker."""
    from census_scvi.local_census.demo.cells import write_demo_census

    uri = tmp_path_factory.mktemp("proteins") / "census"
    write_demo_census(uri, seed=0, scale=0.25, n_genes=600, proteins=True)
    return str(uri)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with real .h5ad files; skips where there is none."""
    folder = os.environ.get("CENSUS_SCVI_TEST_DATA")
    path = Path(folder) if folder else Path(__file__).parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(
            f"needs real cells, and {path} does not exist: set CENSUS_SCVI_TEST_DATA to a folder with"
            " pbmc_multi_human.h5ad and the other files that tests/test_real_data.py reads (docs/blood.md says what"
            " they hold)"
        )
    return path


@pytest.fixture(scope="session")
def finished_run(demo_census: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of all three stages on the demo Census; tests only read it."""
    torch.set_num_threads(1)  # as in the forks of tests, whose results are compared with these
    return Run(tmp_path_factory.mktemp("finished"), demo_census).all()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Address of an S3 server on this machine; started once a worker, because its libraries take seconds to import."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        host, port = "127.0.0.1", str(free.getsockname()[1])
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", host, "-p", port], stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            with suppress(ConnectionError), socket.create_connection((host, int(port))):
                break
            time.sleep(0.1)
        yield f"{host}:{port}"
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A new bucket of the S3 server, which TileDB and fsspec find as they would any other."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{s3_server}",
        "TILEDB_VFS_S3_ENDPOINT_OVERRIDE": s3_server,
        "TILEDB_VFS_S3_SCHEME": "http",
        "TILEDB_VFS_S3_USE_VIRTUAL_ADDRESSING": "false",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    try:
        name = f"bucket-{uuid.uuid4().hex}"
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir(name)
        yield f"s3://{name}"
    finally:
        fsspec.get_filesystem_class("s3").clear_instance_cache()
