"""Train a model on prepared cells, with this project's or scvi-tools' training plan; training can be resumed."""

from __future__ import annotations

import logging
import os
import traceback
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning
import scvi
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.profilers import PassThroughProfiler
from scvi.train import Trainer, TrainingPlan

from census_scvi.counts.data_module import PreparedDataModule
from census_scvi.errors import UserError
from census_scvi.model.build import quiet
from census_scvi.model.seeded import seeded
from census_scvi.training.callbacks import (
    EpochMetrics,
    GiveBack,
    LearningCurves,
    Stoppable,
    TrainMode,
    early_stopping_callbacks,
)
from census_scvi.training.checkpoint import Checkpoint, StagedIO
from census_scvi.training.fast.measure import measure_precision
from census_scvi.training.fast.plan import FastTrainingPlan
from census_scvi.training.fast.step import unused_frozen
from census_scvi.training.finite_loss import OF_TRAIN, FiniteLoss, Named
from census_scvi.training.installed_arguments import require_known_arguments
from census_scvi.training.plans import make_plan, plan_arguments, unfused_if_clipped
from census_scvi.training.progress import EventLog, Progress
from census_scvi.training.rehearsal import diverged, one_line, require_trainable
from census_scvi.training.settings import TrainSection
from census_scvi.workspace.provenance import processor

log = logging.getLogger(__name__)


def choose_devices(settings: TrainSection) -> dict[str, Any]:
    """`accelerator`, `devices` and `strategy` for Lightning's Trainer.

    Raises
    ------
    UserError
        The number of devices is invalid or larger than the number that torch finds, or torch does not find the
        accelerator.
    """
    if not settings.multi_gpu and settings.devices != "auto":
        log.info(
            "train.devices is %s, which is used only with train.multi_gpu: true; training on one device",
            settings.devices,
        )
    if (nodes := settings.num_nodes) > 1:
        log.info(
            "%d processes on %d nodes train together: start the command on each node", n_processes(settings), nodes
        )
    return _devices(settings)


def _devices(settings: TrainSection) -> dict[str, Any]:
    gpus = torch.cuda.device_count()
    if settings.accelerator == "mps" and not torch.backends.mps.is_available():
        raise UserError(
            "train.accelerator is mps, the GPU of an Apple computer, but torch finds none here; set it to auto"
        )
    _check_number_of_devices(settings.devices)
    if settings.accelerator in ("gpu", "cuda") and not gpus:
        raise UserError(
            f"train.accelerator is {settings.accelerator} but torch finds no GPU here; set it to auto or cpu,"
            " or run ./scvi-init.sh --check-gpu"
        )
    if not settings.multi_gpu:
        strategy = "ddp" if settings.num_nodes > 1 else "auto"
        return {"accelerator": settings.accelerator, "devices": 1, "strategy": strategy}
    asked = settings.devices if isinstance(settings.devices, list) else None
    number = settings.devices if isinstance(settings.devices, int) and settings.devices > 0 else max(gpus, 1)
    number = len(asked) if asked else number
    if settings.accelerator != "cpu" and (number > gpus or max(asked or [0]) >= max(gpus, 1)):
        several = settings.num_nodes > 1
        raise UserError(
            f"train.multi_gpu asks for devices {settings.devices}{' on each node' * several}, but torch finds {gpus}"
            f" GPU(s){' on this one' * several}; lower train.devices, or set train.accelerator to cpu to train in"
            " several CPU processes"
        )
    if settings.accelerator == "cpu":
        asked = None  # on a CPU, Lightning expects a number of processes
    return {"accelerator": settings.accelerator, "devices": asked or number, "strategy": "ddp"}


def _check_number_of_devices(devices: int | list[int] | str) -> None:
    indices = devices if isinstance(devices, list) else [0]
    none = devices == [] or (isinstance(devices, int) and (devices == 0 or devices < -1))
    if none or min(indices) < 0 or len(set(indices)) < len(indices):
        raise UserError(
            f"train.devices is {devices}, expected a number of devices (-1: all), a list of different device indices"
            " such as [0, 1], or auto"
        )


def choose_precision(settings: TrainSection) -> str:
    """`precision` for Lightning's Trainer.

    Raises
    ------
    UserError
        The device does not support `train.precision`.
    """
    gpu = on_gpu(settings)
    if settings.precision == "fp16" and not gpu:
        raise UserError("train.precision is fp16, which needs a GPU; set it to float32 or bf16")
    if settings.precision == "bf16" and gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name()
        raise UserError(
            f"train.precision is bf16, but this GPU ({name}) does not support it; set it to float32 or fp16"
        )
    if settings.precision == "tf32" and not (gpu and torch.cuda.get_device_capability() >= (8, 0)):
        here = f"this GPU ({torch.cuda.get_device_name()})" if gpu else "a CPU"
        raise UserError(f"train.precision is tf32, which {here} does not support; set it to float32")
    return {"float32": "32-true", "tf32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}[settings.precision]


@contextmanager
def matmul_precision(settings: TrainSection) -> Iterator[None]:
    """Let torch multiply float32 matrices in tf32 if `train.precision` says so, and in float32 otherwise."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if settings.precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def loader_threads(settings: TrainSection) -> int:
    """Number of threads that read and decode ahead: `train.num_workers`, or chosen for this machine.

    One thread decodes what a CPU trains on. A GPU needs more: up to eight, of the cores of each process.
    """
    if settings.num_workers != "auto":
        return settings.num_workers
    if not on_gpu(settings):
        return 1
    return max(min(8, (os.cpu_count() or 1) // local_processes(settings) - 1), 1)


def slow_precision(settings: TrainSection, n_genes: int, n_hidden: int) -> str:
    """Why `train.precision` is slower than float32 here, measured on products of the model's shapes; "" if it is not.

    A processor without bf16 instructions can still compute in bf16, but many times slower than in float32.
    """
    if settings.precision == "float32" or on_gpu(settings):
        return ""
    measured = measure_precision(n_genes, n_hidden, torch.bfloat16)
    if measured is None or measured.reduced <= measured.float32:
        return ""
    return (
        f"train.precision is bf16, but it is slower on this processor ({processor()}): {1e3 * measured.reduced:,.0f} ms"
        f" for matrix products of this model, {1e3 * measured.float32:,.0f} ms in float32; set it to float32"
    )


def on_gpu(settings: TrainSection) -> bool:
    """Whether these settings train on a GPU here."""
    return settings.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def check_arguments(settings: TrainSection, plan: dict[str, Any], data: PreparedDataModule, kind: str) -> None:
    """UserError if the libraries cannot train a kind of model with `train.trainer` and `training_plan`."""
    require_known_arguments(settings.trainer or {}, plan, kind)
    processes = n_processes(settings)
    minibatches = [-(-n_cells // (settings.batch_size * processes)) for n_cells in (data.n_train, data.n_val)]
    require_trainable(
        kind,
        settings.trainer or {},
        plan_arguments(plan, kind, data.cells.n_cells),
        trainer_arguments(settings, data) | {"devices": 1, "num_nodes": 1, "strategy": "auto"},
        minibatches=(minibatches[0], minibatches[1]),
        early_stopping=settings.early_stopping,
    )


def n_processes(settings: TrainSection) -> int:
    """Number of training processes on all nodes."""
    return settings.num_nodes * local_processes(settings)


def local_processes(settings: TrainSection) -> int:
    """Number of training processes on this node."""
    devices = _devices(settings)["devices"]
    return len(devices) if isinstance(devices, list) else int(devices)


def engine_of(plan: TrainingPlan) -> str:
    """The `train.engine` that a plan implements."""
    return "fast" if isinstance(plan, FastTrainingPlan) else "scvi-tools"


def libraries_of(plan: TrainingPlan) -> dict[str, str] | None:
    """Libraries of the float32 matrix products, for the record; None if only torch's library was used."""
    libraries = plan.libraries if isinstance(plan, FastTrainingPlan) else None
    return asdict(libraries) if libraries else None


def fit(
    model: scvi.model.SCVI,
    data: PreparedDataModule,
    settings: TrainSection,
    plan_settings: dict[str, Any],
    *,
    seed: int,
    checkpoint: Path,
    tensorboard: Path,
    named: Named = OF_TRAIN,
    progress: Path | None = None,
) -> LearningCurves:
    """Train a model in place; resume from `checkpoint` if that file exists.

    Parameters
    ----------
    model
        The model, trained or untrained.
    data
        Training and validation minibatches.
    settings
        The `train` section.
    plan_settings
        The `training_plan` section: arguments of scvi-tools' training plan.
    seed
        Seed of dropout and of the latent samples; with several processes, each adds its rank.
    checkpoint
        File written after each epoch, and every `settings.checkpoint_minutes` within an epoch.
    tensorboard
        Folder of the TensorBoard logs.
    named
        Names of settings and cells in the error of a loss that is not finite.
    progress
        JSON file with the learning curves, written after each epoch; None: no file.

    Returns
    -------
    The learning curves, including the epochs before a resume.

    Raises
    ------
    UserError
        The devices or the checkpoint cannot be used, or the loss is not finite.
    """
    with seeded(seed):  # TOTALVI's plan draws the weights of its adversary
        plan = make_plan(settings, model, data, plan_settings)
    curves, finite = LearningCurves(engine_of(plan), progress), FiniteLoss(named)
    arguments = dict(settings.trainer or {})
    callbacks = [
        Stoppable(),
        TrainMode(),
        finite,
        EpochMetrics(),
        curves,
        Progress(data.n_train),
        LearningRateMonitor(logging_interval="epoch"),
    ]
    callbacks += early_stopping_callbacks(arguments, wanted=settings.early_stopping)
    callbacks += [Checkpoint(checkpoint, settings.checkpoint_minutes), GiveBack()]
    with (
        warnings.catch_warnings(),
        quiet("lightning.pytorch", logging.WARNING),
        quiet("lightning.fabric", logging.WARNING),
        unused_frozen(model.module),
        matmul_precision(settings),
    ):
        _ignore_known_warnings()
        trainer = Trainer(
            callbacks=callbacks,
            plugins=StagedIO(),
            logger=EventLog(tensorboard.parent, name=tensorboard.name, version="", sub_dir=None),
            default_root_dir=str(tensorboard.parent),
            **trainer_arguments(settings, data) | arguments,
        )
        lightning.seed_everything(seed + trainer.global_rank, verbose=False)
        unfused_if_clipped(plan, trainer)
        try:
            trainer.fit(plan, data, ckpt_path=_resumable(checkpoint), weights_only=True)
        except Exception as error:
            if (explained := _explained(error, settings, trainer, finite)) is not None:
                raise explained from error
            raise
    curves.libraries = libraries_of(plan)
    model.module.eval()
    model.is_trained_ = True
    return curves


def _explained(error: Exception, settings: TrainSection, trainer: Trainer, finite: FiniteLoss) -> UserError | None:
    """The error for a cause that the user can change; None for another cause."""
    if n_processes(settings) > 1 and _lost(error):
        return UserError(
            "another process of this training ended, or cannot be reached"
            f" ({one_line(error).partition('. ')[0]}); see what it says, then start the same command on each node"
            " again: it resumes from the last checkpoint"
        )
    if diverged(error):
        return finite.report(trainer, "the loss is nan")
    if settings.trainer and not isinstance(error, UserError) and _of_lightning(error):
        return UserError(
            f"Lightning stopped the training ({one_line(error)}); it was given train.trainer: {settings.trainer};"
            " correct or remove it"
        )
    return None


def _lost(error: Exception) -> bool:
    """Whether the connection between processes failed; gloo's errors have no class of their own."""
    return isinstance(error, torch.distributed.DistError) or (type(error) is RuntimeError and "gloo" in str(error))


def _of_lightning(error: Exception) -> bool:
    """Whether Lightning itself raised an error (not this project or, for example, a full disk)."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{os.sep}lightning{os.sep}" in frames[-1].filename


def trainer_arguments(settings: TrainSection, data: PreparedDataModule) -> dict[str, Any]:
    """Trainer arguments set by the pipeline; `train.trainer` may override the last five."""
    return {
        **_devices(settings),
        "num_nodes": settings.num_nodes,
        "max_epochs": settings.max_epochs,
        "precision": choose_precision(settings),
        "check_val_every_n_epoch": 1,
        "limit_val_batches": None if data.n_val else 0,
        "enable_progress_bar": False,  # our own progress bar counts cells over all epochs
        "enable_model_summary": False,
        "profiler": NoProfiler(),
    }


class NoProfiler(PassThroughProfiler):
    """Lightning's default profiler, which measures nothing, without its cost: 75 contexts are entered in each step."""

    def profile(self, action_name: str) -> AbstractContextManager[None]:
        """A context that does nothing."""
        return _NOTHING


_NOTHING: AbstractContextManager[None] = nullcontext()


def _resumable(checkpoint: Path) -> Path | None:
    if not checkpoint.exists():
        return None
    if not zipfile.is_zipfile(checkpoint):  # a zip file ends with its directory, so this finds truncated files
        raise UserError(f"{checkpoint} is damaged; start again with --force")
    return checkpoint


def _ignore_known_warnings() -> None:
    for message in (
        "The '.*_dataloader' does not have many workers",  # our loader reads ahead in threads
        "The number of training batches",
        "early_stopping was automatically disabled",  # our own callback does it
        "Checkpoint directory .* exists",
        "The lr scheduler dict contains the key",  # scvi-tools' plan of TOTALVI steps it itself
        "It is recommended to use .self.log",  # EpochMetrics logs sums over all processes
        "Found .* in eval mode",  # TrainMode switches to training mode
        ".training_step. returned .None.",  # a graph has made the whole step
        ".isinstance.treespec, LeafSpec.. is deprecated",
    ):
        warnings.filterwarnings("ignore", message=message)
