"""Imports that wait until something is used, and the extra that brings an absent package."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from typing import Any, Final

from llmopt.errors import PackageMissingError

EXTRAS: Final[Mapping[str, str]] = {
    "gguf": "cpu",
    "jinja2": "cpu",
    "ml_dtypes": "cpu",
    "onnx": "cpu",
    "onnx_ir": "cpu",
    "onnxscript": "cpu",
    "safetensors": "cpu",
    "torch": "cpu",
    "ziglang": "cpu",
    "onnxruntime": "runtime",
    "tvm": "runtime-tvm",
    "tvm_ffi": "runtime-tvm",
    "starlette": "serve",
    "uvicorn": "serve",
    "model_signing": "sign",
    "transformers": "transformers",
    "onnxruntime_genai": "bench",
}
"""The extra of llmopt that installs each package, by the name that the package is imported by."""


def load(reference: str) -> Any:
    """Return what ``"module:name"`` refers to.

    >>> load("string:digits")
    '0123456789'
    """
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


@contextlib.contextmanager
def extras_needed() -> Iterator[None]:
    """Name the extra to install where a package of one is absent; works as a decorator too.

    Any other module that cannot be imported is left to its importer.

    Raises:
        PackageMissingError: A package in ``EXTRAS`` is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = error.name or ""
        if package not in EXTRAS:
            raise
        raise PackageMissingError(package, f"pip install 'llmopt[{EXTRAS[package]}]'") from error
