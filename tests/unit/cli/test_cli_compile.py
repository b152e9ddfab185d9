"""llmopt compile: what is asked for arrives, what was made is told."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from llmopt.artifact.manifest import Manifest
from llmopt.cli import app
from llmopt.cli.progress import Progress
from llmopt.cli.summary import quality, summary, verification
from llmopt.compiler import Artifact, CompileOptions
from llmopt.errors import AccuracyError
from llmopt.frontend.base import SourceOptions
from llmopt.fusion import FusionCount
from llmopt.interface.facts import ModelFacts
from llmopt.passes.base import Miss
from llmopt.passes.pipeline import Ran


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What ``compile_source`` is called with; nothing is compiled."""
    found: dict[str, Any] = {}

    def compile_source(*arguments: Any) -> list[Artifact]:
        names = ("source", "targets", "output", "options", "reading", "progress")
        found.update(zip(names, arguments, strict=True))
        return [artifact(tmp_path)]

    monkeypatch.setattr("llmopt.compiler.compile_source", compile_source)
    return found


def artifact(path: Path, **changes: Any) -> Artifact:
    """Return an artifact with one attention of two fused."""
    manifest = Manifest(
        "onnxruntime-cpu",
        "model.onnx",
        changes.pop("task", "generate"),
        model=ModelFacts(layers=2),
        precision={"weights": "w8"},
        verification={
            "status": "passed",
            "cases": 12,
            "tolerance": 0.001,
            "worst_error_rel": 2.7e-05,
            "worst_case": "B1 S33 P0 none logits",
        },
        quality={"kl_mean": 0.00173, "kl_mean_error": 0.00012, "top1": 0.974, "top1_error": 0.006},
    )
    missed = tuple(f"layer{i}: no mask" for i in range(7))
    fusion = {
        "attention": FusionCount(2, 1, missed),
        "norm": FusionCount(5, 5),
        "activation": FusionCount(None, 2),
    }
    ran = (Ran("fuse-attention", 1, (Miss("layer1", "no mask", "attention"),), 0.1),)
    values = {"passes": ran, "fusion": fusion, "notes": ("no chat template",)} | changes
    return Artifact(path, manifest, **values)


def test_a_compiled_artifact_is_described_and_runs(
    llmopt: Any, bigram: Path, tmp_path: Path
) -> None:
    result = llmopt("compile", bigram, "--target", "cpu", "-o", tmp_path / "out")

    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["artifact", str(tmp_path / "out")]
    assert lines[1].split() == ["target", "onnxruntime-cpu"]
    assert "kB" in lines[2]
    assert "within 0.001 of the source; worst relative error" in lines[3]
    assert ["norm", "1", "1"] in [line.split() for line in lines]
    stages = [line for line in result.stderr.splitlines() if line.endswith(" s")]
    assert [line.partition(" … ")[0] for line in stages][:3] == [
        "starting",
        "tracing",
        "optimizing",
    ]
    assert "Next: llmopt run" in result.stderr
    assert "--inputs" in result.stderr.splitlines()[-1]
    assert Manifest.read(tmp_path / "out").task == "generate"


def test_json_is_one_object_with_the_keys_of_the_design(
    llmopt: Any, bigram: Path, tmp_path: Path
) -> None:
    result = llmopt("compile", bigram, "--target", "cpu", "-o", tmp_path / "out", "--json")

    data = json.loads(result.stdout)
    assert list(data) == ["schema", "artifacts"]
    [made] = data["artifacts"]
    keys = {"path", "target", "size_bytes", "passes", "fusion", "verification", "quality"}
    assert set(made) == keys
    assert made["path"] == str(tmp_path / "out")
    around = {"manifest.json", "build-report.json"}
    files = [f for f in (tmp_path / "out").rglob("*") if f.is_file() and f.name not in around]
    assert made["size_bytes"] == sum(file.stat().st_size for file in files)
    assert made["fusion"]["norm"]["fused"] == made["fusion"]["norm"]["expected"] == 1
    assert made["verification"]["status"] == "passed"
    assert {"name", "applied", "missed"} == set(made["passes"][0])


def test_the_default_place_is_named_after_source_and_target(
    llmopt: Any, bigram: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    llmopt("compile", bigram, "--target", "cpu", "--verify", "off")

    assert [path.name for path in tmp_path.iterdir()] == ["bigram.onnxruntime-cpu"]
    assert not (tmp_path / "bigram.onnxruntime-cpu" / "golden").exists()  # nothing ran


def test_force_replaces_an_artifact(llmopt: Any, bigram: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()

    line = ["compile", bigram, "--target", "cpu", "--verify", "off", "-o", tmp_path / "out"]
    result = llmopt(*line, "--force")

    assert result.exit_code == 0, result.stderr
    assert not (tmp_path / "out" / "old").exists()
    assert "no (--verify final" in result.stdout


def test_a_plugin_and_its_pass_are_used(llmopt: Any, bigram: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from llmopt import Outcome, Pass\n\n"
        "class Mine(Pass):\n"
        "    name = 'mine'\n"
        "    def run(self, program):\n"
        "        outcome = Outcome()\n"
        "        outcome.miss('here', 'only looking')\n"
        "        return outcome\n",
        encoding="utf-8",
    )

    line = ["compile", bigram, "--target", "cpu", "--verify", "off", "-o", tmp_path / "out"]
    result = llmopt(*line, "--json", "--plugin", tmp_path / "mine.py", "--passes", "default,mine")

    passes = json.loads(result.stdout)["artifacts"][0]["passes"]
    [mine] = [each for each in passes if each["name"] == "mine"]
    assert mine["missed"] == [{"node": "here", "reason": "only looking"}]


def test_every_option_arrives(llmopt: Any, asked: dict[str, Any]) -> None:
    line = (
        "compile model.pt --target cpu --target other -o place --model file.py:make --quantize w4 "
        "--block 64 --max-kl 0.5 --passes default,-merge-qkv --plugin a.py --plugin b "
        "--require attention=all --require norm=all --verify off --task raw "
        "--example-inputs in.npz --max-length 99 --trust-pickle --force --json"
    )
    result = llmopt(*line.split())

    assert result.exit_code == 0, result.stderr
    assert (asked["source"], asked["output"]) == ("model.pt", Path("place"))
    assert asked["targets"] == ("cpu", "other")
    assert asked["options"] == CompileOptions(
        quantize="w4{block=64}",
        passes="default,-merge-qkv",
        plugins=("a.py", "b"),
        require=("attention=all", "norm=all"),
        verify="off",
        max_kl=0.5,
        force=True,
    )
    assert asked["reading"] == SourceOptions(
        model="file.py:make",
        trust_pickle=True,
        task="raw",
        example_inputs=Path("in.npz"),
        max_length=99,
    )


def test_what_is_left_out_has_the_defaults_of_the_api(llmopt: Any, asked: dict[str, Any]) -> None:
    llmopt("compile", "model.pt", "--target", "cpu")

    assert asked["options"] == CompileOptions()
    assert asked["reading"] == SourceOptions()
    assert asked["output"] is None


def test_interrupting_several_targets_says_what_is_kept(
    llmopt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llmopt.compiler.compile_source", interrupted)
    result = llmopt("compile", "model.pt", "--target", "cpu", "--target", "other")

    assert result.exit_code == 130
    assert "complete artifacts were kept" in result.stderr


def test_quality_past_its_bound_fails_and_leaves_nothing(
    llmopt: Any, bigram: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmopt.compiler.compilation.measure_quality", lambda *_: {"kl_mean": 0.5})
    line = ["compile", bigram, "--target", "cpu", "--quantize", "w8", "-o", tmp_path / "out"]

    result = llmopt(*line, "--max-kl", "0.01")

    assert result.exit_code == AccuracyError.exit_code == 1
    assert "mean KL divergence from the source: 0.5, allowed 0.01" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_summary_names_misses_and_errors(tmp_path: Path) -> None:
    text = summary(artifact(tmp_path))

    assert "size      0 bytes, weights w8" in text
    assert "worst relative error 2.7e-05 at B1 S33 P0 none logits" in text
    assert "KL 0.0017 ± 0.0001 nats, top-1 agreement 97.4 ± 0.6 %" in text
    assert "attention          2      1" in text
    assert "activation         ?      2" in text
    assert "missed attention: layer4: no mask" in text
    assert "layer5" not in text
    assert "missed attention: 2 more" in text


def test_notes_and_the_next_step_go_to_stderr(llmopt: Any, asked: dict[str, Any]) -> None:
    result = llmopt("compile", "model.pt", "--target", "cpu")

    assert asked
    assert "Note: no chat template\n" in result.stderr
    assert "Note" not in result.stdout


@pytest.mark.parametrize(
    ("task", "option"), [("generate", "--prompt"), ("embed", "--text"), ("raw", "--inputs")]
)
def test_the_next_step_fits_the_task(
    task: str, option: str, llmopt: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").touch()
    made = [artifact(tmp_path, task=task)]
    monkeypatch.setattr("llmopt.compiler.compile_source", lambda *_: made)

    last = llmopt("compile", "model.pt", "--target", "cpu").stderr.splitlines()[-1]

    assert last.startswith(f"Next: llmopt run {tmp_path} {option}")


def test_the_quality_of_an_encoder_is_a_cosine() -> None:
    found = {"cosine_mean": 0.9938, "cosine_min": 0.9923, "text": "6 batches of random tokens"}

    assert quality(found).startswith("cosine to the source: mean 0.9938, lowest 0.9923")
    assert "99th percentile 2.64" in quality({"kl_mean": 0.77, "kl_p99": 2.64, "top1": 0.5})


def test_verification_off_is_no_success() -> None:
    assert verification({"status": "off"}).startswith("no ")
    assert verification({}).startswith("no ")


def test_an_error_ends_the_line_of_its_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        with Progress() as progress:
            progress("tracing")
            raise ZeroDivisionError

    stderr = io.StringIO()
    monkeypatch.setattr("sys.stderr", stderr)
    with pytest.raises(ZeroDivisionError):
        broken()

    assert stderr.getvalue() == "tracing … stopped\n"


def test_a_terminal_shows_a_spinner_and_then_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stderr = Terminal()
    monkeypatch.setattr("sys.stderr", stderr)
    with Progress() as progress:
        progress("tracing")
        time.sleep(0.15)
        progress("writing")

    shown = stderr.getvalue()
    assert "tracing … 0." in shown
    assert "writing … 0.0 s\n" in shown


def test_progress_stays_off_stdout(asked: dict[str, Any]) -> None:
    result = CliRunner().invoke(app, ["compile", "model.pt", "--target", "cpu", "--json"])

    assert asked
    json.loads(result.stdout)
    assert "starting" in result.stderr
