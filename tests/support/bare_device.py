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
sys.argv = ["llmopt.runtime", *sys.argv[2:]]
runpy.run_module("llmopt.runtime", run_name="__main__", alter_sys=True)
"""


def on_device(packages: tuple[str, ...], *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run ``python -m llmopt.runtime`` where only these packages can be imported.

    Args:
        packages: What runs artifacts there.
        *arguments: Of the command.
    """
    return subprocess.run(
        [sys.executable, "-c", _BARE, ",".join([*_ALWAYS, *packages]), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
