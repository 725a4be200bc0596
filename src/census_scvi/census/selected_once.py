"""Cells that several processes of a stage need: the first one selects them, and all map the same files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from census_scvi.census.cells import Cells
from census_scvi.errors import UserError
from census_scvi.files.atomic import new_file, replacing, write_json
from census_scvi.files.json_file import read_json
from census_scvi.files.lock import waiting_lock


def selected_once(folder: Path, select: Callable[[], Cells], name: str = "selected") -> Cells:
    """Cells from files in a folder, which are written if they are not there.

    Parameters
    ----------
    folder
        Folder that the processes share; it is created.
    select
        Selects them; must give the same cells in each process.
    name
        Name of these cells in the folder.

    Returns
    -------
    The cells, in memory that the processes on a machine share.
    """
    folder.mkdir(exist_ok=True)
    joinids, codes, batches = (folder / f"{name}{end}" for end in ("-joinids.npy", "-batches.npy", "-batches.json"))
    with waiting_lock(folder / f"{name}.lock"):
        if not batches.exists():
            cells = select()
            for path, values in ((joinids, cells.joinids), (codes, cells.batch_codes)):
                with replacing([path]) as (partial,), new_file(partial, "wb") as file:
                    np.save(file, values)
            write_json(batches, cells.batches)  # last: if this file exists, all do
    try:
        ids, of_batches = (np.asarray(np.load(path, mmap_mode="r")) for path in (joinids, codes))
        return Cells(ids, of_batches, list(read_json(batches)))
    except (ValueError, EOFError, FileNotFoundError) as error:
        raise UserError(f"{joinids} or {codes} is damaged ({error}); --force without --part starts again") from None
