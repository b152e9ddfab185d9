"""make replay: nothing for a refactor, a difference otherwise, and the tree stays as it is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAME = ["-c", "user.name=a", "-c", "user.email=a@b"]


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *NAME, *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout


def replay(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it on the cases of one golden file."""
    return subprocess.run(
        [sys.executable, str(folder / "tests/golden/replay.py"), *arguments],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(folder)},
    )


@pytest.mark.thorough
@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_a_refactor_prints_nothing_and_another_pass_a_difference(tmp_path: Path) -> None:
    for name in ("llmopt", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "llmopt", "tests")
    git(tmp_path, "commit", "--quiet", "--message", "before")
    file = tmp_path / "llmopt" / "passes" / "cancel_transposes.py"
    text = file.read_text(encoding="utf-8")

    file.write_text(text.replace("inner", "below"), encoding="utf-8")
    refactored = replay(tmp_path, "HEAD", "inverse pair")
    assert (refactored.returncode, refactored.stdout) == (0, ""), refactored.stderr

    file.write_text(text.replace("perm != sorted(perm)", "perm != []"), encoding="utf-8")
    changed = replay(tmp_path, "HEAD", "inverse pair")

    assert changed.returncode == 1, changed.stderr
    assert "cancel-transposes.ir: inverse pair | cancel-transposes" in changed.stdout
    assert "+ Transpose perm=[0, 1, 2]" in changed.stdout
    assert git(tmp_path, "worktree", "list").count("\n") == 1
    assert git(tmp_path, "status", "--short") == f" M {file.relative_to(tmp_path)}\n"
    assert replay(tmp_path, "no-such-revision").returncode == 2
