"""What a request asks for: OpenAI's JSON checked key by key.

What would change the answer and is not supported is refused, as a key that is not known is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from llmopt.errors import UsageError
from llmopt.runtime.generation import Request
from llmopt.runtime.serving.refusals import RefusedError

Data = Mapping[str, Any]
Tokens = tuple[int, ...]
COMPLETION_TOKENS: Final = 16
CHAT_TOKENS: Final = 1024
INPUTS: Final = 2048
STOPS: Final = 4
_IGNORED: Final = frozenset({"model", "user", "metadata", "store", "service_tier"})
_FIXED: Final[Mapping[str, tuple[Any, ...]]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
}
"""What is understood at these values alone, which change nothing; null is one of them."""
_LENGTHS: Final = ("max_tokens", "max_completion_tokens")
_SAMPLING: Final = ("temperature", "top_p", "top_k", "seed", "stop", *_LENGTHS)
_STREAMING: Final = ("stream", "stream_options")


@dataclass(frozen=True)
class Ask:
    """A request to generate.

    Args:
        prompts: A text, tokens or a conversation each.
        options: Options of generation.
        stream: Whether it is answered piece by piece.
        usage: Whether a stream ends with how many tokens it took.
    """

    prompts: tuple[str | Tokens | list[dict[str, str]], ...]
    options: Request
    stream: bool
    usage: bool


@dataclass(frozen=True)
class EmbedAsk:
    """A request for embeddings.

    Args:
        inputs: A text or tokens each.
        base64: Whether numbers are wanted as bytes in base64.
        width: Numbers of each vector; None for the model's own width.
    """

    inputs: tuple[str | Tokens, ...]
    base64: bool
    width: int | None


def read_completion(data: Data) -> Ask:
    """Return what a request of ``/v1/completions`` asks for.

    Raises:
        RefusedError: A key is unknown, missing, or has a value that it cannot have.
    """
    _check_keys(data, ("prompt", *_SAMPLING, *_STREAMING))
    return _ask(data, _texts(data, "prompt"), COMPLETION_TOKENS)


def read_chat(data: Data) -> Ask:
    """Return what a request of ``/v1/chat/completions`` asks for.

    Raises:
        RefusedError: As in `read_completion`.
    """
    _check_keys(data, ("messages", *_SAMPLING, *_STREAMING))
    messages = data.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _bad("messages", "a list of messages, and not empty")
    return _ask(data, ([_message(each) for each in messages],), CHAT_TOKENS, chat=True)


def read_embeddings(data: Data) -> EmbedAsk:
    """Return what a request of ``/v1/embeddings`` asks for.

    Raises:
        RefusedError: As in `read_completion`.
    """
    _check_keys(data, ("input", "encoding_format", "dimensions"))
    form = data.get("encoding_format") or "float"
    if form not in {"float", "base64"}:
        raise _bad("encoding_format", "'float' or 'base64'")
    return EmbedAsk(_texts(data, "input"), form == "base64", _number(data, "dimensions", None))


def _ask(data: Data, prompts: tuple[Any, ...], most: int, *, chat: bool = False) -> Ask:
    lengths = [name for name in _LENGTHS if data.get(name) is not None]
    if len(lengths) > 1:
        raise _bad(lengths[1], f"left out where {lengths[0]} is given")
    count = _number(data, lengths[0], most) if lengths else most
    if count < 1:
        raise _bad(lengths[0], "1 or more")
    seed = _number(data, "seed", None)
    try:
        options = Request(
            max_new_tokens=count,
            temperature=_real(data, "temperature"),
            top_p=_real(data, "top_p"),
            top_k=_number(data, "top_k", 0),
            seed=None if seed is None else seed % 2**64,
            stop=_stops(data),
            chat=chat,
        )
    except UsageError as error:
        raise RefusedError(400, str(error), str(error).split(" ", 1)[0]) from error
    stream = _flag(data, "stream")
    return Ask(prompts, options, stream, _wants_usage(data, stream=stream))


def _check_keys(data: Data, known: Sequence[str]) -> None:
    for key, value in data.items():
        if key in known or key in _IGNORED or value is None:
            continue
        if key not in _FIXED:
            raise RefusedError(400, f"unrecognized request argument {key!r}", repr(key)[1:-1])
        if value not in _FIXED[key]:
            only = _FIXED[key][0]
            raise RefusedError(400, f"{key} is supported as {only!r} only; leave it out", key)


def _texts(data: Data, key: str) -> tuple[str | Tokens, ...]:
    """Return one text, several, one row of tokens, or several."""
    value = data.get(key)
    wanted = "a text, tokens, or a list of either, and not empty"
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise _bad(key, wanted)
    if all(map(_whole, value)):
        return (tuple(value),)
    if len(value) > INPUTS:
        raise _bad(key, f"at most {INPUTS} of them")
    if not all(isinstance(each, str) or _is_tokens(each) for each in value):
        raise _bad(key, wanted)
    return tuple(tuple(each) if isinstance(each, list) else each for each in value)


def _is_tokens(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_whole, value))


def _message(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise _bad("messages", "objects with 'role' and 'content'")
    role = "system" if value["role"] == "developer" else value["role"]
    return {"role": role, "content": _content(value.get("content"))}


def _content(value: object) -> str:
    """Return a text, or the texts of a list of parts together."""
    if isinstance(value, str):
        return value
    parts = value if isinstance(value, list) else [value]
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise _bad("messages", "of text: 'content' is a string, or parts of type 'text'")
    return "".join(map(str, texts))


def _stops(data: Data) -> tuple[str, ...]:
    value = data.get("stop")
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise _bad("stop", "a text or a list of texts")
    if len(stops) > STOPS:
        raise _bad("stop", f"at most {STOPS} texts")
    return tuple(stops)


def _wants_usage(data: Data, *, stream: bool) -> bool:
    options = data.get("stream_options")
    if options is None:
        return False
    if not stream or not isinstance(options, dict):
        raise _bad("stream_options", 'an object, with "stream": true')
    return _flag(options, "include_usage")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(data: Data, key: str, default: int | None) -> Any:
    value = data.get(key)
    if value is None:
        return default
    if not _whole(value):
        raise _bad(key, "a whole number")
    return value


def _real(data: Data, key: str) -> float:
    value = data.get(key)
    if value is None:
        return 1.0
    if not _whole(value) and not isinstance(value, float):
        raise _bad(key, "a number")
    try:
        return float(value)
    except OverflowError:
        raise _bad(key, "a number, and not that large") from None


def _flag(data: Data, key: str) -> bool:
    value = data.get(key)
    if value is not None and not isinstance(value, bool):
        raise _bad(key, "true or false")
    return bool(value)


def _bad(key: str, wanted: str) -> RefusedError:
    return RefusedError(400, f"{key} should be {wanted}", key)
