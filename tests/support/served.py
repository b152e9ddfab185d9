"""A server of an artifact in this process, and a plain client of it."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmopt.interface.arrays import Array
from llmopt.interface.stepping import Step, Stepper
from llmopt.runtime import Runner, load
from llmopt.runtime.serving.line import Line
from llmopt.runtime.serving.server import ListenOptions, listen, make_server

PATIENCE_S = 20.0


@dataclass
class Gate:
    """Lets steps of a model through as it is told: all, or so many more."""

    open: threading.Event = field(default_factory=threading.Event)
    tickets: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    passed: int = 0

    def slow_runner(self, folder: Path) -> Runner:
        """Return a runner of an artifact whose every step waits for the gate."""
        runner = load(folder, threads=1)
        made = runner.session.stepper
        runner.session.stepper = (  # type: ignore[method-assign]
            lambda batch, capacity: _Gated(made(batch, capacity), self)
        )
        return runner

    def wait(self) -> None:
        """Wait until one more step may be taken."""
        end = time.monotonic() + PATIENCE_S / 4
        while not self.open.is_set() and not self.tickets.acquire(timeout=0.01):
            assert time.monotonic() < end, "the gate stayed closed"
        self.passed += 1


@dataclass
class _Gated:
    stepper: Stepper
    gate: Gate

    def run(self, step: Step) -> Array:
        self.gate.wait()
        return self.stepper.run(step)


@dataclass(frozen=True)
class Reply:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """What a stream said, the end left out."""
        *said, end = self.body.decode().removesuffix("\n\n").split("\n\n")
        assert end == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in said]


@dataclass(frozen=True)
class Served:
    """A server that runs.

    Args:
        port: Of this machine.
        line: Its model.
    """

    port: int
    line: Line

    def get(self, path: str, **headers: str) -> Reply:
        """Ask for something."""
        return self.send("GET", path, None, headers)

    def post(self, path: str, data: Any = None, **headers: str) -> Reply:
        """Send JSON; bytes as they are."""
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        return self.send("POST", path, body, {"Content-Type": "application/json"} | headers)

    def send(self, method: str, path: str, body: Any, headers: Mapping[str, str]) -> Reply:
        """Send a request; underscores in names of headers become hyphens."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        with contextlib.closing(connection):
            connection.request(
                method, path, body, {k.replace("_", "-"): v for k, v in headers.items()}
            )
            found = connection.getresponse()
            return Reply(found.status, dict(found.headers), found.read())

    def begin(self, path: str, data: Any) -> socket.socket:
        """Send a request and return the connection, nothing read."""
        body = json.dumps(data).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        return connection

    def eventually(self, length: int) -> None:
        """Wait until so many requests are in the line."""
        end = time.monotonic() + PATIENCE_S
        while self.line.length != length:
            assert time.monotonic() < end, f"{self.line.length} in the line, not {length}"
            time.sleep(0.005)


@contextlib.contextmanager
def served(runner: Any, name: str, waiting: int = 64) -> Iterator[Served]:
    """Serve what ``runner()`` opens, until the block ends."""
    line = Line(runner, waiting)
    with listen(ListenOptions(port=0)) as listening:
        server = make_server(line, name, listening)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield Served(listening.getsockname()[1], line)
        finally:
            line.close()
            server.should_exit = True
            thread.join(PATIENCE_S)
            line.end()
        assert not thread.is_alive()
