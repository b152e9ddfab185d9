"""Loading TVM's runtime into this process.

Only ``tvm_ffi`` is imported, and TVM's runtime library loaded: not its compiler, which is eighty
times as large, and nothing of the ``tvm`` module itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from llmopt.errors import BackendUnavailableError
from llmopt.runtime.cpu_features import tiles_allowed

_INSTALL: Final = "it is not installed; pip install 'llmopt[runtime-tvm]'"


@contextlib.contextmanager
def another_path(library: Path) -> Iterator[Path]:
    """Yield another path of ``library`` that no library was opened by before.

    The dynamic linker gives back what it once opened by a path, whatever lies there now; by a new
    path it looks at the file.
    """
    with tempfile.TemporaryDirectory(prefix="llmopt-") as place:
        alias = Path(place) / library.name
        alias.symlink_to(library.absolute())
        yield alias


def load_runtime(threads: int) -> Any:
    """Return ``tvm_ffi`` with TVM's runtime loaded, its pool set to ``threads``.

    Raises:
        BackendUnavailableError: It is not installed, or was loaded before this process was forked.
    """
    check_process()
    tiles_allowed()  # before there are threads; whether they are needed is checked elsewhere
    # Read once, when the first kernel runs in parallel. TVM would halve the cores, as if each were
    # two, and tie threads to cores that others may be using.
    os.environ["TVM_NUM_THREADS"] = str(threads)
    os.environ["TVM_BIND_THREADS"] = "0"
    found = find_spec("tvm")
    if found is None or not found.submodule_search_locations:
        raise BackendUnavailableError("tvm", _INSTALL)
    try:
        with _torch_hidden():
            import tvm_ffi
        library = Path(found.submodule_search_locations[0]) / "lib" / "libtvm_runtime.so"
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    except (ImportError, OSError) as error:
        raise BackendUnavailableError("tvm", f"{last_line(error)}; {_INSTALL}") from error
    tvm_ffi.get_global_func("runtime.config_threadpool")(1, threads)
    return tvm_ffi


def check_process() -> None:
    """Refuse a child that was forked after TVM was loaded: it has none of TVM's worker threads.

    Raises:
        BackendUnavailableError: A call would wait for them for ever.
    """
    if os.getpid() != _loading_process():
        problem = "TVM was loaded before this process was forked, and its threads are not in it"
        hint = "load artifacts after the fork, or start processes by 'spawn'"
        raise BackendUnavailableError("tvm", f"{problem}; {hint}")


@functools.cache
def _loading_process() -> int:
    """Return the number of the process that loaded TVM's runtime."""
    return os.getpid()


@contextlib.contextmanager
def _torch_hidden() -> Iterator[None]:
    """Keep ``tvm_ffi`` from importing torch, which costs seconds and serves nothing here."""
    if "torch" in sys.modules:
        yield
        return
    hidden: Any = None  # how Python spells "cannot be imported"
    sys.modules["torch"] = hidden
    try:
        yield
    finally:
        del sys.modules["torch"]


def last_line(error: BaseException) -> str:
    """Return the last line of an error of TVM, which says what is wrong; the rest is a trace."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
