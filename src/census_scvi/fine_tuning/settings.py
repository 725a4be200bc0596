"""Settings: fine-tuning of a trained model on the new cells of a Census."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from census_scvi.config.section import Changes, Section
from census_scvi.config.types import LocalPath, PathName
from census_scvi.training.settings import TrainSection

CONTINUE, NEW_BATCHES, RETRAIN = "continue", "new_batches", "retrain"
# Learning rate of scvi-tools' training plan, and the part of the training's that fine-tuning takes.
_DEFAULT_LR, _PART_OF_LR = 1e-3, 0.1


class FineTuneSection(Section):
    """Training a model further on the cells of a newer Census (fine-tune; then also prepare and train)."""

    changes: ClassVar[tuple[str, ...]] = ("train",)
    model: Annotated[PathName | None, Changes("prepare", "train")] = None
    """Model to fine-tune: run directory, published folder or its URL. With it, prepare selects the cells that the model
    has not seen, with the model's genes, and train starts from its weights; null: no fine-tuning.
    """
    mode: Annotated[Literal["continue", "new_batches", "retrain"], Changes("prepare", "train")] = "continue"
    """What is trained: continue, all weights; new_batches, only those of batches that the model does not have: the
    embedding of its own cells does not change; retrain: all weights from random ones, on all cells.
    """
    replay_cells: Annotated[int, Field(ge=0), Changes("prepare")] = 0
    """Number of cells that the model has seen, drawn at random, to train on again in mode continue."""
    held_out: Annotated[LocalPath | None, Changes("prepare")] = None
    """File of identities of cells that are not trained on: held-out.npy, which `--decide` writes; null: none."""
    budget: Annotated[float, Field(gt=0.0, le=1.0), Changes()] = 1.0
    """Share of train.max_epochs for which `--decide` trains the model again; below 1 its curve is extrapolated."""
    measured_cells: Annotated[int, Field(ge=10), Changes()] = 2000
    """Held-out cells of each release that `--decide` measures, at most."""
    decoder: bool = False
    """Whether mode new_batches trains if the encoder does not use the batch: then only the decoder changes."""
    lr: Annotated[float, Field(gt=0.0)] | None = None
    """Learning rate; null: a tenth of training_plan.lr."""
    max_epochs: Annotated[int, Field(ge=1)] = 50
    """Maximum number of epochs."""
    patience: Annotated[int, Field(ge=1)] = 5
    """Epochs without a better elbo_validation after which the training stops."""

    @model_validator(mode="after")
    def _only_continue_replays(self) -> Self:
        if self.mode != CONTINUE and self.replay_cells:
            why = "trains no weights of their batches" if self.mode == NEW_BATCHES else "trains on all cells"
            raise ValueError(
                f"fine_tune.replay_cells is {self.replay_cells:,}, and mode {self.mode} {why}; set it to 0, or"
                " fine_tune.mode to continue"
            )
        return self

    def training(self, train: TrainSection, plan: dict[str, Any]) -> tuple[TrainSection, dict[str, Any]]:
        """The sections `train` and `training_plan` of a fine-tuning.

        A small learning rate, early stopping (if there are validation cells), and the full weight of the KL divergence
        from the first step: a warm-up would let the latent space of the trained model drift. In mode new_batches, no
        weight decay, which would change all weights. Mode retrain takes both sections as they are.
        """
        if self.mode == RETRAIN:
            return train, plan
        stopping = {"early_stopping_patience": self.patience, **(train.trainer or {})}
        new = {
            "max_epochs": self.max_epochs,
            "early_stopping": train.train_size < 1.0,
            "trainer": stopping if train.train_size < 1.0 else train.trainer,
        }
        lr = self.lr or _PART_OF_LR * plan.get("lr", _DEFAULT_LR)
        arguments = {name: value for name, value in plan.items() if name != "n_steps_kl_warmup"}
        arguments |= {"lr": lr, "n_epochs_kl_warmup": None}
        if self.mode == NEW_BATCHES:
            arguments["weight_decay"] = 0.0
        return train.model_copy(update=new), arguments


class CostSection(Section):
    """What a machine costs (fine-tune --decide)."""

    changes: ClassVar[tuple[str, ...]] = ()
    per_hour: Annotated[float, Field(ge=0.0)] | None = None
    """Price of an hour of this machine, in any currency; null: no prices are shown."""
