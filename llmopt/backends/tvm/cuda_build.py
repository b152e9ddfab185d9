"""A module of Relax becomes a library for the host and kernels for a GPU.

``model.so`` calls the kernels, whose source it holds; ``kernels.fatbin`` is that source compiled,
so that a device needs no compiler.
"""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from llmopt.backends.environment import variable
from llmopt.backends.tvm import api
from llmopt.backends.tvm.build import link
from llmopt.backends.tvm.features import TRIPLES
from llmopt.errors import BackendUnavailableError, LlmoptError

NEEDED: Final = (
    "nvcc on the PATH (the CUDA toolkit), or NVRTC: `pip install cuda-bindings` and CUDA_PATH=…"
)
_EXACT: Final = "TVM_CUDA_NVCC_NO_FAST_MATH"


def compiler() -> str:
    """Return what compiles CUDA here: ``"nvcc"``, ``"nvrtc"``, or nothing."""
    if shutil.which("nvcc"):
        return "nvcc"
    bindings = find_spec("cuda") is not None and find_spec("cuda.bindings") is not None
    return "nvrtc" if bindings and os.environ.get("CUDA_PATH") else ""


def require_compiler() -> str:
    """Return what compiles CUDA here.

    Raises:
        BackendUnavailableError: Nothing does.
    """
    found = compiler()
    if not found:
        raise BackendUnavailableError("tvm-cuda", f"compiling CUDA needs {NEEDED}")
    return found


def target_of(arch: str, machine: str) -> dict[str, object]:
    """Return a GPU and its host as TVM's target.

    Args:
        arch: ``"sm_80"``.
        machine: Architecture of the host: ``"x86_64"`` or ``"aarch64"``.
    """
    host = {"kind": "llvm", "mtriple": TRIPLES[machine]}
    return {"kind": "cuda", "arch": arch, "host": host}


def build(module: Any, target: dict[str, object], library: Path, kernels: Path) -> str:
    """Compile ``module`` and return the source of its kernels.

    Args:
        module: Module of Relax.
        target: Target from `target_of`.
        library: Output file of the host code.
        kernels: Output file of the kernels.

    Raises:
        BackendUnavailableError: There is no compiler of CUDA.
        LlmoptError: It does not take the kernels.
    """
    found = require_compiler()
    executable = api.compiled(module, target)
    executable.export_library(str(library), fcompile=link)
    source = api.device_source(executable)
    try:
        with variable(_EXACT, "1"):  # division, roots and exponentials as they are
            kernels.write_bytes(api.cuda_binary(source, found, target))
    except RuntimeError as error:
        said = " ".join(str(error).strip().splitlines()[-3:])
        raise LlmoptError(f"{found} could not compile the kernels: {said}") from error
    return source
