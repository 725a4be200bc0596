"""The reconstruction loss of scVI for counts that are mostly 0: the same number, without the work that cancels.

A cell with counts x_g and library size l = sum of x_g, whose decoder gives the logits a_g, has the expected counts
mu_g = l p_g with p = softmax(a), and with the inverse dispersion theta_g the log-likelihood of scvi-tools'
`log_nb_positive` (eps = 1e-8, t_g = theta_g + mu_g + eps)

    log p(x) = sum over all genes of    theta_g (log(theta_g + eps) - log t_g)
             + sum over x_g > 0   of    x_g (log(mu_g + eps) - log t_g)
                                        + lgamma(x_g + theta_g) - lgamma(theta_g) - lgamma(x_g + 1).

The second sum of scvi-tools runs over all genes too; where x_g = 0 each of its terms is exactly 0, for lgamma(theta) -
lgamma(theta) = 0 and lgamma(1) = 0. So the gamma functions, the dearest part, are left to the counts that are there.
The derivatives split in the same way. With the loss = -log p(x):

    d loss / d mu_g    = theta_g / t_g                                            all genes
                       + x_g / t_g - x_g / (mu_g + eps)                           where x_g > 0
    d loss / d theta_g = log t_g - log(theta_g + eps) - theta_g / (theta_g + eps) + theta_g / t_g
                       + x_g / t_g - digamma(x_g + theta_g) + digamma(theta_g)    where x_g > 0

and through mu = l softmax(a), with s_g = d loss / d mu_g,

    d loss / d a_g     = l p_g (s_g - sum over h of p_h s_h).

All of it needs one row of logits at a time, so that loss and derivatives are made in one go, the latter in the memory
of the logits; a cell without counts (l = 0) has mu = 0 and no derivative, as in scvi-tools. What is left for autograd
are the matrix products around it, and the decoder's head for dropout, which only zinb uses, is not computed.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch

from census_scvi.counts.minibatch import SparseCounts
from census_scvi.model.fast.products import product_dtype, times_transposed

log = logging.getLogger(__name__)

EPS = 1e-8  # scvi-tools'


@dataclass(frozen=True)
class Dispersion:
    """Inverse dispersion theta of genes, shared by cells.

    Attributes
    ----------
    theta
        float (rows, genes): one row for all cells, or one a batch, label or cell.
    row_of_cell
        int64 (cells,): the row that is a cell's.
    """

    theta: torch.Tensor
    row_of_cell: torch.Tensor


class Slopes(NamedTuple):
    """Loss of each cell and derivatives of the sum over cells.

    `loss` (cells,); `logits` (cells, genes) and `theta` (rows, genes), or None where no derivatives were asked for.
    """

    loss: torch.Tensor
    logits: torch.Tensor | None
    theta: torch.Tensor | None


def reconstruction_loss(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dispersion: Dispersion, counts: SparseCounts
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of counts under the decoder's negative binomial.

    Parameters
    ----------
    hidden
        float (cells, n_hidden): the decoder's last hidden layer.
    weight, bias
        float (genes, n_hidden) and (genes,): `px_scale_decoder`'s linear layer, which gives the logits.
    dispersion
        theta of the genes.
    counts
        Counts of the cells.

    Returns
    -------
    The mean over cells, which carries gradients to all but the counts, and the loss of each cell (cells,), which does
    not.
    """
    return _ReconstructionLoss.apply(hidden, weight, bias, dispersion.theta, dispersion.row_of_cell, counts)


class _ReconstructionLoss(torch.autograd.Function):
    """The decoder's last product and the loss in one, so that the logits' memory serves their derivatives too."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        theta: torch.Tensor,
        row_of_cell: torch.Tensor,
        counts: SparseCounts,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wanted = any(ctx.needs_input_grad)
        dtype = product_dtype(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            logits = times_transposed(hidden, weight, bias.to(dtype)).to(theta.dtype)
            slopes = loss_and_slopes(logits, Dispersion(theta, row_of_cell), counts, slopes=wanted)
        if slopes.logits is not None:
            most = torch.finfo(dtype).max  # of float16: 65,504, which the slope of a larger count may exceed
            of_logits = slopes.logits if dtype == slopes.logits.dtype else slopes.logits.clamp_(-most, most).to(dtype)
            ctx.save_for_backward(hidden, weight, of_logits, slopes.theta)
        ctx.mark_non_differentiable(slopes.loss)
        return slopes.loss.mean(), slopes.loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_mean: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, logits, theta = ctx.saved_tensors
        scale = of_mean / len(logits)
        # The scale goes to the smaller factor; float16 keeps the slopes of single cells, not those divided by cells.
        of_weight = times_transposed(logits.T, (hidden * scale.to(hidden.dtype)).T)
        of_hidden = times_transposed(logits, weight.T) * scale
        of_bias = logits.sum(0, dtype=theta.dtype) * scale
        return of_hidden, of_weight.to(theta.dtype), of_bias, theta * scale, None, None


def loss_and_slopes(
    logits: torch.Tensor, dispersion: Dispersion, counts: SparseCounts, *, slopes: bool = True
) -> Slopes:
    """Loss of each cell and its derivatives, by the kernel for the device; the logits are overwritten.

    Parameters
    ----------
    logits
        float (cells, genes), contiguous.
    dispersion
        theta of the genes, of the logits' dtype.
    counts
        Counts of the cells.
    slopes
        Whether derivatives are wanted.
    """
    kernel = _kernel(logits.device.type) if logits.dtype == torch.float32 else None
    if kernel is None or logits.shape[1] > kernel.MOST_GENES:
        return by_torch(logits, dispersion, counts, slopes=slopes)
    return Slopes(*kernel.loss_and_slopes(logits, dispersion.theta, dispersion.row_of_cell, counts, slopes=slopes))


@cache
def _kernel(device: str) -> ModuleType | None:
    """The kernel for a kind of device, if there is one and it gives here what torch gives."""
    name = {"cpu": "cpu_kernel", "cuda": "gpu_kernel"}.get(device)
    if name is None:
        return None
    try:
        kernel = import_module(f"census_scvi.model.fast.{name}")
        _compare(kernel, device)
    except Exception as error:  # whatever compilers raise: torch does without them
        log.warning(
            "the training step's kernel for %s cannot be used here (%s: %s); torch's own operations take its place,"
            " which are slower",
            device,
            type(error).__name__,
            (str(error).strip().splitlines() or ["no reason given"])[0],
        )
        return None
    return kernel


def _compare(kernel: ModuleType, device: str) -> None:
    """ArithmeticError where the kernel differs from torch on a few cells."""
    genes = torch.arange(50, device=device)
    logits = (genes * torch.tensor([[0.7], [0.1], [0.3]], device=device)).sin()
    n_detected = torch.tensor([5, 0, 45], device=device)
    few = SparseCounts(n_detected, genes.to(torch.uint16), (1 + genes**2).to(torch.uint16), 50)
    for rows in (1, 3):
        theta = (1 + genes * torch.ones(rows, 1, device=device)) / 10
        dispersion = Dispersion(theta, torch.arange(3, device=device) % rows)
        made = kernel.loss_and_slopes(logits.clone(), theta, dispersion.row_of_cell, few)
        for found, expected in zip(made, by_torch(logits.clone(), dispersion, few), strict=True):
            assert expected is not None
            difference = ((found - expected).abs().max() / expected.abs().max()).item()
            if not difference < 1e-4:
                raise ArithmeticError(f"its results differ from torch's by {difference:.1e} of their size")


def by_torch(logits: torch.Tensor, dispersion: Dispersion, counts: SparseCounts, *, slopes: bool = True) -> Slopes:
    """The same in torch's own operations, for any float dtype and device."""
    library = counts.library_size(logits.dtype).unsqueeze(1)
    share = torch.softmax(logits, dim=-1)
    rows = dispersion.row_of_cell
    theta = dispersion.theta if len(dispersion.theta) == 1 else dispersion.theta[rows]
    mu = share * library
    total = (mu + theta).add_(EPS)
    fall = -(mu / (theta + EPS)).log1p()
    loss = -(fall @ theta[0] if len(theta) == 1 else (theta * fall).sum(1))

    cells, places = counts.cells(), counts.places()
    x = counts.counts.to(logits.dtype)
    theta_x = dispersion.theta.view(-1)[rows[cells] * counts.n_genes + counts.genes.long()]
    mu_x, total_x = mu.view(-1)[places] + EPS, total.view(-1)[places]
    gain = x * (mu_x / total_x).log() + (x + theta_x).lgamma() - theta_x.lgamma() - (x + 1).lgamma()
    loss -= torch.segment_reduce(gain, "sum", lengths=counts.n_detected)
    if not slopes:
        return Slopes(loss, None, None)

    of_mu = theta / total
    of_theta = of_mu.sub(fall).sub_(theta / (theta + EPS))
    of_theta.view(-1)[places] += x / total_x - (x + theta_x).digamma() + theta_x.digamma()
    of_mu.view(-1)[places] += x / total_x - x / mu_x
    of_logits = of_mu.sub_((share * of_mu).sum(1, keepdim=True)).mul_(mu)
    summed = torch.zeros_like(dispersion.theta).index_add_(0, rows, of_theta)
    return Slopes(loss, of_logits, summed)
