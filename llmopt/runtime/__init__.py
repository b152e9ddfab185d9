"""What a device needs to run an artifact: no torch, no onnx, no onnx_ir.

>>> from llmopt.runtime import load
>>> runner = load("SmolLM2.onnxruntime-cpu")        # doctest: +SKIP
>>> runner.generate("The sky is", max_new_tokens=3)  # doctest: +SKIP
' blue and the'
"""

from __future__ import annotations

import os
from pathlib import Path

from llmopt.runtime.runner import Runner

__all__ = ["Runner", "load"]


def load(artifact: str | os.PathLike[str], *, threads: int | None = None) -> Runner:
    """Return a runner of the artifact at a path.

    Args:
        artifact: The folder that `llmopt compile` wrote.
        threads: Threads inside one operator; None for as many as the process may use.

    Raises:
        ArtifactError: It is not an artifact, damaged, or from a newer llmopt.
        BackendUnavailableError: What it needs is not installed here.
        UsageError: ``threads`` is below 1.
    """
    return Runner(Path(artifact), threads)
