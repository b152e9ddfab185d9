"""Workers: fresh processes that measure when it is their turn, and leave nothing behind."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_artifacts import rewrite_manifest

from llmopt.benchmark.gate import worker
from llmopt.benchmark.gate.process import Task, WorkerProcess, started
from llmopt.benchmark.gate.rounds import BASELINE, CANDIDATE, Rounds, plan_cycle
from llmopt.benchmark.workload import Encode, Generate
from llmopt.errors import LlmoptError

ECHO = """
import json, sys, time
print("{}", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if asked["do"] == "load":
        print(json.dumps({"load_s": 0.1, "threads": 1}), flush=True)
        continue
    if asked["do"] == "peak":
        print(json.dumps({"peak_rss_bytes": None}), flush=True)
        continue
    time.sleep(0.0005 * asked["count"])
    print(json.dumps({"samples": [FACTOR * 0.001] * asked["count"]}), flush=True)
"""
"""A worker that loads nothing: what is tested here is who talks to it."""


def echo(factor: float = 1.0, code: str = ECHO) -> Task:
    command = [sys.executable, "-c", code.replace("FACTOR", str(factor))]
    return Task(Path("made-up"), "prefill=2,decode=3", 1, command)


def state(process: WorkerProcess) -> str:
    pid = process._process.pid
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def stopped(*processes: WorkerProcess) -> bool:
    """Tell whether all come to be stopped: a signal takes effect when the process is scheduled."""
    end = time.monotonic() + 5
    while time.monotonic() < end:
        if all(state(process) == "T" for process in processes):
            return True
        time.sleep(0.005)
    return False


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Run a worker in this process and return its answers."""
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(worker, "_end_with_parent", lambda: None)

    def run(artifact: Path, workload: str, *commands: dict[str, Any]) -> list[dict[str, Any]]:
        request = {"artifact": str(artifact), "workload": workload, "threads": 1}
        lines = (json.dumps(command) + "\n" for command in ({"do": "load"}, *commands))
        worker.main(json.dumps(request), io.StringIO("".join(lines)), answers := io.StringIO())
        ready, *found = [json.loads(line) for line in answers.getvalue().splitlines()]
        assert ready == {"ready": True}
        return found

    yield run
    assert signal.getsignal(signal.SIGINT) == before


def block(metric: str, count: int) -> dict[str, Any]:
    return {"do": "block", "metric": metric, "count": count, "seed": 3}


def test_a_worker_answers_what_it_is_asked(main: Any, artifacts: Path) -> None:
    asked = [block("ttft_s", 2), block("time_per_output_token_s", 3), {"do": "peak"}]
    loaded, first, steps, peak = main(artifacts / "shared", "prefill=4,decode=8", *asked)
    assert loaded["load_s"] > 0
    assert [len(first["samples"]), len(steps["samples"])] == [2, 3]
    assert min(first["samples"] + steps["samples"]) > 0
    assert peak["peak_rss_bytes"] > 1e6


def test_a_worker_encodes_and_runs_given_arrays(main: Any, artifacts: Path, tmp_path: Path) -> None:
    ids = np.ones((2, 4), np.int64)
    np.savez(tmp_path / "in.npz", input_ids=ids, attention_mask=ids, token_type_ids=0 * ids)
    for workload, metric in (
        ("encode=2x4", "encode_latency_s"),
        (str(tmp_path / "in.npz"), "run_latency_s"),
    ):
        _, found = main(artifacts / "encoder", workload, block(metric, 2))
        assert len(found["samples"]) == 2


def test_a_worker_leaves_interrupts_to_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[Any] = []
    monkeypatch.setattr("signal.signal", lambda *what: set_to.append(what))
    monkeypatch.setattr("ctypes.CDLL", lambda _: (_ for _ in ()).throw(OSError))
    worker._end_with_parent()
    assert set_to == [(signal.SIGINT, signal.SIG_IGN)]


def test_a_worker_is_stopped_unless_it_is_its_turn() -> None:
    with started([echo(), echo()], [1, 0]) as (one, other):
        assert stopped(one, other)
        assert one.block("ttft_s", 2, 0) == [0.001, 0.001]
        assert stopped(one, other)
        pids = [one._process.pid, other._process.pid]
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_worker_that_is_killed_is_told_by_name() -> None:
    with started([echo()], [0]) as (one,):
        os.kill(one._process.pid, signal.SIGKILL)
        time.sleep(0.05)
        with pytest.raises(LlmoptError, match=r"made-up: the process .* ended: killed by SIGKILL"):
            one.block("ttft_s", 1, 0)


def test_a_worker_that_fails_says_why() -> None:
    code = ECHO.replace("time.sleep", "raise RuntimeError('no memory left') #")
    with (
        started([echo(code=code)], [0]) as (one,),
        pytest.raises(LlmoptError, match="no memory left"),
    ):
        one.block("ttft_s", 1, 0)
    with (
        pytest.raises(LlmoptError, match="exit code 3"),
        started([echo(code="import sys; sys.exit(3)")], [0]),
    ):
        pass


def test_a_worker_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmopt.benchmark.gate.process._TIMEOUT_S", 0.05)
    with (
        pytest.raises(LlmoptError, match="did not answer within 0 s"),
        started([echo(code="import time; time.sleep(60)")], [0]),
    ):
        pass


def test_an_artifact_that_does_not_load_is_an_error(artifacts: Path, tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(artifacts / "shared", broken)
    rewrite_manifest(broken, target="nothing")
    with (
        pytest.raises(LlmoptError, match=r"broken: the process .* ended: .*nothing"),
        started([Task(broken, "prefill=2,decode=2", 1)], [0]),
    ):
        pass


def test_rounds_give_every_process_the_same_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmopt.benchmark.gate.rounds._WORKER_S", 0.02)
    rounds = Rounds({BASELINE: echo(), CANDIDATE: echo(2.0)})
    for _ in range(2):
        rounds.measure()
    assert rounds.count == len(rounds.durations_s) == 2
    assert [(m.side, m.round, m.number) for m in rounds.measured][:4] == [
        (BASELINE, 0, 0),
        (CANDIDATE, 0, 0),
        (BASELINE, 0, 1),
        (CANDIDATE, 0, 1),
    ]
    for number in range(2):
        counts = [
            {k: len(v) for k, v in m.blocks.items()} for m in rounds.measured if m.round == number
        ]
        assert all(count == counts[0] for count in counts)
        assert counts[0]["ttft_s"] >= 1
        assert counts[0]["time_per_output_token_s"] >= 1
    assert "peak_rss_bytes" not in rounds.measured[0].blocks


def test_blocks_of_quick_models_are_long_enough_to_time() -> None:
    slots = plan_cycle(Generate(8, 200), 1e-3, 5e-5)
    assert {(s.metric, s.count) for s in slots} == {("ttft_s", 1), ("time_per_output_token_s", 80)}
    assert plan_cycle(Encode(2, 8), 1e-4, 0.0)[0].count == 40


def test_slow_models_get_one_cycle_of_few_blocks() -> None:
    slots = plan_cycle(Generate(64, 64), 5.0, 0.5)
    assert [s.metric for s in slots] == ["ttft_s"] + ["time_per_output_token_s"] * 8
