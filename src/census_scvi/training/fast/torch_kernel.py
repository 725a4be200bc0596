"""`negative_binomial.loss_and_slopes` with torch's operations, for any device and float dtype."""

from __future__ import annotations

import torch
from torch.nn.functional import softplus

from census_scvi.training.fast.decoded import Decoded, LossAndSlopes

_EPS = 1e-8  # as in scvi-tools


def loss_and_slopes(decoded: Decoded, *, slopes: bool = True) -> LossAndSlopes:
    """Loss of each cell and, if `slopes`, its derivatives; does not overwrite the logits."""
    logits, dropout, counts = decoded.logits, decoded.dropout, decoded.counts
    theta, row_of_cell = decoded.theta, decoded.row_of_cell
    share = torch.softmax(logits, dim=-1)
    mu = share * counts.library_size(logits.dtype).unsqueeze(1)
    of_cell = theta if len(theta) == 1 else theta[row_of_cell]
    total = (mu + of_cell).add_(_EPS)
    fall = (mu / (of_cell + _EPS)).log1p_().neg_()  # log(theta + eps) - log t, accurate for small mu

    cells, places = counts.cells(), counts.places()
    x = counts.counts.to(logits.dtype)
    theta_x = theta.view(-1)[row_of_cell[cells] * counts.n_genes + counts.genes.long()]
    mu_x, total_x = mu.view(-1)[places] + _EPS, total.view(-1)[places]
    gain = x * (mu_x / total_x).log() + (x + theta_x).lgamma() - theta_x.lgamma() - (x + 1).lgamma()
    if dropout is None:
        loss = -(fall @ theta[0] if len(theta) == 1 else (of_cell * fall).sum(1))
    else:
        odds = of_cell * fall - dropout
        loss = (softplus(-dropout) - softplus(odds)).sum(1)
        gain -= softplus(-odds.view(-1)[places])
    loss -= counts.sum_of_cells(gain)
    if not slopes:
        return LossAndSlopes(loss)

    of_mu = of_cell / total
    of_theta = of_mu.sub(fall).sub_(of_cell / (of_cell + _EPS))
    of_dropout = None
    if dropout is not None:
        weight = odds.sigmoid_()
        weight.view(-1)[places] = 1
        of_mu, of_theta = of_mu.mul_(weight), of_theta.mul_(weight)
        of_dropout = weight.sub_(torch.sigmoid(-dropout))
    of_theta.view(-1)[places] += x / total_x - (x + theta_x).digamma() + theta_x.digamma()
    of_mu.view(-1)[places] += x / total_x - x / mu_x
    of_logits = of_mu.sub_((share * of_mu).sum(1, keepdim=True)).mul_(mu)
    of_rows = torch.zeros_like(theta).index_add_(0, row_of_cell, of_theta)
    return LossAndSlopes(loss, of_logits, of_rows, of_dropout)
