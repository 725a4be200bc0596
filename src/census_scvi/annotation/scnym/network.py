"""The classifier, and the domain adversary with its gradient reversal."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from census_scvi.annotation.scnym.settings import Hyperparameters

_DROPOUT = 0.5
TOTAL = 1e6  # counts per cell after normalisation: log(CPM + 1)


class ResidualBlock(nn.Module):
    """Two linear layers with batch normalisation whose input is added to their output."""

    def __init__(self, n_hidden: int) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Linear(n_hidden, n_hidden), nn.BatchNorm1d(n_hidden)
        self.second, self.second_norm = nn.Linear(n_hidden, n_hidden), nn.BatchNorm1d(n_hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(cells, n_hidden) to (cells, n_hidden)."""
        inner = self.first_norm(self.first(x)).relu()
        return (self.second_norm(self.second(inner)) + x).relu()


class CellTypeClassifier(nn.Module):
    """Hidden layers of Linear, BatchNorm, Dropout and ReLU, and a linear layer with one output per class.

    Attributes
    ----------
    embed
        The hidden layers.
    classify
        The last layer.
    """

    def __init__(self, n_genes: int, n_classes: int, settings: Hyperparameters) -> None:
        super().__init__()
        self.n_genes, self.n_classes, self.n_hidden = n_genes, n_classes, settings.n_hidden
        self.init_dropout = settings.init_dropout
        layers = [
            *_layer(nn.Linear(n_genes, settings.n_hidden_init), settings.n_hidden_init),
            *_layer(nn.Linear(settings.n_hidden_init, settings.n_hidden), settings.n_hidden),
        ]
        for _ in range(settings.n_layers - 1):  # every layer has weights of its own
            hidden = ResidualBlock(self.n_hidden) if settings.residual else nn.Linear(self.n_hidden, self.n_hidden)
            layers += _layer(hidden, self.n_hidden)
        self.embed = nn.Sequential(*layers)
        self.classify = nn.Linear(self.n_hidden, n_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, (cells, classes), of log(CPM + 1), (cells, genes)."""
        logits: torch.Tensor = self.classify(self.embed(self._dropped(x)))
        return logits

    def penultimate(self, x: torch.Tensor) -> torch.Tensor:
        """The last hidden layer before its ReLU, (cells, n_hidden); the embedding that scNym calls X_scnym."""
        hidden: torch.Tensor = self.embed[:-1](x)
        return hidden

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or not self.init_dropout:
            return x
        counts = nn.functional.dropout(x.expm1(), self.init_dropout)
        return normalized(counts).log1p()


def _layer(linear: nn.Module, n_hidden: int) -> list[nn.Module]:
    return [linear, nn.BatchNorm1d(n_hidden), nn.Dropout(_DROPOUT), nn.ReLU()]


def normalized(counts: torch.Tensor) -> torch.Tensor:
    """Counts per million, (cells, genes); a cell without counts stays 0."""
    totals = counts.sum(dim=1, keepdim=True)
    return counts * torch.where(totals > 0, TOTAL / totals, 0.0)


class _Reversal(torch.autograd.Function):
    """Identity whose gradients are multiplied by -weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: float) -> torch.Tensor:
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return -ctx.weight * gradients[0], None


def reverse_gradient(x: torch.Tensor, weight: float) -> torch.Tensor:
    """`x` itself; gradients that flow back through it are multiplied by `-weight`."""
    reversed_: torch.Tensor = _Reversal.apply(x, weight)
    return reversed_


class DomainAdversary(nn.Module):
    """Predicts the domain of cells from their embedding, which is trained to make that impossible."""

    def __init__(self, n_hidden: int, n_domains: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(n_hidden, n_hidden), nn.ReLU(), nn.Linear(n_hidden, n_domains))

    def forward(self, embedding: torch.Tensor, weight: float) -> torch.Tensor:
        """Logits, (cells, domains); the embedding gets the reversed gradients, times `weight`."""
        logits: torch.Tensor = self.layers(reverse_gradient(embedding, weight))
        return logits
