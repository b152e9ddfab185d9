"""An optimizing compiler for Transformers: traced, fused, quantized, lowered and proven.

>>> import llmopt                                                              # doctest: +SKIP
>>> artifact = llmopt.compile("SmolLM2-135M", target="cpu", quantize="w8")     # doctest: +SKIP
>>> print(llmopt.load(artifact).generate("The sky is", max_new_tokens=16))     # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from llmopt import lazy
from llmopt.errors import LlmoptError
from llmopt.version import __version__ as __version__

if TYPE_CHECKING:
    from llmopt.api import compile, diff, load, trace  # noqa: A004 - the name of the design
    from llmopt.compiler import Artifact
    from llmopt.ir.program import Program
    from llmopt.passes.base import Miss, Outcome, Pass
    from llmopt.passes.pipeline import Pipeline
    from llmopt.runtime import Runner

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

_PUBLIC: Final = {
    "Artifact": "llmopt.compiler:Artifact",
    "Miss": "llmopt.passes.base:Miss",
    "Outcome": "llmopt.passes.base:Outcome",
    "Pass": "llmopt.passes.base:Pass",
    "Pipeline": "llmopt.passes.pipeline:Pipeline",
    "Program": "llmopt.ir.program:Program",
    "Runner": "llmopt.runtime:Runner",
    "compile": "llmopt.api:compile",
    "diff": "llmopt.api:diff",
    "load": "llmopt.api:load",
    "trace": "llmopt.api:trace",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: ``import llmopt`` stays quick."""
    if name in _PUBLIC:
        with lazy.extras_needed():
            return lazy.load(_PUBLIC[name])
    raise AttributeError(f"module 'llmopt' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names, imported yet or not, and the rest of the module."""
    return sorted({*globals(), *__all__})
