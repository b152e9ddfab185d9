"""The action and the GitLab job do what they say, on a repository of their own."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from steps import Done, run_action, run_gitlab
from support.tiny_sources import bigram_file

ROOT = Path(__file__).parents[2]
ACTION = ROOT / "action.yml"
GITLAB = ROOT / "docs" / "examples" / "gitlab-ci.yml"
MODEL = "model.onnx"
COUNTS = "--proxies only"
"""Times of a model this small on a machine that tests keep busy are another test's business."""

GH = """#!/bin/sh
echo "$@" >> "$CALLS"
case "$*" in *--paginate*) cat "$COMMENTS";; esac
"""
"""Stands for GitHub: notes what it is asked, and knows the comments that a file has."""
CURL = """#!/bin/sh
echo "$@" >> "$CALLS"
case "$*" in *--request*) ;; *) cat "$COMMENTS";; esac
"""


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the commands that the steps call."""
    folder = tmp_path_factory.mktemp("bin")
    ours = f'#!/bin/sh\nexec "{sys.executable}" -m llmopt "$@"\n'
    for name, text in (("llmopt", ours), ("gh", GH), ("curl", CURL)):
        (folder / name).write_text(text)
        (folder / name).chmod((folder / name).stat().st_mode | stat.S_IXUSR)
    return folder


@pytest.fixture
def environment(tools: Path, tmp_path: Path) -> dict[str, str]:
    """What a runner's environment adds to ours."""
    (tmp_path / "comments").write_text("")
    return {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "COMMENTS": str(tmp_path / "comments"),
        "GITHUB_REF": "refs/pull/7/merge",
        "GITHUB_BASE_REF": "",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository of two commits: a model, and the same model with a larger table."""
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "--quiet", "--initial-branch=main")
    bigram_file(folder / MODEL)
    commit(folder, "a model")
    return folder


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=someone", "-c", "user.email=someone@example.org"]
    done = subprocess.run(
        ["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def commit(folder: Path, message: str) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", message)


def grow(folder: Path) -> None:
    """Add an operator to the model: one more than there was."""
    import onnx

    model = onnx.load(folder / MODEL)
    model.graph.node[0].output[0] = "first"
    model.graph.node.insert(1, onnx.helper.make_node("Neg", ["first"], ["rows"], "turn"))
    onnx.save(model, folder / MODEL)
    commit(folder, "the model, turned")


def act(repository: Path, environment: dict[str, str], **inputs: str) -> Done:
    given = {"source": MODEL, "install": "none", "compile-arguments": "--verify off"}
    given |= {"check-arguments": COUNTS} | {k.replace("_", "-"): v for k, v in inputs.items()}
    return run_action(ACTION, repository, given, environment)


@pytest.mark.slow
def test_the_action_fails_a_pull_request_that_adds_work(
    repository: Path, environment: dict[str, str]
) -> None:
    grow(repository)
    done = act(repository, environment)
    assert done.code == 1, done.log
    assert done.outputs["check.exit-code"] == "1"
    assert "| operators |" in done.summary
    calls = Path(environment["CALLS"]).read_text().splitlines()
    assert calls[0].startswith("api --paginate repos/someone/something/issues/7/comments")
    assert "--method POST repos/someone/something/issues/7/comments" in calls[1]
    assert git(repository, "status", "--porcelain") == ""
    assert len(git(repository, "worktree", "list").splitlines()) == 1


@pytest.mark.slow
def test_the_action_passes_what_is_the_same_and_replaces_its_comment(
    repository: Path, environment: dict[str, str]
) -> None:
    (repository / "README").write_text("nothing of the model\n")
    commit(repository, "words")
    Path(environment["COMMENTS"]).write_text("42\n43\n")
    done = act(repository, environment)
    assert done.code == 0, done.log
    calls = Path(environment["CALLS"]).read_text()
    assert "--method PATCH repos/someone/something/issues/comments/42" in calls
    assert "check.md" in calls


@pytest.mark.slow
def test_the_action_compares_a_new_model_with_nothing(
    repository: Path, environment: dict[str, str]
) -> None:
    (repository / MODEL).rename(repository / "new.onnx")
    commit(repository, "another name")
    done = act(repository, environment, source="new.onnx", comment="false")
    assert done.code == 0, done.log
    assert "new.onnx is new" in done.log
    assert not Path(environment["CALLS"]).exists()


@pytest.mark.slow
def test_the_gitlab_job_does_the_same(repository: Path, environment: dict[str, str]) -> None:
    base = git(repository, "rev-parse", "HEAD")
    grow(repository)
    Path(environment["COMMENTS"]).write_text(
        json.dumps([{"id": 5, "body": "hello"}, {"id": 9, "body": "<!-- llmopt check -->\n"}])
    )
    gitlab = {
        "SOURCE": MODEL,
        "INSTALL": "",
        "CHECK_ARGUMENTS": COUNTS,
        "CI_MERGE_REQUEST_DIFF_BASE_SHA": base,
        "CI_MERGE_REQUEST_IID": "7",
        "CI_API_V4_URL": "https://gitlab.example/api/v4",
        "CI_PROJECT_ID": "1",
        "LLMOPT_COMMENT_TOKEN": "token",
    }
    done = run_gitlab(GITLAB, repository, environment | gitlab)
    assert done.code == 1, done.log
    calls = Path(environment["CALLS"]).read_text()
    assert "--request PUT" in calls
    assert "merge_requests/7/notes/9" in calls
    root = ET.parse(repository / "check.xml").getroot()  # noqa: S314 - ours
    assert root.find(".//failure") is not None


def test_the_action_takes_every_value_from_the_environment() -> None:
    import yaml

    action = yaml.safe_load(ACTION.read_text())
    assert action["runs"]["using"] == "composite"
    for step in action["runs"]["steps"]:
        assert "${{" not in step["run"], "values come by env: in a script they would be executed"
    assert all(each["description"] for each in action["inputs"].values())
