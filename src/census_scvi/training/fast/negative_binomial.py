"""The reconstruction loss of scVI for counts that are mostly 0: the same value, without computing terms that cancel.

A cell has counts x_g and library size l = sum of x_g. The decoder gives the logits a_g, so the expected counts are
mu_g = l p_g with p = softmax(a). With the inverse dispersion theta_g, eps = 1e-8 and t_g = theta_g + mu_g + eps, the
log-likelihood of scvi-tools' `log_nb_positive` is

    log p(x) = sum over all genes of    theta_g (log(theta_g + eps) - log t_g)
             + sum over x_g > 0   of    x_g (log(mu_g + eps) - log t_g)
                                        + lgamma(x_g + theta_g) - lgamma(theta_g) - lgamma(x_g + 1).

In scvi-tools the second sum runs over all genes too. If x_g = 0, each of its terms is exactly 0, because
lgamma(theta) - lgamma(theta) = 0 and lgamma(1) = 0. So the gamma functions, the most expensive part, are computed for
non-zero counts only. The derivatives split in the same way. With loss = -log p(x):

    d loss / d mu_g    = theta_g / t_g                                            all genes
                       + x_g / t_g - x_g / (mu_g + eps)                           if x_g > 0
    d loss / d theta_g = log t_g - log(theta_g + eps) - theta_g / (theta_g + eps) + theta_g / t_g
                       + x_g / t_g - digamma(x_g + theta_g) + digamma(theta_g)    if x_g > 0

and through mu = l softmax(a), with s_g = d loss / d mu_g,

    d loss / d a_g     = l p_g (s_g - sum over h of p_h s_h).

With zero inflation (zinb), a second head of the decoder gives the logits b_g of dropout. With A_g = theta_g
(log(theta_g + eps) - log t_g) - b_g, scvi-tools' `log_zinb_positive` is, split in the same way,

    log p(x) = sum over all genes of    softplus(A_g) - softplus(-b_g)
             + sum over x_g > 0   of    x_g (...) + lgamma(...) ... as above, - softplus(-A_g)

Its derivatives are those above, with the parts for all genes multiplied by w_g = sigmoid(A_g), or by w_g = 1 if
x_g > 0, and

    d loss / d b_g     = w_g - sigmoid(-b_g).

The computation needs one row of logits at a time. So loss and derivatives are computed together, and the derivatives
overwrite the logits. A cell without counts (l = 0) has mu = 0 and no derivative with respect to mu, as in scvi-tools.
The matrix products before and after are computed by `products`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch

from census_scvi.counts.minibatch import SparseCounts
from census_scvi.model.compiled import require_equal, works
from census_scvi.training.fast import torch_kernel
from census_scvi.training.fast.decoded import Decoded, LossAndSlopes
from census_scvi.training.fast.products import input_gradient, layer_output, product_dtype, weight_gradient


class Dispersion(NamedTuple):
    """Inverse dispersion of genes: `theta` and `row_of_cell` of `Decoded`."""

    theta: torch.Tensor
    row_of_cell: torch.Tensor


class Head(NamedTuple):
    """A linear layer from the decoder's last hidden layer to genes: `weight` (genes, n_hidden), `bias` (genes,)."""

    weight: torch.Tensor
    bias: torch.Tensor


def reconstruction_loss(
    hidden: torch.Tensor, scale: Head, dispersion: Dispersion, counts: SparseCounts, dropout: Head | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of counts under the decoder's negative binomial.

    Parameters
    ----------
    hidden
        float (cells, n_hidden): the decoder's last hidden layer.
    scale
        `px_scale_decoder`'s layer, which gives the logits.
    dispersion
        Inverse dispersion of the genes.
    counts
        Counts of the cells.
    dropout
        Layer `px_dropout_decoder` of a zero-inflated distribution; None without zero inflation.

    Returns
    -------
    The mean over cells, with gradients with respect to all inputs except the counts, and the loss of each cell
    (cells,), without gradients.
    """
    heads = (*scale, *(dropout or (None, None)))
    return _ReconstructionLoss.apply(hidden, *heads, *dispersion, counts)


class _ReconstructionLoss(torch.autograd.Function):
    """The decoder's last matrix products and the loss together, so that the derivatives can overwrite the logits."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        weight, bias, dropout_weight, dropout_bias, theta, row_of_cell, counts = rest
        dtype = product_dtype(hidden.device, hidden.dtype)
        hidden = hidden.to(dtype)
        weights = [each.to(dtype) for each in (weight, dropout_weight) if each is not None]
        biases = [each.to(dtype) for each in (bias, dropout_bias) if each is not None]
        with torch.autocast(hidden.device.type, enabled=False):
            products = [layer_output(hidden, *head).to(theta.dtype) for head in zip(weights, biases, strict=True)]
            decoded = Decoded(products[0], theta, row_of_cell, counts, products[1] if len(products) > 1 else None)
            made = loss_and_slopes(decoded, slopes=any(ctx.needs_input_grad))
        of_products = [_narrow(each, dtype) for each in (made.logits, made.dropout) if each is not None]
        ctx.save_for_backward(hidden, made.theta, *weights, *of_products)
        ctx.mark_non_differentiable(made.loss)
        return made.loss.mean(), made.loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_mean: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, theta, *rest = ctx.saved_tensors
        weights, of_products = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        scale = of_mean / len(hidden)
        # The scale is applied to `hidden`, not to the slopes: scaled slopes may be outside the range of float16.
        scaled = hidden * scale.to(hidden.dtype)
        of_hidden = sum(input_gradient(slopes, weight) for weight, slopes in zip(weights, of_products, strict=True))
        of_heads: list[torch.Tensor | None] = []
        for slopes in of_products:
            of_heads += [weight_gradient(slopes, scaled).to(theta.dtype), slopes.sum(0, dtype=theta.dtype) * scale]
        of_heads += [None] * (4 - len(of_heads))
        return of_hidden * scale, *of_heads, theta * scale, None, None


def _narrow(slopes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert slopes to the dtype of the products; clipped, because the slope of a large count may exceed float16."""
    most = torch.finfo(dtype).max
    return slopes if slopes.dtype == dtype else slopes.clamp_(-most, most).to(dtype)


def loss_and_slopes(decoded: Decoded, *, slopes: bool = True) -> LossAndSlopes:
    """Loss of each cell and, if `slopes`, the derivatives of their sum, by the kernel for the device and dtype."""
    kernel = compiled_kernel(decoded.logits.device.type) if decoded.logits.dtype == torch.float32 else None
    return (kernel or torch_kernel).loss_and_slopes(decoded, slopes=slopes)


@cache
def compiled_kernel(device: str) -> ModuleType | None:
    """The kernel for a kind of device; None if there is none or its results on this machine differ from torch's."""
    name = {"cpu": "cpu_kernel", "cuda": "gpu_kernel"}.get(device)
    if name is None:
        return None
    module = f"census_scvi.training.fast.{name}"
    usable = works(lambda: _compare(import_module(module), device), f"the training step's kernel for {device}")
    return import_module(module) if usable else None


def _compare(kernel: ModuleType, device: str) -> None:
    """ArithmeticError if the kernel's results differ from torch's on a few cells."""
    genes = torch.arange(50, device=device)
    logits = (genes * torch.tensor([[0.7], [0.1], [0.3]], device=device)).sin()
    n_detected = torch.tensor([5, 0, 45], device=device)
    few = SparseCounts(n_detected, genes.to(torch.uint16), (1 + genes**2).to(torch.uint16), 50)
    for rows, dropout in ((1, None), (3, None), (1, logits.flip(0))):
        theta = (1 + genes * torch.ones(rows, 1, device=device)) / 10
        decoded = Decoded(logits, theta, torch.arange(3, device=device) % rows, few, dropout)
        overwritten = replace(decoded, logits=logits.clone(), dropout=None if dropout is None else dropout.clone())
        expected, made = torch_kernel.loss_and_slopes(decoded), kernel.loss_and_slopes(overwritten)
        for found, wanted in zip(made, expected, strict=True):
            require_equal(found, wanted, 1e-4)
    if device == "cuda":
        require_equal(kernel.log_counts(few), few.dense(log1p=True), 1e-6)
