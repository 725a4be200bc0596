"""Training steps and expected cost of a method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from census_scvi.annotation.scnym.settings import NO_NEW_IDENTITY, preset_named
from census_scvi.annotation.settings import NUMBERS, AnnotateSection, BudgetSection
from census_scvi.config.messages import suggestion
from census_scvi.errors import UserError

# CPU-seconds on two cores of a server: fixed; per 1,000 cells of reference and query; per training step of a joint
# model and per cell and epoch of scNym, both for 2,000 genes.
_FIXED, _PER_1000_CELLS, _PER_STEP, _PER_CELL_AND_EPOCH = 8.0, 1.2, 0.030, 1.8e-4
_STEPS, _MINIBATCH, _EPOCHS = 1_000, 128, 100
# A joint model with fewer steps is worse than methods without training.
_FEWEST_STEPS = 200
# Times that a method is trained: for the query, and for each of three held-out parts.
_TRAININGS = 4
TRAINED, SCNYM, SCANVI = ("consensus", "joint", "scanvi"), "scnym", "scanvi"
_NEIGHBORS = "n_neighbors"  # also for scnym, which is compared with methods that have it


@dataclass(frozen=True)
class Effort:
    """What a method computes.

    Attributes
    ----------
    method
        The method, or `fast` if the budget is too small for the one asked for.
    arguments
        Arguments of the method: `steps`, `n_neighbors`; of `scnym` its hyper-parameters.
    cpu_seconds
        Expected CPU time.
    note
        Why the method is another one than asked for; "" if it is not.
    preset
        Hyper-parameters of `scnym` that its arguments replace.
    """

    method: str
    arguments: dict[str, Any]
    cpu_seconds: float
    note: str = ""
    preset: str = NO_NEW_IDENTITY

    @property
    def of_method(self) -> dict[str, Any]:
        """Arguments of `annotate_labels`."""
        if self.method != SCNYM:
            return self.arguments
        own = {name: value for name, value in self.arguments.items() if name != _NEIGHBORS}
        others = {name: value for name, value in self.arguments.items() if name == _NEIGHBORS}
        return {"scnym": {**own, "preset": self.preset}, **others}


def effort(settings: AnnotateSection, n_cells: int, n_labelled: int, *, trainings: int = _TRAININGS) -> Effort:
    """Arguments and cost of a method for numbers of cells, within the budget.

    Parameters
    ----------
    settings
        Method, overrides and budget.
    n_cells, n_labelled
        Number of cells of reference and query, and of the reference.
    trainings
        Times that scNym's classifier is trained.

    Raises
    ------
    UserError
        An override is not an argument of the method.
    """
    method, budget = settings.method, settings.budget
    base = _FIXED + _PER_1000_CELLS * n_cells / 1000
    if method == SCNYM:
        epochs = _epochs(settings.overrides, budget, n_labelled, trainings)
        arguments = {**settings.overrides, **({} if epochs is None else {"n_epochs": epochs})}
        cost = trainings * int(arguments.get("n_epochs", _EPOCHS)) * n_labelled * _PER_CELL_AND_EPOCH
        return Effort(method, arguments, base + cost, preset=preset_named(settings.preset))
    arguments = dict(settings.overrides)
    for name in arguments:
        if name not in NUMBERS:
            near = suggestion(name, list(NUMBERS))
            raise UserError(
                f"annotate.overrides: {name} is not an argument of {method}{near}; it has {', '.join(NUMBERS)}"
            )
    if method not in TRAINED:
        return Effort(method, {k: v for k, v in arguments.items() if k != "steps"}, base)
    steps = _steps(arguments, budget, n_cells)
    if method == "consensus" and steps < _FEWEST_STEPS and budget.cpu_seconds:
        note = (
            f"annotate.budget.cpu_seconds is {budget.cpu_seconds}, which is enough for {steps} training steps of"
            f" consensus ({_FEWEST_STEPS} are needed): method fast is used, which trains nothing"
        )
        return Effort("fast", {k: v for k, v in arguments.items() if k != "steps"}, base, note)
    factor = 1 + _TRAININGS * (method == SCANVI)
    return Effort(method, {**arguments, "steps": max(steps, 1)}, base + factor * max(steps, 1) * _PER_STEP)


def _steps(arguments: Mapping[str, Any], budget: BudgetSection, n_cells: int) -> int:
    steps = int(arguments.get("steps", _STEPS))
    if budget.epochs is not None:
        steps = (
            min(steps, budget.epochs * max(n_cells // _MINIBATCH, 1))
            if "steps" in arguments
            else (budget.epochs * max(n_cells // _MINIBATCH, 1))
        )
    if budget.cpu_seconds is not None:
        fixed = _FIXED + _PER_1000_CELLS * n_cells / 1000
        steps = min(steps, int((budget.cpu_seconds - fixed) / _PER_STEP))
    return steps


def _epochs(overrides: Mapping[str, Any], budget: BudgetSection, n_labelled: int, trainings: int) -> int | None:
    """Epochs of scNym's classifier within the budget; None: the preset's."""
    limits = [] if budget.epochs is None else [budget.epochs]
    if budget.cpu_seconds is not None:
        limits.append(max(int(budget.cpu_seconds / (trainings * max(n_labelled, 1) * _PER_CELL_AND_EPOCH)), 1))
    if not limits:
        return None
    return min([*limits, int(overrides.get("n_epochs", _EPOCHS))])
