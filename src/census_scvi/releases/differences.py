"""What differs between two releases according to their records: settings, genes, batches, package versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from census_scvi.releases.release import STAGES, Release

# Where the inputs are, and names of files: they do not change a result, and the page shows the Census itself.
_PLACES = ("census.uri", "census.version", "census.tiledb", "anndata.model_filename", "model.filename")
_ABSENT = "–"


def differences(old: Release, new: Release, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that differs between how two releases were made.

    Parameters
    ----------
    old, new
        The releases.
    defaults
        Default of each setting that changes the result of a stage in `STAGES`, by dotted key.

    Returns
    -------
    `settings`: list of `name`, `old`, `new`; `genes` and `batches`: numbers `shared`, and lists `only_old` and
    `only_new`; `packages`: list of `stages`, `package`, `old`, `new`; `code`: commit of each.
    """
    return {
        "settings": _settings(old, new, defaults),
        "genes": _names(_labelled_genes(old), _labelled_genes(new)),
        "same_genes": old.description.genes == new.description.genes,
        "batches": _names({name: name for name in old.description.batches}, {n: n for n in new.description.batches}),
        "packages": _packages(old, new),
        "code": {name: release.stages["train"].get("code", {}) for name, release in (("old", old), ("new", new))},
    }


def _settings(old: Release, new: Release, defaults: Mapping[str, Any]) -> list[dict[str, Any]]:
    both = [_of_stages(release.settings, defaults) for release in (old, new)]
    names = sorted(both[0].keys() | both[1].keys())
    rows = [{"name": name, "old": both[0].get(name), "new": both[1].get(name)} for name in names]
    rows += [{"name": "seed", "old": old.stages["train"]["seed"], "new": new.stages["train"]["seed"]}]
    return [row for row in rows if row["old"] != row["new"]]


def _of_stages(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that change the result, those with defaults filled in that an earlier version did not have."""
    known = {
        key: value
        for key, value in settings.items()
        if any(key == name or key.startswith(f"{name}.") for name in defaults)
    }
    filled = {**{name: value for name, value in defaults.items() if not _mapping_filled(name, known)}, **known}
    return {
        key: value
        for key, value in filled.items()
        if key != "seed" and not any(key == place or key.startswith(f"{place}.") for place in _PLACES)
    }


def _mapping_filled(name: str, settings: Mapping[str, Any]) -> bool:
    """Whether a mapping, such as training_plan, has entries of its own."""
    return any(key.startswith(f"{name}.") for key in settings)


def _labelled_genes(release: Release) -> dict[str, str]:
    """Symbol (or id, if it is not known) of each gene, by id."""
    genes, symbols = release.description.genes, release.description.symbols
    return dict(zip(genes, symbols or genes, strict=True))


def _names(old: Mapping[str, str], new: Mapping[str, str]) -> dict[str, Any]:
    return {
        "shared": len(old.keys() & new.keys()),
        "only_old": [shown for name, shown in old.items() if name not in new],
        "only_new": [shown for name, shown in new.items() if name not in old],
    }


def _packages(old: Release, new: Release) -> list[dict[str, Any]]:
    """Packages of which a stage used another version; stages with the same difference share a row."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for stage in STAGES:
        one, other = (release.stages[stage]["packages"] for release in (old, new))
        for name in sorted(one.keys() | other.keys()):
            versions = one.get(name, _ABSENT), other.get(name, _ABSENT)
            if versions[0] != versions[1]:
                rows.setdefault((name, *versions), []).append(stage)
    return [
        {"stages": stages, "package": name, "old": one, "new": other} for (name, one, other), stages in rows.items()
    ]
