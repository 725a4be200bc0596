"""Verification of a published embedding: a chain of checks from the embedding back to the counts."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np

from census_scvi.census.cells import Cells, select_cells
from census_scvi.census.embedding import EmbeddingHash, publication_of, published_uri, read_cells, read_embedding
from census_scvi.census.genes import locate_genes
from census_scvi.census.open import Census, open_census
from census_scvi.census.precision import BFLOAT16, rounded
from census_scvi.census.settings import CensusSection
from census_scvi.config.renamed import translate_recorded_config
from census_scvi.config.run_names import PROTEINS
from census_scvi.config.types import Precision
from census_scvi.counts.row_hash import count_hashes
from census_scvi.errors import UserError
from census_scvi.files.paths import expand_argument
from census_scvi.files.place import resolved
from census_scvi.files.uri import local_path, tiledb_place
from census_scvi.model.encode import reference_latent
from census_scvi.model.facts import built_facts
from census_scvi.model.published import damaged_files, fetch, read_provenance, seal_of
from census_scvi.model.safe import load_safe, read_description
from census_scvi.publication.gates import NO_MODEL, WITHOUT_MODEL, architecture, broken_verdicts, re_embedding
from census_scvi.publication.own_array import seal_in
from census_scvi.publication.sample import draw_rows, read_sample
from census_scvi.publication.sealed import COUNT_HASH, SEALED_EMBEDDING, read_sealed
from census_scvi.publication.settings import GatesSection
from census_scvi.publication.summary import provenance_of

# Gates that every record contains, whichever version wrote it.
_ALWAYS = (
    "cells", "finite", "variance", "duplicate_dimensions", "effective_rank", "genes", "counts", "architecture",
    "re_embedding", "order", "active_units",
)  # fmt: skip
_MAX_DIFFERENCE = GatesSection().max_difference
# Key of the recorded config that records of earlier versions lack.
_MEASUREMENT = "protein_measurement"


@dataclass(frozen=True)
class Link:
    """Result of one check of the chain: valid or not, and the finding."""

    name: str
    valid: bool
    finding: str


def verify(published: str, census: str | None = None, *, n_cells: int = 500, seed: int | None = None) -> list[Link]:
    """Check every link of the chain.

    Parameters
    ----------
    published
        Folder or URL of the model that was published with the embedding.
    census
        URI of the Census that holds the embedding; None: check only the folder.
    n_cells
        Number of cells to read again from the Census.
    seed
        Seed of that sample; None: a new random sample on each call.

    Returns
    -------
    The links in order. Links that depend on a broken one may be missing. Without a Census, the links only show that
    the folder is consistent: a forgery of all files together, including model and cells, is not detected.

    Raises
    ------
    UserError
        The published folder or the Census does not exist, or `n_cells` or `seed` is negative.
    """
    if n_cells < 1 or (seed is not None and seed < 0):
        raise UserError(f"--sample is {n_cells} and --seed {seed}; expected 1 or more cells, and a seed of 0 or more")
    published = expand_argument(published, "PUBLISHED")
    census = None if census is None else expand_argument(census, "--census")
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = fetch(published, Path(scratch))  # not from the cache: the published files themselves are checked
        try:
            record = read_provenance(folder)
        except UserError as error:
            return [Link("provenance", False, str(error))]
        by = f" by {record['published_by']}" if record["published_by"] else ""
        words = f"published {record['published_on']}{by}, publication {record['publication']}"
        links = [Link("provenance", True, words)]
        offline = _Folder(folder, record)
        of_model = (offline.model, offline.sealed_counts, offline.sealed_embedding) if offline.has_model else ()
        for look in (offline.files, *of_model, offline.gates):
            links.append(_looked_at(look))
        if census is None:
            return links
        section = CensusSection(uri=census, organism=record["census"]["organism"])
        try:
            opened = stack.enter_context(open_census(section))
        except UserError:
            raise
        except Exception as error:
            return [*links, _damaged("census", error)]
        online = _InCensus(offline, opened, n_cells, seed)
        links.append(_looked_at(online.census))
        if links[-1].valid:  # in another Census, the same soma_joinids refer to other cells
            arrays = (*([online.embedding] if online.in_obsm else []), *([online.array] if online.has_array else []))
            again = (online.sealed_cells, online.fresh_sample) if offline.has_model else ()
            links += [_looked_at(look) for look in (online.publication, *arrays, *again)]
        return links


def _looked_at(look: Callable[[], tuple[bool, str]]) -> Link:
    """Run one check; a check that raises an error is a broken link."""
    try:
        return Link(look.__name__, *look())
    except UserError as error:
        return Link(look.__name__, False, str(error))
    except Exception as error:
        return _damaged(look.__name__, error)


def _damaged(name: str, error: Exception) -> Link:
    """A broken link for an error; libraries raise many kinds of errors on damaged or forged files."""
    reason = str(error).strip().partition("\n")[0]
    return Link(name, False, f"cannot be checked ({type(error).__name__}: {reason})")


class _Folder:
    """The links that need only the published folder; each method returns (valid, finding)."""

    def __init__(self, folder: Path, record: dict[str, Any]) -> None:
        self.path, self.record = folder, record
        self.has_model = record["model"] is not None

    def files(self) -> tuple[bool, str]:
        """The files are the ones that were published."""
        wrong = damaged_files(self.path, self.record)
        return not wrong, "; ".join(wrong) or f"{len(self.record['files'])} files, unchanged"

    def model(self) -> tuple[bool, str]:
        """The model is built as recorded in its provenance."""
        model, description = load_safe(self.path)
        stated = {name: value for name, value in self.record["model"].items() if name not in ("sha256", "uri")}
        gate = architecture(stated, built_facts(model, description.genes))
        return gate.passed, gate.detail

    def sealed_counts(self) -> tuple[bool, str]:
        """The counts of the sealed cells match their sealed hashes."""
        cells = self.sealed()
        hashes = count_hashes(cells.X, cells.obsm.get(PROTEINS))
        wrong = int((hashes != cells.obs[COUNT_HASH].to_numpy()).sum())
        return not wrong, f"{wrong:,} of {cells.n_obs:,} sealed cells have changed counts"

    def sealed_embedding(self) -> tuple[bool, str]:
        """scvi-tools reproduces the published embedding of the sealed cells."""
        cells = self.sealed()
        return self.re_embedded(cells, cells.obsm[SEALED_EMBEDDING])

    def gates(self) -> tuple[bool, str]:
        """The gates were passed, or waived with a reason."""
        found = self.record["gates"]["gates"]
        names, most = (_ALWAYS, _MAX_DIFFERENCE) if self.has_model else (WITHOUT_MODEL, math.inf)
        wrong = broken_verdicts(self.record["gates"], names, most)
        waived = [f"{gate['name']} ({gate['waived']})" for gate in found if "waived" in gate]
        words = f"{len(found)} gates" + (f", waived: {', '.join(waived)}" if waived else "")
        words += "" if self.has_model else f"; of the model: {NO_MODEL}"
        return not wrong, "; ".join(wrong) or words

    def sealed(self) -> ad.AnnData:
        """The sealed sample."""
        model, n_latent = self.record["model"], self.record["embedding"]["n_features"]
        return read_sealed(self.path, model["genes"], n_latent, model.get("n_proteins", 0))

    def re_embedded(self, cells: ad.AnnData, published: Any, precision: Precision = "float32") -> tuple[bool, str]:
        """The published model reproduces the published embedding of cells, but for the rounding to `precision`.

        Their obs has soma_joinid and batch; of a model with proteins, their obsm has the protein counts.
        """
        model, description = load_safe(self.path)
        if description.arguments["encode_covariates"]:  # scvi-tools has random weights for batches outside training
            trained = cells.obs["batch"].isin(description.batches).to_numpy()
            cells, published = cells[trained], published[trained]
        batches = cells.obs["batch"].to_numpy(dtype=object)
        proteins = np.asarray(cells.obsm[PROTEINS]) if description.proteins else None
        mean, _ = reference_latent(model, description.genes, cells.X, batches, proteins)
        # The record is untrusted: a forged one could allow any difference.
        bound = min(float(translate_recorded_config(self.record["config"])["gates"]["max_difference"]), _MAX_DIFFERENCE)
        published = np.asarray(published)
        if precision == "bfloat16":
            published = np.where(np.abs(published - mean) <= BFLOAT16 * np.abs(mean), mean, published)
        gate = re_embedding(cells.obs["soma_joinid"].to_numpy(), published, mean, bound)
        words = f"{len(mean):,} cells, largest difference to scvi-tools' own {gate.value:.1e}"
        return gate.passed, words if gate.passed else gate.detail


class _InCensus:
    """The links that need the Census."""

    def __init__(self, folder: _Folder, census: Census, n_cells: int, seed: int | None) -> None:
        self._folder, self._census, self._record = folder, census, folder.record
        self._n_cells = n_cells
        self._seed = int(np.random.default_rng().integers(2**31)) if seed is None else seed
        self._name = str(self._record["embedding"]["name"])
        self._array: dict[str, Any] = self._record["embedding"].get("array") or {}
        self.has_array = bool(self._array)
        # An embedding that is an array of its own, and not in obsm, has no Experiment in its record.
        self.in_obsm = not self.has_array or self._record["embedding"]["experiment_uri"] is not None

    def census(self) -> tuple[bool, str]:
        """The Census is the one that the embedding was computed from."""
        stated, found = self._record["census"], self._census.identity
        names = ("schema", "created_on", "organism", "cells")
        differing = [
            f"{name} is {found[name]}, expected {stated[name]}" for name in names if stated[name] != found[name]
        ]
        return not differing, "; ".join(differing) or f"{found['cells']:,} cells, created on {found['created_on']}"

    def publication(self) -> tuple[bool, str]:
        """The Experiment names this publication, with this provenance."""
        publication = self._record["publication"]
        live = publication_of(self._embedding_uri())
        if live != publication:
            return False, f"the Census has publication {live}, this folder {publication}"
        if not self.in_obsm:
            same = seal_in(self._embedding_uri()) == seal_of(self._record)
            return same, "its seal is in the array" if same else "the array has the seal of another provenance"
        stated = provenance_of(self._experiment_uri(), publication)
        stated.pop("seal", None)
        same = json.dumps(stated, sort_keys=True) == json.dumps(self._record, sort_keys=True)
        return same, "as in scvi_summary" if same else "scvi_summary has another provenance of this publication"

    def embedding(self) -> tuple[bool, str]:
        """Every value of the embedding in obsm is the published one."""
        return self._values(self._in_obsm(), self._record["embedding"]["sha256"])

    def array(self) -> tuple[bool, str]:
        """Every value of the array of its own is the published one."""
        return self._values(self._own_array(), self._array["sha256"])

    def _values(self, uri: str, expected: str) -> tuple[bool, str]:
        digest, found = EmbeddingHash(), [np.empty(0, np.int64)]
        for joinids, values in read_embedding(uri):
            digest.update(joinids, values)
            found.append(joinids)
        cells, n_cells = np.concatenate(found), self._record["embedding"]["n_cells"]
        wrong = []
        if digest.hexdigest() != expected:
            wrong.append("their hash differs from that of the published ones")
        if len(cells) != n_cells:
            wrong.append(f"the record says {n_cells:,}")
        if not np.array_equal(cells, self._cells().joinids):
            wrong.append("they are not the cells that match the recorded query")
        return not wrong, "; ".join([f"{len(cells):,} cells", *wrong])

    def sealed_cells(self) -> tuple[bool, str]:
        """The embedding of the sealed cells in the Census equals their sealed embedding."""
        cells = self._folder.sealed()
        published = read_cells(self._embedding_uri(), cells.obs["soma_joinid"].to_numpy())
        sealed = rounded(np.asarray(cells.obsm[SEALED_EMBEDDING]), self._precision)
        wrong = int((published != sealed).any(axis=1).sum())
        return not wrong, f"{wrong:,} of {cells.n_obs:,} sealed cells have another embedding in the Census"

    def fresh_sample(self) -> tuple[bool, str]:
        """The model reproduces the published embedding of random cells that are read again from the Census."""
        cells, genes = self._cells(), self._record["model"]["genes"]
        rows = draw_rows(len(cells), self._n_cells, self._seed)
        proteins, measurement = read_description(self._folder.path).proteins, self._config["anndata"].get(_MEASUREMENT)
        places = locate_genes(self._census, genes, 0.0)
        sample = read_sample(self._census, cells, rows, genes, places, proteins, measurement)
        obsm = {} if sample.proteins is None else {PROTEINS: sample.proteins}
        obs = sample.obs[["soma_joinid", "batch"]].set_axis(sample.joinids.astype(str))
        published = read_cells(self._embedding_uri(), sample.joinids)
        cells_again = ad.AnnData(sample.counts, obs=obs, obsm=obsm)
        valid, words = self._folder.re_embedded(cells_again, published, self._precision)
        return valid, f"{words} (--seed {self._seed})"

    @property
    def _config(self) -> dict[str, Any]:
        return dict(translate_recorded_config(self._record["config"]))

    def _cells(self) -> Cells:
        config = self._config
        return select_cells(self._census, config["census"]["obs_query"], config["anndata"]["batch_key"])

    def _experiment_uri(self) -> str:
        """URI of this Census' Experiment; if it lacks the embedding, of the recorded Experiment if that exists."""
        here = str(self._census.experiment.uri)
        there = resolved(self._record["embedding"]["experiment_uri"], self._folder.path)
        path = None if there is None else local_path(there)
        gone = there is None or (path is not None and not path.exists())
        return here if gone or published_uri(here, self._name) else str(there)

    @property
    def _precision(self) -> Precision:
        """Of the values that are compared."""
        return "float32" if self.in_obsm else self._array["precision"]

    def _embedding_uri(self) -> str:
        """The published values: in obsm, or else in an array of their own."""
        return self._in_obsm() if self.in_obsm else self._own_array()

    def _own_array(self) -> str:
        uri = resolved(self._array["uri"], self._folder.path)
        if uri is None:
            raise UserError("the record does not say where the array is")
        return tiledb_place(uri, "the array")

    def _in_obsm(self) -> str:
        experiment = self._experiment_uri()
        uri = published_uri(experiment, self._name)
        if uri is None:
            raise UserError(f"{experiment} has no obsm[{self._name!r}]")
        return uri
