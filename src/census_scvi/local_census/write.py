"""Write a local Census (SOMA) from sources, in blocks, completely or not at all."""

import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import tiledbsoma as soma

from census_scvi.census import schema
from census_scvi.census.gene_ids import GeneReport
from census_scvi.errors import UserError
from census_scvi.files.atomic import exchange, sync
from census_scvi.files.partial_folder import OLD, partial_folder
from census_scvi.files.uri import local_path, plain_name, tiledb_place
from census_scvi.local_census.experiment import Repeated, Written, write_experiment
from census_scvi.local_census.info import write_info
from census_scvi.local_census.sources import Source
from census_scvi.workspace.provenance import code_state

log = logging.getLogger(__name__)

# Cells whose counts are in memory at a time. 2,048 cells with 3,000 genes each need a table of 0.12 GB.
BLOCK_ROWS = 2048

# A cell has lost most of its counts if the kept share is below this value.
_MOST = 0.5
# Key of the build record (JSON) in the metadata of the Census.
BUILD = "census_scvi_build"


@dataclass(frozen=True)
class DatasetReport:
    """Summary of one dataset of a build."""

    dataset_id: str
    organism: str
    n_cells: int
    n_primary: int
    genes: GeneReport
    n_lost_most: int = 0  # cells with more than half of their counts in dropped genes
    n_emptied: int = 0  # cells with all counts in dropped genes
    n_proteins: int = 0

    @classmethod
    def of(cls, source: Source) -> "DatasetReport":
        """Create the report of a source whose counts were read."""
        lost, emptied = source.kept_counts < _MOST, source.kept_counts == 0
        n_primary = int(source.obs["is_primary_data"].sum())
        numbers = (len(source.obs), n_primary, source.genes, int(lost.sum()), int(emptied.sum()), len(source.proteins))
        return cls(source.dataset_id, source.organism, *numbers)

    def __str__(self) -> str:
        unique = "" if self.n_primary == self.n_cells else f" ({self.n_primary:,} primary)"
        cells = f"{self.dataset_id} ({self.organism}): {self.n_cells:,} cells{unique}"
        return f"{cells}, {self.genes}{self.losses}{f'; {self.n_proteins:,} proteins' if self.n_proteins else ''}"

    @property
    def losses(self) -> str:
        """Text on cells that lost most of their counts; empty if there are none."""
        if not self.n_lost_most:
            return ""
        return f"; {self.n_lost_most:,} cells lost most of their counts with them, {self.n_emptied:,} lost all"


@dataclass(frozen=True)
class BuildReport:
    """Result of a build: cells, genes and proteins by organism, every dataset, and repeated primary cells."""

    uri: str
    n_cells: dict[str, int]
    n_genes: dict[str, int]
    datasets: tuple[DatasetReport, ...]
    repeated: tuple[Repeated, ...]
    seconds: float
    n_proteins: dict[str, int] = field(default_factory=dict)


def build_census(
    uri: str | Path, sources: Sequence[Source], *, force: bool = False, block_rows: int = BLOCK_ROWS
) -> BuildReport:
    """Write the cells of `sources` as a new Census in the folder `uri`.

    The Census is written to the folder `<uri>.partial` and moved to `uri` when it is complete. A build that fails or
    is killed leaves no partial Census at `uri`. An old Census at `uri` is removed only after the new one was opened
    there. The labels of all cells and the counts of `block_rows` cells are in memory.

    Raises
    ------
    UserError
        `uri` exists and `force` is not set, or is not local; two sources have the same dataset_id; counts are not
        whole numbers of 0 or more; or another build is writing to the same place.
    """
    began = time.monotonic()
    target = check_target(uri, force=force)
    _check_sources(sources)
    with partial_folder(target, "scvi-build-census.py") as partial:
        check_target(uri, force=force)  # again: the lock may have restored the Census of a killed build
        new = partial / "new"
        new.mkdir()
        with plain_name(new) as folder:
            written = _write_census(folder, sources, block_rows)
        _check_census(new, sources)
        _put_in_place(new, target, sources)
    report = BuildReport(
        uri=str(target),
        n_cells={organism: each.n_cells for organism, each in written.items()},
        n_genes={organism: each.n_genes for organism, each in written.items()},
        datasets=tuple(DatasetReport.of(source) for source in sources),
        repeated=tuple(cells for each in written.values() for cells in each.repeated),
        seconds=time.monotonic() - began,
        n_proteins={organism: each.n_proteins for organism, each in written.items() if each.n_proteins},
    )
    _warn(report, sources)
    for organism, each in written.items():
        proteins = f", {each.n_proteins:,} proteins" if each.n_proteins else ""
        log.info("%s: %s cells, %s genes%s in all", organism, f"{each.n_cells:,}", f"{each.n_genes:,}", proteins)
    log.info("%s written in %.1f s", target, report.seconds)
    return report


def _warn(report: BuildReport, sources: Sequence[Source]) -> None:
    """Warn about probable mistakes in the contents of the Census."""
    for dataset, source in zip(report.datasets, sources, strict=True):
        if dataset.n_lost_most:
            log.warning(
                "%s: %s of %s cells lost more than half of their counts with excluded genes, %s of them all;"
                " the first is cell %d. If they are of another organism, remove them from the file",
                dataset.dataset_id,
                f"{dataset.n_lost_most:,}",
                f"{dataset.n_cells:,}",
                f"{dataset.n_emptied:,}",
                int(np.argmax(source.kept_counts < _MOST)) + 1,
            )
    for repeated in report.repeated:
        log.warning(
            "%s: the same cells twice? They would be trained on twice; keep one copy, or set is_primary_data: false in"
            " the values of a dataset",
            repeated,
        )


def check_target(uri: str | Path, *, force: bool) -> Path:
    """The target folder; UserError unless it is free, or holds a Census and `force` is set."""
    path = local_path(str(uri))
    if path is None:
        raise UserError(f"{uri}: a Census can only be built in a local folder; build it there and copy the folder")
    target = Path(tiledb_place(str(path), "uri"))
    try:
        target = target.resolve() if target.is_symlink() else target
        if not target.exists():
            return target
        is_census = (target / "__group").is_dir() and (target / "census_data").is_dir()
    except (OSError, RuntimeError) as error:
        raise UserError(f"{uri}: it cannot be written there ({error})") from None
    if not force:
        raise UserError(f"{uri} exists; choose another uri, or replace it with --force")
    if not is_census:
        raise UserError(
            f"{uri} exists and is not a Census: it is not replaced; remove it yourself or choose another uri"
        )
    return target


def _check_sources(sources: Sequence[Source]) -> None:
    if not sources:
        raise UserError("no datasets to build a Census from")
    ids = pd.Series([source.dataset_id for source in sources])
    if ids.duplicated().any():
        twice = ids[ids.duplicated()].iloc[0]
        raise UserError(f"dataset_id {twice!r} is used more than once; every dataset needs its own")
    given = [s.obs["observation_joinid"] for s in sources if "observation_joinid" in s.obs]
    if given and pd.concat(given).duplicated().any():
        raise UserError("observation_joinid is not unique over the datasets; remove it, and it is generated")
    for source in sources:
        if source.organism not in schema.ORGANISMS:
            raise UserError(f"organism {source.organism!r} is not one of {', '.join(schema.ORGANISMS)}")


def _write_census(partial: Path, sources: Sequence[Source], block_rows: int) -> dict[str, Written]:
    """Write all parts of the Census; return what was written of each organism."""
    written = {}
    with soma.Collection.create(str(partial / "census_data")) as census_data:
        for organism in schema.ORGANISMS:
            chosen = [(number, source) for number, source in enumerate(sources) if source.organism == organism]
            if not chosen:
                continue
            written[organism] = write_experiment(
                census_data, organism, chosen, n_datasets=len(sources), rows=block_rows
            )
    with soma.Collection.create(str(partial / "census_info")) as info:
        write_info(info, sources)
    _write_root(partial, _record(sources, [cells for each in written.values() for cells in each.repeated]))
    return written


def _record(sources: Sequence[Source], repeated: Sequence[Repeated]) -> str:
    """Record of the build as JSON, stored in the metadata of the Census."""
    datasets = [{"file": Path(source.path).name, **asdict(DatasetReport.of(source))} for source in sources]
    return json.dumps({"datasets": datasets, "repeated": [asdict(cells) for cells in repeated]})


def _write_root(partial: Path, record: str) -> None:
    """Write the root last: without it, the folder cannot be opened as a Census."""
    with soma.Collection.create(str(partial)) as root:
        for name in ("census_info", "census_data"):
            with soma.Collection.open(str(partial / name), "w") as member:
                root.set(name, member, use_relative_uri=True)
        root.metadata["created_on"] = datetime.now(UTC).isoformat(timespec="seconds")
        root.metadata["git_commit_sha"] = code_state().get("commit", "na")
        root.metadata[BUILD] = record


def _check_census(folder: Path, sources: Sequence[Source]) -> None:
    """Open the written Census as a user does, and check its sizes."""
    with soma.open(str(folder)) as root:
        for organism in {source.organism for source in sources}:
            experiment = root["census_data"][organism]
            n_obs = sum(len(source.obs) for source in sources if source.organism == organism)
            layers = experiment.ms["RNA"].X
            if experiment.obs.count != n_obs or layers["raw"].nnz != layers["normalized"].nnz:
                raise RuntimeError(
                    f"{folder}: {organism} has {experiment.obs.count} of {n_obs} cells, "
                    f"{layers['raw'].nnz} raw and {layers['normalized'].nnz} normalized values"
                )


def _put_in_place(new: Path, target: Path, sources: Sequence[Source]) -> None:
    """Move the new Census to the target; restore the old one if the new one cannot be read there."""
    # A Census has about a thousand small files: one sync for all is a hundred times faster than one per file.
    os.sync()
    old = new.with_name(OLD)
    _swap(new, target, old)
    try:
        sync(target.parent)
        _check_census(target, sources)
    except BaseException:
        target.rename(new)
        if old.exists():
            old.rename(target)
        raise


def _swap(new: Path, target: Path, old: Path) -> None:
    """Rename `target` to `old` and `new` to `target`, in one step if the file system supports it."""
    if not target.exists():
        new.rename(target)
    elif exchange(new, target):
        new.rename(old)
    else:
        target.rename(old)
        try:
            new.rename(target)
        except OSError:
            old.rename(target)
            raise
