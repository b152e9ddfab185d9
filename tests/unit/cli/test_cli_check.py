"""llmopt check: what it prints, writes and exits with."""

from __future__ import annotations

import json
import shutil
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.gate_samples import measured
from support.tiny_artifacts import rewrite_manifest

from llmopt.benchmark.gate.rounds import BASELINE, Rounds
from llmopt.errors import LlmoptError

QUICK = ["--workload", "prefill=4,decode=8", "--threads", 1]
WORK = {
    "operators": {"layers.0.norm": {"SkipNorm": 1}},
    "products": {"token": {"macs": {"float32": 10}, "weight_bytes": 40}},
    "other_bytes": 2,
}
Measure = Callable[..., None]


@pytest.fixture
def candidate(made: Path, tmp_path: Path) -> Path:
    """A copy of an artifact, to be changed."""
    shutil.copytree(made / "shared", tmp_path / "new" / "shared")
    return tmp_path / "new" / "shared"


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> Measure:
    """Let rounds come from made-up samples, at once."""

    def set_up(**options: Any) -> None:
        def measure(self: Rounds) -> None:
            number, sides = self.count, self._sides
            every = measured(number + 1, sides=sides, **options)
            self.measured += [m for m in every if m.round == number]
            self.durations_s.append(7.0)
            self.threads = 1

        monkeypatch.setattr(Rounds, "measure", measure)

    return set_up


def test_the_same_passes_and_says_what_could_have_been_found(
    llmopt: Any, made: Path, candidate: Path, measuring: Measure
) -> None:
    measuring()
    result = llmopt("check", candidate, "--baseline", made / "shared", *QUICK)
    assert result.exit_code == 0, result.stderr
    header, first, *_ = result.stdout.splitlines()
    assert header.split()[:3] == ["metric", "baseline", "candidate"]
    assert first.startswith("first token")
    assert first.endswith("pass")
    assert "would have been detected 19 times in 20" in " ".join(result.stdout.split())
    assert result.stdout.splitlines()[-1].startswith("no regression")


def test_slower_fails_with_the_metric_named(
    llmopt: Any, made: Path, candidate: Path, measuring: Measure
) -> None:
    measuring(factors={"time_per_output_token_s": 1.2})
    result = llmopt("check", candidate, "--baseline", made, *QUICK, "--json")
    assert result.exit_code == 1
    data = json.loads(result.stdout)
    assert (data["schema"], data["verdict"], data["exit_code"]) == (1, "fail", 1)
    verdicts = {m["metric"]: m["verdict"] for m in data["metrics"]}
    assert [name for name in verdicts if verdicts[name] == "fail"] == ["time_per_output_token_s"]
    assert verdicts["load_s"] == "reported"
    (artifact,) = data["artifacts"]
    assert len(artifact["processes"]) == 4 * len(artifact["rounds_s"])
    assert artifact["processes"][0]["blocks"]["ttft_s"][0][0] > 0


def test_noise_ends_inconclusive_at_the_bound(
    llmopt: Any, made: Path, candidate: Path, measuring: Measure
) -> None:
    measuring(noise=0.8)
    arguments = ["--baseline", made / "shared", *QUICK, "--max-time", "40s", "--json"]
    result = llmopt("check", candidate, *arguments)
    assert result.exit_code == 4
    data = json.loads(result.stdout)
    assert data["verdict"] == "inconclusive"
    assert len(data["artifacts"][0]["rounds_s"]) == 5
    short = llmopt("check", candidate, *arguments[:-3], "--max-time", "10")
    assert short.exit_code == 4
    assert "2 processes per side and 8 are needed" in short.stdout


def test_only_what_is_asked_for_is_gated(
    llmopt: Any, made: Path, candidate: Path, measuring: Measure
) -> None:
    measuring(factors={"time_per_output_token_s": 1.2, "load_s": 3.0})
    base = ["check", candidate, "--baseline", made / "shared", *QUICK]
    assert llmopt(*base, "--metric", "ttft_s").exit_code == 0
    assert llmopt(*base, "--metric", "load_s").exit_code == 1
    allowed = ["--max-regression", "time_per_output_token_s=30%"]
    assert llmopt(*base, *allowed).exit_code == 0
    assert llmopt(*base, "--max-regression", "30%").exit_code == 0


def test_counts_alone_time_nothing(
    llmopt: Any, made: Path, candidate: Path, tmp_path: Path
) -> None:
    old = tmp_path / "old" / "shared"
    shutil.copytree(made / "shared", old)
    more = {"operators": {"layers.0.norm": {"Norm": 1}, "layers.0": {"Add": 1}}}
    rewrite_manifest(old, work=WORK)
    rewrite_manifest(candidate, work=WORK | more)
    files = ["--junit", tmp_path / "check.xml", "--markdown", tmp_path / "check.md"]
    result = llmopt("check", candidate, "--baseline", old, "--proxies", "only", *files)
    assert result.exit_code == 1
    assert "operators of layers.0: Add 0 → 1; norm: SkipNorm 1 → 0, Norm 0 → 1" in result.stdout
    assert "round" not in result.stderr
    assert (tmp_path / "check.md").read_text().startswith("<!-- llmopt check -->\n")
    root = ET.parse(tmp_path / "check.xml").getroot()  # noqa: S314 - ours
    failures = {
        case.get("name") for case in root.iter("testcase") if case.find("failure") is not None
    }
    assert failures == {"operators", "operators of layers.0"}
    again = llmopt("check", old, "--baseline", old, "--proxies", "only")
    assert (again.exit_code, again.stdout.strip()[:13]) == (0, "no regression")


def test_counts_may_be_reported_only(
    llmopt: Any, made: Path, candidate: Path, measuring: Measure
) -> None:
    measuring()
    rewrite_manifest(candidate, work=WORK)
    (candidate / "more").write_text("x")
    manifest = json.loads((candidate / "manifest.json").read_text())
    extra = {"path": "more", "size_bytes": 1, "sha256": "0" * 64}
    rewrite_manifest(candidate, files=[*manifest["files"], extra])
    base = ["check", candidate, "--baseline", made / "shared", *QUICK]
    assert llmopt(*base).exit_code == 1
    result = llmopt(*base, "--proxies", "report")
    assert result.exit_code == 0
    assert "reported" in result.stdout


def test_a_baseline_is_written_and_compared_with_later(
    llmopt: Any, made: Path, candidate: Path, measuring: Measure, tmp_path: Path
) -> None:
    measuring()
    file = tmp_path / "baseline.json"
    written = llmopt("check", made / "shared", "--baseline", file, "--update", *QUICK)
    assert written.exit_code == 0, written.stderr
    assert "baseline.json with shared" in written.stdout
    result = llmopt("check", candidate, "--baseline", file)
    assert result.exit_code == 0, result.stdout
    assert "measured earlier" in result.stdout
    both = llmopt("check", made / "concat", "--baseline", file, "--update", *QUICK)
    assert "shared, concat" in both.stdout
    other = llmopt("check", candidate, "--baseline", file, "--workload", "prefill=2,decode=2")
    assert other.exit_code == 2
    assert "was measured with prefill=4,decode=8" in other.stderr


def test_another_machine_refuses_to_compare_times_but_counts(
    llmopt: Any, made: Path, candidate: Path, measuring: Measure, tmp_path: Path
) -> None:
    measuring()
    file = tmp_path / "baseline.json"
    llmopt("check", made / "shared", "--baseline", file, "--update", *QUICK)
    data = json.loads(file.read_text())
    data["machine"]["cores"] += 1
    file.write_text(json.dumps(data))
    result = llmopt("check", candidate, "--baseline", file, "--junit", tmp_path / "j.xml")
    assert result.exit_code == 3
    assert "another machine (cores " in result.stdout
    assert ET.parse(tmp_path / "j.xml").getroot().find(".//skipped") is not None  # noqa: S314
    assert llmopt("check", candidate, "--baseline", file, "--proxies", "only").exit_code == 0
    (candidate / "more").write_text("x")
    manifest = json.loads((candidate / "manifest.json").read_text())
    extra = {"path": "more", "size_bytes": 1, "sha256": "0" * 64}
    rewrite_manifest(candidate, files=[*manifest["files"], extra])
    assert llmopt("check", candidate, "--baseline", file).exit_code == 1


def test_a_baseline_of_counts_alone_compares_counts_alone(
    llmopt: Any, made: Path, candidate: Path, tmp_path: Path
) -> None:
    file = tmp_path / "baseline.json"
    only = ["--proxies", "only"]
    assert llmopt("check", made / "shared", "--baseline", file, "--update", *only).exit_code == 0
    assert llmopt("check", candidate, "--baseline", file, *only).exit_code == 0
    result = llmopt("check", candidate, "--baseline", file)
    assert result.exit_code == 3
    assert "the baseline has counts only" in result.stdout


def test_budgets_limit_what_an_artifact_takes(
    llmopt: Any, made: Path, candidate: Path, measuring: Measure, tmp_path: Path
) -> None:
    measuring()
    config = tmp_path / "llmopt.toml"
    base = ["check", candidate, "--baseline", made / "shared", *QUICK, "--config", config]
    for metric, limit, code in (
        ("time_per_output_token_s", 'max = "7ms"', 1),
        ("time_per_output_token_s", 'max = "9ms"', 0),
        ("size_bytes", 'max = "1 kB"', 1),
        ("kl_mean", "max = 0.5", 1),  # nobody measured it
        ("load_s", 'max_regression = "50%"', 0),
    ):
        config.write_text(f'[[budget]]\nartifact = "sh*"\nmetric = "{metric}"\n{limit}\n')
        assert llmopt(*base).exit_code == code, (metric, limit)
    config.write_text('[[budget]]\nartifact = "other"\nmetric = "size_bytes"\nmax = 1\n')
    assert llmopt(*base).exit_code == 0


def test_several_artifacts_are_told_apart(llmopt: Any, made: Path, measuring: Measure) -> None:
    measuring()
    several = ["check", made / "shared", made / "concat", *QUICK]
    result = llmopt(*several, "--baseline", made)
    assert result.exit_code == 0, result.stderr
    assert {line.split()[0] for line in result.stdout.splitlines()[1:9]} == {"shared", "concat"}
    refused = llmopt(*several, "--baseline", made / "shared")
    assert refused.exit_code == 2
    assert "a single artifact cannot be the baseline of several" in refused.stderr


def test_the_step_summary_gets_the_comment(
    llmopt: Any, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    run = ["check", made / "shared", "--baseline", made / "shared", "--proxies", "only"]
    assert llmopt(*run).exit_code == 0
    assert summary.read_text().startswith("before\n<!-- llmopt check -->\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "nowhere" / "summary.md"))
    result = llmopt(*run)
    assert result.exit_code == 0
    assert "Warning: GITHUB_STEP_SUMMARY" in result.stderr


def test_a_process_that_ends_is_an_error_in_every_form(
    llmopt: Any, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(_: Rounds) -> None:
        raise LlmoptError("shared: the process ended\x00: <no memory>")

    monkeypatch.setattr(Rounds, "measure", measure)
    report = tmp_path / "check.xml"
    result = llmopt(
        "check", made / "shared", "--baseline", made / "shared", *QUICK, "--junit", report, "--json"
    )
    assert result.exit_code == 1
    said = json.loads(result.stdout)
    assert (said["schema"], said["verdict"], said["exit_code"]) == (1, "error", 1)
    assert "no memory" in said["error"]
    assert "no memory" in result.stderr
    error = ET.parse(report).getroot().find(".//error")  # noqa: S314 - ours
    assert error is not None
    assert "no memory" in str(error.get("message"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-regression", "fast"], "not an amount"),
        (["--max-regression", "speed=5%"], "unknown metric of --max-regression"),
        (["--metric", "size_bytes"], "unknown metric of --metric"),
        (["--max-time", "0"], "above 0"),
        (["--threads", "0"], "at least 1"),
        (["--workload", "prefill=x"], "workload"),
        (["--config", "nowhere.toml"], "not found"),
        (["--update"], "--update writes a .json file"),
        (["--proxies", "report", "--metric", "encode_latency_s"], "nothing to gate"),
    ],
)
def test_requests_that_make_no_sense_are_refused(
    llmopt: Any, made: Path, arguments: list[str], message: str
) -> None:
    result = llmopt("check", made / "shared", "--baseline", made / "shared", *arguments)
    assert result.exit_code == 2, result.stderr
    assert message in result.stderr


def test_what_is_not_there_is_said_so(llmopt: Any, made: Path, tmp_path: Path) -> None:
    for arguments in (
        [tmp_path / "a", "--baseline", made / "shared"],
        [made / "shared", "--baseline", tmp_path / "b"],
        [made / "shared", "--baseline", tmp_path],
    ):
        result = llmopt("check", *arguments)
        assert result.exit_code == 2
        assert "not found" in result.stderr


def test_twice_as_slow_is_found_in_fresh_processes(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is made up here: sixteen processes of each, one side's steps slowed to a third."""
    from llmopt.benchmark.gate import CheckRequest, check

    monkeypatch.setattr("llmopt.benchmark.gate.rounds._WORKER_S", 0.1)
    slow = [
        sys.executable,
        str(Path(__file__).parents[3] / "bench" / "gate" / "slow_worker.py"),
        "2",
    ]
    request = CheckRequest(
        candidates=(made / "shared",),
        baseline=made / "shared",
        allowances={"": 0.5},
        metrics=("time_per_output_token_s",),
        workload="prefill=4,decode=40",
        threads=1,
        max_time_s=600.0,
        commands={"candidate": slow},
    )
    result = check(request)
    assert result.verdict == "fail"
    assert result.answers[0].change > 1
    assert result.answers[0].processes >= 8
    assert result.recorded[0].measured[0].side == BASELINE
