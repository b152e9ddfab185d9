"""Writing a file or folder in one piece: it appears complete, or not at all."""

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
    """Yield a hidden, empty folder beside ``destination`` that becomes it when the block ends.

    Whatever ends the block early (an error, Ctrl-C, SIGTERM) removes the folder and leaves
    what was at ``destination`` as it was; with ``force`` the old one is replaced only then.

    Args:
        destination: Path of the finished folder.
        force: Replace what is there.

    Raises:
        OutputExistsError: Something is there, and ``force`` is off.
        UsageError: What is there is a folder that replacing would be a disaster.
        StorageError: The disk is full, or the place may not be written to.
    """
    with _staged(destination, force=force) as staging:
        staging.mkdir()
        yield staging


@contextlib.contextmanager
def staged_file(destination: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield the hidden path beside ``destination`` to write to; otherwise as `staged_folder`."""
    with _staged(destination, force=force) as staging:
        yield staging


def check_destination(destination: Path, *, force: bool = False) -> None:
    """Raise now what `staged_folder` would, so that no work is done for nothing.

    Raises:
        OutputExistsError: Something is there, and ``force`` is off.
        UsageError: It is the working folder, or one that holds it, or the home folder.
        StorageError: Its folder, or the one that would hold that, takes no files.
    """
    with _refusals(destination):
        _check_free(destination, force=force)
        _try(_hidden(Path(destination).absolute(), "try"))


def _try(hidden: Path) -> None:
    """Make a file where there will be one, or in the folder that is to hold it, and remove it.

    Permissions alone do not tell: /proc grants them and refuses.
    """
    while not hidden.parent.exists():
        hidden = hidden.parent.with_name(hidden.name)
    hidden.touch(exist_ok=False)
    hidden.unlink()


@contextlib.contextmanager
def _refusals(destination: Path) -> Iterator[None]:
    """Word what the system says of a place, whatever it is: a name too long, no such device."""
    try:
        yield
    except OSError as error:
        raise StorageError(destination, f"cannot be written ({_words(error)})") from error


def _check_free(destination: Path, *, force: bool) -> None:
    if not (destination.exists() or destination.is_symlink()):
        return
    if not force:
        raise OutputExistsError(destination)
    real = destination.resolve()
    if real.is_dir() and any(place.is_relative_to(real) for place in (Path.cwd(), Path.home())):
        raise UsageError(
            f"{destination}: --force would delete the working or home folder; "
            "choose another place with -o"
        )


@contextlib.contextmanager
def _staged(destination: Path, *, force: bool) -> Iterator[Path]:
    destination = Path(destination).absolute()
    with _refusals(destination):
        _check_free(destination, force=force)
    staging = _hidden(destination, "partial")
    made = [folder for folder in destination.parents if not folder.exists()]
    try:
        with _storage_errors(destination, staging), _termination_raises():
            with _refusals(destination):
                destination.parent.mkdir(parents=True, exist_ok=True)
                _try(staging)
            yield staging
            _put_in_place(staging, destination, force=force)
    except BaseException:  # interrupted too: nothing half-written stays
        _remove(staging)
        _remove_empty(made)
        raise


def _hidden(destination: Path, what: str) -> Path:
    return destination.with_name(f".{destination.name}.{secrets.token_hex(4)}.{what}")


def _put_in_place(staging: Path, destination: Path, *, force: bool) -> None:
    _check_free(destination, force=force)  # someone may have put something there meanwhile
    if not (destination.exists() or destination.is_symlink()):
        staging.rename(destination)
        return
    old = _hidden(destination, "old")
    destination.rename(old)
    try:
        staging.rename(destination)
    except BaseException:  # interrupted too: what was there comes back
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
        raise StorageError(destination, f"cannot be written ({_words(error)})") from error


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


def _words(error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return "its folder takes no files"  # /proc says that there is no such file
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
