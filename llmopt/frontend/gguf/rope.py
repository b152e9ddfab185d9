"""RoPE scaling of a GGUF file, as a Hugging Face ``rope_scaling`` entry."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from llmopt.frontend.gguf.checkpoint import read_tensor
from llmopt.frontend.gguf.file import GgufFile

_LLAMA3_CONTEXT = 8192  # context that every Llama 3 was first trained on
_REL = 1e-4  # the factors are computed and stored in float32


def rope_scaling(file: GgufFile) -> dict[str, Any] | None:
    """Return the ``rope_scaling`` of the file's model, or None for plain rotary.

    Raises:
        UnsupportedModelError: No ``rope_type`` expresses the file's scaling.
    """
    if "rope_factors_long.weight" in file.tensors:
        return _longrope(file)
    if "rope_freqs.weight" in file.tensors:
        return _llama3(file)
    kind = file.value("rope.scaling.type")
    factor = file.value("rope.scaling.factor", file.value("rope.scale_linear", 1.0))
    if kind == "none" or (factor in {0.0, 1.0} and kind in {None, "linear"}):
        return None
    if kind in {None, "linear"}:
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return _yarn(file, factor)
    raise file.unsupported(f"rope scaling {kind!r} (known: none, linear, yarn, longrope, llama3)")


def _yarn(file: GgufFile, factor: float) -> dict[str, Any]:
    if file.value("rope.scaling.yarn_ext_factor", 1.0) not in {1.0, -1.0}:
        raise file.unsupported("a yarn extrapolation factor other than 1")
    result = {"rope_type": "yarn", "factor": factor}
    for key, source in {
        "original_max_position_embeddings": "rope.scaling.original_context_length",
        "beta_fast": "rope.scaling.yarn_beta_fast",
        "beta_slow": "rope.scaling.yarn_beta_slow",
    }.items():
        if (value := file.value(source)) is not None:
            result[key] = value
    attention = file.value(
        "rope.scaling.yarn_attn_factor", file.value("rope.scaling.attn_factor", 1.0)
    )
    if attention != 1.0:  # ggml multiplies yarn's own magnitude by it
        result["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0)
    return result


def _longrope(file: GgufFile) -> dict[str, Any]:
    result: dict[str, Any] = {
        "rope_type": "longrope",
        "long_factor": _shortest(read_tensor(file, "rope_factors_long.weight")),
        "short_factor": _shortest(read_tensor(file, "rope_factors_short.weight")),
    }
    original = file.value("rope.scaling.original_context_length")
    if original is not None:
        result["original_max_position_embeddings"] = original
    attention = file.value("rope.scaling.attn_factor")
    if attention is not None:
        result["attention_factor"] = attention
    return result


def _shortest(values: np.ndarray) -> list[float]:
    return [float(str(value)) for value in values.astype(np.float32)]


def _llama3(file: GgufFile) -> dict[str, Any] | None:
    """Return the parameters whose divisors are those of ``rope_freqs.weight``."""
    divisors = read_tensor(file, "rope_freqs.weight").astype(np.float64).ravel()
    if np.allclose(divisors, 1.0, rtol=_REL):
        return None
    base = float(file.number("rope.freq_base", 10000.0))
    frequencies = base ** -(np.arange(divisors.size) / divisors.size)
    scaling = _fit_llama3(divisors, frequencies)
    if not np.allclose(llama3_divisors(scaling, frequencies), divisors, rtol=_REL):
        raise file.unsupported("rope_freqs.weight does not follow Llama 3's scaling")
    return scaling


def _fit_llama3(divisors: np.ndarray, frequencies: np.ndarray) -> dict[str, Any]:
    """Return llama3 parameters from divisors; exact if any parameters give them.

    Between the two wavelengths 1/divisor = (1 - s)/factor + s with s linear in the frequency:
    s = (C f/2pi - low)/(high - low). Only two of (C, low, high) are free; C is Llama's own.
    """
    factor = round(float(divisors.max()), 4)
    low, high = 1.0, 4.0
    mixed = (divisors > 1.0 + _REL) & (divisors < factor * (1.0 - _REL))
    if np.count_nonzero(mixed) >= 2:
        share = (1.0 / divisors[mixed] - 1.0 / factor) / (1.0 - 1.0 / factor)
        slope, offset = np.polyfit(frequencies[mixed] * _LLAMA3_CONTEXT / (2 * math.pi), share, 1)
        low, high = (round(float(x), 3) for x in (-offset / slope, (1.0 - offset) / slope))
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": _LLAMA3_CONTEXT,
    }


def llama3_divisors(scaling: dict[str, Any], frequencies: np.ndarray) -> np.ndarray:
    """Return the divisor of each rotary frequency [D/2] under Llama 3's scaling.

    Source: Meta (2024), Llama 3.1 reference code, ``apply_scaling``.
    """
    low, high, factor = (scaling[key] for key in ("low_freq_factor", "high_freq_factor", "factor"))
    rotations = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    share = np.clip((rotations - low) / (high - low), 0.0, 1.0)
    return np.asarray(1.0 / ((1.0 - share) / factor + share))
