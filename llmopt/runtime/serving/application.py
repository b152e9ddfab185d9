"""The endpoints: from HTTP to work for the model, and back."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from llmopt.errors import LlmoptError, UsageError
from llmopt.runtime.serving import answers
from llmopt.runtime.serving.answers import Answer
from llmopt.runtime.serving.line import Job, Line
from llmopt.runtime.serving.refusals import RefusedError
from llmopt.runtime.serving.requests import Ask, read_chat, read_completion, read_embeddings
from llmopt.runtime.serving.work import Text, embed, generate, inputs_of, prompts_of

BODY_BYTES: Final = 4 << 20
BODY_S: Final = 30.0


@dataclass(frozen=True)
class Service:
    """What the endpoints share.

    Args:
        name: The model's name.
        created: Start of the server, in seconds since 1970.
        line: The model.
    """

    name: str
    created: int
    line: Line

    async def health(self, _: Request) -> Response:
        """Answer that the server is there, and how many requests it has."""
        return JSONResponse({"status": "ok", "model": self.name, "requests": self.line.length})

    async def models(self, _: Request) -> Response:
        """Answer with the one model."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """Answer with the model that is named."""
        self._check_name(request.path_params["name"])
        return JSONResponse(self._model())

    async def completions(self, request: Request) -> Response:
        """Answer with texts that follow prompts."""
        return await self._generate(request, read_completion)

    async def chat(self, request: Request) -> Response:
        """Answer with the next message of a conversation."""
        return await self._generate(request, read_chat)

    async def embeddings(self, request: Request) -> Response:
        """Answer with embeddings of texts."""
        data = await self._data(request)
        ask = read_embeddings(data)
        rows = await asyncio.to_thread(inputs_of, self.line.runner, ask)
        turn = self.line.join(lambda runner: embed(runner, rows))
        async with _watched(request, turn):
            parts = [part async for part in turn]
        if not parts:
            raise ClientDisconnect
        found = np.concatenate(parts)
        return JSONResponse(answers.embeddings(self.name, rows, found, as_base64=ask.base64))

    async def _generate(
        self, request: Request, read: Callable[[Mapping[str, Any]], Ask]
    ) -> Response:
        data = await self._data(request)
        ask = read(data)
        rows = await asyncio.to_thread(prompts_of, self.line.runner, ask)
        turn = self.line.join(lambda runner: generate(runner, rows, ask.options))
        answer = Answer(model=self.name, chat=ask.options.chat, rows=rows, usage=ask.usage)
        if ask.stream:
            return await _streamed(request, turn, answer)
        async with _watched(request, turn):
            pieces = [piece async for piece in turn]
        if not pieces or pieces[-1].reason is None:
            raise ClientDisconnect
        return JSONResponse(answer.complete(pieces))

    async def _data(self, request: Request) -> Mapping[str, Any]:
        """Return the JSON object that was sent, for this model.

        Raises:
            RefusedError: It is no such object, too large, late, or for another model.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # which a page of another origin cannot send unasked
            raise RefusedError(415, "send JSON, with the header 'Content-Type: application/json'")
        body = await _body(request)
        try:
            data = json.loads(body)
        except (ValueError, RecursionError) as error:
            reason = str(error) if isinstance(error, json.JSONDecodeError) else "not JSON"
            raise RefusedError(400, f"the body cannot be read: {reason}") from error
        if not isinstance(data, dict):
            raise RefusedError(400, "the body should be a JSON object")
        if data.get("model") is not None:
            self._check_name(data["model"])
        return data

    def _check_name(self, name: object) -> None:
        if name != self.name:
            problem = f"there is no model {name!r} here, only {self.name!r}"
            raise RefusedError(404, problem, "model", "model_not_found")

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "llmopt",
        }


def application(service: Service, *, local: bool) -> ASGIApp:
    """Return the server's application.

    Args:
        service: The model.
        local: Whether only requests to this machine by its own names are answered: a page that a
            browser here shows may know other names of it.
    """
    routes = [
        Route("/health", service.health, methods=["GET"]),
        Route("/v1/models", service.models, methods=["GET"]),
        Route("/v1/models/{name:path}", service.model, methods=["GET"]),
        Route("/v1/completions", service.completions, methods=["POST"]),
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        Route("/v1/embeddings", service.embeddings, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {
        LlmoptError: _on_llmopt_error,
        HTTPException: _on_http_exception,
        ClientDisconnect: _on_disconnect,
        Exception: _on_bug,
    }
    made = Starlette(routes=routes, exception_handlers=handlers)
    return _LocalOnly(made) if local else made


class _LocalOnly:
    """Answers requests whose Host is a name of this machine.

    Args:
        application: Application that answers local requests.
    """

    def __init__(self, application: ASGIApp) -> None:
        self._made = application

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "http":
            host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
            name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
            if not _is_local(name):
                problem = "this server answers to localhost alone; --host lets it answer others"
                await _refused(RefusedError(403, problem))(scope, receive, send)
                return
        await self._made(scope, receive, send)


def _is_local(name: str) -> bool:
    """Whether a host is this machine by its own names.

    >>> _is_local("localhost"), _is_local("[::1]"), _is_local("evil.example")
    (True, True, False)
    """
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return name.lower() == "localhost"


async def _body(request: Request) -> bytes:
    """Return what was sent.

    Raises:
        RefusedError: It is too large, or takes too long to come.
    """
    large = RefusedError(413, f"the body is larger than {BODY_BYTES} bytes")
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > BODY_BYTES:
        raise large
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                size += len(part)
                if size > BODY_BYTES:
                    raise large
                parts.append(part)
    except TimeoutError as error:
        raise RefusedError(408, f"the body did not come within {BODY_S:.0f} s") from error
    return b"".join(parts)


@contextlib.asynccontextmanager
async def _watched(request: Request, job: Job[Any]) -> AsyncIterator[None]:
    """Cancel the work when the client leaves, or the block ends early."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        job.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        job.cancel()


async def _streamed(request: Request, job: Job[Text], answer: Answer) -> Response:
    """Return a stream of events, or what was raised before the first."""
    watched = contextlib.AsyncExitStack()
    await watched.enter_async_context(_watched(request, job))
    pieces = aiter(job)
    try:
        first = await anext(pieces, None)
    except BaseException:
        await watched.aclose()
        raise
    if first is None:
        await watched.aclose()
        raise ClientDisconnect

    async def events() -> AsyncIterator[bytes]:
        ends = []
        async with watched:
            for part in answer.beginning():
                yield part
            piece: Text | None = first
            while piece is not None:
                ends += [piece] if piece.reason else []
                for part in answer.part(piece):
                    yield part
                try:
                    piece = await anext(pieces, None)
                except LlmoptError as error:
                    yield answers.event(_as_refused(error).body())
                    return
            for part in answer.end(ends):
                yield part

    return StreamingResponse(events(), headers=_STREAM, media_type="text/event-stream")


_STREAM: Final = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def _as_refused(error: LlmoptError) -> RefusedError:
    if isinstance(error, RefusedError):
        return error
    return RefusedError(400 if isinstance(error, UsageError) else 500, str(error))


def _refused(error: RefusedError) -> Response:
    headers = {"Retry-After": "1"} if error.status in {429, 503} else {}
    if error.status in {408, 413, 415}:  # what is still being sent is not read
        headers["Connection"] = "close"
    return JSONResponse(error.body(), error.status, headers)


async def _on_llmopt_error(_: Request, error: LlmoptError) -> Response:
    return _refused(_as_refused(error))


async def _on_http_exception(request: Request, error: HTTPException) -> Response:
    where = f"{request.method} {request.url.path}"
    known = error.status_code in {404, 405}
    problem = f"there is no {where} here" if known else str(error.detail)
    refused = _refused(RefusedError(error.status_code, problem))
    refused.headers.update(error.headers or {})
    return refused


async def _on_disconnect(_: Request, _error: ClientDisconnect) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _on_bug(_: Request, _error: Exception) -> Response:
    return _refused(RefusedError(500, "the server failed; it says more where it was started"))
