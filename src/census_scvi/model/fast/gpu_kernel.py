"""`negative_binomial.loss_and_slopes` for float32 on a GPU: logits are read once and their slopes written once.

A program of Triton takes a few cells, one after another, each whole in registers, where torch's operations pass over
all cells some twenty times. It takes the counts dense: a GPU's lanes all wait for the one that has a count, so that
leaving out zeros gains nothing there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from census_scvi.counts.minibatch import SparseCounts

MOST_GENES = 2**14  # a cell's row is in the registers of one program
_CELLS_A_PROGRAM = 8


def loss_and_slopes(
    logits: torch.Tensor,
    dropout: torch.Tensor | None,
    theta: torch.Tensor,
    row_of_cell: torch.Tensor,
    counts: SparseCounts,
    *,
    slopes: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """See `negative_binomial.loss_and_slopes`; at most `MOST_GENES` genes."""
    n_cells, n_genes = logits.shape
    loss = torch.empty(n_cells, device=logits.device)
    programs = triton.cdiv(n_cells, _CELLS_A_PROGRAM)
    shared = len(theta) == 1
    # One row of sums a program where all cells have one theta, else one a cell.
    of_theta = torch.empty(programs if shared else n_cells, n_genes, device=logits.device)
    _cells[(programs,)](
        logits,
        logits if dropout is None else dropout,
        counts.dense(),
        theta.contiguous(),
        row_of_cell,
        loss,
        of_theta,
        n_cells,
        n_genes,
        CELLS=_CELLS_A_PROGRAM,
        SHARED=shared,
        INFLATED=dropout is not None,
        SLOPES=slopes,
        WIDTH=triton.next_power_of_2(n_genes),
        num_warps=16 if n_genes > 2048 else 4,
    )
    if not slopes:
        return loss, None, None, None
    if shared:
        return loss, logits, of_theta.sum(0, keepdim=True), dropout
    return loss, logits, torch.zeros_like(theta).index_add_(0, row_of_cell, of_theta), dropout


@triton.jit
def _cells(  # type: ignore[no-untyped-def]
    logits,
    dropout,
    counts,
    theta,
    row_of_cell,
    loss,
    of_theta,
    n_cells,
    n_genes,
    CELLS: tl.constexpr,
    SHARED: tl.constexpr,
    INFLATED: tl.constexpr,
    SLOPES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    gene = tl.arange(0, WIDTH)
    there = gene < n_genes
    sums = tl.zeros([WIDTH], tl.float32)
    for number in range(CELLS):
        cell = tl.program_id(0) * CELLS + number
        if cell < n_cells:
            place = cell.to(tl.int64) * n_genes + gene
            row = tl.load(row_of_cell + cell)
            inverse = tl.load(theta + row * n_genes + gene, mask=there, other=1.0)
            x = tl.load(counts + place, mask=there, other=0.0)
            logit = tl.load(logits + place, mask=there, other=-float("inf"))
            share = tl.exp(logit - tl.max(logit, 0))
            share = share / tl.sum(share, 0)
            mu = share * tl.sum(x, 0)
            some = mu + 1e-8
            total = inverse + some
            fall = -_log_above_one(mu / (inverse + 1e-8))
            factorial = _lgamma_rise(tl.zeros_like(x) + 1.0, x)
            gain = tl.where(x > 0, x * tl.log(some / total) + _lgamma_rise(inverse, x) - factorial, 0.0)
            by_gene = inverse * fall
            if INFLATED:
                missed = tl.load(dropout + place, mask=there, other=0.0)
                odds = by_gene - missed
                weight = tl.where(x > 0, 1.0, tl.sigmoid(odds))
                by_gene = tl.where(x > 0, odds, _softplus(odds)) - _softplus(-missed)
            tl.store(loss + cell, -tl.sum(tl.where(there, by_gene + gain, 0.0), 0))
            if SLOPES:
                of_mu = inverse / total
                slope = of_mu - fall - inverse / (inverse + 1e-8)
                if INFLATED:
                    of_mu *= weight
                    slope *= weight
                    tl.store(dropout + place, weight - tl.sigmoid(-missed), mask=there)
                slope += tl.where(x > 0, x / total - _digamma_rise(inverse, x), 0.0)
                if SHARED:
                    sums += slope
                else:
                    tl.store(of_theta + place, slope, mask=there)
                of_mu += x / total - x / some
                tl.store(logits + place, mu * (of_mu - tl.sum(share * of_mu, 0)), mask=there)
    if SLOPES and SHARED:
        tl.store(of_theta + tl.program_id(0).to(tl.int64) * n_genes + gene, sums, mask=there)


# The same series as in `cpu_kernel`, where they are explained.


@triton.jit
def _log_above_one(y):  # type: ignore[no-untyped-def]
    rounded = 1.0 + y
    return tl.log(rounded) + (y - (rounded - 1.0)) / rounded


@triton.jit
def _softplus(a):  # type: ignore[no-untyped-def]
    return tl.maximum(a, 0.0) + _log_above_one(tl.exp(-tl.abs(a)))


@triton.jit
def _lgamma_rise(z, x):  # type: ignore[no-untyped-def]
    low, high = z + 4.0, z + x + 4.0
    steps = (z + x) * (z + x + 1.0) / (z * (z + 1.0))
    steps *= (z + x + 2.0) * (z + x + 3.0) / ((z + 2.0) * (z + 3.0))
    series = _stirling(high) - _stirling(low)
    return x * tl.log(high) + (low - 0.5) * _log_above_one(x / low) - x + series - tl.log(steps)


@triton.jit
def _stirling(y):  # type: ignore[no-untyped-def]
    square = 1.0 / (y * y)
    return (1.0 / 12 - square * (1.0 / 360 - square * (1.0 / 1260))) / y


@triton.jit
def _digamma_rise(z, x):  # type: ignore[no-untyped-def]
    low, high = z + 4.0, z + x + 4.0
    series = _digamma_series(high) - _digamma_series(low)
    return _log_above_one(x / low) + series + _steps(z) - _steps(z + x)


@triton.jit
def _digamma_series(y):  # type: ignore[no-untyped-def]
    square = 1.0 / (y * y)
    return -0.5 / y - square * (1.0 / 12 - square * (1.0 / 120 - square * (1.0 / 252)))


@triton.jit
def _steps(z):  # type: ignore[no-untyped-def]
    return 1.0 / z + 1.0 / (z + 1.0) + 1.0 / (z + 2.0) + 1.0 / (z + 3.0)
