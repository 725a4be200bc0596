"""`log_counts` and `negative_binomial.loss_and_slopes` for float32 on a GPU, in one Triton kernel each.

No argument of a kernel depends on the number of non-zeros, so both can be part of a CUDA graph (`graph`).

In `loss_and_slopes`, a Triton program processes a few cells one after another. For each cell it passes over the genes
in blocks, several times: for the softmax, for the loss and the mean slope, and to write the slopes. Only the first pass
reads from GPU memory, the later ones read from the cache; torch's operations would pass over all cells about twenty
times. Before the slopes are written, the program passes over the cell's non-zeros, because only these need the gamma
functions. Their contribution to the slopes is kept in `extra` until the slopes of all genes are written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from census_scvi.counts.minibatch import SparseCounts
from census_scvi.training.fast.decoded import Decoded, LossAndSlopes

_CELLS_A_PROGRAM = 4
# Four genes per thread: their values fit into its registers.
_BLOCK, _WARPS = 1024, 8


def log_counts(counts: SparseCounts, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(cells, genes): log(1 + counts), dense."""
    dense = torch.empty(len(counts), counts.n_genes, dtype=dtype, device=counts.counts.device)
    last = counts.n_detected.cumsum(0)
    rows = (dense, last - counts.n_detected, last, counts.genes, counts.counts)
    _log_rows[(len(counts),)](*rows, counts.n_genes, BLOCK=_BLOCK, num_warps=_WARPS)
    return dense


@triton.jit
def _log_rows(dense, first, last, genes, counts, n_genes, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton infers the types
    lane, cell = tl.arange(0, BLOCK), tl.program_id(0)
    row = dense + cell.to(tl.int64) * n_genes
    for start in range(0, n_genes, BLOCK):
        gene = start + lane
        tl.store(row + gene, tl.zeros([BLOCK], dense.dtype.element_ty), mask=gene < n_genes)
    tl.debug_barrier()  # other threads write to the same memory from here on
    begin, end = tl.load(first + cell), tl.load(last + cell)
    for start in range(begin, end, BLOCK):
        place = start + lane
        there = place < end
        gene = tl.load(genes + place, mask=there, other=0).to(tl.int32)
        x = tl.load(counts + place, mask=there, other=0).to(tl.float32)
        tl.store(row + gene, _log_above_one(x).to(dense.dtype.element_ty), mask=there)


def loss_and_slopes(decoded: Decoded, *, slopes: bool = True) -> LossAndSlopes:
    """Loss of each cell and, if `slopes`, its derivatives, which overwrite the logits."""
    logits, dropout, counts = decoded.logits, decoded.dropout, decoded.counts
    theta, row_of_cell = decoded.theta.contiguous(), decoded.row_of_cell
    n_cells, n_genes = logits.shape
    loss = torch.empty(n_cells, device=logits.device)
    programs = triton.cdiv(n_cells, _CELLS_A_PROGRAM)
    one_row = len(theta) == 1
    # One row per program if all cells share one theta, else one row per cell.
    of_theta = torch.zeros(programs if one_row else n_cells, n_genes, device=logits.device)
    last = counts.n_detected.cumsum(0)
    _cells[(programs,)](
        logits,
        logits if dropout is None else dropout,
        last - counts.n_detected,
        last,
        counts.genes,
        counts.counts,
        theta,
        row_of_cell,
        loss,
        of_theta,
        torch.empty(2, len(counts.genes), device=logits.device),
        len(counts.genes),
        n_cells,
        n_genes,
        CELLS=_CELLS_A_PROGRAM,
        ONE_ROW=one_row,
        INFLATED=dropout is not None,
        SLOPES=slopes,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )
    if not slopes:
        return LossAndSlopes(loss)
    if one_row:
        return LossAndSlopes(loss, logits, of_theta.sum(0, keepdim=True), dropout)
    return LossAndSlopes(loss, logits, torch.zeros_like(theta).index_add_(0, row_of_cell, of_theta), dropout)


@triton.jit
def _cells(  # type: ignore[no-untyped-def]  # Triton infers the types
    logits,
    dropout,
    first,
    last,
    genes,
    counts,
    theta,
    row_of_cell,
    loss,
    of_theta,
    extra,
    n_non_zeros,
    n_cells,
    n_genes,
    CELLS: tl.constexpr,
    ONE_ROW: tl.constexpr,
    INFLATED: tl.constexpr,
    SLOPES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lane = tl.arange(0, BLOCK)
    for number in range(CELLS):
        cell = tl.program_id(0) * CELLS + number
        if cell < n_cells:
            start_of_row = cell.to(tl.int64) * n_genes
            row, missed_row = logits + start_of_row, dropout + start_of_row
            theta_row = theta + tl.load(row_of_cell + cell) * n_genes
            target = of_theta + (tl.program_id(0).to(tl.int64) * n_genes if ONE_ROW else start_of_row)
            begin, end = tl.load(first + cell), tl.load(last + cell)
            sums = tl.zeros([BLOCK], tl.float32)
            for start in range(begin, end, BLOCK):
                place = start + lane
                sums += tl.load(counts + place, mask=place < end, other=0).to(tl.float32)
            depth = tl.sum(sums, 0)

            highest = tl.zeros([BLOCK], tl.float32) - float("inf")
            for start in range(0, n_genes, BLOCK):
                gene = start + lane
                highest = tl.maximum(highest, tl.load(row + gene, mask=gene < n_genes, other=-float("inf")))
            most = tl.max(highest, 0)
            sums = tl.zeros([BLOCK], tl.float32)
            for start in range(0, n_genes, BLOCK):
                gene = start + lane
                sums += tl.exp(tl.load(row + gene, mask=gene < n_genes, other=-float("inf")) - most)
            scale = 1.0 / tl.sum(sums, 0)

            gains = tl.zeros([BLOCK], tl.float32)
            means = tl.zeros([BLOCK], tl.float32)
            for start in range(0, n_genes, BLOCK):
                gene = start + lane
                there = gene < n_genes
                share, inverse, fall, of_mu = _gene(row, theta_row, gene, there, most, scale, depth)
                gain = inverse * fall
                if INFLATED:
                    missed = tl.load(missed_row + gene, mask=there, other=0.0)
                    odds = gain - missed
                    gain = _softplus(odds) - _softplus(-missed)
                    of_mu *= tl.sigmoid(odds)
                gains += tl.where(there, gain, 0.0)
                means += tl.where(there, share * of_mu, 0.0)

            for start in range(begin, end, BLOCK):
                place = start + lane
                there = place < end
                gene = tl.load(genes + place, mask=there, other=0).to(tl.int32)
                x = tl.load(counts + place, mask=there, other=1).to(tl.float32)
                share, inverse, fall, of_mu = _gene(row, theta_row, gene, there, most, scale, depth)
                some = share * depth + 1e-8
                total = inverse + some
                gain = x * tl.log(some / total) + _lgamma_rise(inverse, x) - _lgamma_rise(tl.zeros_like(x) + 1.0, x)
                more = x / total - x / some
                of_theta_more = x / total - _digamma_rise(inverse, x)
                if INFLATED:
                    odds = inverse * fall - tl.load(missed_row + gene, mask=there, other=0.0)
                    gain -= _softplus(-odds)
                    rest = tl.sigmoid(-odds)  # adds up to weight 1 with the sigmoid(odds) of the pass over all genes
                    more += rest * of_mu
                    of_theta_more += rest * (of_mu - fall - inverse / (inverse + 1e-8))
                    tl.store(extra + n_non_zeros + place, rest, mask=there)
                gains += tl.where(there, gain, 0.0)
                means += tl.where(there, share * more, 0.0)
                if SLOPES:
                    tl.store(extra + place, share * depth * more, mask=there)
                    tl.store(target + gene, tl.load(target + gene, mask=there) + of_theta_more, mask=there)
            tl.store(loss + cell, -tl.sum(gains, 0))

            if SLOPES:
                mean = tl.sum(means, 0)
                tl.debug_barrier()  # other threads access the same memory from here on
                for start in range(0, n_genes, BLOCK):
                    gene = start + lane
                    there = gene < n_genes
                    share, inverse, fall, of_mu = _gene(row, theta_row, gene, there, most, scale, depth)
                    slope = of_mu - fall - inverse / (inverse + 1e-8)
                    if INFLATED:
                        missed = tl.load(missed_row + gene, mask=there, other=0.0)
                        weight = tl.sigmoid(inverse * fall - missed)
                        of_mu *= weight
                        slope *= weight
                        tl.store(missed_row + gene, weight - tl.sigmoid(-missed), mask=there)
                    tl.store(target + gene, tl.load(target + gene, mask=there) + slope, mask=there)
                    tl.store(row + gene, share * depth * (of_mu - mean), mask=there)
                tl.debug_barrier()
                for start in range(begin, end, BLOCK):
                    place = start + lane
                    there = place < end
                    gene = tl.load(genes + place, mask=there, other=0).to(tl.int32)
                    more = tl.load(extra + place, mask=there)
                    tl.store(row + gene, tl.load(row + gene, mask=there) + more, mask=there)
                    if INFLATED:
                        rest = tl.load(extra + n_non_zeros + place, mask=there)
                        tl.store(missed_row + gene, tl.load(missed_row + gene, mask=there) + rest, mask=there)
                tl.debug_barrier()


@triton.jit
def _gene(row, theta_row, gene, there, most, scale, depth):  # type: ignore[no-untyped-def]  # Triton infers the types
    """Share p, theta, log(theta + eps) - log t, and derivative with respect to mu, of some genes."""
    share = tl.exp(tl.load(row + gene, mask=there, other=-float("inf")) - most) * scale
    inverse = tl.load(theta_row + gene, mask=there, other=1.0)
    mu = share * depth
    return share, inverse, -_log_above_one(mu / (inverse + 1e-8)), inverse / (inverse + mu + 1e-8)


# The same series as in `cpu_kernel`, which explains them.


@triton.jit
def _log_above_one(y):  # type: ignore[no-untyped-def]  # Triton infers the types
    rounded = 1.0 + y
    return tl.log(rounded) + (y - (rounded - 1.0)) / rounded


@triton.jit
def _softplus(a):  # type: ignore[no-untyped-def]  # Triton infers the types
    return tl.maximum(a, 0.0) + _log_above_one(tl.exp(-tl.abs(a)))


@triton.jit
def _lgamma_rise(z, x):  # type: ignore[no-untyped-def]  # Triton infers the types
    low, high = z + 4.0, z + x + 4.0
    steps = (z + x) * (z + x + 1.0) / (z * (z + 1.0))
    steps *= (z + x + 2.0) * (z + x + 3.0) / ((z + 2.0) * (z + 3.0))
    series = _stirling(high) - _stirling(low)
    return x * tl.log(high) + (low - 0.5) * _log_above_one(x / low) - x + series - tl.log(steps)


@triton.jit
def _stirling(y):  # type: ignore[no-untyped-def]  # Triton infers the types
    square = 1.0 / (y * y)
    return (1.0 / 12 - square * (1.0 / 360 - square * (1.0 / 1260))) / y


@triton.jit
def _digamma_rise(z, x):  # type: ignore[no-untyped-def]  # Triton infers the types
    low, high = z + 4.0, z + x + 4.0
    series = _digamma_series(high) - _digamma_series(low)
    return _log_above_one(x / low) + series + _steps(z) - _steps(z + x)


@triton.jit
def _digamma_series(y):  # type: ignore[no-untyped-def]  # Triton infers the types
    square = 1.0 / (y * y)
    return -0.5 / y - square * (1.0 / 12 - square * (1.0 / 120 - square * (1.0 / 252)))


@triton.jit
def _steps(z):  # type: ignore[no-untyped-def]  # Triton infers the types
    return 1.0 / z + 1.0 / (z + 1.0) + 1.0 / (z + 2.0) + 1.0 / (z + 3.0)
