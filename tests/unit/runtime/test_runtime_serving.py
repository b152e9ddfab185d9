"""The server: OpenAI's shapes, and clients that are wrong, slow, many or gone."""

from __future__ import annotations

import base64
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.served import PATIENCE_S, Gate, Reply, Served, served
from support.tiny_artifacts import HIDDEN, MAX_LENGTH, TinyDecoder, TinyEncoder

from llmopt.errors import BackendUnavailableError, LlmoptError, UsageError
from llmopt.runtime import Runner, load
from llmopt.runtime import serving as package
from llmopt.runtime.chat import ChatFormat, Join
from llmopt.runtime.serving import application as app
from llmopt.runtime.serving import server as serving
from llmopt.runtime.serving.server import ListenOptions, serve

CHAT = ChatFormat(
    (
        Join("start", "system", "S:"),
        Join("system", "user", "\nU:"),
        Join("start", "user", "U:"),
        Join("user", "generate", "\nA:"),
    )
)
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = TinyDecoder().write(tmp_path_factory.mktemp("served") / "tiny")
    (folder / "chat.json").write_text(CHAT.to_json())
    return folder


@pytest.fixture(scope="module")
def runner(chatty: Path) -> Runner:
    """What answers are compared with."""
    return load(chatty, threads=1)


@pytest.fixture(scope="module")
def tiny(chatty: Path) -> Iterator[Served]:
    """A server of the tiny decoder."""
    with served(lambda: load(chatty, threads=1), "tiny") as found:
        yield found


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Runner]]:
    """A server of the tiny encoder, and its runner."""
    folder = TinyEncoder().write(tmp_path_factory.mktemp("served") / "encoder")
    with served(lambda: load(folder, threads=1), "encoder") as found:
        yield found, load(folder, threads=1)


def text_of(reply: Reply) -> str:
    assert reply.status == 200, reply.body
    [choice] = reply.json["choices"]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


def test_a_completion_is_the_text_that_the_runner_writes(tiny: Served, runner: Runner) -> None:
    reply = tiny.post("/v1/completions", {"model": "tiny", "prompt": "Hello", **GREEDY})

    assert text_of(reply) == runner.generate("Hello", max_new_tokens=12)
    data = reply.json
    assert (data["object"], data["model"]) == ("text_completion", "tiny")
    assert data["id"].startswith("cmpl-")
    assert abs(data["created"] - time.time()) < 60
    assert data["choices"][0]["finish_reason"] == "length"
    assert data["usage"] == {"prompt_tokens": 5, "completion_tokens": 12, "total_tokens": 17}


def test_several_prompts_are_answered_by_their_index(tiny: Served, runner: Runner) -> None:
    prompts = ["Hello", "Once upon"]
    asked: dict[str, Any] = {"prompt": prompts, **GREEDY}

    whole = tiny.post("/v1/completions", asked).json
    parts = tiny.post("/v1/completions", asked | {"stream": True}).events

    wanted = runner.generate(prompts, max_new_tokens=12)
    assert [choice["text"] for choice in whole["choices"]] == wanted
    assert [choice["index"] for choice in whole["choices"]] == [0, 1]
    assert whole["usage"]["completion_tokens"] == 24
    for row, text in enumerate(wanted):
        choices = [c for part in parts for c in part["choices"] if c["index"] == row]
        assert "".join(choice["text"] for choice in choices) == text
        assert [c["finish_reason"] for c in choices if c["finish_reason"]] == ["length"]


def test_prompts_may_be_tokens(tiny: Served, runner: Runner) -> None:
    ids = list(b"Hello")

    one = tiny.post("/v1/completions", {"prompt": ids, **GREEDY})
    several = tiny.post("/v1/completions", {"prompt": [ids, ids], **GREEDY})

    assert text_of(one) == runner.generate("Hello", max_new_tokens=12)
    assert [choice["text"] for choice in several.json["choices"]] == [text_of(one)] * 2


def test_a_stream_joins_to_the_whole_and_counts_its_tokens(tiny: Served, runner: Runner) -> None:
    asked = {"prompt": "Hello", **GREEDY, "stream": True, "stream_options": {"include_usage": True}}

    reply = tiny.post("/v1/completions", asked)

    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    *parts, last = reply.events
    texts = [part["choices"][0]["text"] for part in parts]
    assert "".join(texts) == runner.generate("Hello", max_new_tokens=12)
    assert len(texts) > 3
    assert [part["choices"][0]["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [
        "length"
    ]
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 12
    assert len({part["id"] for part in reply.events}) == 1


def test_a_chat_is_asked_in_the_artifact_s_format(tiny: Served, runner: Runner) -> None:
    conversation = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
    ]
    asked: dict[str, Any] = {"messages": conversation, "temperature": 0}

    whole = tiny.post("/v1/chat/completions", asked | {"max_completion_tokens": 6})
    parts = tiny.post("/v1/chat/completions", asked | {"max_tokens": 6, "stream": True}).events

    told = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    wanted = runner.generate(told, chat=True, max_new_tokens=6)
    assert text_of(whole) == wanted
    assert whole.json["object"] == "chat.completion"
    assert parts[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    deltas = [part["choices"][0]["delta"] for part in parts]
    assert "".join(delta.get("content", "") for delta in deltas) == wanted
    assert parts[-1]["choices"][0]["finish_reason"] in {"stop", "length"}
    assert {part["object"] for part in parts} == {"chat.completion.chunk"}


def test_a_text_ends_before_a_stop_string(tiny: Served, runner: Runner) -> None:
    text = runner.generate("Hello", max_new_tokens=12)
    stop = text[3:5]

    reply = tiny.post("/v1/completions", {"prompt": "Hello", **GREEDY, "stop": [stop]})

    assert text_of(reply) == text[: text.index(stop)]
    assert reply.json["choices"][0]["finish_reason"] == "stop"
    assert reply.json["usage"]["completion_tokens"] < 12


def test_a_text_ends_with_the_model_s_own_end(tmp_path: Path, runner: Runner) -> None:
    [first] = runner.generate_ids([list(b"Hello")], max_new_tokens=1)
    folder = TinyDecoder().write(tmp_path / "ends", eos=tuple(first))

    with served(lambda: load(folder, threads=1), "ends") as found:
        reply = found.post("/v1/completions", {"prompt": "Hello", **GREEDY})

    assert text_of(reply) == ""
    assert reply.json["choices"][0]["finish_reason"] == "stop"
    assert reply.json["usage"]["completion_tokens"] == 1


def test_a_seed_gives_the_same_text_again(tiny: Served, runner: Runner) -> None:
    asked = {"prompt": "Hello", "seed": 5, "temperature": 20, "top_p": 0.9, "max_tokens": 12}

    texts = [text_of(tiny.post("/v1/completions", asked)) for _ in range(2)]
    other = text_of(tiny.post("/v1/completions", asked | {"seed": -5}))

    options: dict[str, Any] = {"temperature": 20, "top_p": 0.9, "max_new_tokens": 12}
    assert texts == [runner.generate("Hello", seed=5, **options)] * 2
    assert other == runner.generate("Hello", seed=2**64 - 5, **options) != texts[0]


def test_embeddings_are_those_of_the_runner(embedder: tuple[Served, Runner]) -> None:
    found, runner = embedder
    texts = ["one", "two three", "four"]
    wanted = runner.embed(texts)

    plain = found.post("/v1/embeddings", {"input": texts}).json
    coded = found.post("/v1/embeddings", {"input": texts, "encoding_format": "base64"}).json
    tokens = found.post("/v1/embeddings", {"input": list(b"one"), "dimensions": HIDDEN}).json

    assert plain["object"] == "list"
    assert [each["index"] for each in plain["data"]] == [0, 1, 2]
    listed = np.array([each["embedding"] for each in plain["data"]], np.float32)
    assert np.array_equal(listed, wanted)
    bytes_of = [base64.b64decode(each["embedding"]) for each in coded["data"]]
    assert np.array_equal([np.frombuffer(each, "<f4") for each in bytes_of], wanted)
    np.testing.assert_allclose(tokens["data"][0]["embedding"], wanted[0], rtol=1e-5)
    count = sum(map(len, texts))
    assert plain["usage"] == {"prompt_tokens": count, "total_tokens": count}


def test_more_inputs_than_go_at_once_keep_their_order(embedder: tuple[Served, Runner]) -> None:
    found, runner = embedder
    texts = ["a" * (1 + i % 9) for i in range(40)]

    data = found.post("/v1/embeddings", {"input": texts}).json["data"]

    np.testing.assert_allclose([d["embedding"] for d in data], runner.embed(texts), rtol=1e-4)


def test_the_model_and_the_server_can_be_asked_for(tiny: Served) -> None:
    listed = tiny.get("/v1/models").json
    named = tiny.get("/v1/models/tiny")

    assert [model["id"] for model in listed["data"]] == ["tiny"]
    assert named.json == listed["data"][0]
    assert tiny.get("/health").json == {"status": "ok", "model": "tiny", "requests": 0}
    assert_refused(tiny.get("/v1/models/other"), 404, "model", "model_not_found")
    assert_refused(tiny.get("/v1/else"), 404)
    refused = tiny.get("/v1/completions")
    assert_refused(refused, 405)
    assert refused.headers["allow"] == "POST"


def assert_refused(
    reply: Reply, status: int, parameter: str | None = None, code: str | None = None
) -> None:
    assert reply.status == status, reply.body
    error = reply.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert (error["param"], error["code"]) == (parameter, code)


@pytest.mark.parametrize(
    ("data", "parameter"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a"] * 3000}, "prompt"),
        ({"prompt": "a", "n": 2}, "n"),
        ({"prompt": "a", "logprobs": 3}, "logprobs"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "no_such": 1}, "no_such"),
        ({"prompt": "a", "\ud800": 1}, "\\ud800"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 1, "max_completion_tokens": 1}, "max_completion_tokens"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "temperature": "hot"}, "temperature"),
        ({"prompt": "a", "temperature": 10**400}, "temperature"),
        ({"prompt": "a", "temperature": float("nan")}, "temperature"),
        ({"prompt": "a", "top_p": 0}, "top_p"),
        ({"prompt": "a", "top_k": -1}, "top_k"),
        ({"prompt": "a", "seed": "x"}, "seed"),
        ({"prompt": "a", "stop": ["a"] * 5}, "stop"),
        ({"prompt": "a", "stop": 3}, "stop"),
        ({"prompt": "a", "stream": "yes"}, "stream"),
        ({"prompt": "a", "stream_options": {}}, "stream_options"),
        ({"prompt": "a", "stream": True, "stream_options": {"include_usage": 1}}, "include_usage"),
        ({"prompt": ""}, None),
        ({"prompt": "a" * MAX_LENGTH}, None),
        ({"prompt": "half \ud800"}, None),
        ({"prompt": [999]}, None),
        ([1], None),
    ],
)
def test_what_cannot_be_asked_is_refused(tiny: Served, data: Any, parameter: str | None) -> None:
    assert_refused(tiny.post("/v1/completions", data), 400, parameter)


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "Hi",
        ["Hi"],
        [{"content": "Hi"}],
        [{"role": "user"}],
        [{"role": "user", "content": [{"type": "image_url"}]}],
        [{"role": "user", "content": [3]}],
    ],
)
def test_a_conversation_of_another_form_is_refused(tiny: Served, messages: Any) -> None:
    assert_refused(tiny.post("/v1/chat/completions", {"messages": messages}), 400, "messages")


def test_a_role_that_the_format_has_not_is_refused(tiny: Served) -> None:
    asked = {"messages": [{"role": "tool", "content": "Hi"}]}
    reply = tiny.post("/v1/chat/completions", asked)

    assert_refused(reply, 400)
    assert "no role 'tool'" in reply.json["error"]["message"]


def test_values_that_change_nothing_are_taken(tiny: Served) -> None:
    more = {"n": 1, "echo": False, "logprobs": None, "frequency_penalty": 0.0, "user": "me"}
    assert text_of(tiny.post("/v1/completions", {"prompt": "Hello", **GREEDY, **more}))


def test_a_model_of_another_kind_or_name_is_refused(
    tiny: Served, embedder: tuple[Served, Runner]
) -> None:
    found, _ = embedder

    assert_refused(tiny.post("/v1/embeddings", {"input": "a"}), 400)
    assert_refused(found.post("/v1/completions", {"prompt": "a"}), 400)
    wrong = tiny.post("/v1/completions", {"prompt": "a", "model": "gpt-9"})
    assert_refused(wrong, 404, "model", "model_not_found")
    assert_refused(found.post("/v1/embeddings", {"input": "a", "dimensions": 3}), 400, "dimensions")
    assert_refused(
        found.post("/v1/embeddings", {"input": "a", "encoding_format": "hex"}),
        400,
        "encoding_format",
    )
    code = "context_length_exceeded"
    assert_refused(found.post("/v1/embeddings", {"input": "a" * 99}), 400, "input", code)


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"1" * 9999])
def test_what_is_no_json_is_refused(tiny: Served, body: bytes) -> None:
    assert_refused(tiny.post("/v1/completions", body), 400)


def test_bodies_of_other_types_are_refused(tiny: Served) -> None:
    reply = tiny.post("/v1/completions", b"{}", Content_Type="text/plain")

    assert_refused(reply, 415)
    assert "Content-Type: application/json" in reply.json["error"]["message"]


def test_a_body_that_is_too_large_is_refused_before_it_is_read(tiny: Served) -> None:
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with closing(socket.create_connection(("127.0.0.1", tiny.port), PATIENCE_S)) as connection:
        connection.sendall(f"{head}Content-Length: {1 << 40}\r\n\r\n".encode())
        assert read_all(connection).startswith(b"HTTP/1.1 413")


def test_a_body_of_unknown_length_is_cut_off(tiny: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "BODY_BYTES", 1000)

    part = b"64\r\n" + b" " * 100 + b"\r\n"
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with closing(socket.create_connection(("127.0.0.1", tiny.port), PATIENCE_S)) as connection:
        # In one piece: whoever writes on after the answer finds the connection closed.
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + part * 20)
        assert connection.recv(65536).startswith(b"HTTP/1.1 413")


def read_all(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def test_a_body_that_does_not_come_is_not_waited_for(
    tiny: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "BODY_S", 0.2)
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with closing(socket.create_connection(("127.0.0.1", tiny.port), PATIENCE_S)) as connection:
        connection.sendall(f"{head}Content-Length: 9\r\n\r\n{{".encode())
        # others are answered meanwhile
        assert text_of(tiny.post("/v1/completions", {"prompt": "Hello", **GREEDY}))
        assert read_all(connection).startswith(b"HTTP/1.1 408")


def test_a_client_that_leaves_while_it_sends_is_let_go(tiny: Served) -> None:
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with closing(socket.create_connection(("127.0.0.1", tiny.port), PATIENCE_S)) as connection:
        connection.sendall(f"{head}Content-Length: 9\r\n\r\n{{".encode())

    assert tiny.get("/health").status == 200


def test_a_connection_without_a_request_is_closed(
    tiny: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "HEADERS_S", 0.1)
    with closing(socket.create_connection(("127.0.0.1", tiny.port), PATIENCE_S)) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: loc")
        assert read_all(connection) == b""


def test_pages_of_other_origins_do_not_reach_the_model(tiny: Served) -> None:
    assert_refused(tiny.get("/v1/models", Host="evil.example:8000"), 403)
    assert tiny.get("/v1/models", Host=f"localhost:{tiny.port}").status == 200
    assert tiny.get("/v1/models", Host="[::1]").status == 200


def test_fifty_at_once_are_all_answered(tiny: Served, runner: Runner) -> None:
    def ask(number: int) -> str:
        return text_of(tiny.post("/v1/completions", {"prompt": f"Hello {number}", **GREEDY}))

    with ThreadPoolExecutor(50) as clients:
        texts = list(clients.map(ask, range(50)))

    wanted = [runner.generate(f"Hello {number}", max_new_tokens=12) for number in range(50)]
    assert texts == wanted
    tiny.eventually(0)


def test_who_finds_the_line_full_is_sent_away(chatty: Path) -> None:
    gate = Gate()
    asked = {"prompt": "Hello", **GREEDY}
    with served(lambda: gate.slow_runner(chatty), "slow", waiting=1) as found:
        connections = [found.begin("/v1/completions", asked) for _ in range(2)]
        found.eventually(2)

        full = found.post("/v1/completions", asked)
        health = found.get("/health").json
        gate.open.set()

        assert_refused(full, 429, code="rate_limit_exceeded")
        assert full.headers["retry-after"] == "1"
        assert health["requests"] == 2
        for connection in connections:
            with closing(connection):
                assert connection.recv(65536).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_generation(chatty: Path, *, stream: bool) -> None:
    gate = Gate()
    asked = {"prompt": "Hello", "temperature": 0, "max_tokens": 40, "stream": stream}
    with served(lambda: gate.slow_runner(chatty), "slow") as found:
        running, waiting = [found.begin("/v1/completions", asked) for _ in range(2)]
        found.eventually(2)
        gate.tickets.release(9)
        told = b""
        while stream and b"data: " not in told:
            told += running.recv(65536)

        waiting.close()
        running.close()
        time.sleep(0.2)  # until the server has noticed
        gate.open.set()
        found.eventually(0)

        assert gate.passed < 15  # not the 40 of one, nor those of the other
        assert text_of(found.post("/v1/completions", {"prompt": "Hello", **GREEDY}))


def test_a_server_that_ends_finishes_what_it_began_and_no_more(chatty: Path) -> None:
    gate = Gate()
    asked = {"prompt": "Hello", **GREEDY}
    with served(lambda: gate.slow_runner(chatty), "slow") as found, ExitStack() as stack:
        running = stack.enter_context(closing(found.begin("/v1/completions", asked)))
        found.eventually(1)
        waiting = stack.enter_context(closing(found.begin("/v1/completions", asked)))
        found.eventually(2)
        gate.tickets.release(2)
        found.line.close()
        late = found.post("/v1/completions", asked)
        gate.open.set()

        assert_refused(late, 503)
        assert running.recv(65536).startswith(b"HTTP/1.1 200")
        assert waiting.recv(65536).startswith(b"HTTP/1.1 503")


def test_an_error_in_mid_stream_is_its_last_event(chatty: Path) -> None:
    def failing() -> Runner:
        runner = load(chatty, threads=1)
        decode, calls = runner.tokenizer.decode, itertools.count()

        def fail(tokens: list[int]) -> str:
            if next(calls) % 20 == 19:
                raise LlmoptError("the device overheated")
            return decode(tokens)

        runner.tokenizer.decode = fail  # type: ignore[method-assign]
        return runner

    with served(failing, "failing") as found:
        asked = {"prompt": "Hello", **GREEDY}
        streamed = found.post("/v1/completions", asked | {"stream": True})
        whole = found.post("/v1/completions", asked)

    *_, last = streamed.body.decode().removesuffix("\n\n").split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "the device overheated"
    assert_refused(whole, 500)


def test_a_bug_is_a_server_error_and_the_server_goes_on(
    chatty: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> Runner:
        runner = load(chatty, threads=1)

        def divide(batch: int, capacity: int) -> Any:
            return batch * capacity // 0

        vars(runner.session)["stepper"] = divide
        return runner

    with served(broken, "broken") as found:
        for stream in (False, True):
            asked = {"prompt": "Hello", **GREEDY, "stream": stream}
            assert_refused(found.post("/v1/completions", asked), 500)
        assert found.get("/health").json["requests"] == 0
    assert "ZeroDivisionError" in caplog.text


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_cleanly(
    number: signal.Signals, chatty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    replies = []

    def client() -> None:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            try:
                replies.append(Served(port, None).get("/health"))  # type: ignore[arg-type]
                break
            except OSError:
                time.sleep(0.02)
        os.kill(os.getpid(), number)

    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    asking = threading.Thread(target=client)
    asking.start()

    assert serve(chatty, "tiny", ListenOptions(port=port), threads=1) == 0

    asking.join()
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before
    assert replies[0].json["model"] == "tiny"
    assert f"serving tiny at http://127.0.0.1:{port}/v1" in capsys.readouterr().err


def test_a_place_that_cannot_be_had_says_so(chatty: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=rf"cannot listen at 127.0.0.1:{port}.*--port"):
            serve(chatty, "tiny", ListenOptions(port=port))
    with pytest.raises(UsageError, match=r"cannot listen at no\.such\.host"):
        serve(chatty, "tiny", ListenOptions("no.such.host.invalid", 0))
    with pytest.raises(UsageError, match="port 70000"):
        ListenOptions(port=70000)
    with pytest.raises(UsageError, match="queue -1"):
        ListenOptions(queue=-1)


def test_an_artifact_that_cannot_be_opened_ends_the_start(tmp_path: Path) -> None:
    with pytest.raises(LlmoptError, match="not found"):
        serve(tmp_path / "none", "none", ListenOptions(port=0))


def test_without_the_library_that_serves_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(package, "find_spec", lambda name: None if name == "uvicorn" else sys)

    with pytest.raises(BackendUnavailableError, match=r"uvicorn not installed.*llmopt\[serve\]"):
        package.require_server()
