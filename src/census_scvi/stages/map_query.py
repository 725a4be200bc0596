"""The command scvi-map-query.py: writes a user's .h5ad with embedding, map and predicted labels."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from anndata.io import write_elem

from census_scvi.annotation.annotator import EMPTY, PREDICTION
from census_scvi.atlas import EMBEDDING, OWN_EMBEDDING, Atlas
from census_scvi.config import Config
from census_scvi.config.obs_filter import in_section
from census_scvi.config.run_names import MANIFEST
from census_scvi.counts.h5ad import check_path, portable_frame
from census_scvi.errors import UserError
from census_scvi.files.atomic import replacing
from census_scvi.files.json_values import json_values
from census_scvi.files.writable import require_writable
from census_scvi.model.safe import DESCRIPTION
from census_scvi.model.source import PROVENANCE
from census_scvi.neighbors.index import EXACT_CELLS
from census_scvi.neighbors.umap_map import UmapMap
from census_scvi.pictures.umap import draw_on_reference
from census_scvi.query.alignment import TooFewGenes
from census_scvi.query.cells import QueryCells
from census_scvi.stages.plan import Plan
from census_scvi.workspace import Workspace

log = logging.getLogger(__name__)

MAP = "X_umap"
# Of the report and the pictures next to the .h5ad; and what makes a folder one that holds a model.
_SUFFIXES, _OF_A_MODEL = (".json", ".png"), (MANIFEST, PROVENANCE, DESCRIPTION)
_COUNTS = "query.counts="  # what says where the raw counts are, for messages
# For --dry-run, from runs on two cores: memory of the imports, and of a cell of query or reference; time that does not
# depend on cells; cells/s that are embedded and annotated; the index of a large reference; the map.
_BASE_MEMORY, _BYTES_A_CELL = 1.0e9, 1500.0
_FIXED_SECONDS, _CELLS_A_SECOND, _INDEX_SECONDS, _MAP_SECONDS = 12.0, 1500.0, 40.0, 50.0


def run(config: Config, *, force: bool = False) -> None:
    """Embed the cells, predict their labels, and write the .h5ad, pictures and a report next to it."""
    source, target = _paths(config)
    if target.exists() and not force:
        raise UserError(f"{target} exists; name another query.output, or replace it with --force")
    files = [*_beside(config, target), target]
    with replacing(files) as partials:
        _run(config, source, target, dict(zip(files, partials, strict=True)))
    log.info("wrote %s", ", ".join(str(path) for path in reversed(files) if path.exists()))


def _run(config: Config, source: Path, target: Path, partial: dict[Path, Path]) -> None:
    """Write everything; `partial` says where, for each file."""
    settings = config.query
    with (
        in_section("query"),
        Atlas.open(
            settings.model or config.directory,
            census=_census(config),
            embedding=settings.embedding,
            organism=config.census.organism if "organism" in config.census.model_fields_set else None,
            tiledb=config.census.tiledb,
        ) as atlas,
    ):
        mapped = _predict(atlas, source, config)
        for labels in settings.labels:
            log.info("%s", _summary(mapped, labels))
            if mapped.uns[PREDICTION][labels].get("held_out"):
                figure = atlas.quality(mapped, labels)
                figure.savefig(partial[_quality_picture(target, labels)], dpi=110, format="png")
        if settings.umap_cells:
            _place(atlas, mapped, config, partial[target.with_suffix(".png")])
    report = json.dumps(json_values(_report(mapped, settings.labels)), indent=1)
    partial[target.with_suffix(".json")].write_text(report + "\n", encoding="utf-8")
    _write(source, partial[target], mapped)


def _predict(atlas: Atlas, source: Path, config: Config) -> ad.AnnData:
    """The cells as `Atlas.predict` gives them; its errors name the settings of the config."""
    settings, (setting, min_share) = config.query, _min_share(config)
    with QueryCells(source) as cells:
        counts = cells.find_counts(settings.counts, setting=_COUNTS)
    try:
        return atlas.predict(
            source,
            settings.labels,
            obs_filter=settings.obs_filter,
            method=settings.method,
            n_neighbors=settings.n_neighbors,
            baseline_cells=settings.baseline_cells,
            max_cells=settings.reference_cells,
            seed=config.seed,
            counts=counts,
            min_share=min_share,
        )
    except TooFewGenes as error:
        raise error.named(setting) from None


def _paths(config: Config) -> tuple[Path, Path]:
    if config.query.file is None:
        raise UserError("query.file is not set; name the .h5ad with your cells: query.file=my-cells.h5ad")
    source = Path(config.query.file)
    check_path(source)
    target = Path(config.query.output) if config.query.output else source.with_name(f"{source.stem}-mapped.h5ad")
    if target.suffix in _SUFFIXES:
        raise UserError(f"query.output ends in {target.suffix}, like the report or a picture; expected NAME.h5ad")
    for path in (target, *_beside(config, target)):
        require_writable(path, "query.output")
        if path.exists() and path.samefile(source):
            raise UserError(f"query.output is query.file, {source}; name another file")
    if config.query.model is None and not any((config.directory / name).exists() for name in _OF_A_MODEL):
        Workspace(config.directory).require_run("name it in output.directory, or a published model in query.model")
    return source, target


def _beside(config: Config, target: Path) -> list[Path]:
    """The files that are written next to the .h5ad: pictures and the report."""
    settings = config.query
    pictures = [_quality_picture(target, labels) for labels in settings.labels] if settings.baseline_cells else []
    if settings.umap_cells:
        pictures.append(target.with_suffix(".png"))
    return [*dict.fromkeys(pictures), target.with_suffix(".json")]


def _census(config: Config) -> str | None:
    """The Census that the config names, or that of the model."""
    named = config.census.model_fields_set & {"uri", "version"}
    return config.census.uri or config.census.version if named else None


def _min_share(config: Config) -> tuple[str, float]:
    """The setting that decides, and its value: query.min_share, or genes.min_share where that alone is set."""
    set_for_census = "min_share" in config.genes.model_fields_set and "min_share" not in config.query.model_fields_set
    section = "genes" if set_for_census else "query"
    return f"{section}.min_share", getattr(config, section).min_share


def _summary(mapped: ad.AnnData, labels: str) -> str:
    quality = mapped.uns[PREDICTION][labels]
    unknown = mapped.obs[f"{labels}_unknown"].to_numpy()
    found = mapped.obs[f"{labels}_predicted"].nunique() - bool(unknown.any())
    words = f"{labels}: {found} of {len(quality['classes'])} labels found, {unknown.mean():.1%} of the cells unknown"
    if empty := int(mapped.obs[EMPTY].sum()):
        words += f", {empty:,} cells without counts among them"
    if quality["far"]:
        return (
            f"{words}; the cells lie {quality['shift']:.1f} times as far from the reference as its own cells: check"
            " these labels by marker genes before you use them"
        )
    if np.isnan(quality["left_out_found"]):
        return words
    return (
        f"{words} (tested by excluding one label of the reference: {quality['left_out_found']:.0%} of its cells were"
        f" unknown, and {1 - quality['known_kept']:.0%} of the cells of known labels)"
    )


def _quality_picture(target: Path, labels: str) -> Path:
    return target.with_name(f"{target.stem}-{labels.replace('/', '_')}.png")


def _place(atlas: Atlas, mapped: ad.AnnData, config: Config, picture: Path) -> None:
    """Map of the reference, the cells on it, and the picture."""
    settings = config.query
    labels = settings.labels[0] if settings.labels else "cell_type"
    reference = atlas.reference(settings.obs_filter, [labels], settings.umap_cells, config.seed)
    log.info("placing %s cells on a map of %s", f"{mapped.n_obs:,}", f"{reference.n_obs:,}")
    umap = UmapMap(reference.obsm[EMBEDDING], seed=config.seed)
    mapped.obsm[MAP] = umap.place(mapped.obsm[OWN_EMBEDDING])
    named = mapped.obs[f"{labels}_predicted"] if settings.labels else pd.Series("your cells", mapped.obs_names)
    figure = draw_on_reference(umap.positions, reference.obs[labels], mapped.obsm[MAP], named, labels.replace("_", " "))
    figure.savefig(picture, dpi=110, format="png")


def _report(mapped: ad.AnnData, labels: list[str]) -> dict[str, Any]:
    """What became of the genes, and how many cells got which label."""
    return {
        "cells": mapped.n_obs,
        "alignment": mapped.uns["scvi_alignment"],
        "predictions": {
            name: {
                **mapped.uns[PREDICTION][name],
                "cells": {str(k): int(n) for k, n in mapped.obs[f"{name}_predicted"].value_counts().items() if n},
                "mean_probability": float(mapped.obs[f"{name}_probability"].mean()),
            }
            for name in labels
        },
    }


def _write(source: Path, target: Path, mapped: ad.AnnData) -> None:
    """The user's file as it is, with what was found."""
    shutil.copyfile(source, target)
    with h5py.File(target, "r+") as file:
        write_elem(file, "obs", portable_frame(mapped.obs))
        if "obsm" not in file:
            write_elem(file, "obsm", {})
        for name, values in mapped.obsm.items():
            if name in file["obsm"]:
                kept = f"{name}_before"
                log.warning("obsm[%r] of the file is kept as obsm[%r]", name, kept)
                file["obsm"].move(name, kept)
            write_elem(file["obsm"], name, np.asarray(values))
        if "uns" not in file:
            write_elem(file, "uns", {})
        for name in ("scvi_alignment", PREDICTION, "scvi_model"):
            if name in mapped.uns:
                write_elem(file["uns"], name, _storable(mapped.uns[name]))


def _storable(values: Any) -> Any:
    """Lists of text as arrays, which .h5ad files hold."""
    if isinstance(values, Mapping):
        return {name: _storable(value) for name, value in values.items()}
    return np.array(values, dtype=object) if isinstance(values, list) else values


def plan(config: Config) -> Plan:
    """Size from the file; the time is that of two cores."""
    source, target = _paths(config)
    settings = config.query
    with QueryCells(source) as cells:
        n_cells, place = len(cells), cells.find_counts(settings.counts, setting=_COUNTS)
        n_genes = len(cells.var(place))
    return Plan(
        "map-query",
        reads=[
            f"{source}: raw counts from {place}",
            settings.model or f"{config.directory}/",
            f"{_census(config) or 'the Census of the model'}: embedding and labels of up to"
            f" {settings.reference_cells:,} cells",
        ],
        writes=[str(path) for path in (target, *_beside(config, target))],
        cells=n_cells,
        genes=n_genes,
        memory=_BASE_MEMORY + _BYTES_A_CELL * (n_cells + settings.reference_cells),
        disk=source.stat().st_size + 300.0 * n_cells,
        seconds=_FIXED_SECONDS
        + n_cells / _CELLS_A_SECOND
        + _INDEX_SECONDS * (settings.reference_cells > EXACT_CELLS)
        + _MAP_SECONDS * bool(settings.umap_cells),
    )
