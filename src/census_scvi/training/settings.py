"""Settings: training."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from census_scvi.config.library_arguments import check_trainer, listed
from census_scvi.config.section import USUAL, Changes, Expected, Section
from census_scvi.config.types import ObsFilter


def _of_trainer(arguments: dict[str, Any]) -> dict[str, Any]:
    check_trainer(arguments, listed())
    return arguments


# Arguments of Lightning's Trainer, and of scvi-tools' training plan with the loss; `training_plan:` alone has none.
TrainerArguments = Annotated[dict[str, Any], AfterValidator(_of_trainer)]
PlanArguments = Annotated[
    dict[str, Any],
    BeforeValidator(lambda arguments: {} if arguments is None else arguments),
]


Devices = int | list[int] | Literal["auto"]


class TrainSection(Section):
    """Training."""

    changes: ClassVar[tuple[str, ...]] = ("train",)
    max_epochs: Annotated[int, Field(ge=1), USUAL] = 100
    """Maximum number of epochs."""
    batch_size: Annotated[int, Field(ge=2), USUAL] = 1024
    """Cells per minibatch and device."""
    n_samples_per_label: Annotated[int | None, Field(ge=1)] = None
    """SCANVI: number of labelled cells of each label that are drawn for each epoch; null: all of them."""
    train_size: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    """Fraction of the cells to train on; the others are for validation."""
    held_out: ObsFilter | None = None
    """Value filter of cells that are not trained on, only validated, e.g. `donor_id in ['A', 'B']`; null: the random
    cells of `train_size`.
    """
    split_seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    """Seed of the random choice of validation and training cells; null: `seed`."""
    max_cells: Annotated[int, Field(ge=2)] | None = None
    """Number of training cells, drawn at random; null: all that are not for validation."""
    early_stopping: Annotated[bool, USUAL] = False
    """Stop when elbo_validation no longer improves (patience and others: `train.trainer`)."""
    multi_gpu: Annotated[bool, USUAL] = False
    """Train on several `devices` (Lightning DDP)."""
    num_workers: Annotated[
        Annotated[int, Field(ge=0)] | Literal["auto"], Changes(), Expected("a number of threads, 0 or more, or auto")
    ] = "auto"
    """Threads that read minibatches ahead; 0: read between training steps; auto: up to 8 for a GPU, 1 on a CPU."""
    cells_in_memory: Annotated[bool | Literal["auto"], Changes(), Expected("true, false or auto")] = "auto"
    """Decode all cells once, before the first epoch, and keep them in memory: 4 bytes per non-zero in each process.
    auto: for more than one epoch on a GPU, if this takes at most a quarter of the free memory.
    """
    devices: Annotated[
        Devices, Expected("a number of devices, a list of device indices such as [0, 1], or auto"), USUAL
    ] = "auto"
    """With `multi_gpu`: number or indices of the devices of each node; otherwise one device is used."""
    num_nodes: Annotated[int, Field(ge=1)] = 1
    """Nodes that train together; torchrun or srun starts the command on each (docs/run-directory.md)."""
    accelerator: Annotated[Literal["auto", "cpu", "gpu", "cuda", "mps"], Changes()] = "auto"
    """Type of device."""
    engine: Annotated[Literal["fast", "scvi-tools"], Changes()] = "fast"
    """Implementation of the training step: `fast` computes the same loss and gradients as `scvi-tools` in a fraction
    of the time.
    """
    precision: Literal["float32", "tf32", "bf16", "fp16"] = "float32"
    """Precision of matrix products. `tf32`, `bf16` and `fp16` are faster on hardware that supports them, and change the
    numbers.
    """
    checkpoint_minutes: Annotated[float, Field(ge=0.0), Changes()] = 10.0
    """Minutes between checkpoints within an epoch, from which a killed training resumes; each epoch ends with one,
    unless writing it would take more than 5 % of the time. 0: after every minibatch.
    """
    trainer: TrainerArguments | None = None
    """More arguments of Lightning's Trainer, e.g. gradient_clip_val."""

    @model_validator(mode="after")
    def _validation_cells(self) -> Self:
        if self.early_stopping and self.train_size == 1.0 and self.held_out is None:
            raise ValueError(
                "train.early_stopping needs validation cells and train.train_size is 1.0;"
                " set train.train_size below 1 or train.early_stopping to false"
            )
        return self
