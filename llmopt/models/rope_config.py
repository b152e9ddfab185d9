"""Rotary settings from a Hugging Face config."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

from llmopt.errors import UnsupportedModelError
from llmopt.models.config import Rope

Fields = Mapping[str, Any]


def parse_rope(config: Fields, params: Fields, width: int, theta: float) -> Rope:
    """Return the rotary settings of one kind of layer.

    Args:
        config: Config of the model, for the lengths that some kinds scale by.
        params: ``rope_parameters`` (or ``rope_scaling``), of the model or one kind of layer.
        width: Number of channels that rotate.
        theta: Base, if ``params`` names none.

    Raises:
        UnsupportedModelError: The kind of scaling is unknown, or lacks a parameter.
    """
    kind = str(params.get("rope_type", params.get("type", "default")))
    if kind not in _KINDS:
        why = ", whose frequencies change as the sequence grows" if kind == "dynamic" else ""
        raise refused(config, f"rope type {kind!r}{why} (known: {', '.join(_KINDS)})")
    base = params.get("rope_theta")
    plain = Rope(width, float(theta if base is None else base))
    try:
        return _KINDS[kind](plain, config, params)
    except KeyError as missing:
        raise refused(config, f"rope type {kind!r} without {missing.args[0]!r}") from None


def refused(config: Fields, problem: str) -> UnsupportedModelError:
    """Return the error for a config with an unsupported setting."""
    return UnsupportedModelError(
        f"model type {config.get('model_type')!r}",
        [problem],
        "pass the module itself as file.py:factory, or check config.json",
    )


def _default(rope: Rope, config: Fields, params: Fields) -> Rope:
    del config, params
    return rope


def _linear(rope: Rope, config: Fields, params: Fields) -> Rope:
    del config
    return replace(rope, kind="linear", factor=float(params["factor"]))


def _llama3(rope: Rope, config: Fields, params: Fields) -> Rope:
    return replace(
        rope,
        kind="llama3",
        factor=float(params["factor"]),
        original_length=_original(config, params),
        low=float(params["low_freq_factor"]),
        high=float(params["high_freq_factor"]),
    )


def _yarn(rope: Rope, config: Fields, params: Fields) -> Rope:
    factor = _factor(config, params)
    amplitude = params.get("attention_factor")
    if amplitude is None:
        over, under = params.get("mscale"), params.get("mscale_all_dim")
        both = bool(over and under)
        amplitude = _yarn_amplitude(factor, over if both else 1.0)
        amplitude /= _yarn_amplitude(factor, under) if both else 1.0
    return replace(
        rope,
        kind="yarn",
        factor=factor,
        original_length=_original(config, params),
        beta_fast=float(params.get("beta_fast") or 32),
        beta_slow=float(params.get("beta_slow") or 1),
        truncate=bool(params.get("truncate", True)),
        amplitude=float(amplitude),
    )


def _yarn_amplitude(factor: float, scale: float | None) -> float:
    assert scale is not None
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(rope: Rope, config: Fields, params: Fields) -> Rope:
    short, long = (tuple(map(float, params[f"{name}_factor"])) for name in ("short", "long"))
    if len(short) != rope.width // 2 or len(long) != rope.width // 2:
        counts = f"{len(short)} short and {len(long)} long factors"
        raise refused(config, f"longrope with {counts} for {rope.width // 2} frequencies")
    original = _original(config, params)
    amplitude = params.get("attention_factor")
    if amplitude is None:
        factor = _factor(config, params)
        amplitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return replace(
        rope,
        kind="longrope",
        original_length=original,
        short=short,
        long=long,
        amplitude=float(amplitude),
    )


def _original(config: Fields, params: Fields) -> float:
    """Return the training length; Phi-3 has it outside of the rotary parameters."""
    for settings in (config, params):
        if (length := settings.get("original_max_position_embeddings")) is not None:
            return float(length)
    return float(config["max_position_embeddings"])


def _factor(config: Fields, params: Fields) -> float:
    factor = params.get("factor")
    if factor is not None:
        return float(factor)
    return float(config["max_position_embeddings"] / _original(config, params))


_KINDS: Final[Mapping[str, Callable[[Rope, Fields, Fields], Rope]]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
