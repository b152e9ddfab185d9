"""What a device needs to run an artifact: no torch, no onnx, no onnx_ir.

>>> from llmopt.runtime import load
>>> runner = load("SmolLM2.onnxruntime-cpu")        # doctest: +SKIP
>>> runner.generate("The sky is", max_new_tokens=3)  # doctest: +SKIP
' blue and the'
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from llmopt.bundle.signing import trust_of
from llmopt.runtime.opening import artifact_of
from llmopt.runtime.runner import Runner

__all__ = ["Runner", "load"]


def load(
    artifact: str | os.PathLike[str],
    *,
    threads: int | None = None,
    key: str | os.PathLike[str] | None = None,
    certificate_chain: Sequence[str | os.PathLike[str]] = (),
    signature: str | os.PathLike[str] | None = None,
) -> Runner:
    """Return a runner of the artifact at a path.

    Args:
        artifact: The folder that `llmopt compile` wrote, or a bundle: the variant that suits this
            machine is unpacked into the user's cache, once.
        threads: Threads inside one operator; None for as many as the process may use.
        key: A public key, PEM: the bundle has to be signed with its private one.
        certificate_chain: Certificates, PEM, that the signer's own has to lead to; or a key.
        signature: Signature file of the bundle; None for the one next to it.

    Raises:
        ArtifactError: It is not an artifact, damaged, or from a newer llmopt.
        BackendUnavailableError: What it needs is not here.
        SignatureError: The bundle is not signed by whom it should be.
        UsageError: ``threads`` is below 1, or there is no such key.
    """
    trust = trust_of(key, certificate_chain, signature)
    return Runner(artifact_of(Path(artifact), trust), threads)
