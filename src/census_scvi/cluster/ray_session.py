"""A connection to Ray, or Ray on this machine, while a block runs."""

from __future__ import annotations

import logging
import os
import signal
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import ray

from census_scvi.cluster.settings import AUTO, LOCAL
from census_scvi.errors import UserError
from census_scvi.terminal.printing import on_one_line

log = logging.getLogger(__name__)

_MOST_STARTS = 5
_OBJECT_STORE_BYTES = 80_000_000  # the least that Ray accepts; parts and trials communicate through files
_ANSWER_SECONDS = 10.0
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray would warn that it will change this
    "RAY_worker_niceness": "0",
}
# One attempt to connect, which takes up to 40 seconds; not twenty of them.
_ONE_ATTEMPT = {"RAY_gcs_server_port_wait_time_s": "1"}


@contextmanager
def ray_at(address: str) -> Iterator[None]:
    """Connect to a Ray cluster while the block runs (`cluster.address`).

    UserError if it cannot be reached, or its version of Ray or Python differs.
    """
    if address == LOCAL:
        with ray_here():
            yield
        return
    os.environ.update(_ENVIRONMENT | _ONE_ATTEMPT)
    place = os.environ.get("RAY_ADDRESS", address) if address == AUTO else address
    if place != AUTO:
        _require_answer(place)

    def connect() -> None:
        try:
            with warnings.catch_warnings(action="ignore"):  # of what the error says, too
                ray.init(place, configure_logging=False, log_to_driver=False)
        except Exception as error:
            ray.shutdown()
            raise UserError(f"cluster.address {address}: {_reason(error, place)}") from None

    with _connected(connect):
        yield


@contextmanager
def ray_here(n_gpus: int | None = None) -> Iterator[None]:
    """Run Ray on this machine while the block runs, with this number of GPUs; None: all."""
    os.environ.update(_ENVIRONMENT)
    with _connected(lambda: _start(n_gpus)):
        yield


@contextmanager
def _connected(connect: Callable[[], None]) -> Iterator[None]:
    """Connect; the handlers of signals stay as they are."""
    # It says that it uses tokens.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    handlers: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    connect()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    try:
        yield
    finally:
        ray.shutdown()


def _start(n_gpus: int | None) -> None:
    """Start Ray, several times if need be: it waits for its own processes for 30 s, too short for a busy machine."""
    for attempt in range(_MOST_STARTS):
        try:
            ray.init(
                LOCAL,
                num_cpus=os.cpu_count(),
                num_gpus=n_gpus,
                include_dashboard=False,
                configure_logging=False,
                log_to_driver=False,
                object_store_memory=_OBJECT_STORE_BYTES,
            )
            return
        except Exception as error:
            ray.shutdown()
            if "timed out during startup" not in str(error):
                raise
            log.warning("Ray did not start within its time limit (%d of %d times)", attempt + 1, _MOST_STARTS)
    raise UserError(
        f"Ray did not start in {_MOST_STARTS} attempts: the machine is too busy; run the same command again later"
    )


def _require_answer(address: str) -> None:
    """UserError if nothing answers: Ray itself would try for minutes."""
    place = urlsplit(address if "://" in address else f"//{address}")
    try:
        socket.create_connection((str(place.hostname), place.port or 0), _ANSWER_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"cluster.address {address}: nothing answers there ({error.strerror or error}); start Ray (ray start"
            " --head), or correct the address"
        ) from None


def _reason(error: Exception, address: str) -> str:
    text = str(error).strip()
    text = on_one_line(text.splitlines()[-1] if "Traceback" in text else text)
    if isinstance(error, ConnectionError):
        if address == AUTO:
            return "no Ray runs on this machine; start it (ray start --head), or give its address as host:port"
        return f"what answers there is no Ray cluster of this machine ({text}); the port of ray:// is 10001, else 6379"
    return text
