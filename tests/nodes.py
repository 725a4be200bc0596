"""A command on two nodes, each of one process, as far as the processes know."""

import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor

from pipeline import Run, forked, run_code

MAIN = """
import sys
from census_scvi.cli import main
from census_scvi.workspace import first_process
first_process.PATIENCE = 90
sys.exit(main({command!r}, sys.argv[1:]))
"""


def variables_of(launcher: str, rank: int) -> dict[str, str]:
    """Environment variables with which a launcher starts the only process of a node."""
    if launcher == "torchrun":
        ranks = {"RANK": str(rank), "GROUP_RANK": str(rank), "LOCAL_RANK": "0"}
        return {**ranks, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "run"}
    if launcher == "srun":
        ranks = {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank), "SLURM_LOCALID": "0"}
        return {
            **ranks,
            "SLURM_NTASKS": "2",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NAME": "train",
            "SLURM_NTASKS_PER_NODE": "1",
        }
    return {"NODE_RANK": str(rank)}


def on_two_nodes(
    run: Run, *arguments: str, command: str = "train", before: str = "", launcher: str = ""
) -> list[subprocess.CompletedProcess[str]]:
    """The command on both nodes at once, after the Python code `before`; the first node's result is the first."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])

    def node(rank: int) -> subprocess.CompletedProcess[str]:
        variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **variables_of(launcher, rank)}
        code = before + MAIN.format(command=command)
        return forked(run_code, code, "--config", str(run.config), *arguments, **variables)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(node, (0, 1)))
