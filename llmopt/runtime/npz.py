"""Arrays by name in an ``.npz`` file, read without unpickling anything."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from llmopt.artifact.writer import staged_file
from llmopt.errors import PickleRefusedError, SourceError, SourceNotFoundError

_HINT: Final = "write it with numpy.savez, one array for each input"
_PLAIN: Final = "save plain arrays of numbers with numpy.savez"
_PICKLE: Final = b"\x80"
_ARCHIVES: Final = frozenset({b"PK\x03\x04", b"PK\x05\x06"})  # the second one is empty


def read_npz(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Return the arrays of a file.

    Raises:
        SourceNotFoundError: There is no such file.
        PickleRefusedError: An array in it is pickled.
        SourceError: It is damaged, or no ``.npz`` file.
    """
    if not path.is_file():
        raise SourceNotFoundError(path, _HINT)
    _check_start(path)
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays}
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        if "pickle" in str(error):
            raise PickleRefusedError(path, "it holds pickled objects", _PLAIN) from error
        raise SourceError(path, f"not an .npz file ({error})", _HINT) from error


def read_images(path: Path) -> np.ndarray[Any, Any]:
    """Return the images in a file: ``pixel_values``, or its only array.

    Raises:
        SourceNotFoundError: There is no such file.
        PickleRefusedError: An array in it is pickled.
        SourceError: It is damaged, or says not which of its arrays are images.
    """
    arrays = read_npz(path)
    if "pixel_values" not in arrays and len(arrays) != 1:
        problem = f"it holds {', '.join(arrays) or 'no arrays'}, and no pixel_values"
        raise SourceError(path, problem, "save the images under this name")
    return arrays.get("pixel_values", next(iter(arrays.values())))


def _check_start(path: Path) -> None:
    """Tell a pickle from other files that are no archive; numpy takes both for a pickle."""
    with path.open("rb") as stream:
        start = stream.read(4)
    if start[:1] == _PICKLE:
        raise PickleRefusedError(path, "it is a pickle", _PLAIN)
    if start not in _ARCHIVES:
        raise SourceError(path, f"not an .npz file, it starts with {start!r}", _HINT)


def write_npz(path: Path, arrays: Mapping[str, np.ndarray[Any, Any]], *, force: bool) -> None:
    """Write arrays by name, in one piece.

    Raises:
        OutputExistsError: Something is there, and ``force`` is off.
        StorageError: It could not be written.
    """
    # Not numpy.savez: it takes names as keywords, and cannot save an array called "file".
    with staged_file(path, force=force) as staging, zipfile.ZipFile(staging, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
