"""The fast training step is scvi-tools' own: the same loss, gradients, posterior and random numbers."""

from __future__ import annotations

import copy
import logging
import os
import subprocess
import sys
import time
from functools import partial
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.special import digamma, gammaln
from scvi.distributions import NegativeBinomial, ZeroInflatedNegativeBinomial
from scvi.module import VAE
from torch.nn import functional
from waits import Waits

from census_scvi.counts.minibatch import SparseCounts
from census_scvi.model import sparse_layer
from census_scvi.training.fast import cpu_kernel, measure, negative_binomial, products, torch_kernel
from census_scvi.training.fast.decoded import Decoded
from census_scvi.training.fast.products import Libraries
from census_scvi.training.fast.step import encode, reason_against, step, unused_frozen

N_GENES = 60


def sparse(counts: np.ndarray) -> SparseCounts:
    csr = sp.csr_matrix(counts)
    narrow = np.uint16 if counts.max(initial=0) <= 65_535 and (counts == counts.round()).all() else np.float32
    return SparseCounts(
        torch.from_numpy(np.diff(csr.indptr).astype(np.int64)),
        torch.from_numpy(csr.indices.astype(np.uint16)),
        torch.from_numpy(csr.data.astype(narrow)),
        counts.shape[1],
    )


def some_counts(n_cells: int = 50, *, largest: float = 30, seed: int = 0) -> np.ndarray:
    """Mostly zeros; gene 3 is 0 everywhere, cell 1 is empty, one count is `largest`."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(0.3, 2.0, (n_cells, N_GENES))).astype(np.float64)
    counts[0, 5] = largest
    counts[:, 3] = 0
    counts[1:2] = 0
    return counts


def minibatches(counts: np.ndarray, n_batch: int, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same cells for the fast step and for scvi-tools; the last batch has one cell."""
    rng = np.random.default_rng(1)
    codes = torch.from_numpy(rng.integers(0, max(n_batch - 1, 1), (len(counts), 1)))
    codes[-1] = n_batch - 1
    common = {"batch": codes, "labels": codes.clone()}
    return {"X": sparse(counts), **common}, {"X": torch.from_numpy(counts).to(dtype), **common}


def make(dtype: torch.dtype = torch.float64, n_batch: int = 3, **arguments: Any) -> VAE:
    torch.manual_seed(7)
    values = {"n_hidden": 16, "n_latent": 4, "gene_likelihood": "nb", "dropout_rate": 0.2, **arguments}
    module = VAE(N_GENES, n_batch=n_batch, n_labels=n_batch, **values).to(dtype)
    with torch.no_grad():  # BatchNorm's weights and the biases are not at their initial 1 and 0 for long
        for parameter in module.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return module


@pytest.fixture
def one_hot_as_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """scvi-tools makes its one-hot matrix for the dispersion float32, whatever the module is."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def both_sides(module: VAE, counts: np.ndarray, n_batch: int, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Losses, gradients and what else changes, from the same random state."""
    ours, theirs = minibatches(counts, n_batch, dtype)
    seen: dict[str, dict[str, Any]] = {}
    for side in ("ours", "theirs"):
        copied = copy.deepcopy(module).train()
        torch.manual_seed(3)
        losses = step(copied, ours, 0.4) if side == "ours" else copied(theirs, loss_kwargs={"kl_weight": 0.4})[2]
        losses.loss.backward()
        seen[side] = {
            "loss": losses.loss.detach(),
            "reconstruction": losses.reconstruction_loss["reconstruction_loss"].detach(),
            "kl": losses.kl_local["kl_divergence_z"].detach(),
            "sums": torch.stack([losses.reconstruction_loss_sum.detach(), losses.kl_local_sum.detach()]),
            "n": losses.n_obs_minibatch,
            "gradients": {name: value.grad for name, value in copied.named_parameters() if value.grad is not None},
            "buffers": dict(copied.named_buffers()),
            "random": torch.get_rng_state(),
        }
    return seen


VARIANTS = {
    "plain": {},
    "three layers": {"n_layers": 3},
    "batch in the encoder": {"encode_covariates": True},
    "batch in the encoder, three layers": {"encode_covariates": True, "n_layers": 3},
    "batch in the first layer only": {"n_layers": 3, "deeply_inject_covariates": False, "encode_covariates": True},
    "no dropout": {"dropout_rate": 0.0},
    "no BatchNorm in the decoder": {"use_batch_norm": "encoder"},
    "layer norm": {"use_layer_norm": "both", "use_batch_norm": "none"},
    "logistic normal": {"latent_distribution": "ln"},
    "gene-batch": {"dispersion": "gene-batch"},
    "gene-label": {"dispersion": "gene-label"},
    "gene-cell": {"dispersion": "gene-cell"},
    "zinb": {"gene_likelihood": "zinb"},
    "zinb, gene-cell": {"gene_likelihood": "zinb", "dispersion": "gene-cell"},
    "zinb, gene-batch": {"gene_likelihood": "zinb", "dispersion": "gene-batch", "encode_covariates": True},
}
COUNTS = {"small": 30, "thousands": 9_000, "beyond 65,535": 70_001}


@pytest.mark.parametrize("largest", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("n_batch", [1, 3])
@pytest.mark.parametrize("arguments", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.usefixtures("one_hot_as_float64")
def test_loss_and_gradients_are_those_of_scvi_tools(arguments: dict[str, Any], n_batch: int, largest: int) -> None:
    module = make(n_batch=n_batch, **arguments)
    assert reason_against(module) == ""
    seen = both_sides(module, some_counts(largest=largest), n_batch, torch.float64)
    ours, theirs = seen["ours"], seen["theirs"]
    for name in ("loss", "reconstruction", "kl", "sums"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-9)
    assert ours["n"] == theirs["n"]
    assert torch.equal(ours["random"], theirs["random"])
    for name, buffer in theirs["buffers"].items():
        torch.testing.assert_close(ours["buffers"][name], buffer, rtol=1e-9, atol=1e-9)
    # scvi-tools' gradients of what the loss does not depend on are none, or 0 for a head multiplied by nothing.
    assert set(ours["gradients"]) <= set(theirs["gradients"])
    for name, gradient in theirs["gradients"].items():
        found = ours["gradients"].get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(
            found, gradient, rtol=1e-9, atol=1e-9 * max(1.0, gradient.abs().max().item()), msg=name
        )


@pytest.mark.parametrize("engine", ["kernel", "torch", "sparse counts"])
@pytest.mark.parametrize("largest", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("arguments", VARIANTS.values(), ids=VARIANTS)
def test_in_float32_too(arguments: dict[str, Any], largest: int, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if engine == "torch":
        monkeypatch.setattr(negative_binomial, "compiled_kernel", lambda device: None)
    elif engine == "sparse counts":
        monkeypatch.setattr(products, "_used", Libraries(counts="sparse"))
        assert sparse_layer.usable()
        monkeypatch.delattr(SparseCounts, "dense")  # nothing needs the dense matrix
    assert_float32_step_is_scvi_tools(arguments, largest)


def assert_float32_step_is_scvi_tools(arguments: dict[str, Any], largest: int) -> None:
    seen = both_sides(make(torch.float32, **arguments), some_counts(largest=largest), 3, torch.float32)
    ours, theirs = seen["ours"], seen["theirs"]
    rounding = largest * 3e-6  # of terms like lgamma(70,000), which cancel
    torch.testing.assert_close(ours["loss"], theirs["loss"], rtol=1e-5, atol=rounding / 50)
    torch.testing.assert_close(ours["sums"], theirs["sums"], rtol=1e-5, atol=rounding)
    whole = torch.cat([gradient.flatten() for gradient in theirs["gradients"].values()]).norm()
    for name, gradient in ours["gradients"].items():
        difference = (gradient - theirs["gradients"][name]).norm()
        # What goes into a BatchNorm has, by it, no gradient but rounding.
        assert difference <= 1e-3 * theirs["gradients"][name].norm() or difference <= 1e-6 * whole, name


def test_validation_and_posterior_are_those_of_scvi_tools() -> None:
    module = make().eval()
    ours, theirs = minibatches(some_counts(), 3, torch.float64)
    with torch.inference_mode():
        torch.manual_seed(3)
        losses = step(module, ours, 1.0)
        torch.manual_seed(3)
        outputs, _, expected = module(theirs, loss_kwargs={"kl_weight": 1.0})
        torch.manual_seed(3)
        posterior, latent = encode(module, ours["X"], ours["batch"].squeeze(1))
    torch.testing.assert_close(losses.loss, expected.loss, rtol=1e-9, atol=0)
    torch.testing.assert_close(posterior.loc, outputs["qz"].loc)
    torch.testing.assert_close(posterior.scale, outputs["qz"].scale)
    torch.testing.assert_close(latent, outputs["z"])


def test_gradients_scale_with_the_loss() -> None:
    """Accumulated minibatches, gradient scaling and DDP multiply the loss before its gradients are taken."""
    module = make()
    ours, _ = minibatches(some_counts(), 3, torch.float64)
    gradients = []
    for factor in (1.0, 8.0):
        module.zero_grad()
        torch.manual_seed(3)
        (factor * step(module, ours, 0.4).loss).backward()
        gradients.append(
            {name: value.grad.clone() for name, value in module.named_parameters() if value.grad is not None}
        )
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(8 * gradient, gradients[1][name])


def test_one_cell_alone_is_refused_as_by_scvi_tools() -> None:
    module = make().train()
    ours, theirs = minibatches(some_counts(1), 3, torch.float64)
    for call in (lambda: step(module, ours, 1.0), lambda: module(theirs)):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            call()
    step(module.eval(), ours, 1.0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"gene_likelihood": "poisson"}, "gene_likelihood is poisson"),
        ({"batch_representation": "embedding"}, "batch_representation is embedding"),
        ({"use_size_factor_key": True}, "it has size factors"),
        ({"n_cats_per_cov": [2]}, "it has covariates other than the batch"),
        ({"n_continuous_cov": 1}, "it has covariates other than the batch"),
        ({"log_variational": False}, "its counts are not transformed by log1p"),
    ],
)
def test_what_it_cannot_train_it_says(arguments: dict[str, Any], said: str) -> None:
    assert reason_against(make(**arguments)) == said


def test_only_what_the_loss_depends_on_has_gradients_and_all_of_it() -> None:
    """DDP waits for each parameter with requires_grad."""
    for arguments in ({}, {"dispersion": "gene-cell"}, {"encode_covariates": True}, {"gene_likelihood": "zinb"}):
        module = make(**arguments)
        ours, theirs = minibatches(some_counts(), 3, torch.float64)
        for call in (lambda m=module, x=ours: step(m, x, 1.0), lambda m=module, x=theirs: m(x)[2]):
            module.zero_grad()
            with unused_frozen(module):
                call().loss.backward()
                wanted = {name for name, value in module.named_parameters() if value.requires_grad}
            assert {name for name, value in module.named_parameters() if value.grad is not None} == wanted
        assert all(value.requires_grad for value in module.parameters())


@pytest.mark.parametrize("likelihood", ["nb", "zinb"])
def test_nothing_in_a_step_makes_a_gpu_wait(likelihood: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(negative_binomial, "compiled_kernel", lambda device: None)
    module = make(torch.float32, gene_likelihood=likelihood, encode_covariates=True)
    ours, theirs = minibatches(some_counts(), 3, torch.float32)
    with unused_frozen(module):
        optimiser = torch.optim.Adam([value for value in module.parameters() if value.requires_grad], fused=True)
        for number in range(2):
            with Waits() as waits:
                optimiser.zero_grad()
                step(module, ours, 0.4).loss.backward()
                optimiser.step()
            assert waits.found == [], number
    with Waits() as waits:
        module(theirs)
    assert waits.found  # scvi-tools' looks whether its distributions' parameters are allowed


# --- the loss alone


def reference(
    logits: torch.Tensor, dropout: torch.Tensor | None, theta: torch.Tensor, counts: np.ndarray
) -> list[torch.Tensor | None]:
    """Loss of each cell and its derivatives by scvi-tools' distribution and autograd, in float64.

    torch's softplus is its argument beyond 20, and so without e^-20 = 2e-9 of its slope: here without e^-40.
    """
    logits, theta = logits.double().requires_grad_(), theta.double().requires_grad_()
    dropout = None if dropout is None else dropout.double().requires_grad_()
    x = torch.from_numpy(counts)
    mu = x.sum(1, keepdim=True) * torch.softmax(logits, -1)
    if dropout is None:
        distribution = NegativeBinomial(mu=mu, theta=theta)
    else:
        distribution = ZeroInflatedNegativeBinomial(mu=mu, theta=theta, zi_logits=dropout)
    with patch.object(functional, "softplus", partial(functional.softplus, threshold=40)):
        loss = -distribution.log_prob(x).sum(1)
    loss.sum().backward()
    return [loss.detach(), logits.grad, theta.grad, None if dropout is None else dropout.grad]


def decoded(
    logits: torch.Tensor,
    dropout: torch.Tensor | None,
    theta: torch.Tensor,
    counts: np.ndarray,
    dtype: torch.dtype = torch.float32,
) -> Decoded:
    """Of copies, which a kernel may overwrite; the rows of theta go round among the cells."""
    rows = torch.arange(len(counts)) % len(theta)
    tensors = [None if tensor is None else tensor.to(dtype, copy=True) for tensor in (logits, theta, dropout)]
    return Decoded(*tensors[:2], rows, sparse(counts), tensors[2])


@settings(max_examples=80)
@given(
    seed=st.integers(0, 2**32 - 1),
    n_cells=st.integers(1, 9),
    n_genes=st.integers(1, 40),
    density=st.sampled_from([0.0, 0.1, 0.9]),
    largest=st.sampled_from([1, 5, 3_000, 80_000]),
    spread=st.sampled_from([0.1, 3.0, 30.0]),
    spread_of_log_theta=st.sampled_from([0.5, 4.0]),
    inflated=st.booleans(),
    threads=st.integers(1, 3),
)
# A count where theta is 9e-5: x / (theta + mu) and the digamma functions, 10,000 each, cancel.
@example(3265, 1, 40, 0.1, 1, 30.0, 4.0, False, 1)
# Logits of dropout beyond 20, where torch's softplus is cut off.
@example(2645, 1, 22, 0.1, 80_000, 30.0, 0.5, True, 1)
def test_kernel_and_torch_give_the_loss_of_the_distribution(
    seed: int,
    n_cells: int,
    n_genes: int,
    density: float,
    largest: int,
    spread: float,
    spread_of_log_theta: float,
    inflated: bool,
    threads: int,
) -> None:
    rng = np.random.default_rng(seed)
    counts = np.floor(rng.uniform(1, largest + 1, (n_cells, n_genes))) * (rng.random((n_cells, n_genes)) < density)
    logits = torch.from_numpy(rng.normal(0, spread, (n_cells, n_genes))).float()
    theta = torch.from_numpy(rng.normal(0, spread_of_log_theta, (1, n_genes))).exp().float()
    dropout = torch.from_numpy(rng.normal(0, spread, (n_cells, n_genes))).float() if inflated else None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert negative_binomial.compiled_kernel("cpu") is cpu_kernel
        compute = negative_binomial.loss_and_slopes
        kernel = compute(decoded(logits, dropout, theta, counts))
        forward = compute(decoded(logits, dropout, theta, counts), slopes=False)
    finally:
        torch.set_num_threads(before)
    exact = torch_kernel.loss_and_slopes(decoded(logits, dropout, theta, counts, torch.float64))
    expected = reference(logits, dropout, theta, counts)
    assert torch.equal(kernel.loss, forward.loss)
    # Of float32, in terms as large as the counts and their logarithms; in theta's slope as 1 / theta where a count is.
    rounding = 3e-6 * (5 + counts.sum())
    of_theta = rounding + 5e-7 * torch.from_numpy((counts > 0).sum(0)) / theta.double()
    cut = {"loss": 3 * n_genes * np.exp(-20)}  # what torch's softplus leaves out, up to three times an entry
    for name, in_kernel, in_torch, wanted in zip(kernel._fields, kernel, exact, expected, strict=True):
        if wanted is None:
            assert in_kernel is None
            assert in_torch is None
        else:
            atol = 1e-9 * (1 + wanted.abs().max().item()) + cut.get(name, 0)
            torch.testing.assert_close(in_torch, wanted, rtol=1e-9, atol=atol)
            allowed = (of_theta if name == "theta" else rounding) + 1e-5 * wanted.abs()
            assert ((in_kernel.double() - wanted).abs() <= allowed).all(), name


def test_gamma_functions_of_the_kernel() -> None:
    z = np.geomspace(1e-6, 1e6, 500).astype(np.float32)
    for x in (1, 2, 3, 10, 1_000, 100_000):
        found, wanted = np.empty_like(z), gammaln(z.astype(float) + x) - gammaln(z.astype(float))
        rise(z, np.float32(x), found)
        assert np.allclose(found, wanted, rtol=1e-6, atol=5e-6)
        fall, wanted = np.empty_like(z), digamma(z.astype(float) + x) - digamma(z.astype(float))
        digamma_rise(z, np.float32(x), fall)
        assert np.allclose(fall, wanted, rtol=2e-6, atol=0)


@cpu_kernel._each
def rise(z, x, out):
    for i in range(len(z)):
        out[i] = cpu_kernel._lgamma_rise(z[i], x)


@cpu_kernel._each
def digamma_rise(z, x, out):
    for i in range(len(z)):
        out[i] = cpu_kernel._digamma_rise(z[i], x)


@pytest.mark.parametrize("where", ["logits", "theta"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_not_hidden(where: str, value: float) -> None:
    counts = some_counts()
    logits, theta = torch.randn(len(counts), N_GENES), torch.ones(1, N_GENES)
    (logits if where == "logits" else theta)[0, 7] = value
    for kernel in (cpu_kernel, torch_kernel):
        for dropout in (None, torch.randn(len(counts), N_GENES)):
            assert not torch.isfinite(kernel.loss_and_slopes(decoded(logits, dropout, theta, counts)).loss[0])


@pytest.mark.parametrize("trouble", ["does not compile", "gives other results"])
def test_without_the_kernel_torch_does_it_and_it_is_said(
    trouble: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no vector instructions")

    logging.getLogger("census_scvi").propagate = True
    negative_binomial.compiled_kernel.cache_clear()
    with monkeypatch.context() as planted:
        planted.setattr(cpu_kernel, "_cells", fails if trouble == "does not compile" else lambda *_: None)
        assert negative_binomial.compiled_kernel("cpu") is None
        ours, _ = minibatches(some_counts(), 3, torch.float32)
        assert torch.isfinite(step(make(torch.float32), ours, 1.0).loss)
    negative_binomial.compiled_kernel.cache_clear()
    reason = {
        "does not compile": "RuntimeError: no vector instructions",
        "gives other results": "ArithmeticError: the relative difference of its results from torch's is",
    }[trouble]
    assert f"kernel for cpu cannot be used here ({reason}" in caplog.text
    assert "torch's own, slower operations are used instead" in caplog.text


@pytest.fixture
def gpu_kernel() -> ModuleType:
    """Triton's kernel; where there is no GPU, by its interpreter, which shows the arithmetic, not that it compiles."""
    pytest.importorskip("triton", reason="needs Triton: pip install triton (Linux)")
    from census_scvi.training.fast import gpu_kernel

    return gpu_kernel


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton compiles here, for the GPU: CUDA_VISIBLE_DEVICES= hides it"
)
@pytest.mark.parametrize("largest", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("inflated", [False, True])
def test_the_gpu_s_kernel_in_the_interpreter(gpu_kernel: ModuleType, inflated: bool, rows: int, largest: int) -> None:
    counts = some_counts(21, largest=largest)  # no multiple of the cells that a program takes
    torch.manual_seed(0)
    logits, theta = 2 * torch.randn(21, N_GENES), torch.rand(rows, N_GENES) * 5 + 0.01
    dropout = torch.randn(21, N_GENES) if inflated else None
    made = gpu_kernel.loss_and_slopes(decoded(logits, dropout, theta, counts))
    forward = gpu_kernel.loss_and_slopes(decoded(logits, dropout, theta, counts), slopes=False)
    expected = torch_kernel.loss_and_slopes(decoded(logits, dropout, theta, counts, torch.float64))
    assert torch.equal(made[0], forward[0])
    assert forward[1:] == (None, None, None)
    for found, wanted in zip(made, expected, strict=True):
        if wanted is None:
            assert found is None
        else:
            torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=3e-6 * (5 + counts.sum()))
    negative_binomial._compare(gpu_kernel, "cpu")  # what is done before it is first used on a GPU


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from census_scvi.training.fast.gpu_kernel import _BLOCK, _WARPS, _cells

constants = {"CELLS": 4, "ONE_ROW": True, "INFLATED": True, "SLOPES": True, "BLOCK": _BLOCK}
types = {name: "*i64" for name in ("first", "last", "row_of_cell")} | {"genes": "*u16", "counts": "*u16"}
types |= {name: "i32" for name in ("n_non_zeros", "n_cells", "n_genes")} | {name: "constexpr" for name in constants}
source = ASTSource(
    fn=_cells,
    signature={name: types.get(name, "*fp32") for name in _cells.arg_names},
    constexprs={(_cells.arg_names.index(name),): value for name, value in constants.items()},
)
for capability in (75, 86, 90):
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": _WARPS})
    assert len(made.asm["cubin"]) > 1000
"""


@pytest.mark.slow
def test_the_gpu_s_kernel_compiles_for_gpus_that_are_not_there() -> None:
    """A T4, an A10G and an H100."""
    pytest.importorskip("triton", reason="needs Triton: pip install triton (Linux)")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU that torch finds: ./scvi-init.sh says what is missing"
)
def test_the_step_on_a_gpu() -> None:
    module = make(torch.float32, dropout_rate=0.0).cuda()
    ours, theirs = minibatches(some_counts(), 3, torch.float32)
    torch.backends.cuda.matmul.allow_tf32 = False
    losses = []
    sides = ((lambda x: step(module, x, 0.4), ours), (lambda x: module(x, loss_kwargs={"kl_weight": 0.4})[2], theirs))
    for call, minibatch in sides:
        torch.manual_seed(3)
        module.zero_grad()
        losses.append(call({name: value.to("cuda") for name, value in minibatch.items()}))
        losses[-1].loss.backward()
    torch.testing.assert_close(losses[0].loss, losses[1].loss, rtol=1e-5, atol=0)
    assert negative_binomial.compiled_kernel("cuda") is not None


# --- reduced precision


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"gene_likelihood": "zinb"},
        {"n_layers": 3},
        {"n_layers": 3, "encode_covariates": True},
        {"n_layers": 2, "deeply_inject_covariates": False, "dispersion": "gene-cell", "use_batch_norm": "none"},
    ],
    ids=["nb", "zinb", "three layers", "three layers with the batch", "gene-cell"],
)
@pytest.mark.parametrize(
    ("dtype", "largest", "closeness"),
    [(torch.bfloat16, 30, 1e-2), (torch.float16, 30, 1e-3), (torch.float16, 400_000, 1e-3)],
    ids=["bf16", "fp16", "fp16, slopes beyond its range"],
)
def test_a_reduced_precision_is_of_the_products_alone(
    dtype: torch.dtype, largest: int, closeness: float, arguments: dict[str, Any]
) -> None:
    module = make(torch.float32, **arguments)
    ours, _ = minibatches(some_counts(largest=largest), 3, torch.float32)
    scale = 2.0**10  # as Lightning scales losses in fp16
    results = []
    for enabled in (False, True):
        module.zero_grad()
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype, enabled=enabled):
            losses = step(module, ours, 0.4)
        (scale * losses.loss).backward()
        results.append((losses, [p.grad.flatten() for p in module.parameters() if p.grad is not None]))
    (exact, gradients), (reduced, reduced_gradients) = results
    assert reduced.loss.dtype == reduced_gradients[0].dtype == torch.float32
    assert not torch.equal(exact.loss, reduced.loss)
    torch.testing.assert_close(reduced.loss, exact.loss, rtol=closeness, atol=0)
    assert all(gradient.isfinite().all() for gradient in reduced_gradients)
    if largest < 65_504:
        assert torch.nn.functional.cosine_similarity(torch.cat(gradients), torch.cat(reduced_gradients), dim=0) > 0.99


# --- products


@pytest.mark.parametrize("library", ["torch", "onednn", "onednn where torch has none"])
@pytest.mark.parametrize("layout", ["plain", "transposed", "sliced"])
@pytest.mark.parametrize("shape", [(1, 5, 3), (40, 7, 130), (200, 9, 31), (64, 2000, 48)])
def test_products(shape: tuple[int, int, int], layout: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if library == "onednn where torch has none":
        monkeypatch.setattr(products, "_onednn", None)
    monkeypatch.setattr(products, "_used", Libraries(*[library.split()[0]] * 3))
    n, m, k = shape
    torch.manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        if layout == "transposed":
            return torch.randn(columns, rows).T
        return torch.randn(rows, columns + 3)[:, :columns] if layout == "sliced" else torch.randn(rows, columns)

    left, right, bias = matrix(n, k).requires_grad_(), matrix(m, k).requires_grad_(), torch.randn(m, requires_grad=True)
    made, expected = products.linear(left, right, bias), left.double() @ right.T.double() + bias
    slopes = torch.randn(n, m)
    pairs = zip(
        [made, *torch.autograd.grad(made, (left, right, bias), slopes)],
        [expected, *torch.autograd.grad(expected, (left, right, bias), slopes.double())],
        # So many products of normal numbers are added up, each partial sum rounded.
        [k, m, n, n],
        strict=True,
    )
    for found, wanted, summed in pairs:
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-6, atol=1e-6 + 3e-7 * summed)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    n_cells=st.integers(1, 40),
    n_genes=st.integers(1, 700),
    n_batches=st.sampled_from([0, 1, 3, 130]),
    n_hidden=st.integers(1, 200),
    density=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    kind=st.sampled_from([np.uint16, np.float32]),
    genes=st.sampled_from([np.uint16, np.int32]),
    contiguous=st.booleans(),
)
def test_sparse_layer(
    seed: int,
    n_cells: int,
    n_genes: int,
    n_batches: int,
    n_hidden: int,
    density: float,
    kind: type,
    genes: type,
    contiguous: bool,
) -> None:
    """The layer and its gradients are those of the dense matrix, whatever the number of threads."""
    rng = np.random.default_rng(seed)
    dense = rng.integers(1, 5_000, (n_cells, n_genes)) * (rng.random((n_cells, n_genes)) < density)
    csr = sp.csr_matrix((dense + (kind is np.float32) * 0.25 * (dense > 0)).astype(kind))
    counts = SparseCounts(
        torch.from_numpy(np.diff(csr.indptr).astype(np.int64)),
        torch.from_numpy(csr.indices.astype(genes)),
        torch.from_numpy(csr.data),
        n_genes,
    )
    codes = torch.from_numpy(rng.integers(0, max(n_batches, 1), n_cells))
    one_hot = np.eye(max(n_batches, 1))[codes.numpy()][:, :n_batches]
    x = np.concatenate([np.log1p(csr.toarray().astype(np.float64)), one_hot], 1)
    weight = torch.from_numpy(rng.normal(size=(n_hidden, x.shape[1]))).float().requires_grad_()
    bias = torch.from_numpy(rng.normal(size=n_hidden)).float().requires_grad_()
    slopes = torch.from_numpy(rng.normal(size=(n_cells, n_hidden))).float()
    slopes = slopes if contiguous else slopes.T.contiguous().T
    before, made = torch.get_num_threads(), {}
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            output = sparse_layer.sparse_layer(counts, codes if n_batches else None, weight, bias)
            made[threads] = (output.detach(), *torch.autograd.grad(output, (weight, bias), slopes))
        finally:
            torch.set_num_threads(before)
    outputs = torch.from_numpy(x) @ weight.detach().T.double() + bias.detach().double()
    expected = (outputs, slopes.double().T @ torch.from_numpy(x), slopes.double().sum(0))
    for one, several, wanted in zip(made[1], made[3], expected, strict=True):
        assert torch.equal(one, several)
        torch.testing.assert_close(one.double(), wanted, rtol=1e-5, atol=1e-5 * (1 + wanted.abs().max().item()))


@pytest.mark.parametrize("trouble", ["does not compile", "gives other results"])
def test_without_the_sparse_layer_dense_products_do_it_and_it_is_said(
    trouble: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no vector instructions")

    logging.getLogger("census_scvi").propagate = True
    monkeypatch.setattr(products, "_used", Libraries(counts="sparse"))
    sparse_layer.usable.cache_clear()
    with monkeypatch.context() as planted:
        broken = fails if trouble == "does not compile" else lambda *arguments: arguments[-1].fill(0)
        planted.setattr(sparse_layer, "_outputs", broken)
        assert measure.faster_libraries(1000, 32, 0.05).counts == "dense"
        assert_float32_step_is_scvi_tools({}, 30)
    sparse_layer.usable.cache_clear()
    assert "the encoder's layer for sparse counts cannot be used here" in caplog.text
    # The same record may come by the logger of the project and by its parent's.
    said = {record.created for record in caplog.records if "cannot be used here" in record.getMessage()}
    assert len(said) == 1


@pytest.mark.parametrize("kind", ["forward", "input_gradient", "weight_gradient"])
@pytest.mark.parametrize("arguments", [{}, {"gene_likelihood": "zinb"}, {"n_layers": 2, "encode_covariates": True}])
def test_each_library_gives_the_step_of_scvi_tools(
    arguments: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = products._onednn
    monkeypatch.setattr(products, "_onednn", lambda *operands: calls.append(1) or real(*operands))
    monkeypatch.setattr(products, "_used", Libraries(**{kind: "onednn"}))
    assert_float32_step_is_scvi_tools(arguments, 30)
    assert calls


def test_the_faster_library_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """By products as the step has them: slowed down, a library is not chosen."""
    monkeypatch.setattr(measure, "_SECONDS", 0.02)
    large, small = (1000, 32), (100, 32)
    assert measure.shape_of(make(n_hidden=24)) == (N_GENES, 24)
    before = torch.get_rng_state()
    real, kinds = measure.times_transposed, ("forward", "input_gradient", "weight_gradient")
    monkeypatch.setattr(sparse_layer, "usable", lambda: False)
    for slow in ("torch", "onednn"):

        def multiply(library: str, *operands: Any, slow: str = slow) -> torch.Tensor:
            if library == slow:
                time.sleep(0.01)
                sum(range(100_000))  # where the processor's time counts, sleep is none
            return real(library, *operands)

        monkeypatch.setattr(measure, "times_transposed", multiply)
        chosen = measure.faster_libraries(*large, 0.1)
        assert chosen == Libraries(**dict.fromkeys(kinds, {"torch": "onednn", "onednn": "torch"}[slow]))
        assert measure.faster_libraries(*small, 0.1) == Libraries()  # too small to matter
    assert torch.equal(before, torch.get_rng_state())
    monkeypatch.setattr(products, "_onednn", None)
    assert measure.faster_libraries(*large, 0.1) == Libraries()


@pytest.mark.parametrize(("slow", "chosen"), [("sparse", "dense"), ("dense", "sparse")])
def test_it_is_measured_whether_the_zeros_are_multiplied(
    slow: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_SECONDS", 0.02)
    owner, name = {"sparse": (sparse_layer, "sparse_layer"), "dense": (SparseCounts, "dense")}[slow]
    real = getattr(owner, name)

    def slowed(*operands: Any, **options: Any) -> torch.Tensor:
        end = time.process_time() + 0.05
        while time.process_time() < end:
            pass
        return real(*operands, **options)

    monkeypatch.setattr(owner, name, slowed)
    before = torch.get_rng_state()
    assert measure.faster_libraries(1000, 32, 0.1).counts == chosen
    assert torch.equal(before, torch.get_rng_state())


def test_a_precision_is_measured() -> None:
    """float64 takes longer than float32 on any processor."""
    float32, float64 = measure.measure_precision(4000, 64, torch.float64)
    assert 0 < float32 < float64
    assert measure.measure_precision(100, 32, torch.float64) is None
