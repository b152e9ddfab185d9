"""OpenVINO inside ONNX Runtime: the same model file, run by another provider.

The provider takes the fused operators of an encoder as they are, so nothing is lowered otherwise;
what is to be decided is whether it is here, takes the whole model, and is faster.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from llmopt.backends.onnxruntime.session import open_session
from llmopt.errors import BackendUnavailableError, UnsupportedModelError
from llmopt.interface.arrays import Arrays, Run
from llmopt.ir.feeds import Case, feeds
from llmopt.ir.program import Program
from llmopt.runtime.cores import usable_cores
from llmopt.runtime.engines.providers import Provider, openvino

CPU: Final = "cpu"
OPENVINO: Final = "openvino"
AUTO: Final = "auto"
_KEY: Final = "llmopt.ep"
_CACHE: Final = (
    "OpenVINO's GroupQueryAttention does not write a cache in place; use onnxruntime-cpu as it is, "
    "or tvm-cpu"
)
_ROUNDS: Final = 7
_WARM: Final = 2
_WORTH: Final = 0.95
"""Another provider has to be this much faster, in the median of paired runs, to be chosen."""


def require_encoder(program: Program) -> None:
    """Raise unless OpenVINO can run ``program``.

    Raises:
        UnsupportedModelError: it has a cache.
    """
    if program.signature.has_cache:
        raise UnsupportedModelError("ep=openvino", ["a decoder with a cache"], _CACHE)


def provider_of(ep: str) -> Provider:
    """Return the execution provider of ``ep``, with the threads that this process may use."""
    return openvino(usable_cores()) if ep == OPENVINO else Provider()


def choose(entry: Path, program: Program) -> tuple[str, str]:
    """Return the faster provider on this machine and why, and note it in the model file.

    Args:
        entry: The written model.
        program: Program with its signature and facts.
    """
    ep, why = _faster(entry, program)
    _mark(entry, ep)
    return ep, f"ep=auto: {ep}, because {why}"


def chosen(entry: Path) -> str:
    """Return the provider that `choose` noted in the model file."""
    import onnx

    proto = onnx.load(entry, load_external_data=False)
    return next((item.value for item in proto.metadata_props if item.key == _KEY), CPU)


def _faster(entry: Path, program: Program) -> tuple[str, str]:
    if program.signature.has_cache:
        return CPU, "a decoder with a cache is not for OpenVINO"
    try:
        other = open_session(entry, provider=provider_of(OPENVINO))
    except BackendUnavailableError as error:
        return CPU, error.reason
    cases = [Case(1, _length(program), 0, "none"), Case(8, _length(program), 0, "right")]
    vocabulary = program.facts.model.vocabulary or 2
    batches = [feeds(program.signature, case, vocabulary) for case in cases]
    ratio = _ratio(other, open_session(entry, provider=provider_of(CPU)), batches)
    worth = ratio < _WORTH
    return (OPENVINO if worth else CPU), f"OpenVINO takes {ratio:.2f} of the time"


def _length(program: Program) -> int:
    return min(program.facts.max_length or 128, 128)


def _ratio(one: Run, other: Run, batches: Sequence[Arrays]) -> float:
    """Return the median of the time of ``one`` over that of ``other``."""
    pairs = [pair for batch in batches for pair in paired(one, other, batch, _ROUNDS)]
    return statistics.median(mine / theirs for mine, theirs in pairs)


def paired(one: Run, other: Run, batch: Arrays, rounds: int) -> list[tuple[float, float]]:
    """Return the seconds of both, run in turns, so that both see the same machine."""
    for _ in range(_WARM):
        one(batch)
        other(batch)
    return [(_seconds(one, batch), _seconds(other, batch)) for _ in range(rounds)]


def _seconds(run: Run, batch: Arrays) -> float:
    start = time.perf_counter()
    run(batch)
    return time.perf_counter() - start


def _mark(entry: Path, ep: str) -> None:
    import onnx

    proto = onnx.load(entry, load_external_data=False)
    proto.metadata_props.add(key=_KEY, value=ep)
    onnx.save(proto, entry)
