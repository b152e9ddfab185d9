"""The pass that applies a quantization scheme."""

from __future__ import annotations

from llmopt.passes.base import Pass
from llmopt.passes.convert_float import ConvertFloat
from llmopt.passes.narrow_weights import NarrowWeights
from llmopt.passes.quantize_dynamic import QuantizeDynamic
from llmopt.passes.quantize_weights import QuantizeWeights
from llmopt.quantization.schemes import Blockwise, Cast, DynamicInt8, Scheme


def quantizers(scheme: Scheme | None, islands: str) -> tuple[Pass, ...]:
    """Return what makes a Program be of ``scheme``, before any lowering.

    Args:
        scheme: None keeps float32. ``Static`` is the backend's own: it calibrates what it lowers.
        islands: Values that ``convert-float`` keeps in float32; ``activations``: all but weights.
    """
    match scheme:
        case Blockwise():
            return (QuantizeWeights(**scheme.codes, head=scheme.head),)
        case DynamicInt8():
            return (QuantizeDynamic(),)
        case Cast("bfloat16") if islands == "activations":
            return (NarrowWeights(),)
        case Cast(dtype):
            return (ConvertFloat(dtype, islands),)
    return ()
