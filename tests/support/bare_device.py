"""A Python that has what a device has, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Final

ONNXRUNTIME: Final = ("onnxruntime",)
TVM: Final = ("tvm", "tvm_ffi", "ml_dtypes")
_ALWAYS: Final = ("llmopt", "numpy", "tokenizers", "typing_extensions", "backports")
_BARE: Final = """
import runpy, sys
from importlib.machinery import PathFinder
there = {*sys.stdlib_module_names, *sys.argv[1].split(",")}

class Device:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in there:
            return PathFinder.find_spec(name, path, target)

sys.meta_path = [finder for finder in sys.meta_path if finder is not PathFinder][:2] + [Device]
option, code = sys.argv[2:4]
sys.argv = [code, *sys.argv[4:]]
if option == "-m":
    runpy.run_module(code, run_name="__main__", alter_sys=True)
else:
    exec(code)
"""


def on_device(packages: tuple[str, ...], *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run ``python -m llmopt.runtime`` where only these packages can be imported.

    Args:
        packages: The packages that run artifacts there.
        *arguments: Arguments of the command.
    """
    return bare_python(packages, "-m", "llmopt.runtime", *arguments)


def bare_python(packages: tuple[str, ...], *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python where only these packages, and those that the runtime needs, can be imported.

    Args:
        packages: The packages.
        *arguments: ``-m`` and a module, or ``-c`` and code, and its arguments.
    """
    return subprocess.run(
        [sys.executable, "-c", _BARE, ",".join([*_ALWAYS, *packages]), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
