"""What CI would do, done here: the steps of a composite action and of a GitLab job, by bash.

    python tests/ci/steps.py action.yml REPOSITORY source=model target=onnxruntime-cpu

Understood of GitHub's expressions is what the action uses: ``inputs``, ``github`` and outputs of
steps, each alone.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

_EXPRESSION: Final = re.compile(r"\$\{\{\s*([\w.-]+)\s*\}\}")
BASH: Final = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c"]
"""As GitHub starts it for ``shell: bash``."""


@dataclass
class Done:
    """What a job came to.

    Args:
        code: Its exit code.
        log: What its steps printed.
        outputs: Of the steps, as ``"check.exit-code"``.
        summary: The step summary.
    """

    code: int = 0
    log: str = ""
    outputs: dict[str, str] = field(default_factory=dict)
    summary: str = ""


def run_action(
    path: Path, repository: Path, inputs: Mapping[str, str], environment: Mapping[str, str]
) -> Done:
    """Run the steps of a composite action in a checkout, as a runner would.

    Args:
        path: The ``action.yml``.
        repository: The checkout.
        inputs: What the workflow gives.
        environment: More variables: ``GITHUB_REF``, ``GITHUB_BASE_REF``.
    """
    action: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    known = {f"inputs.{k}": str(v.get("default", "")) for k, v in action["inputs"].items()}
    unknown = [f"inputs.{k}" for k in inputs if f"inputs.{k}" not in known]
    assert not unknown, unknown
    known |= {f"inputs.{k}": v for k, v in inputs.items()} | {"github.token": "a token"}
    done = Done()
    with tempfile.TemporaryDirectory() as place:
        temporary = Path(place)
        for step in action["runs"]["steps"]:
            if done.code == 0:
                _step(step, repository, temporary, known, environment, done, path.parent)
        summary = temporary / "summary"
        done.summary = summary.read_text(encoding="utf-8") if summary.exists() else ""
    return done


def _step(  # noqa: PLR0913, PLR0917 - all that a step sees
    step: Mapping[str, Any],
    repository: Path,
    temporary: Path,
    known: Mapping[str, str],
    environment: Mapping[str, str],
    done: Done,
    action: Path,
) -> None:
    assert step["shell"] == "bash"
    values = {**known, **{f"steps.{_dotted(name)}": value for name, value in done.outputs.items()}}
    output = temporary / "output"
    output.write_text("", encoding="utf-8")
    own = {
        "GITHUB_ACTION_PATH": str(action),
        "GITHUB_OUTPUT": str(output),
        "GITHUB_STEP_SUMMARY": str(temporary / "summary"),
        "GITHUB_REPOSITORY": "someone/something",
        "RUNNER_TEMP": str(temporary),
    }
    given = {name: _filled(str(text), values) for name, text in step.get("env", {}).items()}
    ran = _bash(step["run"], repository, {**own, **environment, **given})
    done.code, done.log = ran.returncode, done.log + ran.stdout
    for line in output.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition("=")
        done.outputs[f"{step['id']}.{name}"] = value


def _dotted(name: str) -> str:
    step, _, output = name.partition(".")
    return f"{step}.outputs.{output}"


def _filled(text: str, values: Mapping[str, str]) -> str:
    return _EXPRESSION.sub(lambda match: values.get(match[1], ""), text)


def run_gitlab(path: Path, repository: Path, environment: Mapping[str, str]) -> Done:
    """Run the scripts of the one job of a GitLab file in a checkout.

    Args:
        path: The file.
        repository: The checkout.
        environment: Variables that GitLab, or the project, sets.
    """
    ((_, job),) = yaml.safe_load(path.read_text(encoding="utf-8")).items()
    lines = [*job["before_script"], *job["script"]]
    ran = _bash("\n".join(lines), repository, {**job["variables"], **environment})
    return Done(ran.returncode, ran.stdout)


def _bash(
    script: str, folder: Path, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*BASH, script],
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


if __name__ == "__main__":
    pairs = dict(argument.split("=", 1) for argument in sys.argv[3:])
    found = run_action(Path(sys.argv[1]), Path(sys.argv[2]), {"install": "none", **pairs}, {})
    sys.stdout.write(found.log + found.summary)
    sys.exit(found.code)
