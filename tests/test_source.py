"""What lies at a path or URL: one answer for models, embeddings and counts."""

from pathlib import Path

import pytest

from census_scvi.model.source import Kind, Source


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ([], Kind.FOLDER),
        (["__group/x"], Kind.FOLDER),
        (["manifest.json"], Kind.RUN),
        (["manifest.json", "provenance.json"], Kind.RUN),
        (["provenance.json", "model.json", "model.pt"], Kind.PUBLISHED),
        (["model.json", "model.pt"], Kind.MODEL),
        (["model.pt"], Kind.PICKLE),
    ],
)
@pytest.mark.parametrize("form", ["{}", "file://{}"])
def test_a_folder_is_what_its_files_say(files: list[str], kind: Kind, form: str, tmp_path: Path) -> None:
    folder = tmp_path / "a folder%20"
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    folder.mkdir(exist_ok=True)
    source = Source.at(form.format(folder))
    assert (source.kind, source.path) == (kind, folder)
    assert source.run == (folder if kind is Kind.RUN else None)
    assert source.is_published == (kind is Kind.PUBLISHED)


def test_nothing_and_urls() -> None:
    assert Source.at("no/such/folder") == Source(Kind.MISSING, Path("no/such/folder"))
    for url in ("s3://bucket/published", "https://example.org/run", "memory://x"):
        assert Source.at(url) == Source(Kind.REMOTE, None)
        assert Source.at(url).is_published
