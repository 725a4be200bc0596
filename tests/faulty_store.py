"""An object store between a client and another one, which fails a share of the requests as real ones do."""

from __future__ import annotations

import http.client
import itertools
import json
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_THROTTLED = b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>'
_FAILED = "/requests-that-failed"
_OF_CONNECTION = ("connection", "transfer-encoding", "server", "date")
_LATE_SECONDS = 4.0  # TileDB waits for an answer for three seconds


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256  # TileDB opens many connections at once

    def __init__(self, upstream: str, every: int, faults: Sequence[str]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.every = upstream, every
        self._faults, self._number = itertools.cycle(faults), itertools.count(1)
        self._lock = threading.Lock()
        self.failed: Counter[str] = Counter()

    def next_fault(self) -> str | None:
        with self._lock:
            if next(self._number) % self.every:
                return None
            fault = next(self._faults)
            self.failed[fault] += 1
            return fault

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that left is no error."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def _pass_on(self) -> None:
        if self.path == _FAILED:
            self._answer(200, {}, json.dumps(self.server.failed).encode())
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.next_fault() if self.command == "GET" else None
        if fault == "throttled":
            self._answer(503, {"Content-Type": "application/xml"}, _THROTTLED)
            return
        if fault == "late":
            time.sleep(_LATE_SECONDS)
        connection = http.client.HTTPConnection(self.server.upstream)
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        headers = {name: value for name, value in answer.getheaders() if name.lower() not in _OF_CONNECTION}
        content = answer.read()
        connection.close()
        if fault == "reset":
            self.send_response(answer.status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        self._answer(answer.status, headers, content)

    def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "content-length" not in {name.lower() for name in headers}:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on

    def log_message(self, format: str, *arguments: object) -> None:
        """Requests are not logged."""


class FaultyStore:
    """A running store: `address`, and the number of requests that failed in each way."""

    def __init__(self, address: str) -> None:
        self.address = address

    def failed(self) -> dict[str, int]:
        with urllib.request.urlopen(f"http://{self.address}{_FAILED}") as answer:
            found: dict[str, int] = json.load(answer)
        return found


@contextmanager
def faulty_store(upstream: str, every: int, *faults: str) -> Iterator[FaultyStore]:
    """A store in front of `upstream` while the block runs, in a process of its own: TileDB holds the GIL as it waits.

    Every `every`-th GET fails in one of the ways of `faults`, in turn: `throttled` (503 SlowDown), `reset` (the
    connection is reset in the middle of the answer), `late` (no answer for longer than the client waits).
    """
    command = [sys.executable, __file__, upstream, str(every), *faults]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield FaultyStore(process.stdout.readline().strip())
        finally:
            process.kill()


if __name__ == "__main__":
    server = _Server(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
    print(f"127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()
