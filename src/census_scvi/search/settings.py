"""Settings: search of settings."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from census_scvi.config.messages import describe_errors, shown
from census_scvi.config.section import USUAL, Changes, Section
from census_scvi.config.types import Name

Measured = Literal["elbo", "bio", "batch"]
PARTS = get_args(Measured)


class Range(Section):
    """A range of a number, for example `{low: 1.0e-4, high: 1.0e-2, log: true}`."""

    changes: ClassVar[tuple[str, ...]] = ("search",)
    low: int | float
    """Lowest value."""
    high: int | float
    """Highest value."""
    log: bool = False
    """Whether the logarithm is drawn uniformly, instead of the value."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low is {self.low} and high is {self.high}: low must be below high")
        if self.log and self.low <= 0:
            raise ValueError(f"low is {self.low}, and log: true needs numbers above 0")
        return self


# Both are checked here, because pydantic reports a value of several types once per type.
def _space(space: Any, prefix: str = "") -> Any:
    """The space with dotted keys, `{model: {n_latent: [10]}}` as `{model.n_latent: [10]}`, and with its ranges."""
    if not isinstance(space, dict):
        return space
    flat: dict[str, Any] = {}
    for key, value in space.items():
        name = f"{prefix}{key}"
        if isinstance(value, list | Range):
            flat[name] = value
        elif isinstance(value, dict) and value.keys() & set(Range.model_fields):
            flat[name] = _range(name, value)
        elif isinstance(value, dict):
            flat |= _space(value, f"{name}.")
        else:
            raise ValueError(
                f"search.space.{name} is {shown(value)}, expected a list of values such as [10, 50], or a range such as"
                " {low: 1.0e-4, high: 1.0e-2, log: true}"
            )
    return flat


def _range(name: str, value: dict[str, Any]) -> Range:
    try:
        return Range.model_validate(value)
    except ValidationError as error:
        raise ValueError(describe_errors(error, Range, lambda _: f"search.space.{name}")) from None


def _metric(metric: Any) -> Any:
    weights = metric if isinstance(metric, dict) else {metric: 1.0}
    wrong = [part for part, weight in weights.items() if part not in PARTS or not isinstance(weight, int | float)]
    if wrong or not weights:
        raise ValueError(
            f"search.metric is {shown(metric)}, expected elbo, bio, batch, or weights such as {{bio: 0.6, batch: 0.4}}"
        )
    return metric


class SearchSection(Section):
    """Search of settings (search)."""

    changes: ClassVar[tuple[str, ...]] = ("search",)
    space: Annotated[dict[Name, list[Any] | Range], BeforeValidator(_space), USUAL] = Field(default_factory=dict)
    """Settings to search, with a list of values or a range: any setting of model, train and training_plan that does not
    change the cells, and hvg.top_n_hvg, hvg.hvg_batch and anndata.batch_key.
    """
    trials: Annotated[int, Field(ge=2)] = 20
    """Number of different settings to try; all combinations if there are fewer."""
    seeds: Annotated[int, Field(ge=1)] = 1
    """Seeds with which each of them is trained: `seed` and the following ones."""
    max_epochs: Annotated[int, Field(ge=1)] | None = None
    """Epochs of a trial; null: `train.max_epochs`."""
    max_cells: Annotated[int, Field(ge=2)] | None = None
    """Training cells of a trial, the same random ones for all; null: `train.max_cells`."""
    metric: Annotated[Measured | dict[Measured, float], BeforeValidator(_metric)] = "elbo"
    """What is compared, on the validation cells: elbo (of the last epoch, per cell); bio or batch, the means of
    scib-metrics' scores of held-out donors or studies (`train.held_out`); or a weighted sum of them.
    """
    searcher: Literal["tpe", "random"] = "tpe"
    """Which settings are tried next: tpe learns from the trials so far (Optuna), random does not."""
    scheduler: Literal["none", "asha"] = "none"
    """Whether trials with a worse validation ELBO than others after the same epochs are stopped (asha)."""
    grace_epochs: Annotated[int, Field(ge=1)] = 10
    """Epochs that asha gives to each trial at least."""
    final_seeds: Annotated[int, Field(ge=2)] = 3
    """Further seeds with which the best settings and the default are trained, to choose between them."""
    cpus_per_trial: Annotated[int, Field(ge=1), Changes()] = 1
    """Cores of a trial; as many trials run at a time as the cores and GPUs of the machine suffice for."""
    gpus_per_trial: Annotated[Annotated[float, Field(ge=0.0)] | None, Changes()] = None
    """GPUs of a trial, also a part of one such as 0.5; null: one if the machine has a GPU."""

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each part of the metric."""
        if isinstance(self.metric, dict):
            return {str(part): weight for part, weight in self.metric.items()}
        return {self.metric: 1.0}
