"""Whether a training keeps the decoded cells in memory."""

from __future__ import annotations

from census_scvi.config.memory import free_memory
from census_scvi.counts.kept_cells import bytes_in_memory
from census_scvi.counts.reader import PreparedCells
from census_scvi.training.fit import local_processes, on_gpu
from census_scvi.training.settings import TrainSection

# Share of the free memory that the cells may take of themselves.
_SHARE = 0.25


def keeps_cells(settings: TrainSection, cells: PreparedCells) -> bool:
    """Whether all cells are decoded once and kept in memory: `train.cells_in_memory`, or chosen for this machine.

    A fast GPU waits for a decoder that runs on all cores, but not for a copy from memory. A CPU waits for neither.
    """
    if settings.cells_in_memory != "auto":
        return settings.cells_in_memory
    needed = bytes_in_memory(cells) * local_processes(settings)  # each process has all cells
    return on_gpu(settings) and settings.max_epochs > 1 and needed <= _SHARE * free_memory()
