"""The arm64 machine is made or its absence is explained; nothing is run here but small programs."""

from __future__ import annotations

import json
import platform
import shutil
import sys
from pathlib import Path

import pytest
from edge import arm64, headers
from edge.arm64 import Arm64, MissingError


def test_a_machine_that_was_never_made_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="make edge-test"):
        arm64.machine(tmp_path)


def test_what_was_missing_is_told_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(arm64, "_system", lambda: {"ID": "fedora", "PRETTY_NAME": "Fedora 44"})
    monkeypatch.setattr(sys, "argv", ["arm64.py", str(tmp_path / "made")])

    arm64.main()

    assert "Fedora 44" in capsys.readouterr().err
    with pytest.raises(MissingError, match="Debian's packages for arm64, which Fedora 44"):
        arm64.machine(tmp_path / "made")


def test_an_arm64_machine_needs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(sys, "argv", ["arm64.py", str(tmp_path)])

    arm64.main()

    assert arm64.machine(tmp_path) == Arm64((sys.executable,))


@pytest.mark.parametrize(("text", "major"), [("qemu-aarch64 version 10.0.2 (Debian)", 10), ("", 0)])
def test_an_emulator_tells_its_version(tmp_path: Path, text: str, major: int) -> None:
    program = tmp_path / "qemu-aarch64"
    program.write_text(f"#!/bin/sh\necho '{text}'\n")
    program.chmod(0o755)

    assert arm64._major(str(program)) == major
    assert arm64._major(str(tmp_path / "absent")) == 0


def test_an_emulator_of_this_machine_is_taken_if_it_is_new_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(arm64, "_major", lambda _: arm64.OLDEST)

    assert arm64._emulator(tmp_path) == "/usr/bin/qemu-aarch64"


def test_a_script_that_fails_there_fails_here_with_what_it_said(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys; print(sys.argv[1]); sys.exit('too small')")

    with pytest.raises(RuntimeError, match=r"exit 1(.|\n)*given(.|\n)*too small"):
        Arm64((sys.executable,)).run(script, "given")


def test_a_script_sees_llmopt_and_the_packages_of_the_machine(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import json, llmopt, there; print(json.dumps(there.NAME))")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "there.py").write_text("NAME = 'there'")

    told = Arm64((sys.executable,), str(tmp_path / "site")).run(script)

    assert json.loads(told) == "there"


def test_packages_come_from_the_mirror_that_the_machine_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = "'https://mirror.test/debian/dists/bookworm/InRelease' name 0 \n"
    monkeypatch.setattr(arm64, "_done", lambda _: told)

    lines = list(arm64._sources("bookworm-backports"))

    assert [line.split()[-3:] for line in lines] == [
        ["https://mirror.test/debian", "bookworm", "main"],
        ["https://mirror.test/debian", "bookworm-backports", "main"],
    ]
    with pytest.raises(MissingError, match="a source of Debian trixie"):
        list(arm64._sources("trixie"))


def test_headers_that_are_not_there_say_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(MissingError, match="make edge-test"):
        headers.headers(tmp_path)
    monkeypatch.setattr(headers, "_done", lambda _: "amd64\n")
    monkeypatch.setattr(arm64, "_system", lambda: {"ID": "fedora", "PRETTY_NAME": "Fedora 44"})
    monkeypatch.setattr(sys, "argv", ["headers.py", str(tmp_path / "made")])

    headers.main()

    assert "Fedora 44" in capsys.readouterr().err
    with pytest.raises(MissingError, match="Fedora 44 does not reach"):
        headers.headers(tmp_path / "made")
