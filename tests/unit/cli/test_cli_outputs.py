"""Places that take no files: every command says so in one line, before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LINES: dict[str, Callable[[Path, Path], list[object]]] = {
    "compile": lambda made, out: ["compile", made / "none.onnx", "--target", "cpu", "-o", out],
    "bench --output": lambda made, out: ["bench", made / "shared", "--output", out],
    "bench --html": lambda made, out: ["bench", made / "shared", "--html", out],
    "check --junit": lambda made, out: [*_check(made / "shared"), "--junit", out],
    "check --markdown": lambda made, out: [*_check(made / "shared"), "--markdown", out],
    "check --update": lambda made, out: [*_check(made / "shared", out), "--update"],
    "bundle create": lambda made, out: ["bundle", "create", made / "shared", "-o", out],
    "opt": lambda made, out: ["opt", made / "shared/model.onnx", "--passes", "default", "-o", out],
    "run": lambda made, out: ["run", made / "encoder", "--inputs", made / "none.npz", "-o", out],
}


def _check(artifact: Path, baseline: Path | None = None) -> list[object]:
    return ["check", artifact, "--baseline", baseline or artifact]


@pytest.mark.parametrize("line", LINES)
def test_a_place_that_takes_no_files_is_an_error_of_one_line(
    llmopt: Any, made: Path, line: str
) -> None:
    """Sources that are not there show that nothing was read before."""
    suffix = {"check --update": ".json", "bundle create": ".llmopt"}.get(line, ".out")
    for place in (Path("/proc") / f"x{suffix}", Path("/proc/none") / f"x{suffix}"):
        result = llmopt(*LINES[line](made, place))

        assert result.exit_code == 1, result.stderr
        assert result.stdout == ""
        assert result.stderr.splitlines()[-1] == (
            f"Error: {place}: cannot be written (its folder is not writable); "
            "free space or choose another place with -o"
        )
        assert "Traceback" not in result.stderr


def test_a_name_that_is_too_long_is_said_so(llmopt: Any, made: Path, tmp_path: Path) -> None:
    result = llmopt(*LINES["run"](made, tmp_path / ("x" * 300)))

    assert result.exit_code == 1
    assert result.stderr.endswith(
        "cannot be written (File name too long); free space or choose another place with -o\n"
    )
