"""Hyper-parameters of scNym's method, its presets, and overrides that change nothing for others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from census_scvi.config.messages import describe_errors, suggestion
from census_scvi.errors import UserError

Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Weight = Annotated[float, Field(ge=0.0)]
Epochs = Annotated[int, Field(ge=0)]
_MOST_UNITS, _MOST_LAYERS = 2**14, 64


class Hyperparameters(BaseModel):
    """Hyper-parameters under the names that scNym gave them; the defaults are those of its publication."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    n_epochs: Annotated[int, Field(ge=1)] = 100
    """Maximum number of epochs (passes over the labelled cells)."""
    patience: Epochs = 40
    """Epochs without a lower validation loss after which training stops."""
    min_epochs: Epochs = 20
    """Epochs before the first weights are kept."""
    batch_size: Annotated[int, Field(ge=2)] = 256
    """Labelled cells per minibatch, and the same number of unlabelled cells."""
    lr: Annotated[float, Field(gt=0.0)] = 1.0
    """Learning rate."""
    optimizer_name: Literal["adadelta", "adam", "adamw", "sgd"] = "adadelta"
    """Optimiser; `sgd` has momentum 0.9 and a cosine schedule."""
    weight_decay: Weight = 1e-4
    """L2 penalty of the weights."""
    balanced_classes: bool = False
    """Draw the labelled cells of all classes equally often."""

    n_hidden: Annotated[int, Field(ge=1, le=_MOST_UNITS)] = 256
    """Hidden units per layer after the first."""
    n_hidden_init: Annotated[int, Field(ge=1, le=_MOST_UNITS)] = 256
    """Hidden units of the first layer."""
    n_layers: Annotated[int, Field(ge=1, le=_MOST_LAYERS)] = 2
    """Hidden layers after the first."""
    init_dropout: Share = 0.0
    """Share of the counts to drop in every forward pass of the training."""
    residual: bool = False
    """Use residual blocks from the third hidden layer on."""

    mixup_alpha: Weight = 0.3
    """MixUp: both parameters of the Beta distribution; 0: no MixUp."""
    augment: Literal["log1p_drop", "none"] = "log1p_drop"
    """Augmentation of labelled cells: drop 10 % of the values and normalise again."""
    augment_pseudolabels: bool = False
    """Augment unlabelled cells before their pseudolabels are predicted."""
    n_augmentations: Annotated[int, Field(ge=1)] = 1
    """Augmented copies of an unlabelled cell whose predictions are averaged."""
    T: Annotated[float, Field(gt=0.0)] = 0.5
    """Temperature that sharpens pseudolabels; 1: no sharpening."""
    pseudolabel_min_confidence: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Confidence below which a pseudolabel is not used."""
    unsup_criterion: Literal["mse", "ce"] = "mse"
    """Loss of pseudolabels: squared error of the probabilities, or cross-entropy."""
    unsup_max_weight: Weight = 1.0
    """Final weight of the loss of pseudolabels."""
    unsup_mean_teacher: bool = False
    """Predict pseudolabels with a moving average of the weights."""
    decay_coef: Share = 0.997
    """Decay of that moving average per step."""
    burn_in_epochs: Epochs = 0
    """Epochs before the weight of pseudolabels rises."""
    ramp_epochs: Epochs = 100
    """Epochs in which the weight of pseudolabels rises linearly."""

    dan_max_weight: Weight = 0.1
    """Final weight of the reversed gradients of the domain adversary; 0: no adversary."""
    dan_ramp_epochs: Epochs = 20
    """Epochs in which that weight rises."""
    dan_use_conf_pseudolabels: bool = False
    """Show the adversary only unlabelled cells with a pseudolabel that is used."""

    def unsupervised_weight(self, epoch: int) -> float:
        """Weight of the loss of pseudolabels: 0 until `burn_in_epochs`, then linear."""
        done = epoch - self.burn_in_epochs
        if done < 0:
            return 0.0
        return self.unsup_max_weight * (done / self.ramp_epochs if done < self.ramp_epochs else 1.0)

    def domain_weight(self, epoch: int) -> float:
        """Weight of the reversed gradients: `exp(-5 (epoch / ramp - 1)^2)` of the maximum, then the maximum."""
        if epoch >= self.dan_ramp_epochs:
            return self.dan_max_weight
        return self.dan_max_weight * math.exp(-5.0 * (epoch / self.dan_ramp_epochs - 1.0) ** 2)

    @property
    def first_kept_epoch(self) -> int:
        """Number of the first epoch whose weights can be kept; the last epoch, if training is shorter."""
        return min(self.min_epochs, self.n_epochs - 1)


NO_NEW_IDENTITY, NEW_IDENTITY_DISCOVERY, SUPERVISED = "no_new_identity", "new_identity_discovery", "supervised"
PRESETS: Mapping[str, Hyperparameters] = MappingProxyType(
    {
        # Every unlabelled cell is of a known class.
        NO_NEW_IDENTITY: Hyperparameters(),
        # Unlabelled cells may be of unknown classes: only confident pseudolabels are used.
        NEW_IDENTITY_DISCOVERY: Hyperparameters(pseudolabel_min_confidence=0.9, dan_use_conf_pseudolabels=True),
        # Labelled cells only.
        SUPERVISED: Hyperparameters(unsup_max_weight=0.0, dan_max_weight=0.0),
    }
)
# Keys of scNym's configurations that have no counterpart of the same name, and what to do.
_ELSEWHERE = {
    "ssl_kwargs": "write its keys directly into the overrides",
    "model_kwargs": "write its keys directly into the overrides",
    "ssl_method": "MixMatch is the only method",
    "weighted_classes": "balanced_classes: true draws the cells of all classes equally often",
    "dan_criterion": "dan_max_weight: 0 switches the domain adversary off",
    "tensorboard": "a TensorBoard log is written if training has a folder",
}
# scNym's other names of presets.
_OTHER_NAMES = {"default": NO_NEW_IDENTITY}


def preset_named(name: str) -> str:
    """A preset by this project's or scNym's name."""
    return _OTHER_NAMES.get(name, name)


def hyperparameters(
    preset: str, overrides: Mapping[str, Any] | None = None, *, where: str = "overrides"
) -> Hyperparameters:
    """The hyper-parameters of a preset, with some of them replaced; presets never change.

    Parameters
    ----------
    preset
        A key of `PRESETS`.
    overrides
        Values by name.
    where
        Source of the overrides, for messages.

    Raises
    ------
    UserError
        The preset or a name does not exist (the error suggests one), or a value is invalid.
    """
    if preset not in PRESETS:
        raise UserError(
            f"{preset!r} is not a preset of scNym's method{suggestion(str(preset), list(PRESETS))} (presets:"
            f" {', '.join(PRESETS)})"
        )
    changed = dict(overrides or {})
    for name in changed:
        if reason := _ELSEWHERE.get(name):
            raise UserError(f"{where}: {name} is not a hyper-parameter of its own: {reason}")
        if name not in Hyperparameters.model_fields:
            near = suggestion(str(name), list(Hyperparameters.model_fields))
            raise UserError(f"{where}: {name} is not a hyper-parameter of scNym's method{near}")
    try:
        return Hyperparameters.model_validate(PRESETS[preset].model_dump() | changed)
    except ValidationError as error:
        raise UserError(describe_errors(error, Hyperparameters, lambda _: where)) from None
