"""Atomic writes of files and folders: they appear complete, or not at all."""

from __future__ import annotations

import contextlib
import errno
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

from llmopt.errors import OutputExistsError, StorageError, UsageError

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_REFUSED: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


@contextlib.contextmanager
def staged_folder(destination: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a hidden, empty folder next to ``destination`` that is renamed to it at the end.

    If the block ends early (an error, Ctrl-C, SIGTERM), the folder is removed and ``destination``
    stays as it was; with ``force`` an existing one is replaced only at the end.

    Args:
        destination: Path of the finished folder.
        force: Whether to replace an existing folder.

    Raises:
        OutputExistsError: ``destination`` exists, and ``force`` is off.
        UsageError: ``destination`` is the working or home folder, or contains it.
        StorageError: The disk is full, or the folder is not writable.
    """
    with _staged(destination, force=force) as staging:
        staging.mkdir()
        yield staging


@contextlib.contextmanager
def staged_file(destination: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a hidden path next to ``destination`` to write to, like `staged_folder`."""
    with _staged(destination, force=force) as staging:
        yield staging


def check_destination(destination: Path, *, force: bool = False) -> None:
    """Raise early what `staged_folder` would raise, before any work is done.

    Raises:
        OutputExistsError: ``destination`` exists, and ``force`` is off.
        UsageError: ``destination`` is the working or home folder, or contains it.
        StorageError: The folder of ``destination`` is not writable.
    """
    with _refusals(destination):
        _check_free(destination, force=force)
        _try(_hidden(Path(destination).absolute(), "try"))


def _try(hidden: Path) -> None:
    """Create a file in the nearest existing folder, and remove it.

    Permissions alone do not tell: /proc grants them and refuses.
    """
    while not hidden.parent.exists():
        hidden = hidden.parent.with_name(hidden.name)
    hidden.touch(exist_ok=False)
    hidden.unlink()


@contextlib.contextmanager
def _refusals(destination: Path) -> Iterator[None]:
    """Turn any error of the system about a path into `StorageError`."""
    try:
        yield
    except OSError as error:
        raise StorageError(destination, f"cannot be written ({_reason(error)})") from error


def _check_free(destination: Path, *, force: bool) -> None:
    if not (destination.exists() or destination.is_symlink()):
        return
    if not force:
        raise OutputExistsError(destination)
    real = destination.resolve()
    if real.is_dir() and any(used.is_relative_to(real) for used in (Path.cwd(), Path.home())):
        raise UsageError(
            f"{destination}: --force would delete the working or home folder; "
            "choose another path with -o"
        )


@contextlib.contextmanager
def _staged(destination: Path, *, force: bool) -> Iterator[Path]:
    destination = Path(destination).absolute()
    with _refusals(destination):
        _check_free(destination, force=force)
    staging = _hidden(destination, "partial")
    missing = [folder for folder in destination.parents if not folder.exists()]
    try:
        with _storage_errors(destination, staging), _termination_raises():
            with _refusals(destination):
                destination.parent.mkdir(parents=True, exist_ok=True)
                _try(staging)
            yield staging
            _replace(staging, destination, force=force)
    except BaseException:  # interrupts too: nothing half-written may stay
        _remove(staging)
        _remove_empty(missing)
        raise


def _hidden(destination: Path, what: str) -> Path:
    return destination.with_name(f".{destination.name}.{secrets.token_hex(4)}.{what}")


def _replace(staging: Path, destination: Path, *, force: bool) -> None:
    _check_free(destination, force=force)  # another process may have created it meanwhile
    if not (destination.exists() or destination.is_symlink()):
        staging.rename(destination)
        return
    old = _hidden(destination, "old")
    destination.rename(old)
    try:
        staging.rename(destination)
    except BaseException:  # interrupts too: the old one is restored
        old.rename(destination)
        raise
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextlib.contextmanager
def _storage_errors(destination: Path, staging: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if not _is_about_output(error, destination, staging):
            raise
        raise StorageError(destination, f"cannot be written ({_reason(error)})") from error


def _is_about_output(error: OSError, destination: Path, staging: Path) -> bool:
    if error.errno in _FULL or _is_short_write(error):
        return True
    if error.filename is None:
        return False
    path = Path(str(error.filename))
    ours = path.is_relative_to(staging) or path == destination or path in destination.parents
    return ours and (error.errno in _REFUSED or path in destination.parents)


def _is_short_write(error: OSError) -> bool:
    # numpy's tofile reports a full disk as "N requested and M written", without a number.
    return error.errno is None and "requested and" in str(error)


def _reason(error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return "its folder is not writable"  # /proc reports ENOENT
    return "no space left on device" if _is_short_write(error) else error.strerror or str(error)


@contextlib.contextmanager
def _termination_raises() -> Iterator[None]:
    """Turn SIGTERM into an exception inside the block, so that clean-up runs."""
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if not ours:
        yield
        return
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
