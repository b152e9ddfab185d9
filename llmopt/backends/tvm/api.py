"""TVM's names, which move between releases: the rest of the compiler asks here."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from llmopt.errors import BackendUnavailableError


def tvm() -> ModuleType:
    """Return the module ``tvm``.

    Raises:
        BackendUnavailableError: it is not installed.
    """
    try:
        import tvm as module
    except ImportError as error:
        raise BackendUnavailableError("tvm", "pip install 'llmopt[cpu]'") from error
    return module  # type: ignore[no-any-return]


def relax() -> Any:
    """Return ``tvm.relax``, the graph language."""
    return tvm().relax


def tirx() -> Any:
    """Return ``tvm.tirx``, the language of kernels."""
    return tvm().tirx


def target(options: dict[str, object]) -> Any:
    """Return a target: ``{"kind": "llvm", "mcpu": …, "mtriple": …}``."""
    return tvm().target.Target(options)


def host_processor() -> str:
    """Return LLVM's name of this machine's processor."""
    return str(tvm().target.codegen.llvm_get_system_cpu())


def processors(triple: str) -> list[str]:
    """Return LLVM's names of the processors of a machine."""
    codegen = tvm().target.codegen
    return [str(name) for name in codegen.llvm_get_cpu_archlist(_bare(triple))]


def processor_features(triple: str, mcpu: str) -> set[str]:
    """Return what LLVM may use on a processor, in LLVM's names."""
    codegen = tvm().target.codegen
    return {str(name) for name in codegen.llvm_get_cpu_features(_bare(triple, mcpu))}


def _bare(triple: str, mcpu: str = "") -> Any:
    return target({"kind": "llvm", "mtriple": triple, **({"mcpu": mcpu} if mcpu else {})})
