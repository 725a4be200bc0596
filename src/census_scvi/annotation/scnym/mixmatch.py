"""MixMatch: pseudolabels of unlabelled cells, MixUp of all cells, and the losses of one step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import one_hot, softmax

from census_scvi.annotation.scnym.network import CellTypeClassifier, DomainAdversary
from census_scvi.annotation.scnym.settings import Hyperparameters


@dataclass(frozen=True)
class Labelled:
    """Labelled cells of a minibatch: values, (cells, genes), log(CPM + 1); the same augmented; classes and domains."""

    values: torch.Tensor
    augmented: torch.Tensor
    codes: torch.Tensor
    domains: torch.Tensor


@dataclass(frozen=True)
class Unlabelled:
    """Unlabelled cells of a minibatch: values, (cells, genes); pseudolabels, (cells, classes); which are confident."""

    values: torch.Tensor
    pseudolabels: torch.Tensor
    confident: torch.Tensor
    domains: torch.Tensor


@dataclass(frozen=True)
class Losses:
    """Losses of one step; `domain_right` is the share of the cells whose domain the adversary predicts."""

    supervised: torch.Tensor
    unsupervised: torch.Tensor
    domain: torch.Tensor
    domain_right: torch.Tensor

    def total(self, unsupervised_weight: float) -> torch.Tensor:
        """The loss to minimise. The weight of the adversary is in its reversed gradients."""
        return self.supervised + unsupervised_weight * self.unsupervised + self.domain


def sharpen(probability: torch.Tensor, temperature: float) -> torch.Tensor:
    """Probabilities, (cells, classes), to the power 1 / temperature, normalised again."""
    if temperature == 1.0:
        return probability
    powered = probability.pow(1.0 / temperature)
    return powered / powered.sum(dim=1, keepdim=True)


@torch.no_grad()
def pseudolabels(
    teacher: CellTypeClassifier, copies: list[torch.Tensor], temperature: float, min_confidence: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sharpened predictions of the teacher for unlabelled cells, and which of them are confident.

    Parameters
    ----------
    teacher
        Predicts in evaluation mode; its mode is restored.
    copies
        (cells, genes) each: the cells, possibly augmented in several ways; predictions are averaged.
    temperature, min_confidence
        `T` and `pseudolabel_min_confidence`.

    Returns
    -------
    float32 (cells, classes), bool (cells,).
    """
    training = teacher.training
    teacher.eval()
    mean = torch.stack([softmax(teacher(values), dim=1) for values in copies]).mean(dim=0)
    teacher.train(training)
    return sharpen(mean, temperature), mean.amax(dim=1) >= min_confidence


def mix_up(values: torch.Tensor, labels: torch.Tensor, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix every cell, and its label, with a random other one; at least half of the mixture is the cell itself.

    Parameters
    ----------
    values, labels
        (cells, genes) and (cells, classes).
    alpha
        Both parameters of the Beta distribution of the shares; 0: nothing is mixed.
    """
    if alpha == 0.0:
        return values, labels
    others = torch.randperm(len(values)).to(values.device)
    share = torch.distributions.Beta(alpha, alpha).sample((len(values),))
    share = torch.maximum(share, 1 - share).unsqueeze(1).to(values.device)
    return torch.lerp(values[others], values, share), torch.lerp(labels[others], labels, share)


def mixmatch_losses(
    network: CellTypeClassifier, labelled: Labelled, unlabelled: Unlabelled, settings: Hyperparameters
) -> tuple[torch.Tensor, torch.Tensor]:
    """Supervised and unsupervised loss of one step.

    Unlabelled cells without a confident pseudolabel are not mixed and have no loss, but pass through the network, so
    that its batch normalisation sees them.
    """
    classes = one_hot(labelled.codes, network.n_classes).to(labelled.augmented.dtype)
    sure, unsure = unlabelled.confident, ~unlabelled.confident
    values, labels = mix_up(
        torch.cat([unlabelled.values[sure], labelled.augmented]),
        torch.cat([unlabelled.pseudolabels[sure], classes]),
        settings.mixup_alpha,
    )
    n_sure = len(values) - len(labelled.codes)
    predicted = network(torch.cat([values[:n_sure], unlabelled.values[unsure]]))
    targets = torch.cat([labels[:n_sure], unlabelled.pseudolabels[unsure]])
    per_cell = _distance(predicted, targets, settings.unsup_criterion)
    used = torch.arange(len(per_cell), device=per_cell.device) < n_sure
    return cross_entropy(network(values[n_sure:]), labels[n_sure:]).mean(), (per_cell * used).mean()


def _distance(logits: torch.Tensor, labels: torch.Tensor, criterion: str) -> torch.Tensor:
    """Loss of pseudolabels, (cells,)."""
    if criterion == "ce":
        return cross_entropy(logits, labels)
    return (softmax(logits, dim=1) - labels).square().sum(dim=1)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of logits and probabilities, both (cells, classes): (cells,)."""
    return -(labels * logits.log_softmax(dim=1)).sum(dim=1)


def domain_loss(
    network: CellTypeClassifier,
    adversary: DomainAdversary,
    values: torch.Tensor,
    domains: torch.Tensor,
    weight: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of the adversary, and the share of the cells whose domain it predicts.

    Parameters
    ----------
    values, domains
        (cells, genes) and int64 (cells,), without augmentation: it would give away the domain.
    weight
        Weight of the reversed gradients that the network gets.
    """
    logits = adversary(network.embed(values), weight)
    right = (logits.argmax(dim=1) == domains).float().mean()
    return torch.nn.functional.cross_entropy(logits, domains), right
