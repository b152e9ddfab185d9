"""The passes, by the names that the command line knows them by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from llmopt import lazy
from llmopt.passes.base import Miss, Outcome, Pass
from llmopt.passes.plugins import installed

__all__ = ["DEFAULT", "PASSES", "Miss", "Outcome", "Pass", "known_passes"]

PASSES: Final[Mapping[str, str]] = {
    "add-kv-cache": "llmopt.passes.add_kv_cache:AddKvCache",
    "canonicalize": "llmopt.passes.canonicalize:Canonicalize",
    "cancel-transposes": "llmopt.passes.cancel_transposes:CancelTransposes",
    "convert-float": "llmopt.passes.convert_float:ConvertFloat",
    "expand-einsum": "llmopt.passes.expand_einsum:ExpandEinsum",
    "fold-weights": "llmopt.passes.fold_weights:FoldWeights",
    "fuse-activations": "llmopt.passes.fuse_activations:FuseActivations",
    "fuse-attention": "llmopt.passes.fuse_attention:FuseAttention",
    "fuse-norms": "llmopt.passes.fuse_norms:FuseNorms",
    "fuse-rotary": "llmopt.passes.fuse_rotary:FuseRotary",
    "merge-gate-up": "llmopt.passes.merge_projections:MergeGateUp",
    "merge-qkv": "llmopt.passes.merge_projections:MergeQkv",
    "merge-reshapes": "llmopt.passes.merge_reshapes:MergeReshapes",
    "narrow-weights": "llmopt.passes.narrow_weights:NarrowWeights",
    "order-columns": "llmopt.passes.order_columns:OrderColumns",
    "push-transposes": "llmopt.passes.push_transposes:PushTransposes",
    "quantize-dynamic": "llmopt.passes.quantize_dynamic:QuantizeDynamic",
    "quantize-experts": "llmopt.passes.quantize_experts:QuantizeExperts",
    "quantize-weights": "llmopt.passes.quantize_weights:QuantizeWeights",
    "raise-attention": "llmopt.passes.raise_attention:RaiseAttention",
    "remove-dead": "llmopt.passes.remove_dead:RemoveDead",
    "split-heads": "llmopt.passes.split_heads:SplitHeads",
    "split-rows": "llmopt.passes.split_rows:SplitRows",
}

DEFAULT: Final[tuple[str, ...]] = (
    "canonicalize",  # one spelling of reshapes and affine maps for all that follow
    "fold-weights",  # projections become MatMul with a weight
    "split-rows",  # which are known by their batch and tokens from here on
    "fuse-norms",
    "fuse-activations",
    "expand-einsum",  # attention is then written with MatMul, whoever wrote it
    "split-heads",  # products of [B * H, S, D] get the four axes that attention is known by
    "fuse-attention",  # written-out attention joins what torch already fused
    "add-kv-cache",  # attention is recognized, masks and tables are still what they were traced as
    "fuse-rotary",  # before attention loses its [B, H, S, D] operands
    "raise-attention",  # cache, mask and heads in the dialect's form
    "cancel-transposes",  # what the forms above brought to cancel
    "merge-reshapes",  # what stands between two operators is one transpose, if any
    "push-transposes",  # to where another one undoes it
    "merge-reshapes",  # what that brought together
    "order-columns",  # parts of heads are parts of the row now, unless weights are in another order
    "canonicalize",  # reshapes of what came together
    "merge-qkv",
    "merge-gate-up",
    "remove-dead",
)


def known_passes() -> dict[str, type[Pass]]:
    """Return every pass by name: the built-in ones and those of installed packages."""
    ours: dict[str, type[Pass]] = {name: lazy.load(path) for name, path in PASSES.items()}
    return ours | installed("llmopt.passes", PASSES, Pass)
