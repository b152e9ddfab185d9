"""What runs on the arm64 machine: kernels of a library on given arrays, their outputs into files.

    python kernels.py LIBRARY FOLDER

FOLDER has ``NAME.npz`` for each kernel NAME: its arguments in their order, named ``a00``, ``a01``
and so on. The last is the output; it is written to ``NAME.npy``.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import numpy as np

from llmopt.runtime.engines.tvm_runtime import load_runtime


def main() -> None:
    """Run every kernel, and print what machine this is."""
    library, folder = sys.argv[1:]
    ffi = load_runtime(threads=1)
    module = ffi.load_module(library)
    for file in sorted(Path(folder).glob("*.npz")):
        with np.load(file) as arrays:
            arguments = [arrays[name] for name in sorted(arrays)]
        module[file.stem](*(ffi.from_dlpack(array) for array in arguments))
        np.save(file.with_suffix(".npy"), arguments[-1])
    sys.stdout.write(platform.machine())


if __name__ == "__main__":
    main()
