"""Make runs.tar.xz: what commit ab837ae of this project wrote, which later versions still read.

    git worktree add --detach /tmp/ab837ae ab837ae
    python tests/data/ab837ae/make.py /tmp/ab837ae tests/data/ab837ae/runs.tar.xz

The code of that commit makes all of it, on simulated cells; nothing is written by this script itself but the config.

- config.yaml: every setting that the commit knows, most of them with a value that is not the default
- census/: the Census, with the published embedding in its obsm. Its cells have every 2,048th soma_joinid: each lies in
  a row of tiles of its own, as if it were one of 2,048 cells, and a few hundred of them fill several parts of prepare
- finished/: all stages, publish included
- training-killed/: training was killed in the middle of an epoch, after a checkpoint in that epoch
- embedding-killed/: create-latent-update was killed when three of its blocks of 64 cells were written
- prepare-killed/: prepare was killed while it wrote its second part; the first is there

What identifies a Census includes its absolute path. It is `/proc/self/cwd/census` here, which is the Census next to
the runs wherever they are unpacked, as long as the stages run in that folder.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

SETTINGS = {
    "census": {
        "uri": "/proc/self/cwd/census",
        "obs_query": "nnz >= 10",
        "obs_query_model": "is_primary_data == True and nnz >= 40",
    },
    "hvg": {"top_n_hvg": 100, "hvg_batch": ["assay"], "min_genes": 30},
    "anndata": {"batch_key": ["dataset_id", "donor_id"], "obs_columns": ["dataset_id", "cell_type", "nnz"]},
    "genes": {"min_share": 0.9},
    "model": {"n_hidden": 16, "n_latent": 4, "dropout_rate": 0.05},
    "train": {
        "max_epochs": 20, "batch_size": 32, "train_size": 0.8, "early_stopping": True, "num_workers": 0,
        "accelerator": "cpu", "checkpoint_minutes": 0.0, "trainer": {"gradient_clip_val": 1000.0},
    },
    "training_plan": {"lr": 5e-3, "n_epochs_kl_warmup": 5, "max_kl_weight": 0.9},
    "latent": {"block_size": 64, "minified": "sample", "sample_size": 100},
    "gates": {
        "sample_size": 80, "max_difference": 2e-5, "min_variance": 2e-6, "min_active_units": 0.2,
        "max_correlation": 0.98, "min_effective_rank": 1.5, "label": "cell_type_ontology_term_id",
        "waived": {"active_units": "a small model"},
    },
    "publish": {
        "name": "small", "title": "Embedding of simulated cells", "description": "Test data", "license": "CC0",
        "doi": "10.1000/1", "contact": {"name": "A", "email": "a@example.org", "affiliation": "B"},
    },
    "query": {
        "file": "cells.h5ad", "output": "mapped.h5ad", "model": "finished", "embedding": "finished", "counts": "X",
        "labels": ["cell_type"], "obs_filter": "is_primary_data == True", "reference_cells": 200,
        "method": "neighbours", "n_neighbours": 7, "baseline_cells": 100, "umap_cells": 150,
    },
    "evaluate": {
        "embeddings": {"trained": "finished"}, "obs_filter": "nnz >= 20", "batches": ["batch"], "mode": "sound",
        "max_cells": 300, "measured_cells": 200, "baseline": False, "folder": "evaluation",
    },
    "seed": 3,
}  # fmt: skip

# The Census: the commit's own builder, with soma_joinids that are spread out.
BUILD = """
import pyarrow as pa
from census_scvi.census.build import experiment, schema
from census_scvi.census.build.census import build_census
from census_scvi.census.demo.cells import demo_sources

SPREAD = schema.X_TILE
new_layer, write_table, obs_tables = experiment._new_layer, experiment.write_table, experiment._obs_tables

class Spread:
    def __init__(self, layer):
        self.layer, self.close = layer, layer.close
    def write(self, table, **options):
        table = table.set_column(0, "soma_dim_0", pa.array(table["soma_dim_0"].to_numpy() * SPREAD))
        self.layer.write(table.sort_by([("soma_dim_0", "ascending"), ("soma_dim_1", "ascending")]))

experiment._new_layer = lambda layers, name, shape: Spread(new_layer(layers, name, (shape[0] * SPREAD, shape[1])))
experiment.write_table = lambda parent, name, kind, length, tables: write_table(
    parent, name, kind, length * SPREAD if name == "obs" else length, tables
)
experiment._obs_tables = lambda *given: (
    table.assign(soma_joinid=table["soma_joinid"] * SPREAD) for table in obs_tables(*given)
)
sources = demo_sources(seed=0, scale=0.05, n_genes=150)
build_census("census", [source for source in sources if source.organism == "homo_sapiens"])
"""
CONFIG = """
import json, yaml
from census_scvi.settings import Config
yaml.safe_dump(Config.model_validate_json(sys.argv[1]).model_dump(mode="json"), open("config.yaml", "w"))
"""
KILL = """
import os, signal
import {module} as module
left = [{after}]
real = module.{name}
def dying(*a, **k):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*a, **k)
module.{name} = dying
"""
STAGE = "from census_scvi.cli import main; sys.exit(main(sys.argv[1], ['--config', 'config.yaml', *sys.argv[2:]]))"
# After two steps of the seventh epoch, of 7 steps each; the first part has 12 pools.
IN_AN_EPOCH = KILL.format(module="census_scvi.model.finite_loss", name="FiniteLoss.on_train_batch_end", after=6 * 7 + 3)
IN_THE_SECOND_PART = KILL.format(module="census_scvi.counts.writer", name="H5adWriter.append", after=12 + 3)
IN_THE_FOURTH_BLOCK = KILL.format(module="census_scvi.stages.latent_store", name="LatentStore.append", after=4)
# Locks and the names of log files say on which machine it was.
LEFT_OUT = (".lock", ".scvi-publish.lock", "tb_logs")


def main(checkout: Path, archive: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def python(code: str, *arguments: str, killed: bool = False) -> None:
            environment = os.environ | {"PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                [sys.executable, "-c", f"import sys\n{code}", *arguments], cwd=folder, env=environment, check=False
            )
            assert done.returncode == (-signal.SIGKILL if killed else 0), (code, done)

        python(BUILD)
        python(CONFIG, json.dumps(SETTINGS))
        for stage in ("prepare", "train"):
            python(STAGE, stage, "output.directory=finished")
        shutil.copytree(folder / "finished", folder / "embedding-killed")
        for stage in ("create-latent-update", "publish"):
            python(STAGE, stage, "output.directory=finished")
        embed = IN_THE_FOURTH_BLOCK + STAGE
        python(embed, "create-latent-update", "output.directory=embedding-killed", killed=True)
        python(STAGE, "prepare", "output.directory=training-killed")
        python(IN_AN_EPOCH + STAGE, "train", "output.directory=training-killed", killed=True)
        python(IN_THE_SECOND_PART + STAGE, "prepare", "output.directory=prepare-killed", killed=True)
        with tarfile.open(archive, "w:xz", preset=9) as tar:
            for member in (
                "config.yaml",
                "census",
                "finished",
                "embedding-killed",
                "training-killed",
                "prepare-killed",
            ):
                tar.add(folder / member, member, filter=_anonymous)


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    if Path(member.name).name in LEFT_OUT:
        return None
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), Path(sys.argv[2]).absolute())
