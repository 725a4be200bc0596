"""Credentials in URLs of any form, in any text: none is written down, and harmless text stays as it is."""

import json
import logging
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from census_scvi.errors import UserError
from census_scvi.files.uri import without_credentials
from census_scvi.model.published import fetch
from census_scvi.settings import Config
from census_scvi.stages.plan import Plan
from census_scvi.terminal import guarded

FORMS = {
    "user and password": "https://user:{}@host/path",
    "user and password of a mirror": "s3://key:{}@bucket/census?region=x",
    "user alone": "https://{}@host/path",
    "no scheme": "//user:{}@host/path",
    "a slash lost": "s3:/key:{}@bucket/path",
    "port and path": "https://user:{}@host:8443/a@b/c",
    "query": "https://host/path?X-Amz-Signature={}",
    "query without a name": "https://host/path?{}",
    "fragment": "https://host/path#token={}",
    "parameter": "https://host/path;token={}",
    "second parameter": "https://host/path&sig={}",
    "file system in a file system": "zip://a.zip::https://user:{}@host/a.zip",
    "host with a share": "file://user:{}@host/share",
    "setting": "census.uri=https://user:{}@host/path",
    "sentence": "Census (https://user:{}@host/path), which nobody can open, is 'not there'",
    "quoted": "cannot open 'https://user:{}@host/path'",
    "encoded": "see https%3A%2F%2Fuser%3A{}%40host%2Fpath",
}
NO_SLASH = ("user alone",)
SECRETS = st.text(st.characters(min_codepoint=33, max_codepoint=0x24F, exclude_categories=("Z", "C")), min_size=6)


def parts(secret: str) -> list[str]:
    """Pieces of a secret that would tell something."""
    return [piece for piece in re.split(r"[/@?#;&:=%]", secret) if len(piece) > 3] + [secret]


@pytest.mark.parametrize("form", FORMS)
@given(secret=SECRETS)
def test_no_part_of_a_secret_remains(form: str, secret: str) -> None:
    if form in NO_SLASH:
        secret = secret.replace("/", "_")
    encoded = quote(secret, safe="")
    for given_as in (encoded,) if form == "encoded" else (secret, encoded):
        text = FORMS[form].format(given_as)
        around = FORMS[form].format("")
        for shown in (without_credentials(text), json.dumps(without_credentials({"a": [{text: (text, 1)}]}))):
            for part in {*parts(secret), encoded}:
                assert part in around or part not in shown, shown


@pytest.mark.parametrize(
    "text",
    [
        "me@lab.org", "mailto:me@lab.org", "Jane Doe <me@lab.org>, Lab: a@b", "/data/what?/x", "/tmp/x//a:b@c",
        "a//b@c",
        "file:///data/pub?1", "file:///data/a#b=c;d=e", "file:///home/me@lab/12:30/a@b", "memory://models/v1",
        "2026-01-01T12:00:00+00:00", "12:30:45", "https://doi.org/10.1101/2024.01", "s3://bucket/run-12:00/model@v1",
        "hf://datasets/lab/x@main/f", "https://host/doc#section", "https://host:8080/x", "is it https://host/x?",
        "assay == '10x 3\\' v3' and nnz >= 50; tissue == 'a:b'", "https://host/my%20path", "100%", "C:/x",
        "{'uri':'https://h/x','contact':'me@lab.org'}", "C:\\data\\x", "dataset_id, donor_id", "tokenizer=word",
    ],
)  # fmt: skip
def test_harmless_text_stays_as_it_is(text: str) -> None:
    assert without_credentials(text) == text
    assert without_credentials([{text: (text, 1, None, 2.5)}]) == [{text: [text, 1, None, 2.5]}]


def test_the_place_is_still_told() -> None:
    assert without_credentials("https://me:pw@host/a/b?sig=x is gone") == "https://***@host/a/b?*** is gone"
    assert without_credentials("s3://key:a/b@bucket/census") == "s3://***@bucket/census"


def test_secrets_are_known_by_their_names_too() -> None:
    values = {"vfs.s3.aws_secret_access_key": "abc", "vfs.s3.region": "eu", "batch_key": "donor", "labels_key": "type"}
    assert without_credentials(values) == values | {"vfs.s3.aws_secret_access_key": "***"}
    assert without_credentials("aws_secret_access_key=abc region=eu") == "aws_secret_access_key=*** region=eu"


@pytest.mark.parametrize("kind", [UserError, RuntimeError])
def test_neither_errors_nor_logs_nor_tracebacks_show_them(kind: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        logging.getLogger("census_scvi").info("reading %s", "s3://key:se/cret@bucket")
        raise kind("s3://key:se/cret@bucket is not there\x1b[2J\x9b1m")

    assert guarded.guarded(work) in (guarded.USER_ERROR, guarded.DEFECT)
    shown = capsys.readouterr().err
    assert "cret" not in shown
    assert "s3://***@bucket is not there\\x1b[2J\\x9b1m" in shown
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown)


def test_a_dry_run_shows_no_credentials() -> None:
    places = {"uri": "https://user:se/cret@host/census", "tiledb": {"vfs.s3.aws_secret_access_key": "cret"}}
    config = Config.model_validate({"census": places, "publish": {"model_uri": "s3://key:se/cret@bucket/model"}})
    shown = Plan("publish", [], [], cells=1, genes=1, memory=1, disk=1, seconds=1).text(config)
    assert "cret" not in shown.replace("secret", "")
    assert "model_uri: s3://***@bucket/model" in shown


def test_a_url_that_cannot_be_split_is_not_quoted(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it is not a valid URL; in a password write / as %2F and @ as %40") as error:
        fetch("ftp://user:se/cret@host/path", cache=tmp_path)
    assert "port" not in str(error.value).casefold()
