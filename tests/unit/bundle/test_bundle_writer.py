"""Writing in one piece: complete or not at all, and nothing lost."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Never

import pytest

from llmopt.artifact.manifest import Manifest
from llmopt.artifact.writer import check_destination, staged_file, staged_folder
from llmopt.errors import OutputExistsError, StorageError, UsageError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill_and_raise(staging: Path, error: BaseException) -> Never:
    (staging / "a").write_text("1")
    raise error


def test_a_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    out = tmp_path / "deep/er/out"
    with staged_folder(out) as staging:
        (staging / "a").write_text("1")
        assert not out.exists()
        assert staging.parent == out.parent
        assert staging.name.startswith(".")
    assert names(out.parent) == ["out"]
    assert (out / "a").read_text() == "1"


def test_an_artifact_is_the_same_whenever_it_is_built(tmp_path: Path) -> None:
    for name, seconds in (("a", 1.5), ("b", 2.5)):
        with staged_folder(tmp_path / name) as staging:
            (staging / "model.onnx").write_bytes(b"abc")
            (staging / "build-report.json").write_text(str(seconds))
            Manifest(target="onnxruntime-cpu", entry="model.onnx", task="raw").with_files(
                staging
            ).write(staging)
        written = Manifest.read(tmp_path / name)
        assert [record.path for record in written.files] == ["model.onnx"]
        written.verify_files(tmp_path / name)
    first, second = ((tmp_path / name / "manifest.json").read_bytes() for name in "ab")
    assert first == second


def test_a_folder_has_the_usual_permissions(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "out"):
        pass
    (tmp_path / "plain").mkdir()
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("out", "plain")}
    assert len(modes) == 1


def test_a_file_is_staged_the_same_way(tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    for text in ("1", "2"):
        with staged_file(out, force=True) as staging:
            staging.write_text(text)
        assert out.read_text() == text
    assert names(tmp_path) == ["model.onnx"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_whatever_ends_the_block_leaves_no_trace(
    tmp_path: Path, error: type[BaseException]
) -> None:
    with pytest.raises(error), staged_folder(tmp_path / "deep/er/out") as staging:
        fill_and_raise(staging, error())
    assert names(tmp_path) == []


def test_a_failed_block_removes_no_folder_that_was_there(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    with pytest.raises(ValueError, match="x"), staged_folder(tmp_path / "deep/er/out"):
        raise ValueError("x")
    assert names(tmp_path) == ["deep"]
    assert names(tmp_path / "deep") == []


def test_what_is_there_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    for name in ("link", "empty"):
        with pytest.raises(OutputExistsError, match="--force"), staged_folder(tmp_path / name):
            pytest.fail("the block ran")


def test_what_comes_in_the_meantime_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/a").write_text("1")
    with pytest.raises(OutputExistsError), staged_folder(tmp_path / "out"):
        shutil.copytree(tmp_path / "theirs", tmp_path / "out")
    assert names(tmp_path) == ["out", "theirs"]
    assert names(tmp_path / "out") == ["a"]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old").write_text("1")
    return tmp_path / "out"


def test_force_replaces_the_old_one_when_the_new_one_is_complete(old: Path) -> None:
    with staged_folder(old, force=True) as staging:
        (staging / "new").write_text("2")
        assert names(old) == ["old"]
    assert names(old) == ["new"]
    assert names(old.parent) == ["out"]


def test_force_loses_nothing_when_the_block_fails(old: Path) -> None:
    with pytest.raises(KeyboardInterrupt), staged_folder(old, force=True):
        raise KeyboardInterrupt
    assert names(old) == ["old"]
    assert names(old.parent) == ["out"]


def test_force_loses_nothing_when_the_last_rename_fails(old: Path) -> None:
    with pytest.raises(FileNotFoundError), staged_folder(old, force=True) as staging:
        staging.rmdir()
    assert names(old) == ["old"]
    assert names(old.parent) == ["out"]


def test_force_replaces_a_link_and_not_what_it_leads_to(old: Path) -> None:
    link = old.parent / "link"
    link.symlink_to(old)
    with staged_folder(link, force=True) as staging:
        (staging / "new").write_text("2")
    assert names(link) == ["new"]
    assert not link.is_symlink()
    assert names(old) == ["old"]


def test_force_does_not_delete_the_working_or_home_folder(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(old)
    for path in (old, old.parent, Path()):
        with pytest.raises(UsageError, match="working or home folder"):
            check_destination(path, force=True)
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", str(old / "me"))
    with pytest.raises(UsageError, match="working or home folder"):
        check_destination(old, force=True)


def fail(error: OSError) -> Never:
    raise error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded"),
        (OSError("4096 requested and 17 written"), "no space left on device"),
    ],
)
def test_a_full_disk_is_a_storage_error(tmp_path: Path, error: OSError, words: str) -> None:
    with pytest.raises(StorageError, match=words), staged_folder(tmp_path / "out"):
        fail(error)
    assert names(tmp_path) == []


def test_a_disk_that_is_really_full_is_a_storage_error(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageError, match="No space left on device"),
        staged_folder(tmp_path / "out"),
        Path("/dev/full").open("wb", buffering=0) as file,
    ):
        file.write(b"x")


def test_places_that_may_not_be_written_to_are_storage_errors(tmp_path: Path) -> None:
    for number, name in ((errno.EACCES, "a"), (errno.EROFS, "..")):
        with pytest.raises(StorageError), staged_folder(tmp_path / "out") as staging:
            fail(OSError(number, os.strerror(number), os.path.normpath(staging / name)))
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError), staged_folder(tmp_path / "file/out"):
        pass


@pytest.mark.parametrize("place", ["/proc/out", "/proc/none/out"])
def test_a_place_that_takes_no_files_is_found_out_before_any_work(place: str) -> None:
    with pytest.raises(StorageError, match="its folder is not writable"):
        check_destination(Path(place))
    for staged in (staged_file, staged_folder):
        with pytest.raises(StorageError, match="its folder is not writable"), staged(Path(place)):
            pytest.fail("the block ran")


def test_looking_at_a_place_leaves_nothing_there(tmp_path: Path) -> None:
    check_destination(tmp_path / "deep/er/out")
    assert names(tmp_path) == []


def test_errors_about_other_files_pass_through(tmp_path: Path) -> None:
    other = PermissionError(errno.EACCES, "Permission denied", "/elsewhere/model.gguf")
    with pytest.raises(PermissionError), staged_folder(tmp_path / "out"):
        fail(other)
    with pytest.raises(OSError, match="unnamed"), staged_folder(tmp_path / "out"):
        fail(OSError(errno.EIO, "unnamed"))


def test_sigterm_cleans_up_and_ends_the_process(tmp_path: Path) -> None:
    script = f"""
import time
from pathlib import Path
from llmopt.artifact.writer import staged_folder
with staged_folder(Path({str(tmp_path / "out")!r})) as staging:
    (staging / "a").write_text("1")
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob(".out.*/a")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    assert names(tmp_path) == []


def test_a_handler_of_the_caller_s_is_left_alone(tmp_path: Path) -> None:
    calls: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: calls.append(number))
    try:
        with staged_folder(tmp_path / "out"):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert calls == [signal.SIGTERM]
    assert names(tmp_path) == ["out"]
