"""An optimizing compiler for Transformers: traced, fused, quantized, lowered and proven.

>>> import llmopt                                                              # doctest: +SKIP
>>> artifact = llmopt.compile("SmolLM2-135M", target="cpu", quantize="w8")     # doctest: +SKIP
>>> print(llmopt.load(artifact).generate("The sky is", max_new_tokens=16))     # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

from llmopt.errors import LlmoptError

if TYPE_CHECKING:
    from llmopt.api import compile, diff, load, trace  # noqa: A004 - the name of the design
    from llmopt.compiler import Artifact
    from llmopt.ir.program import Program
    from llmopt.passes.base import Miss, Outcome, Pass
    from llmopt.passes.pipeline import Pipeline
    from llmopt.runtime import Runner

__version__: Final = "0.1.0"
__all__ = [
    "Artifact",
    "LlmoptError",
    "Miss",
    "Outcome",
    "Pass",
    "Pipeline",
    "Program",
    "Runner",
    "compile",
    "diff",
    "load",
    "trace",
]

_WHERE: Final = {
    "Artifact": "llmopt.compiler",
    "Miss": "llmopt.passes.base",
    "Outcome": "llmopt.passes.base",
    "Pass": "llmopt.passes.base",
    "Pipeline": "llmopt.passes.pipeline",
    "Program": "llmopt.ir.program",
    "Runner": "llmopt.runtime",
    "compile": "llmopt.api",
    "diff": "llmopt.api",
    "load": "llmopt.api",
    "trace": "llmopt.api",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: ``import llmopt`` stays quick."""
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'llmopt' has no attribute {name!r}")
