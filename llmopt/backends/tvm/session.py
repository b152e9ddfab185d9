"""Run a written library in this process, for verification and measurement while compiling."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from llmopt.interface.arrays import Arrays, Run
from llmopt.runtime.engines.tvm import TvmLibrary, run_once


def open_session(entry: Path, *, exact: bool = False) -> Run:
    """Return a function from inputs to outputs, by name.

    Args:
        entry: The shared library.
        exact: Multiply rounded weights by activations that are not rounded.

    Raises:
        BackendUnavailableError: TVM's runtime is not here.
    """
    library = TvmLibrary(entry)
    rounds = any(name.startswith("exact_") for name in library.functions)
    prefix = "exact_" if exact and rounds else ""

    def run(feeds: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        return run_once(library, feeds, prefix)

    return run
