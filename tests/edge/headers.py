"""The C headers of ONNX Runtime, which its wheels lack, out of Debian's package.

    python tests/edge/headers.py FOLDER

unpacks them into FOLDER, once, or notes there what is missing. They are of an older version than
the library: a later library still has every function of an earlier one.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).parents[1]))
from edge.arm64 import ROOT, Apt, MissingError, _done

FOLDER: Final = ROOT / "build" / "onnxruntime"
PACKAGE: Final = "libonnxruntime-dev"
RELEASE: Final = "trixie"  # Debian 13: the first that has it
_INCLUDE: Final = "usr/include/onnxruntime"
_MISSING: Final = "missing.txt"


def headers(folder: Path = FOLDER) -> Path:
    """Return the folder of ``onnxruntime_c_api.h``.

    Raises:
        MissingError: It was never made; with what is missing.
    """
    include, missing = folder / _INCLUDE, folder / _MISSING
    if include.is_dir():
        return include
    told = missing.read_text().strip() if missing.is_file() else "run `make edge-test`"
    raise MissingError(told)


def make(folder: Path = FOLDER) -> None:
    """Unpack the headers.

    Raises:
        MissingError: They are not to be had here.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    architecture = _done(["dpkg", "--print-architecture"]).strip()
    Apt(folder / "apt", architecture, RELEASE).unpack_alone(PACKAGE, folder)
    headers(folder)


def main() -> None:
    """Make them; what is missing is noted and told, and is no failure."""
    folder = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else FOLDER
    try:
        make(folder)
    except MissingError as error:
        sys.stderr.write(f"no headers of ONNX Runtime, its test will be skipped: {error}\n")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _MISSING).write_text(f"{error}\n")


if __name__ == "__main__":
    main()
