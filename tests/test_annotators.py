"""Every annotator behind the one interface, on simulated cells of three types in three batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from census_scvi.annotation.methods import METHODS, check_method, create, members_of
from census_scvi.annotation.protocol import Cells
from census_scvi.errors import UserError

N_GENES, N_TYPES = 60, 3
SINGLE = [name for name in METHODS if len(members_of(name)) == 1]


def simulated(n_cells: int = 360, seed: int = 0) -> tuple[Cells, np.ndarray]:
    """Two thirds are the reference of two batches; each type has twenty genes of its own, each batch ten others."""
    generator = np.random.default_rng(seed)
    codes = generator.integers(0, N_TYPES, n_cells)
    batch = np.repeat(["one", "two", "query"], n_cells // 3).astype(object)
    genes = np.arange(N_GENES)
    rates = np.where(genes // 20 == codes[:, None], 4.0, 1.0)
    rates *= np.where(genes[None, :] % 3 == np.unique(batch, return_inverse=True)[1][:, None], 2.0, 1.0)
    counts = sp.csr_matrix(generator.poisson(rates * generator.uniform(0.5, 2, (n_cells, 1))).astype(np.float32))
    embedding = (np.eye(N_TYPES)[codes] * 5 + generator.normal(size=(n_cells, N_TYPES))).astype(np.float32)
    return Cells(counts, batch, n_cells * 2 // 3, [f"gene{n}" for n in genes], embedding), codes


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("scanvi", "scnym"))) for name in SINGLE]
)
def test_an_annotator_finds_the_types_and_nothing_in_permuted_labels(name: str) -> None:
    cells, codes = simulated()
    reference, query = cells.reference, cells.query
    settings: dict[str, Any] = {"steps": 60, "scnym": {"n_epochs": 40, "min_epochs": 10}}
    annotator = create(name, **settings)
    torch.manual_seed(3)
    annotator.fit(cells)
    # A fourth class without cells, as in a fold that lacks a type.
    found = annotator.predict(reference, codes[reference], N_TYPES + 1, query)
    assert found.dtype == np.float32
    assert found.shape == (len(query), N_TYPES + 1)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-4)
    assert (found >= 0).all()
    assert (found[:, N_TYPES] < 1e-6).all()
    assert (found.argmax(axis=1) == codes[query]).mean() > 0.85
    permuted = np.random.default_rng(1).permutation(codes[reference])
    at_chance = annotator.predict(reference, permuted, N_TYPES, query)
    # Neighbors are the same for many cells of a type, so that chance is not exactly a third.
    assert at_chance[np.arange(len(query)), codes[query]].mean() == pytest.approx(1 / N_TYPES, abs=0.2)
    again = create(name, **settings)
    again.fit(cells)
    np.testing.assert_allclose(again.predict(reference, codes[reference], N_TYPES + 1, query), found, atol=1e-5)
    torch_number = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), torch_number)  # the process's own random numbers are untouched


@pytest.mark.parametrize("name", SINGLE)
def test_one_class_is_certain(name: str) -> None:
    cells, _ = simulated(90)
    annotator = create(name, steps=4)
    annotator.fit(cells)
    found = annotator.predict(cells.reference, np.ones(60, np.int64), 2, cells.query)
    assert np.array_equal(found, np.tile(np.float32([0, 1]), (30, 1)))


def test_harmony_removes_what_the_batches_differ_in() -> None:
    cells, codes = simulated()
    spaces = {}
    for name in ("pca", "harmony"):
        annotator = create(name)
        annotator.fit(cells)
        assert annotator.space is not None
        spaces[name] = annotator.space
    batch = np.unique(cells.batch.astype(str), return_inverse=True)[1]

    def spread(space: np.ndarray, groups: np.ndarray) -> float:
        middles = np.stack([space[groups == group].mean(axis=0) for group in np.unique(groups)])
        return float(middles.var(axis=0).sum() / space.var(axis=0).sum())

    assert spread(spaces["harmony"], batch) < 0.2 * spread(spaces["pca"], batch)
    assert spread(spaces["harmony"], codes) > spread(spaces["pca"], codes)


def test_methods_are_named_in_one_table() -> None:
    assert members_of("consensus") == ("joint", "harmony", "logistic_regression")
    assert "harmony" not in members_of("consensus", batches_known=False) + members_of("fast", batches_known=False)
    with pytest.raises(UserError, match=r"method is 'harmonie'; did you mean harmony\?; choose one of consensus, fast"):
        check_method("harmonie")
    with pytest.raises(UserError, match="needs the embedding by a trained model, and there is none"):
        cells, _ = simulated(30)
        create("neighbors").fit(Cells(cells.counts, cells.batch, 20, cells.genes))
