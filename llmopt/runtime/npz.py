"""Arrays by name in an ``.npz`` file, read without unpickling anything."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from llmopt.bundle.writer import staged_file
from llmopt.errors import PickleRefusedError, SourceError, SourceNotFoundError

_HINT: Final = "write it with numpy.savez, one array for each input"


def read_npz(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Return the arrays of a file.

    Raises:
        SourceNotFoundError: There is no such file.
        PickleRefusedError: An array in it is pickled.
        SourceError: It is damaged, or no ``.npz`` file.
    """
    if not path.is_file():
        raise SourceNotFoundError(path, _HINT)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if not isinstance(arrays, np.lib.npyio.NpzFile):
                raise SourceError(path, "holds one array without a name", _HINT)
            return {name: arrays[name] for name in arrays}
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        if "pickle" in str(error):
            raise PickleRefusedError(
                path, "it holds pickled objects", "save plain arrays of numbers with numpy.savez"
            ) from error
        raise SourceError(path, f"not an .npz file ({error})", _HINT) from error


def write_npz(path: Path, arrays: Mapping[str, np.ndarray[Any, Any]], *, force: bool) -> None:
    """Write arrays by name, in one piece.

    Raises:
        OutputExistsError: Something is there, and ``force`` is off.
        StorageError: It could not be written.
    """
    with staged_file(path, force=force) as staging, staging.open("wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]  # its stub takes flags by name too
