"""Handle signals to stop: the work stops at once, with one line of output and the exit code that a shell expects."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, Self

_WORDS = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "terminated",
    signal.SIGHUP: "terminated, because its terminal was closed",
}
# If a call into a library does not return in this time, the process exits: SLURM kills it without a message after 30 s.
_GRACE_SECONDS = 10.0


class Stopped(BaseException):
    """A signal to stop. It is not an Exception, so that no library handles it as an error."""


class Stopping:
    """While the block runs, SIGINT, SIGTERM and SIGHUP raise `Stopped` in it. A second signal exits the process.

    A signal that is ignored stays ignored. Outside the main thread, nothing changes.

    Attributes
    ----------
    exit_code
        128 plus the number of the received signal, as in a shell; 0 if no signal was received.
    """

    def __init__(self) -> None:
        self.exit_code = 0
        self._before: dict[int, Any] = {}
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread can handle signals in Python
        for number in _WORDS:
            if signal.getsignal(number) != signal.SIG_IGN:  # ignored under nohup
                self._before[number] = signal.signal(number, self._stop)
        if not self._before:
            return self
        self._wakeup, watched = socket.socketpair()
        self._wakeup.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=[watched], daemon=True, name="stopping").start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._ended.set()
        if self._before:
            signal.set_wakeup_fd(self._wakeup_before)
            self._wakeup.close()  # ends the thread
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def line(self) -> str:
        """Message: what happened, and what to do."""
        return f"{_WORDS[signal.Signals(self.exit_code - 128)]}; run the same command again to resume"

    def _stop(self, number: int, frame: FrameType | None) -> None:
        again, self.exit_code = bool(self.exit_code), 128 + number
        if again:
            self._exit()
        raise Stopped

    def _watch(self, signals: socket.socket) -> None:
        """Exit if the block does not end after a signal: Python raises `Stopped` only after a library call returns."""
        with signals:
            while number := signals.recv(1):
                if number[0] in self._before and not self._ended.wait(_GRACE_SECONDS):
                    self.exit_code = 128 + number[0]
                    self._exit()

    def _exit(self) -> None:
        if _is_first_process():
            os.write(2, f"{self.line}\n".encode())  # not print, which may have been interrupted
        os._exit(self.exit_code)


def say(line: str) -> None:
    """Print a line to stderr; if several processes train together, only in the first one."""
    if _is_first_process():
        print(line, file=sys.stderr, flush=True)


def _is_first_process() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"
