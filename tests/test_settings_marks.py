"""The marks on settings: whose result each of them changes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pytest

from census_scvi.config.section import Changes, Section, settings_of, stages_changed
from census_scvi.config.stages import STAGES
from census_scvi.settings import Config, load_config

ROOT = Path(__file__).parents[1]

# Run directories hold fingerprints of exactly these settings: another list, and a finished run would not be done.
SETTINGS_OF_STAGES = {
    "prepare": (
        "census", "hvg", "genes.min_cells", "anndata", "seed", "fine_tune.model", "fine_tune.mode",
        "fine_tune.replay_cells", "fine_tune.held_out",
    ),
    "train": (
        "census.organism", "anndata", "model", "training_plan", "seed",
        "train.max_epochs", "train.batch_size", "train.n_samples_per_label", "train.train_size", "train.held_out",
        "train.split_seed", "train.max_cells", "train.early_stopping", "train.multi_gpu",
        "train.devices", "train.num_nodes", "train.precision", "train.trainer",
        "fine_tune.model", "fine_tune.mode", "fine_tune.decoder", "fine_tune.lr", "fine_tune.max_epochs",
        "fine_tune.patience",
    ),
    "create-latent-update": (
        "census", "anndata.batch_key", "anndata.protein_measurement", "genes", "model.filename", "latent", "seed",
    ),
    "publish": (
        "census", "anndata.batch_key", "genes", "gates", "publish", "seed",
        "model.filename", "model.kind", "model.n_hidden", "model.n_latent", "model.n_layers", "model.dropout_rate",
        "model.gene_likelihood", "model.encode_covariates", "model.arguments",
    ),
    "index": (
        "index.metrics", "index.partitions", "index.nprobe", "index.min_recall", "index.measured_cells", "seed",
    ),
    "import-embedding": ("census.obs_query", "import_embedding.method"),
    "evaluate": (
        "census.organism", "census.uri", "census.version", "hvg.top_n_hvg", "anndata.batch_key", "seed",
        "evaluate.embeddings", "evaluate.obs_filter", "evaluate.labels", "evaluate.batches", "evaluate.donors",
        "evaluate.max_cells", "evaluate.measured_cells", "evaluate.baseline",
    ),
    "compare-releases": (
        "seed", "evaluate.labels", "evaluate.batches", "evaluate.donors", "evaluate.measured_cells",
        "compare_releases.old", "compare_releases.new", "compare_releases.old_census", "compare_releases.new_census",
        "compare_releases.label", "compare_releases.by", "compare_releases.sampled_cells",
    ),
    "annotate": (
        "census.organism", "census.uri", "census.version", "seed", "query.file", "query.model",
        "query.counts", "query.values", "query.min_share", "query.batch_key",
        "query.labels", "query.split_labels",
        "annotate.method", "annotate.preset", "annotate.overrides", "annotate.budget",
        "annotate.reference", "annotate.key_added", "annotate.model",
    ),
    "search": (
        "census", "hvg", "genes.min_cells", "anndata", "seed", "model", "training_plan",
        "fine_tune.model", "fine_tune.mode", "fine_tune.replay_cells", "fine_tune.held_out", "fine_tune.decoder",
        "fine_tune.lr", "fine_tune.max_epochs", "fine_tune.patience",
        "train.max_epochs", "train.batch_size", "train.n_samples_per_label", "train.train_size", "train.held_out",
        "train.split_seed", "train.max_cells", "train.early_stopping", "train.multi_gpu", "train.devices",
        "train.num_nodes", "train.precision", "train.trainer",
        "search.space", "search.trials", "search.seeds", "search.max_epochs", "search.max_cells", "search.metric",
        "search.searcher", "search.scheduler", "search.grace_epochs", "search.final_seeds",
        "evaluate.labels", "evaluate.batches", "evaluate.donors", "evaluate.measured_cells",
    ),
    "map-query": (
        "census.organism", "census.uri", "census.version", "genes.min_share", "seed",
        "query.file", "query.model", "query.embedding", "query.counts", "query.values", "query.min_share",
        "query.batch_key", "query.labels", "query.split_labels", "query.vectors", "query.obs_filter",
        "query.reference_cells", "query.baseline_cells",
        "query.umap_cells", "query.surgery", "query.surgery_training", "query.proteins",
        "annotate.method", "annotate.preset", "annotate.overrides", "annotate.budget",
    ),
}  # fmt: skip
MAPPINGS = [
    "train.trainer={gradient_clip_val: 1.0}",
    "gates.waived={order: copies}",
    "census.tiledb={vfs.s3.region: x}",
]


@pytest.mark.parametrize("overrides", [[], MAPPINGS], ids=["mappings left out", "mappings filled"])
@pytest.mark.parametrize("stage", SETTINGS_OF_STAGES)
def test_a_stage_depends_on_exactly_these_settings(stage: str, overrides: list[str]) -> None:
    config = load_config(ROOT / "scvi-config.yaml", overrides)
    assert config.of_stage(stage) == config.select(SETTINGS_OF_STAGES[stage])
    assert Config().of_stage(stage) == Config().select(SETTINGS_OF_STAGES[stage])


def test_marks_name_commands() -> None:
    marked = {stage for _, stages in stages_changed(Config) for stage in stages}
    assert marked == set(SETTINGS_OF_STAGES) <= set(STAGES)


def test_a_setting_without_a_mark_changes_what_its_section_changes() -> None:
    class Inner(Section):
        changes: ClassVar[tuple[str, ...]] = ("train", "publish")
        new: int = 1
        how: Annotated[int | None, Changes()] = 2
        other: Annotated[str, Changes("prepare")] = "x"

    class Extended(Config):
        inner: Inner = Inner()

    def added(stage: str) -> dict[str, Any]:
        extended = Extended().of_stage(stage)
        assert {**extended, **Config().of_stage(stage)} == extended
        return {key: value for key, value in extended.items() if key.startswith("inner.")}

    assert added("train") == added("publish") == {"inner.new": 1}
    assert added("prepare") == {"inner.other": "x"}
    assert added("evaluate") == {}


def test_a_new_section_must_say_what_it_changes() -> None:
    class Silent(Section):
        new: int = 1

    class Extended(Config):
        silent: Silent = Silent()

    with pytest.raises(AttributeError, match="changes"):
        Extended().of_stage("train")


def test_sections_are_with_their_rooms_and_import_nothing_heavy() -> None:
    package = ROOT / "src/census_scvi"
    modules = {f"census_scvi.{path.parent.name}.settings" for path in package.glob("*/settings.py")}
    owners = {section.__module__ for _, _, section in settings_of(Config)} - {Config.__module__}
    modules.add("census_scvi.query.surgery.settings")  # a section within query
    assert owners == modules - {"census_scvi.local_census.settings"}  # of another file
    code = f"import sys, {', '.join(sorted(owners))}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "scvi", "lightning", "tiledbsoma", "numpy", "pandas", "anndata", "h5py", "scanpy"}
    assert not heavy & set(done.stdout.split())
