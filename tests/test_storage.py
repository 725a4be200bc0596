"""A Census in an object store: who signs, which region, and that no secret of `census.tiledb` is written down."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import anndata as ad
import boto3
import pytest
import yaml
from faulty_store import faulty_store
from pipeline import Run

from census_scvi.census import storage
from census_scvi.census.embedding import published_uri
from census_scvi.census.storage import refused_by_store, soma_context, use_settings
from census_scvi.errors import UserError
from census_scvi.settings import load_config

AWS = (
    "AWS_PROFILE",
    "AWS_DEFAULT_REGION",
    "AWS_REGION",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
)


@pytest.fixture
def no_aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """No AWS settings but those that a test makes; none are sought on the network."""
    for name in AWS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    storage._store_settings.cache_clear()
    storage._context.cache_clear()
    yield monkeypatch
    storage._store_settings.cache_clear()
    storage._context.cache_clear()
    use_settings({})


def region_and_unsigned(uri: str | None) -> tuple[str, str]:
    config = soma_context(uri).tiledb_config
    return config["vfs.s3.region"], config["vfs.s3.no_sign_request"]


def test_the_aws_environment_decides_but_for_the_public_census(no_aws: pytest.MonkeyPatch, tmp_path: Path) -> None:
    public = "s3://cellxgene-census-public-us-west-2/cell-census/2025-11-08/soma/"
    keys = "[lab]\naws_access_key_id = a\naws_secret_access_key = b\n"
    (tmp_path / "AWS_SHARED_CREDENTIALS_FILE").write_text(keys)
    (tmp_path / "AWS_CONFIG_FILE").write_text("[profile lab]\nregion = eu-central-1\n")
    settings: list[tuple[dict[str, str], tuple[str, str]]] = [
        ({}, ("us-west-2", "true")),
        ({"AWS_PROFILE": "lab"}, ("eu-central-1", "false")),
        ({"AWS_PROFILE": "lab", "AWS_REGION": "eu-west-1"}, ("eu-west-1", "false")),
        ({"AWS_DEFAULT_REGION": "us-east-2"}, ("us-east-2", "true")),
        ({"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}, ("us-west-2", "false")),
    ]
    for environment, expected in settings:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            storage._store_settings.cache_clear()
            storage._context.cache_clear()
            assert region_and_unsigned("s3://my-lab/census") == expected, environment
            assert region_and_unsigned(public) == region_and_unsigned(None) == ("us-west-2", "true")
    use_settings({"vfs.s3.aws_access_key_id": "a", "vfs.s3.aws_secret_access_key": "b", "vfs.s3.region": "eu-south-1"})
    assert region_and_unsigned("s3://my-lab/census") == ("eu-south-1", "false")
    use_settings({"vfs.s3.no_sign_request": "false"})
    assert region_and_unsigned("s3://my-lab/census") == ("us-west-2", "false")
    no_aws.setenv("AWS_PROFILE", "nobody")
    storage._store_settings.cache_clear()
    with pytest.raises(UserError, match=r"AWS settings for s3://other cannot be used: .*\(nobody\) could not be found"):
        soma_context("s3://other/census")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("census.tiledb={vfs.s3.regoin: hunter2}", "vfs.s3.regoin is not a setting of TileDB; did you mean"),
        ("census.tiledb.vfs.s3.scheme=hunter2", "census.tiledb (vfs.s3.scheme) is refused by TileDB: Invalid"),
        ("census.tiledb=hunter2", "census.tiledb: expected settings of TileDB and their values, as"),
        ("census.tiledb.vfs.s3.region=[hunter2]", "census.tiledb: vfs.s3.region has no single value"),
    ],
)  # fmt: skip
def test_settings_that_tiledb_does_not_know_are_refused_without_their_values(
    override: str, message: str, finished_run: Run, capsys: pytest.CaptureFixture[str], no_aws: pytest.MonkeyPatch
) -> None:
    assert finished_run("prepare", override, "--dry-run") == 2
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "hunter2" not in error


def test_settings_of_tiledb_are_recorded_nowhere(
    demo_census: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_aws: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, demo_census, census={"tiledb": {"vfs.s3.aws_secret_access_key": "hunter2"}})
    assert load_config(run.config).census.tiledb == {"vfs.s3.aws_secret_access_key": "hunter2"}
    assert run("prepare", "--dry-run") == 0
    assert run("prepare") == 0
    assert run("prepare", "census.tiledb={vfs.s3.region: eu-west-1, vfs.s3.use_virtual_addressing: false}") == 0
    captured = capsys.readouterr()
    assert "prepare is done for these settings" in captured.err  # where it is read from changes no result
    assert "hunter2" not in captured.out + captured.err
    for path in run.directory.rglob("*"):
        assert not path.is_file() or b"hunter2" not in path.read_bytes(), path


@pytest.fixture(scope="module")
def private_bucket(demo_census: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A server that answers signed requests of one user only, with the demo Census in s3://private/census."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    host, port = address.split(":")
    # The first requests make the user; from then on each is checked against its policy.
    environment = os.environ | {"INITIAL_NO_AUTH_ACTION_COUNT": "3", "NO_PROXY": host}
    log = tmp_path_factory.mktemp("moto") / "log"
    command = [sys.executable, "-m", "moto.server", "-H", host, "-p", port]
    with log.open("w") as file:
        server = subprocess.Popen(command, stderr=file, stdout=file, env=environment)
    try:
        for _ in range(300):
            with suppress(ConnectionError), socket.create_connection((host, int(port))):
                break
            time.sleep(0.1)
        where = {"endpoint_url": f"http://{address}", "region_name": "eu-west-1"}
        iam = boto3.client("iam", aws_access_key_id="none", aws_secret_access_key="none", **where)
        iam.create_user(UserName="lab")
        everything = {"Effect": "Allow", "Action": "*", "Resource": "*"}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [everything]})
        iam.put_user_policy(UserName="lab", PolicyName="all", PolicyDocument=policy)
        made = iam.create_access_key(UserName="lab")["AccessKey"]
        key, secret = made["AccessKeyId"], made["SecretAccessKey"]
        s3 = boto3.client("s3", aws_access_key_id=key, aws_secret_access_key=secret, **where)
        s3.create_bucket(Bucket="private", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
        for path in Path(demo_census).rglob("*"):
            if path.is_file():
                s3.upload_file(str(path), "private", f"census/{path.relative_to(demo_census)}")
        yield {"address": address, "key": key, "secret": secret}
    finally:
        server.kill()
        server.wait()


@pytest.mark.slow
def test_a_census_in_a_private_bucket(
    private_bucket: dict[str, str], tmp_path: Path, no_aws: pytest.MonkeyPatch
) -> None:
    """Read, embedded and published into by `census.tiledb` alone, or with the keys of a profile; never without."""
    address, key, secret = (private_bucket[name] for name in ("address", "key", "secret"))
    server = {"vfs.s3.endpoint_override": address, "vfs.s3.scheme": "http", "vfs.s3.use_virtual_addressing": False}
    keys = {"vfs.s3.aws_access_key_id": key, "vfs.s3.aws_secret_access_key": secret, "vfs.s3.region": "eu-west-1"}
    no_aws.setenv("NO_PROXY", "127.0.0.1")
    quick = {"gates": {"sample_size": 300}, "evaluate": {"baseline": False, "batches": []}}
    run = Run(tmp_path, "s3://private/census", census={"tiledb": server}, **quick)
    refused = run.subprocess("prepare")
    assert refused.returncode == 2
    assert "Census s3://private/census cannot be read: the store answers" in refused.stderr
    assert "from the AWS environment (AWS_PROFILE, AWS_ACCESS_KEY_ID" in refused.stderr
    (tmp_path / "AWS_SHARED_CREDENTIALS_FILE").write_text(
        f"[lab]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n"
    )
    no_aws.setenv("AWS_PROFILE", "lab")
    done = run.subprocess("prepare")
    assert done.returncode == 0, done.stderr
    no_aws.delenv("AWS_PROFILE")
    config = yaml.safe_load(run.config.read_text())
    config["census"]["tiledb"] |= keys
    config["publish"] = {"experiment_uri": "s3://private/census/census_data/homo_sapiens"}
    run.config.write_text(yaml.safe_dump(config))
    for stage in ("prepare", "train", "create-latent-update", "publish", "evaluate"):
        done = run.subprocess(stage)
        assert done.returncode == 0, done.stderr
        assert secret not in done.stderr + done.stdout
    for path in run.directory.rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes(), path
    use_settings(load_config(run.config).census.tiledb)
    assert published_uri("s3://private/census/census_data/homo_sapiens", "scvi")


def digest_of_prepared(run: Run) -> str:
    """Hash of the prepared counts by cell."""
    cells = ad.read_h5ad(run.path("anndata_model.h5ad"))
    counts = cells[cells.obs.sort_values("soma_joinid").index].X.tocsr()
    counts.sort_indices()
    parts = (counts.indptr, counts.indices, counts.data, "|".join(cells.var_names).encode())
    return hashlib.sha256(b"".join(part if isinstance(part, bytes) else part.tobytes() for part in parts)).hexdigest()


@pytest.mark.slow
def test_a_store_that_throttles_resets_and_is_late(
    private_bucket: dict[str, str], finished_run: Run, tmp_path: Path, no_aws: pytest.MonkeyPatch
) -> None:
    """TileDB tries again, with growing intervals: the prepared cells are those of the local Census."""
    keys = {"vfs.s3.aws_access_key_id": private_bucket["key"], "vfs.s3.aws_secret_access_key": private_bucket["secret"]}
    own = {**keys, "vfs.s3.region": "eu-west-1", "vfs.s3.scheme": "http", "vfs.s3.use_virtual_addressing": False}
    no_aws.setenv("NO_PROXY", "127.0.0.1")
    with faulty_store(private_bucket["address"], 40, "throttled", "reset", "late") as store:
        settings = {"tiledb": {**own, "vfs.s3.endpoint_override": store.address}}
        run = Run(tmp_path, "s3://private/census", census=settings)
        done = run.subprocess("prepare")
        assert done.returncode == 0, done.stderr
        failed = store.failed()
        assert min(failed.get(fault, 0) for fault in ("throttled", "reset", "late")) >= 2, failed
    assert digest_of_prepared(run) == digest_of_prepared(finished_run)


@pytest.mark.parametrize(
    ("code", "advice"), [(503, "run the same command again later"), (403, "credentials and region")]
)
def test_what_to_do_about_a_store_that_refuses(code: int, advice: str) -> None:
    error = RuntimeError(f"S3: Cannot list [HTTP Response Code: {code}] [Exception: SlowDown] : x")
    assert advice in str(refused_by_store(error))
    assert f"(HTTP {code})" in str(refused_by_store(error))
