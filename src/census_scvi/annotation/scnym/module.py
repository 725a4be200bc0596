"""The training step in Lightning: MixMatch and the domain adversary on minibatches of labelled and unlabelled cells."""

from __future__ import annotations

import copy
from typing import Any

import lightning
import torch
from torch.nn.functional import one_hot

from census_scvi.annotation.scnym.cells import drop, log_cpm
from census_scvi.annotation.scnym.minibatches import Minibatch
from census_scvi.annotation.scnym.mixmatch import (
    Labelled,
    Losses,
    Unlabelled,
    cross_entropy,
    domain_loss,
    mixmatch_losses,
    pseudolabels,
)
from census_scvi.annotation.scnym.network import CellTypeClassifier, DomainAdversary
from census_scvi.annotation.scnym.settings import Hyperparameters
from census_scvi.counts.minibatch import SparseCounts

_DROPPED = 0.1  # share of the counts that the augmentation drops
VALIDATION_LOSS = "validation_loss"


class ScNymModule(lightning.LightningModule):
    """Trains a classifier.

    Parameters
    ----------
    network
        The classifier, trained in place.
    n_domains
        Number of domains; the adversary needs two.
    settings
        Hyper-parameters.
    """

    def __init__(self, network: CellTypeClassifier, n_domains: int, settings: Hyperparameters) -> None:
        super().__init__()
        self.network, self.settings = network, settings
        self.adversary = None
        if settings.dan_max_weight > 0 and n_domains > 1:
            self.adversary = DomainAdversary(network.n_hidden, n_domains)
        self.teacher = None
        if settings.unsup_mean_teacher:
            self.teacher = copy.deepcopy(network).requires_grad_(False)
        self._validated = torch.zeros(3)

    def configure_optimizers(self) -> Any:
        """The optimiser of classifier and adversary."""
        settings = self.settings
        parameters = [*self.network.parameters(), *(self.adversary.parameters() if self.adversary else ())]
        common: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
        if settings.optimizer_name != "sgd":
            kinds = {"adadelta": torch.optim.Adadelta, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
            return kinds[settings.optimizer_name](parameters, **common)
        optimizer = torch.optim.SGD(parameters, momentum=0.9, **common)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.n_epochs, eta_min=settings.lr / 1e4)
        return [optimizer], [schedule]

    def training_step(self, minibatch: Minibatch, index: int) -> torch.Tensor:
        """The loss of one step."""
        if "unlabelled_counts" not in minibatch:
            losses = self._without_unlabelled(minibatch)
        else:
            self._update_teacher()
            losses = self._with_unlabelled(minibatch)
        weight = self.settings.unsupervised_weight(self.current_epoch)
        loss = losses.total(weight)
        self._log(losses, loss, weight, len(minibatch["codes"]))
        return loss

    def _without_unlabelled(self, minibatch: Minibatch) -> Losses:
        values = log_cpm(minibatch["counts"])
        labels = one_hot(minibatch["codes"], self.network.n_classes).to(values.dtype)
        supervised = cross_entropy(self.network(values), labels).mean()
        return self._losses(supervised, supervised.new_zeros(()), values, minibatch["domains"])

    def _with_unlabelled(self, minibatch: Minibatch) -> Losses:
        settings, counts = self.settings, minibatch["unlabelled_counts"]
        others = log_cpm(counts)
        labels, confident = pseudolabels(
            self.teacher or self.network,
            [self._augmented(counts) for _ in range(settings.n_augmentations)]
            if settings.augment_pseudolabels
            else [others],
            settings.T,
            settings.pseudolabel_min_confidence,
        )
        labelled = Labelled(
            log_cpm(minibatch["counts"]),
            self._augmented(minibatch["counts"]),
            minibatch["codes"],
            minibatch["domains"],
        )
        unlabelled = Unlabelled(others, labels, confident, minibatch["unlabelled_domains"])
        used = confident.float().mean()
        self.log("confident_pseudolabels", used, on_step=False, on_epoch=True, batch_size=len(others))
        supervised, unsupervised = mixmatch_losses(self.network, labelled, unlabelled, settings)
        shown = confident if settings.dan_use_conf_pseudolabels else torch.ones_like(confident)
        return self._losses(
            supervised,
            unsupervised,
            torch.cat([labelled.values, others[shown]]),
            torch.cat([labelled.domains, unlabelled.domains[shown]]),
        )

    def _losses(
        self, supervised: torch.Tensor, unsupervised: torch.Tensor, values: torch.Tensor, domains: torch.Tensor
    ) -> Losses:
        if self.adversary is None:
            nothing = supervised.new_zeros(())
            return Losses(supervised, unsupervised, nothing, nothing)
        weight = self.settings.domain_weight(self.current_epoch)
        return Losses(supervised, unsupervised, *domain_loss(self.network, self.adversary, values, domains, weight))

    def _augmented(self, counts: SparseCounts) -> torch.Tensor:
        return log_cpm(drop(counts, _DROPPED) if self.settings.augment == "log1p_drop" else counts)

    def _update_teacher(self) -> None:
        """Move the teacher towards the classifier; its batch statistics are those of the classifier."""
        if self.teacher is None:
            return
        # In the first steps, the mean over all steps.
        decay = min(1 - 1 / (self.global_step + 1), self.settings.decay_coef)
        with torch.no_grad():
            for mine, current in zip(self.teacher.parameters(), self.network.parameters(), strict=True):
                mine.lerp_(current, 1 - decay)
            for average, statistic in zip(self.teacher.buffers(), self.network.buffers(), strict=True):
                average.copy_(statistic)

    def _log(self, losses: Losses, loss: torch.Tensor, weight: float, n_cells: int) -> None:
        values = {"train_loss": loss, "supervised_loss": losses.supervised}
        if weight or losses.unsupervised.requires_grad:
            values |= {"unsupervised_loss": losses.unsupervised, "unsupervised_weight": torch.tensor(weight)}
        if self.adversary is not None:
            domain = torch.tensor(self.settings.domain_weight(self.current_epoch))
            values |= {"domain_loss": losses.domain, "domain_accuracy": losses.domain_right, "domain_weight": domain}
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=n_cells)

    def on_validation_epoch_start(self) -> None:
        """Start the sums over the validation cells."""
        self._validated = torch.zeros(3, device=self.device)

    def validation_step(self, minibatch: Minibatch, index: int) -> None:
        """Add up loss and right labels of the cells."""
        codes = minibatch["codes"]
        logits = self.network(log_cpm(minibatch["counts"]))
        loss = torch.nn.functional.cross_entropy(logits, codes, reduction="sum")
        right = (logits.argmax(dim=1) == codes).sum()
        self._validated += torch.stack([loss, right, torch.tensor(len(codes), device=self.device)])

    def on_validation_epoch_end(self) -> None:
        """Log the means over all validation cells: every cell counts the same, whatever its minibatch."""
        loss, right, n_cells = self._validated
        self.log_dict({VALIDATION_LOSS: loss / n_cells, "validation_accuracy": right / n_cells})
