"""Make models.tar.xz: small models that scvi-tools 0.14.6 to 1.5.1 saved, and the latents that they computed.

    for version in 0.14.6 0.20.3 1.0.4 1.1.6 1.2.2 1.3.3 1.5.1; do
        pip install --no-deps --ignore-requires-python --target versions/$version scvi-tools==$version
    done
    pip install --no-deps --target versions/extra flax optax numpyro ml-collections pooch absl-py msgpack etils \
        platformdirs multipledispatch treescope orbax-checkpoint humanize tensorstore nest_asyncio contextlib2
    python tests/data/scvi-tools/make.py versions tests/data/scvi-tools/models.tar.xz

Each version runs on the installed libraries (Python 3.11, torch 2.13, anndata 0.12), which are newer than it: names
that these libraries have moved since are put back below. Where a version's training does not run with them, the saved
weights are initial ones, and the running means and variances of BatchNorm are random numbers.

- cells.h5ad: the cells, with obs donor and type, and proteins in obsm; a protein is not measured in the second donor
- VERSION/KIND/: what `model.save` wrote
- VERSION/latents.npz: `get_latent_representation` of SCVI, SCANVI and TOTALVI, and `predict(soft=True)` of SCANVI
"""

import os
import subprocess
import sys
import tarfile
import tempfile
import types
import warnings
from pathlib import Path

VERSIONS = ("0.14.6", "0.20.3", "1.0.4", "1.1.6", "1.2.2", "1.3.3", "1.5.1")


def make(versions: Path, archive: Path) -> None:
    """Run each version in a process of its own, and pack what they wrote."""
    with tempfile.TemporaryDirectory() as folder:
        for version in VERSIONS:
            path = os.pathsep.join(map(str, (versions / version, versions / "extra")))
            command = [sys.executable, "-W", "ignore", __file__, folder, version]
            subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path})
        with tarfile.open(archive, "w:xz") as file:
            for path in sorted(Path(folder).iterdir()):
                file.add(path, path.name)


def put_back_names() -> None:
    """Names that the old versions import, where the installed libraries have moved or removed them."""
    import anndata
    import anndata._core.sparse_dataset as sparse
    import jax
    import pytorch_lightning
    import pytorch_lightning.callbacks
    import pytorch_lightning.loggers
    import pytorch_lightning.utilities.seed
    import torch.optim.lr_scheduler

    names = (
        (anndata, "read", anndata.read_h5ad),
        (sparse, "SparseDataset", sparse.BaseCompressedSparseDataset),
        (pytorch_lightning.callbacks, "ProgressBarBase", pytorch_lightning.callbacks.ProgressBar),
        (pytorch_lightning.loggers, "LightningLoggerBase", pytorch_lightning.loggers.Logger),
        (pytorch_lightning.utilities.seed, "seed_everything", pytorch_lightning.seed_everything),
    )
    for module, name, value in names:
        if name not in vars(module):
            setattr(module, name, value)
    sys.modules["jaxlib.xla_extension"] = types.ModuleType("jaxlib.xla_extension")
    sys.modules["jaxlib.xla_extension"].Device = jax.Device

    class Plateau(torch.optim.lr_scheduler.ReduceLROnPlateau):
        def __init__(self, *args: object, verbose: object = None, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)

    torch.optim.lr_scheduler.ReduceLROnPlateau = Plateau


def make_cells():
    """90 cells of two donors, 20 genes, 4 proteins, two types and cells without one."""
    import anndata as ad
    import numpy as np
    import pandas as pd
    import scipy.sparse as sp

    random = np.random.default_rng(0)
    kinds = np.arange(90) % 3
    counts = random.poisson(random.gamma(2, 2, (3, 20))[kinds]).astype(np.float32)
    proteins = random.poisson(random.gamma(2, 10, (3, 4))[kinds]).astype(np.float32)
    donor = np.array(["d1", "d2"])[np.arange(90) // 45]
    proteins[donor == "d2", 3] = 0
    obs = pd.DataFrame(
        {
            "donor": pd.Categorical(donor),
            "type": pd.Categorical(np.array(["T cell", "B cell", "unassigned"])[kinds]),
        },
        index=[f"c{number}" for number in range(90)],
    )
    cells = ad.AnnData(sp.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=[f"ENSG{n:011d}" for n in range(1, 21)]))
    cells.obsm["protein"] = pd.DataFrame(proteins, index=obs.index, columns=["CD3", "CD4", "CD8", "CD19"])
    return cells


def save_models(folder: Path, version: str) -> None:
    """Train and save a model of each kind with one version of scvi-tools."""
    warnings.simplefilter("ignore")
    put_back_names()
    import numpy as np
    import scvi
    import torch

    assert scvi.__version__ == version, scvi.__file__
    np.random.seed(0)
    torch.manual_seed(0)
    latents = {}
    for kind in ("SCVI", "SCANVI", "TOTALVI"):
        cells = make_cells()
        cells.write_h5ad(folder / "cells.h5ad")
        model = make_model(scvi, kind, cells, version)
        try:
            options = {"use_gpu": False} if version < "1" else {"accelerator": "cpu"}
            model.train(max_epochs=2, train_size=0.9, **options)
        except Exception as error:
            print(version, kind, "is not trained:", error)
            randomise_norms(model.module)
        model.module.eval()
        model.is_trained_ = True
        model.save(str(folder / version / kind))
        latents[kind] = model.get_latent_representation()
        if kind == "SCANVI":
            latents["predicted"] = model.predict(soft=True).to_numpy()
    np.savez(folder / version / "latents.npz", **latents)


def make_model(scvi, kind, cells, version):
    """A small model; SCVI with the arguments that query surgery needs, SCANVI and TOTALVI with the defaults."""
    model_class = getattr(scvi.model, kind)
    if kind == "SCVI":
        model_class.setup_anndata(cells, batch_key="donor")
        norms = {"use_layer_norm": "both", "use_batch_norm": "none"}
        return model_class(cells, n_hidden=8, n_latent=3, dispersion="gene-batch", encode_covariates=True, **norms)
    if kind == "TOTALVI":
        model_class.setup_anndata(cells, batch_key="donor", protein_expression_obsm_key="protein")
        return model_class(cells, n_latent=3, n_hidden=8, empirical_protein_background_prior=False)
    if version < "0.15":
        model_class.setup_anndata(cells, batch_key="donor", labels_key="type")
        return model_class(cells, "unassigned", n_hidden=8, n_latent=3)
    model_class.setup_anndata(cells, batch_key="donor", labels_key="type", unlabeled_category="unassigned")
    return model_class(cells, n_hidden=8, n_latent=3)


def randomise_norms(module) -> None:
    """Random running means and variances for BatchNorm."""
    for name, values in module.named_buffers():
        if name.endswith("running_mean"):
            values.normal_()
        elif name.endswith("running_var"):
            values.uniform_(0.5, 2.0)


if __name__ == "__main__":
    target, last = Path(sys.argv[1]), sys.argv[2]
    if last in VERSIONS:
        save_models(target, last)
    else:
        make(target, Path(last))
