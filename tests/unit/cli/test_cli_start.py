"""The command line before any command: imports, help, errors."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import click
import pytest
from click.testing import Result

from llmopt.cli.app import COMMANDS, app

HEAVY = {
    "torch",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "transformers",
    "numpy",
    "gguf",
    "rich",
    "tokenizers",
}


def loaded_by(code: str) -> tuple[set[str], float]:
    """Return the top-level modules that a fresh process has after ``code``, and its CPU time."""
    script = (
        f"import contextlib, io, json, sys, time\n"
        f"with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        f"    {code}\n"
        "names = sorted({name.partition('.')[0] for name in sys.modules})\n"
        "print(json.dumps([names, time.process_time()]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    names, spent_s = json.loads(done.stdout)
    return set(names), spent_s


@pytest.mark.parametrize(
    "code",
    ["import llmopt", "sys.argv[1:] = ['--help']; import llmopt.cli; llmopt.cli.main()"],
)
def test_nothing_heavy_is_imported_and_the_answer_is_quick(code: str) -> None:
    fastest_s = 10.0
    for _ in range(3):
        names, spent_s = loaded_by(code)
        fastest_s = min(fastest_s, spent_s)

    assert not names & HEAVY
    assert fastest_s < 0.3


def test_help_shows_every_command_with_a_whole_sentence(llmopt: Any) -> None:
    shown = llmopt("--help").stdout

    lines = shown.partition("Commands:\n")[2].partition("\n\n")[0].splitlines()
    listed = [line.split(None, 1) for line in lines]
    assert [name for name, _ in listed] == list(COMMANDS)
    assert all(sentence.endswith(".") and "..." not in sentence for _, sentence in listed)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, llmopt: Any) -> None:
    result = llmopt(command, "-h")

    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: llmopt {command}")


def test_without_a_command_there_is_help_and_a_usage_error(llmopt: Any) -> None:
    result = llmopt()

    assert result.exit_code == 2
    assert "Commands:" in result.stderr
    assert result.stdout == ""


def one_line(result: Result) -> str:
    """Return the only line of an error, without its prefix."""
    [line] = result.stderr.splitlines()
    assert result.stdout == ""
    assert line.startswith("Error: ")
    return line.removeprefix("Error: ")


@pytest.mark.parametrize(
    "line",
    [
        "compile x --target cpu --html out.html",
        "compile x --target cpu --batch 2",
        "compile x --target cpu --max-memory 1GB",
        "compile x --target cpu --max-size 1GB",
        "compile x --target cpu --algorithm gptq",
        "compile x --target cpu --calibration text",
        "compile x --target cpu --defer-engine",
        "compile x --target cpu --trust-remote-code",
        "compile x --target cpu --verify each",
        "compile x --target cpu --quantize auto",
        "bench x --html out.html",
        "check x",
        "bundle create x",
        "bisect x",
        "algorithms",
    ],
)
def test_what_belongs_to_later_does_not_exist(line: str, llmopt: Any) -> None:
    result = llmopt(*line.split())

    assert result.exit_code == 2
    assert [text for text in result.stderr.splitlines() if text.startswith("Error: ")]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--bogus", "No such option '--bogus'"),
        ("compil", "No such command 'compil'"),
        ("compile", "Missing argument 'SOURCE'"),
        ("compile x", "Missing option '--target'"),
        ("compile x --target cpu --max-kl many", "'many' is not a valid float"),
    ],
)
def test_a_wrong_command_line_is_one_line_that_names_the_help(
    line: str, says: str, llmopt: Any
) -> None:
    result = llmopt(*line.split())

    error = one_line(result)
    assert result.exit_code == 2
    assert says in error
    assert "--help`" in error


def test_a_bug_keeps_its_traceback_and_tells_the_command(
    llmopt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("llmopt.passes.known_passes", broken)
    result = llmopt("passes", "--json")

    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "ZeroDivisionError: ours" in result.stderr
    assert "llmopt passes --json" in result.stderr
    assert result.stdout == ""


def test_an_interruption_is_one_line(llmopt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llmopt.passes.known_passes", interrupted)
    result = llmopt("passes")

    assert result.exit_code == 130
    assert result.stderr == "interrupted; nothing was written\n"


def test_errors_pass_through_where_another_program_calls_the_group() -> None:
    with pytest.raises(click.UsageError):
        app.main(["compil"], standalone_mode=False)

    assert app.main(["--version"], standalone_mode=False) == 0


def test_a_reader_that_goes_away_is_no_error() -> None:
    script = f"{sys.executable} -m llmopt doctor --json | true"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)

    assert done.stderr == ""


def test_the_module_runs_like_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llmopt", "--version"], capture_output=True, text=True, check=True
    )

    assert done.stdout.startswith("llmopt, version ")
