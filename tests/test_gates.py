"""The gates: each passes what is valid and names what is not."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from census_scvi.publication import gates
from census_scvi.publication.gates import Gate, LatentMoments
from census_scvi.publication.neighbor_overlap import label_share

N_CELLS, N_LATENT = 2000, 5


def latent(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(N_CELLS, N_LATENT)).astype(np.float32)


def moments(mean: np.ndarray, block: int = 300) -> LatentMoments:
    found = LatentMoments(mean.shape[1])
    for start in range(0, len(mean), block):
        found.add(mean[start : start + block])
    return found


@given(
    arrays.arrays(
        np.float32,
        st.tuples(st.integers(2, 60), st.integers(1, 4)),
        elements=st.floats(-50, 50, width=32),
    ),
    st.integers(1, 20),
)
def test_moments_of_blocks_are_those_of_all_cells(mean: np.ndarray, block: int) -> None:
    expected = np.cov(mean.astype(np.float64), rowvar=False, bias=True).reshape(mean.shape[1], -1)
    assert moments(mean, block=block).covariance == pytest.approx(
        expected, abs=1e-7 * max(1.0, float(np.abs(mean).max()) ** 2)
    )


def test_moments_do_not_cancel_far_from_zero() -> None:
    far = latent() * 1e-3 + 1000
    expected = np.var(far.astype(np.float64), axis=0)
    assert moments(far).covariance.diagonal() == pytest.approx(expected, rel=1e-6)


def test_a_sound_embedding_passes() -> None:
    found = moments(latent())
    assert gates.finite(found).passed
    assert gates.variance(found, 0.5).passed
    assert gates.active_units(np.full((100, N_LATENT), 0.1), 1.0).passed
    assert gates.duplicate_dimensions(found, 0.1).passed
    assert gates.effective_rank(found, 4.9).passed


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_no_number_is_found(value: float) -> None:
    broken = latent()
    broken[1234, 2] = value
    gate = gates.finite(moments(broken))
    assert not gate.passed
    assert gate.detail == "1 cells are not finite, the first in row 1,234"
    assert gates.variance(moments(broken), 0.5).passed  # the others are judged without it


def test_a_constant_dimension_is_named() -> None:
    broken = latent()
    broken[:, 3] = 0.7
    gate = gates.variance(moments(broken), 1e-6)
    assert not gate.passed
    assert gate.detail == "least in dimension 3"
    assert gates.effective_rank(moments(broken), 1).value == pytest.approx(4, abs=0.05)
    assert gates.duplicate_dimensions(moments(broken), 0.5).passed


def test_a_repeated_dimension_is_named() -> None:
    broken = latent()
    broken[:, 4] = -2 * broken[:, 1]
    gate = gates.duplicate_dimensions(moments(broken), 0.99)
    assert not gate.passed
    assert gate.detail == "largest between dimensions 1 and 4, of 5 that vary"
    broken[:, 4] *= 1e-3  # it says nothing of a cell, whatever it correlates with
    assert gates.duplicate_dimensions(moments(broken), 0.99).passed
    assert gates.duplicate_dimensions(moments(broken[:, :1]), 0.99).passed


def test_a_posterior_that_is_the_prior_is_not_active() -> None:
    variance = np.full((100, N_LATENT), 0.1)
    variance[:, 1:] = 1.0
    gate = gates.active_units(variance, 0.3)
    assert not gate.passed
    assert (gate.value, gate.detail) == (0.2, "1 of 5 dimensions")


def test_cells_are_compared_one_by_one() -> None:
    expected = np.arange(100, 200)
    assert gates.same_cells(expected, expected).passed
    without = gates.same_cells(expected, np.delete(expected, [3, 4]))
    assert (without.value, without.passed) == (2, False)
    assert "2 missing (the first: 103)" in without.detail
    twice = np.append(expected[:-1], 150)
    assert "1 missing (the first: 199), 1 twice or more (the first: 150)" in gates.same_cells(expected, twice).detail
    swapped = expected.copy()
    swapped[[5, 9]] = swapped[[9, 5]]
    assert gates.same_cells(expected, swapped).detail == "2 in another order"
    assert "1 not of the query (the first: 999)" in gates.same_cells(expected, np.append(expected, 999)).detail


def test_copies_are_found_wherever_they_lie() -> None:
    mean, hashes = latent(), np.arange(N_CELLS, dtype=np.uint64)
    hashes[[7, 700, 1400]] = 42
    hashes[42] = 10**6
    mean[[700, 1400]] = mean[7]
    joinids = np.arange(N_CELLS) + 5
    assert gates.order(hashes, mean, joinids, 1e-5).passed
    assert gates.order(hashes, mean, joinids, 1e-5).detail == "2 pairs of cells with equal counts"
    mean[[1400, 1401]] = mean[[1401, 1400]]
    gate = gates.order(hashes, mean, joinids, 1e-5)
    assert not gate.passed
    assert "705 and 1405" in gate.detail


def test_no_copies_are_no_failure() -> None:
    assert gates.order(np.arange(9, dtype=np.uint64), latent()[:9], np.arange(9), 0).passed


@given(st.permutations(range(12)), st.integers(1, 5))
def test_the_order_gate_does_not_depend_on_the_order(rows: list[int], n_hashes: int) -> None:
    hashes = np.arange(12, dtype=np.uint64) % n_hashes
    mean = hashes[:, None].astype(np.float32)
    assert gates.order(hashes[rows], mean[rows], np.arange(12), 0).passed


def test_genes_and_their_counts_are_two_gates() -> None:
    found, counts = np.ones(100, bool), np.ones(100)
    found[0], counts[0] = False, 901.0
    by_genes, by_counts = gates.gene_coverage(found, counts, 0.98)
    assert by_genes.passed
    assert by_counts.value == pytest.approx(0.099)
    assert not by_counts.passed


def test_the_worst_cell_of_a_re_embedding_is_named() -> None:
    mean = latent()[:50]
    assert gates.re_embedding(np.arange(50), mean, mean + 1e-6, 1e-5).passed
    anew = mean.copy()
    anew[[3, 17], 0] += [0.5, 2]
    gate = gates.re_embedding(np.arange(50) + 100, mean, anew, 1e-5)
    assert gate.detail == "2 of 50 cells read again differ, most of all the cell with soma_joinid 117"
    anew[9] = np.nan
    assert gates.re_embedding(np.arange(50), mean, anew, 1e-5).value == np.inf


def test_a_module_of_other_widths_is_described() -> None:
    expected = {"n_hidden": 128, "n_latent": 10, "genes": ["a", "b"]}
    assert gates.architecture(expected, expected).passed
    gate = gates.architecture(expected, {**expected, "n_hidden": 512})
    assert (gate.value, gate.detail) == (1, "n_hidden is 512, expected 128")
    genes = [str(gene) for gene in range(2000)]
    fewer = gates.architecture({"genes": genes}, {"genes": genes[:-1]})
    assert fewer.detail == "genes is 1,999 items, expected 2,000 items"


def curves(fall: float, gap: float, epochs: int = 100) -> dict[str, list[float]]:
    """ELBO of validation cells that falls to 1000, by a share of it over the last fifth; of training cells below it."""
    last = np.linspace(1000 * (1 + fall), 1000, epochs // 5 + 1)
    validation = np.concatenate([np.linspace(2 * last[0], last[0], epochs - len(last)), last])
    return {"elbo_validation": validation.tolist(), "elbo_train": (validation * (1 - gap)).tolist()}


@pytest.mark.parametrize(
    ("fall", "gap", "expected"),
    [
        (0.005, 0.05, {"convergence": (True, False), "overfitting": (True, False)}),
        (0.03, 0.05, {"convergence": (False, False), "overfitting": (True, False)}),
        (-0.01, 0.3, {"convergence": (True, False), "overfitting": (False, False)}),  # early stopping would help
        (0.03, 0.3, {"convergence": (False, False), "overfitting": (False, True)}),
    ],
    ids=["converged", "still falling", "learnt by heart", "both"],
)
@pytest.mark.parametrize("epochs", [10, 20, 100, 400])
def test_a_training_that_has_not_come_to_its_end_is_found(
    fall: float, gap: float, expected: dict[str, tuple[bool, bool]], epochs: int
) -> None:
    found = gates.training_gates(curves(fall, gap, epochs), 0.02, 0.2)
    assert {gate.name: (gate.passed, gate.stops) for gate in found} == expected
    values = [gate.value for gate in found]
    if epochs >= 20:  # of fewer, the last three are more than a fifth
        assert values == pytest.approx([fall, gap], rel=1e-6)
    assert bool(gates.stopped_by(found, {})) == expected["overfitting"][1]
    assert not gates.stopped_by(found, {"overfitting": "few cells are all there are"})


def test_a_noisy_curve_is_judged_by_its_slope() -> None:
    noisy = curves(0.0, 0.05)
    noisy["elbo_validation"] = (
        np.array(noisy["elbo_validation"]) + np.random.default_rng(0).normal(0, 5, 100)
    ).tolist()
    assert gates.training_gates(noisy, 0.02, 0.2)[0].value == pytest.approx(0, abs=0.006)


def test_a_curve_with_gaps_is_the_one_without() -> None:
    whole = curves(0.03, 0.05)
    some = {
        **whole,
        "elbo_validation": [np.nan if n % 2 == 0 else value for n, value in enumerate(whole["elbo_validation"])],
    }
    for one, other in zip(gates.training_gates(whole, 0.02, 0.2), gates.training_gates(some, 0.02, 0.2), strict=True):
        assert other.value == pytest.approx(one.value, rel=1e-6)


@pytest.mark.parametrize("epochs", [0, 1, 3, 4])
def test_few_epochs_are_a_warning(epochs: int) -> None:
    """A short training may have taken very many steps; nothing of it stops."""
    found = gates.training_gates({name: curve[:epochs] for name, curve in curves(0.5, 0.9, 10).items()}, 0.02, 0.2)
    assert not found[0].passed
    assert found[0].detail == f"{epochs} measured epochs are too few to judge"
    assert not gates.stopped_by(found, {})


def test_without_validation_cells_the_training_cells_tell() -> None:
    (gate,) = gates.training_gates({"elbo_train": curves(0.03, 0.0)["elbo_validation"]}, 0.02, 0.2)
    assert (gate.name, gate.passed, gate.stops) == ("convergence", False, False)
    assert gate.detail.startswith("decrease of elbo_train over the last fifth of 100 epochs")
    assert gates.training_gates({}, 0.02, 0.2)[0].name == "convergence"


def test_what_stops_and_what_does_not() -> None:
    failed = Gate("finite", 3, "at most", 0, "")
    passed = Gate("cells", 0, "at most", 0, "")
    warning = Gate("batch_mixing", 0.1, "at least", 0.5, "", stops=False)
    not_a_number = Gate("counts", float("nan"), "at least", 0.5, "")
    assert gates.stopped_by([failed, passed, warning, not_a_number], {}) == [failed, not_a_number]
    assert gates.stopped_by([failed, warning, not_a_number], {"finite": "known", "counts": "known"}) == []
    assert json.loads(json.dumps(not_a_number.record()))["value"] is None


# --- separation and mixing


def two_groups(distance: float, n_cells: int = 400) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(1)
    labels = np.repeat(["a", "b"], n_cells // 2)
    return generator.normal(size=(n_cells, 3)) + distance * (labels == "b")[:, None], labels


def test_separated_groups_share_no_neighbours_and_mixed_ones_are_at_chance() -> None:
    assert label_share(*two_groups(100.0)).value == 1.0
    mixed = label_share(*two_groups(0.0))
    assert mixed.chance == pytest.approx(199 / 399)
    assert mixed.value == pytest.approx(0.5, abs=0.05)
    assert mixed.low < mixed.value < mixed.high < mixed.low + 0.05


def test_a_share_is_the_one_counted_by_hand() -> None:
    points, labels = two_groups(1.0, 60)
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    neighbors = np.argsort(distances, axis=1)[:, :7]
    expected = (labels[neighbors] == labels[:, None]).mean()
    assert label_share(points, labels, n_neighbors=7).value == pytest.approx(expected)


def test_within_a_group_only_its_cells_are_neighbours() -> None:
    points, groups = two_groups(0.0)
    batches = np.where(groups == "a", "x", np.tile(["x", "y"], 200))
    share = label_share(points, batches, within=groups)
    alone, mixed = (label_share(points[groups == group], batches[groups == group]) for group in "ab")
    assert alone.value == 1.0
    assert share.value == pytest.approx((alone.value + mixed.value) / 2)
    assert share.chance == pytest.approx((1 + 99 / 199) / 2)


def test_cells_alone_in_their_group_have_no_neighbours() -> None:
    points, labels = two_groups(0.0, 4)
    assert np.isnan(label_share(points, labels, within=np.arange(4)).value)
    assert not Gate("batch_mixing", float("nan"), "at most", 0.5, "", stops=False).passed
