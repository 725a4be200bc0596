"""`negative_binomial.loss_and_slopes` for float32 on a CPU, one cell's row at a time, so that it stays in the cache.

numba compiles the functions. Each loop is short, uses few arrays and has no branches, so that LLVM can vectorise it.
For the same reason exp and log are polynomials: the functions of the C library take one number at a time. Sums have
separate loops, because the compiler may change the order of additions in these only. All functions are in one file:
numba caches a compiled function until its own file changes, and does not notice changes of functions in other files.
"""

from __future__ import annotations

import numba
import numpy as np
import torch

from census_scvi.model.compiled import in_threads
from census_scvi.training.fast.decoded import Decoded, LossAndSlopes

_each = numba.njit(fastmath={"contract"}, error_model="numpy", nogil=True, cache=True)
_sum = numba.njit(fastmath={"contract", "reassoc", "nsz"}, error_model="numpy", nogil=True, cache=True)
_most = numba.njit(fastmath={"nnan", "nsz", "reassoc"}, nogil=True, cache=True)
_inlined = numba.njit(inline="always")

_ONE = np.float32(1)
_EPS = np.float32(1e-8)


def loss_and_slopes(decoded: Decoded, *, slopes: bool = True) -> LossAndSlopes:
    """Loss of each cell and, if `slopes`, its derivatives, which overwrite the logits; in torch's number of threads."""
    logits, dropout, counts = decoded.logits, decoded.dropout, decoded.counts
    theta, row_of_cell = decoded.theta, decoded.row_of_cell
    n_cells, n_genes = logits.shape
    last = counts.n_detected.cumsum(0)
    loss = torch.empty(n_cells)
    parts = min(torch.get_num_threads(), n_cells)
    one_row = len(theta) == 1
    # One row per thread if all cells share one theta; else one row per cell, added to its row of theta at the end.
    of_theta = torch.zeros(parts if one_row else n_cells, n_genes)
    inflated = dropout is not None
    missed = logits if dropout is None else dropout
    a_cell = (logits, missed, last - counts.n_detected, last, counts.library_size(), row_of_cell)

    def work(part: int) -> None:
        cells = slice(n_cells * part // parts, n_cells * (part + 1) // parts)
        sums = of_theta[part : part + 1] if one_row else of_theta[cells]
        arrays = (*(each[cells] for each in a_cell), counts.genes, counts.counts, theta, loss[cells], sums)
        _cells(*(array.detach().numpy() for array in arrays), inflated, slopes)

    in_threads(work, parts)
    if not slopes:
        return LossAndSlopes(loss)
    if one_row:
        return LossAndSlopes(loss, logits, of_theta.sum(0, keepdim=True), dropout)
    return LossAndSlopes(loss, logits, torch.zeros_like(theta).index_add_(0, row_of_cell, of_theta), dropout)


@numba.njit(nogil=True, cache=True)
def _cells(  # type: ignore[no-untyped-def]  # numba infers the types
    logits, dropout, first, last, library, row_of_cell, genes, counts, theta, loss, of_theta, inflated, slopes
):
    n_genes = logits.shape[1]
    # Separate arrays, because the compiler does not know that rows of one array are contiguous.
    share, mu, fall = np.empty(n_genes, np.float32), np.empty(n_genes, np.float32), np.empty(n_genes, np.float32)
    odds, weight = np.empty(n_genes, np.float32), np.empty(n_genes, np.float32)
    all_x, all_mu = np.empty(n_genes, np.float32), np.empty(n_genes, np.float32)
    all_theta, all_terms = np.empty(n_genes, np.float32), np.empty(n_genes, np.float32)
    for cell in range(len(logits)):
        row, theta_row = logits[cell], theta[row_of_cell[cell]]
        non_zeros = slice(first[cell], last[cell])
        there = genes[non_zeros]
        n = len(there)
        x, mu_x, theta_x, term = all_x[:n], all_mu[:n], all_theta[:n], all_terms[:n]
        _exp_below(row, _largest(row), share)
        _divide(share, np.float32(_total(share)), library[cell], mu)
        _fall(mu, theta_row, fall)
        _gather(there, counts[non_zeros], mu, theta_row, x, mu_x, theta_x)
        _gain(x, mu_x, theta_x, term)
        if inflated:
            _odds(theta_row, fall, dropout[cell], odds)
            _inflated_loss(odds, dropout[cell], weight)
            _add_softplus_of_minus(there, odds, weight)
            loss[cell] = _total(weight) - _total(term)
        else:
            loss[cell] = -_dot(theta_row, fall) - _total(term)
        if slopes:
            target = of_theta[min(cell, len(of_theta) - 1)]
            _slope_of_mu(mu, theta_row, row)
            if inflated:
                _weight(odds, weight)
                _set_one(there, weight)
                _add_weighted_slope_of_theta(weight, fall, row, theta_row, target)
                _multiply(weight, row)
                _slope_of_dropout(weight, dropout[cell])
            else:
                _add_slope_of_theta(fall, row, theta_row, target)
            _slopes_of_counts(x, mu_x, theta_x, term)
            _scatter(there, term, theta_x, row, target)
            _slope_of_logits(mu, np.float32(_dot(share, row)), row)


@_each
def _exp_below(row, most, out):  # type: ignore[no-untyped-def]  # numba infers the types
    for i in range(len(row)):
        out[i] = _exp(row[i] - most)


@_each
def _divide(share, total, library, mu):  # type: ignore[no-untyped-def]  # numba infers the types
    for i in range(len(share)):
        share[i] /= total
        mu[i] = share[i] * library


@_each
def _fall(mu, theta, out):  # type: ignore[no-untyped-def]  # numba infers the types
    """log(theta + eps) - log t, computed as -log(1 + mu / (theta + eps)), which is accurate for small mu."""
    for i in range(len(mu)):
        out[i] = -_log_above_one(mu[i] / (theta[i] + _EPS))


@_each
def _slope_of_mu(mu, theta, out):  # type: ignore[no-untyped-def]  # numba infers the types
    for i in range(len(mu)):
        out[i] = theta[i] / (theta[i] + mu[i] + _EPS)


@_each
def _add_slope_of_theta(fall, slope_of_mu, theta, out):  # type: ignore[no-untyped-def]  # numba infers the types
    for i in range(len(fall)):
        out[i] += slope_of_mu[i] - fall[i] - theta[i] / (theta[i] + _EPS)


@_each
def _slope_of_logits(mu, mean, row):  # type: ignore[no-untyped-def]  # numba infers the types
    for i in range(len(row)):
        row[i] = mu[i] * (row[i] - mean)


@_each
def _gather(genes, counts, mu, theta, x, mu_x, theta_x):  # type: ignore[no-untyped-def]  # numba infers the types
    for i in range(len(genes)):
        gene = genes[i]
        x[i], mu_x[i], theta_x[i] = counts[i], mu[gene], theta[gene]


@_each
def _scatter(genes, slope_of_mu, slope_of_theta, row, of_theta):  # type: ignore[no-untyped-def]  # numba infers the types
    for i in range(len(genes)):
        gene = genes[i]
        row[gene] += slope_of_mu[i]
        of_theta[gene] += slope_of_theta[i]


@_each
def _gain(x, mu, theta, out):  # type: ignore[no-untyped-def]  # numba infers the types
    """Additional terms of the log-likelihood for non-zero counts."""
    for i in range(len(x)):
        some = mu[i] + _EPS
        out[i] = x[i] * _log(some / (theta[i] + some)) + _lgamma_rise(theta[i], x[i]) - _lgamma_rise(_ONE, x[i])


@_each
def _slopes_of_counts(x, mu, theta, of_mu):  # type: ignore[no-untyped-def]  # numba infers the types
    """Additional terms of the gradients for non-zero counts; the terms of theta overwrite theta."""
    for i in range(len(x)):
        some = mu[i] + _EPS
        by_total = x[i] / (theta[i] + some)
        of_mu[i] = by_total - x[i] / some
        theta[i] = by_total - _digamma_rise(theta[i], x[i])


# Zero inflation.


@_each
def _odds(theta, fall, dropout, out):  # type: ignore[no-untyped-def]  # numba infers the types
    for i in range(len(out)):
        out[i] = theta[i] * fall[i] - dropout[i]


@_each
def _inflated_loss(odds, dropout, out):  # type: ignore[no-untyped-def]  # numba infers the types
    for i in range(len(out)):
        out[i] = _softplus(-dropout[i]) - _softplus(odds[i])


@_each
def _add_softplus_of_minus(genes, odds, out):  # type: ignore[no-untyped-def]  # numba infers the types
    for i in range(len(genes)):
        out[genes[i]] += _softplus(-odds[genes[i]])


@_each
def _weight(odds, out):  # type: ignore[no-untyped-def]  # numba infers the types
    for i in range(len(out)):
        out[i] = _sigmoid(odds[i])


@_each
def _set_one(genes, out):  # type: ignore[no-untyped-def]  # numba infers the types
    for i in range(len(genes)):
        out[genes[i]] = 1


@_each
def _add_weighted_slope_of_theta(weight, fall, slope_of_mu, theta, out):  # type: ignore[no-untyped-def]  # numba infers the types
    for i in range(len(fall)):
        out[i] += weight[i] * (slope_of_mu[i] - fall[i] - theta[i] / (theta[i] + _EPS))


@_each
def _multiply(weight, out):  # type: ignore[no-untyped-def]  # numba infers the types
    for i in range(len(out)):
        out[i] *= weight[i]


@_each
def _slope_of_dropout(weight, dropout):  # type: ignore[no-untyped-def]  # numba infers the types
    for i in range(len(dropout)):
        dropout[i] = weight[i] - _sigmoid(-dropout[i])


@_most
def _largest(row):  # type: ignore[no-untyped-def]  # numba infers the types
    most = row[0]
    for i in range(len(row)):
        most = max(most, row[i])
    return most


@_sum
def _total(values):  # type: ignore[no-untyped-def]  # numba infers the types
    total = 0.0
    for i in range(len(values)):
        total += values[i]
    return total


@_sum
def _dot(some, others):  # type: ignore[no-untyped-def]  # numba infers the types
    total = 0.0
    for i in range(len(some)):
        total += some[i] * others[i]
    return total


@_inlined
def _exp(x):  # type: ignore[no-untyped-def]  # numba infers the types
    """Exponential of x <= 0 within 2 units in the last place (Cephes' expf); 1e-38 for x < -87; NaN stays NaN."""
    x = np.float32(-87) if x < np.float32(-87) else x
    n = np.floor(x * np.float32(1.44269504088896341) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + _ONE
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@_inlined
def _log(x):  # type: ignore[no-untyped-def]  # numba infers the types
    """Natural logarithm of x > 1e-38 within 2 units in the last place (Cephes' logf); NaN and infinity give NaN."""
    bits = np.float32(x).view(np.int32)
    exponent = np.int32((bits - np.int32(0x3F3504F3)) >> np.int32(23))
    m = np.int32(bits - (exponent << np.int32(23))).view(np.float32) - _ONE
    p = np.float32(7.0376836292e-2)
    p = p * m - np.float32(1.1514610310e-1)
    p = p * m + np.float32(1.1676998740e-1)
    p = p * m - np.float32(1.2420140846e-1)
    p = p * m + np.float32(1.4249322787e-1)
    p = p * m - np.float32(1.6668057665e-1)
    p = p * m + np.float32(2.0000714765e-1)
    p = p * m - np.float32(2.4999993993e-1)
    p = p * m + np.float32(3.3333331174e-1)
    z = m * m
    return m - np.float32(0.5) * z + m * z * p + np.float32(exponent) * np.float32(0.693147180559945) + (x - x)


@_inlined
def _log_above_one(y):  # type: ignore[no-untyped-def]  # numba infers the types
    """log(1 + y) for y >= 0, accurate for small y too."""
    rounded = _ONE + y
    return _log(rounded) + (y - (rounded - _ONE)) / rounded


@_inlined
def _softplus(a):  # type: ignore[no-untyped-def]  # numba infers the types
    """log(1 + exp(a))."""
    below = -a if a > 0 else a
    return (a if a > 0 else np.float32(0)) + _log_above_one(_exp(below))


@_inlined
def _sigmoid(a):  # type: ignore[no-untyped-def]  # numba infers the types
    some = _exp(-a if a > 0 else a)
    return (_ONE if a > 0 else some) / (_ONE + some)


@_inlined
def _lgamma_rise(z, x):  # type: ignore[no-untyped-def]  # numba infers the types
    """lgamma(z + x) - lgamma(z) for z > 0 and x >= 0.

    Both are computed by Stirling's series at z + 4, with lgamma(z) = lgamma(z + 4) - log(z (z + 1) (z + 2) (z + 3)).
    Terms that both have in common are cancelled before rounding, so that a large z loses no digits.
    """
    low, high = z + np.float32(4), z + x + np.float32(4)
    steps = (z + x) * (z + x + np.float32(1)) / (z * (z + np.float32(1)))
    steps *= (z + x + np.float32(2)) * (z + x + np.float32(3)) / ((z + np.float32(2)) * (z + np.float32(3)))
    series = _stirling(high) - _stirling(low)
    return x * _log(high) + (low - np.float32(0.5)) * _log_above_one(x / low) - x + series - _log(steps)


@_inlined
def _stirling(y):  # type: ignore[no-untyped-def]  # numba infers the types
    r = _ONE / y
    square = r * r
    return r * (np.float32(1 / 12) - square * (np.float32(1 / 360) - square * np.float32(1 / 1260)))


@_inlined
def _digamma_rise(z, x):  # type: ignore[no-untyped-def]  # numba infers the types
    """digamma(z + x) - digamma(z), the derivative of `_lgamma_rise` with respect to z."""
    low, high = z + np.float32(4), z + x + np.float32(4)
    return _log_above_one(x / low) + _digamma_series(high) - _digamma_series(low) + _steps(z) - _steps(z + x)


@_inlined
def _digamma_series(y):  # type: ignore[no-untyped-def]  # numba infers the types
    r = _ONE / y
    square = r * r
    return -np.float32(0.5) * r - square * (
        np.float32(1 / 12) - square * (np.float32(1 / 120) - square * np.float32(1 / 252))
    )


@_inlined
def _steps(z):  # type: ignore[no-untyped-def]  # numba infers the types
    return _ONE / z + _ONE / (z + np.float32(1)) + _ONE / (z + np.float32(2)) + _ONE / (z + np.float32(3))
