"""Settings: surgery, the training of a reference model's additional batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from census_scvi.config.library_arguments import MODEL_KINDS, check_trainer, check_training_plan, listed
from census_scvi.config.messages import describe_errors, shown, suggestion
from census_scvi.config.section import Section
from census_scvi.config.types import Name
from census_scvi.errors import UserError

NONE, JOINT, PER_BATCH, SEQUENTIAL, COMPARE = "none", "joint", "per_batch", "sequential", "compare"
MODES = [JOINT, PER_BATCH, SEQUENTIAL]
Surgery = Literal["none", "joint", "per_batch", "sequential", "compare"]

_ARGUMENTS = "query.surgery_training.arguments"
# Options of scvi-tools' load_query_data, and those of their values that would change the reference.
_MOVES_REFERENCE = {
    "unfrozen": True,
    "freeze_expression": False,
    "freeze_decoder_first_layer": False,
    "freeze_batchnorm_encoder": False,
}
_OPTIONS = {*_MOVES_REFERENCE, "freeze_dropout", "freeze_batchnorm_decoder", "freeze_classifier"}
# Arguments that have a setting of their own.
_ELSEWHERE = {
    "max_epochs": "query.surgery_training.max_epochs",
    "lr": "query.surgery_training.lr",
    "batch_size": "query.surgery_training.batch_size",
    "early_stopping": "query.surgery_training.early_stopping",
    "train_size": "query.surgery_training.train_size",
}


def _of_surgery(arguments: dict[str, Any]) -> dict[str, Any]:
    """ValueError if a name is unknown, or a value has the wrong type or would change the reference."""
    for name, value in arguments.items():
        if name in _ELSEWHERE:
            raise ValueError(f"{_ARGUMENTS}.{name} cannot be set here; set {_ELSEWHERE[name]}")
        if name in _OPTIONS and not isinstance(value, bool):
            raise ValueError(f"{_ARGUMENTS}.{name} is {shown(value)}, expected true or false")
        if name in _MOVES_REFERENCE and value == _MOVES_REFERENCE[name]:
            raise ValueError(
                f"{_ARGUMENTS}.{name} is {str(value).lower()}, which trains weights of the reference: its cells would"
                " move; remove it"
            )
        if name == "weight_decay" and value != 0:
            raise ValueError(
                f"{_ARGUMENTS}.weight_decay is {shown(value)}, which shrinks the weights of the reference in every"
                " step: its cells would move; remove it (it is 0)"
            )
    try:
        check_trainer(_stopping(arguments), listed())
    except ValueError as error:
        raise ValueError(_of_this_section(str(error))) from None
    wrong = [found for kind in MODEL_KINDS if (found := _wrong_plan(arguments, kind))]
    if len(wrong) == len(MODEL_KINDS):  # the kind of the reference is not known yet
        raise ValueError(wrong[0])
    return arguments


def _wrong_plan(arguments: dict[str, Any], kind: str) -> str:
    """What is wrong with the arguments of the training plan for a kind of model; "" if nothing is."""
    try:
        check_training_plan(_plan(arguments), listed(), kind)
    except ValueError as error:
        return _of_this_section(str(error))
    return ""


def _of_this_section(message: str) -> str:
    """A message of the training's settings with the names that the arguments have here."""
    return message.replace("train.trainer.", f"{_ARGUMENTS}.").replace("training_plan.", f"{_ARGUMENTS}.")


def _stopping(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name.startswith("early_stopping_")}


def _plan(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in _OPTIONS | _stopping(arguments).keys()}


class SurgeryTraining(Section):
    """Training of the additional batches by `query.surgery`."""

    changes: ClassVar[tuple[str, ...]] = ("map-query",)
    max_epochs: Annotated[int, Field(ge=1)] = 200
    """Maximum number of epochs, of each training."""
    lr: Annotated[float, Field(gt=0.0)] | None = None
    """Learning rate; null: scvi-tools' default for the kind of model, 0.001 or 0.004 (TOTALVI)."""
    batch_size: Annotated[int, Field(ge=2)] = 128
    """Cells per minibatch."""
    early_stopping: bool = False
    """Stop when elbo_validation no longer improves."""
    train_size: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Fraction of the cells to train on; null: all, or 0.9 with `early_stopping`."""
    order: list[Name] | None = None
    """Batches in the order in which `sequential` adds them; null: the order of their first cells."""
    arguments: Annotated[dict[str, Any], AfterValidator(_of_surgery)] = Field(default_factory=dict)
    """More arguments by name: of scvi-tools' training plan (n_epochs_kl_warmup, ...) and load_query_data
    (freeze_dropout, ...), and early_stopping_patience and the like. `weight_decay` is 0.
    """

    @model_validator(mode="after")
    def _validation_cells(self) -> Self:
        if self.early_stopping and self.train_size == 1.0:
            raise ValueError(
                "query.surgery_training.early_stopping needs validation cells and query.surgery_training.train_size is"
                " 1.0; set train_size below 1, or early_stopping to false"
            )
        return self

    @classmethod
    def of(cls, mode: str, values: Mapping[str, Any] | Self | None) -> Self:
        """Settings from values by name; UserError if the mode or a value is wrong."""
        if mode not in MODES:
            raise UserError(f"mode is {shown(mode)}, expected one of {', '.join(MODES)}{suggestion(str(mode), MODES)}")
        try:
            training = cls.model_validate(values or {})
        except ValidationError as error:
            raise UserError(describe_errors(error, cls, lambda _: "training")) from None
        if training.order is not None and mode != SEQUENTIAL:
            raise UserError(f"training: order is only used by mode sequential, and the mode is {mode}")
        return training

    def require_kind(self, kind: str) -> None:
        """UserError if an argument is not one of the training plan of a kind of model."""
        if wrong := _wrong_plan(self.arguments, kind):
            raise UserError(wrong)

    @property
    def share(self) -> float:
        """Fraction of the cells to train on."""
        return self.train_size or (0.9 if self.early_stopping else 1.0)

    @property
    def options(self) -> dict[str, bool]:
        """Options of scvi-tools' `load_query_data`."""
        return {name: value for name, value in self.arguments.items() if name in _OPTIONS}

    @property
    def stopping(self) -> dict[str, Any]:
        """Arguments of the early stopping, as in `train.trainer`."""
        return _stopping(self.arguments)

    @property
    def plan(self) -> dict[str, Any]:
        """Arguments of scvi-tools' training plan."""
        arguments = {**_plan(self.arguments), "weight_decay": 0.0}
        if self.lr is not None:
            arguments["lr"] = self.lr
        if self.share == 1.0:  # nothing to monitor
            arguments.setdefault("reduce_lr_on_plateau", False)
        return arguments
