"""Sources that are traced once: compiling one for a test takes as long as what is tested."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from llmopt.backends import find_backend
from llmopt.compiler import Artifact, Clock, CompileOptions, optimize
from llmopt.compiler.compilation import Compilation, Optimized
from llmopt.frontend.base import SourceOptions
from support import tiny_sources
from support.schemes import scheme_of


@dataclass(frozen=True)
class Traced:
    """A source on which every pass ran that no target asks for.

    Args:
        source: The checkpoint.
        optimized: It, traced.
    """

    source: Path
    optimized: Optimized

    @classmethod
    def of(cls, source: Path, **reading: Any) -> Self:
        """Trace a checkpoint."""
        optimized = optimize(source, CompileOptions(), SourceOptions(**reading), Clock())
        return cls(source, optimized)

    @classmethod
    def llama(cls, folder: Path) -> Self:
        """Write the tiny Llama into a folder and trace it."""
        return cls.of(tiny_sources.llama_folder(folder))

    def compiled(self, target: str, place: Path, **options: Any) -> Artifact:
        """Write an artifact and prove it, as ``llmopt.compile`` does with what it has traced."""
        scheme = scheme_of(options.pop("quantize", None))
        making = CompileOptions(quantize=scheme, **options)
        return Compilation.prepare(self.optimized, find_backend(target), making, Clock()).run(place)
