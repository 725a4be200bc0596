"""Try `train.trainer` and `training_plan` on a model of two genes, to find invalid arguments early."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import lightning
import scvi
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import LearningRateMonitor, Timer
from lightning.pytorch.loggers.logger import DummyLogger
from scvi.train import Trainer

from census_scvi.counts.minibatch import LABELLED
from census_scvi.errors import UserError
from census_scvi.model.build import Labels, Proteins, build_model, quiet
from census_scvi.model.families import SCANVI, TOTALVI
from census_scvi.training.callbacks import LearningCurves, TrainMode, early_stopping_callbacks
from census_scvi.training.plans import library_plan, unfused_if_clipped

Arguments: TypeAlias = dict[str, Any]
_Setting: TypeAlias = tuple[str, str]  # section and key

_TRAINER, _PLAN = "train.trainer", "training_plan"
_LONGEST = 300
_MINIBATCHES = 2
# Arguments not used in a rehearsal: it does not wait for other nodes, write profiles or print output.
_NOT_RUN = ("profiler", "enable_progress_bar", "enable_model_summary")
# Arguments that do not apply to an epoch of two minibatches, unless they are 0.
_OF_REAL_LENGTH = (
    "max_time", "max_steps", "min_steps", "min_epochs", "val_check_interval", "overfit_batches",
    "limit_train_batches", "limit_val_batches",
)  # fmt: skip


def require_trainable(
    kind: str,
    trainer: Arguments,
    plan: Arguments,
    fixed: Arguments,
    *,
    minibatches: tuple[int, int],
    early_stopping: bool,
) -> None:
    """UserError if Lightning, torch or scvi-tools cannot train with the settings: names the setting and the reason.

    Parameters
    ----------
    kind
        Kind of model.
    trainer
        The setting `train.trainer`.
    plan
        Arguments of scvi-tools' training plan: the setting `training_plan`.
    fixed
        Trainer arguments set by the pipeline, for one device.
    minibatches
        Number of training minibatches and of validation minibatches.
    early_stopping
        The setting `train.early_stopping`.
    """

    def refusal(trainer: Arguments, plan: Arguments) -> Exception | None:
        try:
            _rehearse(kind, trainer, plan, fixed, minibatches, early_stopping=early_stopping)
        except Exception as error:  # the libraries raise exceptions of any kind
            return None if diverged(error) else error  # divergence depends on the cells, not on the arguments
        return None

    with quiet("lightning.pytorch"), quiet("lightning.fabric"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if (error := refusal(trainer, plan)) is None:
            return
        if unrelated := refusal({}, {}):  # a bug that does not depend on the settings
            raise unrelated
        named = _blamed([(_TRAINER, key) for key in trainer] + [(_PLAN, key) for key in plan], trainer, plan, refusal)
    values = {_TRAINER: trainer, _PLAN: plan}
    found = " and ".join(f"{section}.{key} is {values[section][key]!r}" for section, key in named)
    raise UserError(f"{found}: training cannot start with it ({one_line(error)}); correct or remove it")


def _blamed(
    settings: list[_Setting],
    trainer: Arguments,
    plan: Arguments,
    refusal: Callable[[Arguments, Arguments], Exception | None],
) -> list[_Setting]:
    """The settings to report in the error.

    The first setting that fails alone; else each setting whose removal makes the others work; else all settings.
    """

    def some(chosen: list[_Setting]) -> tuple[Arguments, Arguments]:
        return (
            {key: value for key, value in trainer.items() if (_TRAINER, key) in chosen},
            {key: value for key, value in plan.items() if (_PLAN, key) in chosen},
        )

    alone = next(([setting] for setting in settings if refusal(*some([setting]))), [])
    together = [one for one in settings if not refusal(*some([other for other in settings if other != one]))]
    return alone or together or settings


def diverged(error: Exception) -> bool:
    """Whether a step failed because its numbers are not finite: torch's distributions raise before the loss exists."""
    return isinstance(error, ValueError) and "satisfy the constraint" in str(error)


def one_line(error: BaseException) -> str:
    """Text of an exception in one line, for a message."""
    text = " ".join(str(error).split()).rstrip(".")
    return text[:_LONGEST] if " " in text else f"{type(error).__name__} {text[:_LONGEST]}"


class _Ready(Exception):
    """Everything is built and checked; the first minibatch would follow."""


class _StopAtFirstMinibatch(lightning.Callback):
    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        raise _Ready


class _Minibatches:
    """Minibatches that all hold the same four cells."""

    def __init__(self, number: int, kind: str) -> None:
        self._number, self._kind = number, kind

    def __len__(self) -> int:
        return self._number

    def __iter__(self) -> Iterator[Arguments]:
        zeros = torch.zeros(4, 1, dtype=torch.int64)
        counts = torch.arange(8.0).reshape(4, 2)
        more: Arguments = {}
        if self._kind == SCANVI:
            more[LABELLED] = {"X": counts, "batch": zeros, "labels": zeros}
        elif self._kind == TOTALVI:
            more["proteins"] = counts
        for _ in range(self._number):
            yield {"X": counts, "batch": zeros, "labels": zeros, **more}


def _model(kind: str) -> scvi.model.SCVI:
    """A model of two genes."""
    names = {"n_layers_encoder": 1} if kind == TOTALVI else {"n_layers": 1}
    return build_model(
        ["a", "b"],
        ["x"],
        {"n_hidden": 2, "n_latent": 2, **names},
        kind=kind,
        labels=Labels(["a", "b"], "unknown") if kind == SCANVI else None,
        proteins=Proteins(["a", "b"], {}) if kind == TOTALVI else None,
    )


def _rehearse(
    kind: str,
    trainer: Arguments,
    plan: Arguments,
    fixed: Arguments,
    minibatches: tuple[int, int],
    *,
    early_stopping: bool,
) -> None:
    """Build everything, start training with the real number of minibatches, then train one epoch of two minibatches."""
    built = _trainer(trainer, fixed, [], early_stopping=early_stopping)
    for timer in (callback for callback in built.callbacks if isinstance(callback, Timer)):
        if (timer.time_remaining() or 0) <= 0:
            raise ValueError("no time to train in")
    run = {key: value for key, value in trainer.items() if key not in _NOT_RUN}
    try:
        ready = _trainer(run, fixed, [_StopAtFirstMinibatch()], early_stopping=early_stopping)
        _fit(kind, ready, plan, minibatches)
    except _Ready:
        pass
    short = {key: value for key, value in run.items() if key not in _OF_REAL_LENGTH or value == 0}
    curves = LearningCurves("")
    one_epoch = _trainer(short, {**fixed, "max_epochs": 1}, [curves], early_stopping=early_stopping)
    _fit(kind, one_epoch, plan, (_MINIBATCHES, min(_MINIBATCHES, minibatches[1])))
    if "elbo_train" not in curves.curves:
        raise RuntimeError("no step would be trained and no elbo_train measured")


def _trainer(
    arguments: Arguments, fixed: Arguments, callbacks: list[lightning.Callback], *, early_stopping: bool
) -> Trainer:
    arguments = dict(arguments)
    callbacks = [TrainMode(), *callbacks, LearningRateMonitor(logging_interval="epoch")]
    callbacks += early_stopping_callbacks(arguments, wanted=early_stopping)
    return Trainer(callbacks=callbacks, logger=DummyLogger(), plugins=LightningEnvironment(), **fixed | arguments)


def _fit(kind: str, trainer: Trainer, plan: Arguments, minibatches: tuple[int, int]) -> None:
    model = _model(kind)
    if plan.get("compile"):
        library_plan(model, copy.deepcopy(plan))  # copied, because it writes into compile_kwargs
    plan = {key: value for key, value in plan.items() if not key.startswith("compile")}  # compiling takes minutes
    training = library_plan(model, plan)
    training.n_obs_training = training.n_obs_validation = 4
    unfused_if_clipped(training, trainer)
    validation = _Minibatches(minibatches[1], kind) if minibatches[1] else None
    trainer.fit(training, _Minibatches(minibatches[0], kind), validation, weights_only=True)
