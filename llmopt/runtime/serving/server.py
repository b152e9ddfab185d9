"""Starting the server, and ending it."""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final

import h11
import uvicorn
from typing_extensions import override
from uvicorn.protocols.http.h11_impl import H11Protocol

from llmopt.errors import UsageError
from llmopt.runtime.runner import Runner
from llmopt.runtime.serving.application import Service, application
from llmopt.runtime.serving.line import Line

HOST: Final = "127.0.0.1"
PORT: Final = 8000
QUEUE: Final = 64
GRACE_S: Final = 10
HEADERS_S: Final = 30.0
_ENDING: Final = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class ListenOptions:
    """Where a server listens, and how many may wait.

    Args:
        host: An address or name of this machine.
        port: 0 for a free one.
        queue: Most requests that wait while one is answered.
    """

    host: str = HOST
    port: int = PORT
    queue: int = QUEUE

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 <= self.port < 1 << 16:
            raise UsageError(f"port {self.port} is not between 0 and 65535")
        if self.queue < 0:
            raise UsageError(f"queue {self.queue} is below 0")


def serve(artifact: Path, name: str, options: ListenOptions, threads: int | None = None) -> int:
    """Answer requests until SIGINT or SIGTERM, and return the exit code.

    What is being generated then may end within `GRACE_S` seconds; who waits is sent away.

    Args:
        artifact: The folder.
        name: Name of the model for clients.
        options: Address to listen at, and limits.
        threads: Threads inside one operator; None for as many as the process may use.

    Raises:
        UsageError: The address or port cannot be had.
        ArtifactError: The artifact is damaged.
        BackendUnavailableError: What it needs is not here.
    """
    with listen(options) as listening:
        line = Line(lambda: Runner(artifact, threads), options.queue)
        try:
            host, port = listening.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            sys.stderr.write(f"serving {name} at http://{shown}:{port}/v1 until Ctrl-C\n")
            _run(make_server(line, name, listening), listening)
        finally:
            line.end()
    return 0


def make_server(line: Line, name: str, listening: socket.socket) -> uvicorn.Server:
    """Return a server of a model that answers at a socket when it is run."""
    local = ipaddress.ip_address(listening.getsockname()[0]).is_loopback
    config = uvicorn.Config(
        application(Service(name, int(time.time()), line), local=local),
        loop="asyncio",
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE_S,
    )
    return _Server(config, line)


def _run(server: uvicorn.Server, listening: socket.socket) -> None:
    # uvicorn raises the signal that ended it once more, when it is done
    before = {number: signal.signal(number, _noted) for number in _ENDING}
    try:
        server.run([listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Server(uvicorn.Server):
    """A server that closes the line as soon as it has to stop.

    Args:
        config: Configuration of uvicorn.
        line: The model.
    """

    def __init__(self, config: uvicorn.Config, line: Line) -> None:
        super().__init__(config)
        self._line = line

    @override
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._line.close()
        super().handle_exit(sig, frame)


class _Protocol(H11Protocol):
    """HTTP whose first request has to come in time."""

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(HEADERS_S, self._late)

    def _late(self) -> None:
        between = self.timeout_keep_alive_task is not None  # requests, which has its own time
        if self.conn.their_state is h11.IDLE and not between:
            self.transport.close()


def listen(options: ListenOptions) -> socket.socket:
    """Return a socket that listens there.

    Raises:
        UsageError: The address or port cannot be had.
    """
    try:
        found = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)
        family, _, _, _, address = found[0]
        return socket.create_server(address[:2], family=family, backlog=options.queue + 64)
    except OSError as error:
        where = f"{options.host}:{options.port}"
        hint = "choose another with --host and --port"
        raise UsageError(f"cannot listen at {where} ({error.strerror or error}); {hint}") from error


def _noted(_number: int, _frame: FrameType | None) -> None:
    """Do nothing: the server has ended because of it."""
