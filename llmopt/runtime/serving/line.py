"""One model and those who wait for it: work is done one after another, by one thread.

A decoder reads all of its weights for each token and keeps every core busy with one request; two
at once would each take twice as long.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Generic, TypeVar

from llmopt.runtime.runner import Runner
from llmopt.runtime.serving.refusals import RefusedError

Piece = TypeVar("Piece")
Work = Callable[[Runner], Iterator[Piece]]
_BUSY: Final = "too many requests wait for the model; try again later"
_CLOSED: Final = "the server is shutting down"


class Line:
    """The model, and the work that waits for it. All but the work happens on one event loop.

    Args:
        open_runner: Opens the artifact, in the thread that will run it.
        waiting: Most requests that wait while one is answered.
    """

    def __init__(self, open_runner: Callable[[], Runner], waiting: int) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._closed = threading.Event()
        self._most = waiting + 1
        self.length = 0
        try:
            self.runner = self._thread.submit(open_runner).result()
        except BaseException:  # interrupted too: the thread would keep the process
            self.end()
            raise

    def join(self, work: Work[Piece]) -> Job[Piece]:
        """Return a place in the line.

        Raises:
            RefusedError: It is full, or closed.
        """
        if self._closed.is_set():
            raise RefusedError(503, _CLOSED)
        if self.length >= self._most:
            raise RefusedError(429, _BUSY, code="rate_limit_exceeded")
        self.length += 1
        turn = Job(work, self._closed, self._left)
        self._thread.submit(turn.take, self.runner)
        return turn

    def close(self) -> None:
        """Let nobody join, and tell those who still wait that their turn will not come."""
        self._closed.set()

    def end(self) -> None:
        """Wait for the thread to end; work that still goes on has to be cancelled before."""
        self._thread.shutdown()

    def _left(self) -> None:
        self.length -= 1


class Job(Generic[Piece]):
    """One piece of work in the line; iterate over what it gives.

    Args:
        work: Work to do, piece by piece, when it is first in line.
        closed: Set when turns no longer come.
        left: Called on the loop when it is over.
    """

    def __init__(
        self, work: Work[Piece], closed: threading.Event, left: Callable[[], None]
    ) -> None:
        self._work = work
        self._closed = closed
        self._left = left
        self._loop = asyncio.get_running_loop()
        self._told: asyncio.Queue[Any] = asyncio.Queue()
        self._stop = threading.Event()

    def cancel(self) -> None:
        """Let it end after the piece that is being made; what iterates gets no more."""
        self._stop.set()
        self._told.put_nowait(_END)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Yield the pieces as they are made.

        Raises:
            RefusedError: Its turn did not come.
            Exception: Whatever the work raised.
        """
        while (piece := await self._told.get()) is not _END:
            if isinstance(piece, BaseException):
                raise piece
            yield piece

    def take(self, runner: Runner) -> None:
        """Do the work, in the thread of the model."""
        try:
            for piece in self._pieces(runner):
                self._tell(self._told.put_nowait, piece)
                if self._stop.is_set():
                    break
        except Exception as error:  # noqa: BLE001 - it is raised where somebody waits for it
            self._tell(self._told.put_nowait, error)
        self._tell(self._told.put_nowait, _END)
        self._tell(self._left)

    def _pieces(self, runner: Runner) -> Iterator[Piece]:
        if self._closed.is_set():
            raise RefusedError(503, _CLOSED)
        return iter(()) if self._stop.is_set() else self._work(runner)

    def _tell(self, *call: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(*call)


_END: Final = object()
