"""Windows and rotary settings of a decoder's layers, by family.

A function returns one entry for each layer, from the first to the last.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmopt.models.config import Rope
from llmopt.models.family import Fields, need
from llmopt.models.rope_config import parse_rope, refused


def _depth(config: Fields) -> range:
    return range(int(need(config, "num_hidden_layers")))


def no_windows(config: Fields) -> Sequence[int | None]:
    """Return None for every layer: no window."""
    return [None for _ in _depth(config)]


def mistral_windows(config: Fields) -> Sequence[int | None]:
    """Return one window for every layer, 4096 by default."""
    return config_windows({"sliding_window": 4096} | dict(config))


def config_windows(config: Fields) -> Sequence[int | None]:
    """Return the config's window for every layer; None without one."""
    return [config.get("sliding_window") for _ in _depth(config)]


def qwen_windows(config: Fields) -> Sequence[int | None]:
    """Return a window from layer ``max_window_layers`` on, if the config enables it."""
    first = int(config.get("max_window_layers", 28))
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    sliding = [layer >= first for layer in _depth(config)]
    return _typed_windows(config, sliding, window)


def smollm3_windows(config: Fields) -> Sequence[int | None]:
    """Return a window for the layers without rotary, if the config enables it."""
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    return _typed_windows(config, [not rotates for rotates in _rotating(config)], window)


def _patterned_windows(config: Fields, every: int) -> Sequence[int | None]:
    """Return a window for all layers but each ``every``-th."""
    sliding = [(layer + 1) % every != 0 for layer in _depth(config)]
    return _typed_windows(config, sliding, config.get("sliding_window", 4096))


def gemma2_windows(config: Fields) -> Sequence[int | None]:
    """Return a window for every other layer, the first included."""
    return _patterned_windows(config, 2)


def gemma3_windows(config: Fields) -> Sequence[int | None]:
    """Return a window for five layers of six, or by the config's pattern."""
    return _patterned_windows(config, int(config.get("sliding_window_pattern", 6)))


def _typed_windows(
    config: Fields, sliding: Sequence[bool], window: int | None
) -> Sequence[int | None]:
    """Return the window of each layer; ``layer_types``, if in the config, decide."""
    if (types := config.get("layer_types")) is not None:
        if set(types) - {"sliding_attention", "full_attention"} or len(types) != len(sliding):
            raise refused(config, f"layer_types {sorted(set(types))} of {len(types)} layers")
        sliding = [each == "sliding_attention" for each in types]
    return [window if each else None for each in sliding]


def _params(config: Fields) -> Fields:
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def _theta(config: Fields, default: float) -> float:
    return float(config.get("rope_theta") or default)


def one_rope(config: Fields, width: int, theta: float) -> Sequence[Rope | None]:
    """Return one rotary setting for every layer."""
    params = _params(config)
    if params.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in {None, 1.0}:
        raise refused(config, "partial_rotary_factor: partial rotary embeddings are not supported")
    rope = parse_rope(config, params, width, _theta(config, theta))
    return [rope for _ in _depth(config)]


def phi3_ropes(config: Fields, width: int, theta: float) -> Sequence[Rope | None]:
    """Return one setting for every layer; it may rotate only some channels of a head."""
    params = dict(_params(config))
    share = params.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if params.get("rope_type", params.get("type")) in {"su", "yarn"}:  # early names of it
        params["rope_type"] = "longrope"
    lengths = {"original_max_position_embeddings": 4096, "max_position_embeddings": 4096}
    rope = parse_rope(lengths | dict(config), params, int(width * share), _theta(config, theta))
    return [rope for _ in _depth(config)]


def smollm3_ropes(config: Fields, width: int, theta: float) -> Sequence[Rope | None]:
    """Return one setting for the layers that rotate, None for the others."""
    ropes = one_rope(config, width, theta)
    return [rope if on else None for rope, on in zip(ropes, _rotating(config), strict=True)]


def _rotating(config: Fields) -> Sequence[bool]:
    interval = int(config.get("no_rope_layer_interval", 4))
    flags = config.get("no_rope_layers")  # 1 for a layer with rotary, despite the name
    if flags is None:
        return [(layer + 1) % interval != 0 for layer in _depth(config)]
    if len(flags) != len(_depth(config)):
        raise refused(config, f"no_rope_layers of {len(flags)} layers, not {len(_depth(config))}")
    return [bool(flag) for flag in flags]


def gemma3_ropes(config: Fields, width: int, theta: float) -> Sequence[Rope | None]:
    """Return one setting for layers with a window, another for those without."""
    params = dict(_params(config))
    local = params.pop("sliding_attention", None) or {}
    full = params.pop("full_attention", None) or params
    narrow = float(config.get("rope_local_base_freq") or 10000.0)
    near = parse_rope(config, local, width, narrow)
    far = parse_rope(config, full, width, _theta(config, theta))
    return [far if window is None else near for window in gemma3_windows(config)]
