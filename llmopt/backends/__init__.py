"""The backends, by the target names that the command line knows them by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from llmopt import lazy, spelling
from llmopt.backends.base import Backend
from llmopt.errors import UnknownNameError
from llmopt.passes.plugins import installed

__all__ = ["ALIASES", "BACKENDS", "Backend", "find_backend", "known_backends"]

BACKENDS: Final[Mapping[str, str]] = {
    "onnxruntime-arm64": "llmopt.backends.onnxruntime:OnnxRuntimeArm64",
    "onnxruntime-cpu": "llmopt.backends.onnxruntime:OnnxRuntimeCpu",
    "onnxruntime-cuda": "llmopt.backends.onnxruntime.cuda:OnnxRuntimeCuda",
    "reference": "llmopt.backends.reference:ReferenceBackend",
    "tensorrt": "llmopt.backends.tensorrt:TensorRt",
    "tensorrt-rtx": "llmopt.backends.tensorrt:TensorRtRtx",
    "tvm-arm64": "llmopt.backends.tvm:TvmArm64",
    "tvm-cpu": "llmopt.backends.tvm:TvmCpu",
    "tvm-cuda": "llmopt.backends.tvm.cuda:TvmCuda",
}
ALIASES: Final[Mapping[str, str]] = {
    "cpu": "onnxruntime-cpu",
    "edge": "onnxruntime-arm64",
    "gpu": "onnxruntime-cuda",
}


def known_backends() -> dict[str, type[Backend]]:
    """Return every backend by target name: the built-in ones and those of installed packages."""
    ours: dict[str, type[Backend]] = {name: lazy.load(path) for name, path in BACKENDS.items()}
    return ours | installed("llmopt.backends", {**BACKENDS, **ALIASES}, Backend)


def find_backend(target: str) -> Backend:
    """Return the backend of ``name{option=value,...}``.

    Raises:
        UnknownNameError: There is no such target, or no such option of it.
        UsageError: The text is not of that form, or an option takes no such value.
    """
    name, options = spelling.split(target, "target")
    known = known_backends()
    found = known.get(ALIASES.get(name, name))
    if found is None:
        raise UnknownNameError("target", name, [*known, *ALIASES], "`llmopt targets` lists them")
    return spelling.make(found, options, f"target {found.name}")
