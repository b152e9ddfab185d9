"""Optimization profiles of a typed network, and obstacles to lowering a Program to one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from llmopt.backends.tensorrt.legalize_operators import TAKEN
from llmopt.interface.signature import Role
from llmopt.ir import graph as g
from llmopt.ir.attention import AttentionOp
from llmopt.ir.landmarks import Landmark, is_landmark
from llmopt.ir.program import Program
from llmopt.runtime.engines.tensorrt_recipe import InputRange, Profile, Sizes

USUAL: Final = 128  # tokens: the length that kernels are tuned for where it is dynamic


def problems_of(program: Program) -> list[str]:
    """Return every operator, and every use of a cache, that cannot be lowered."""
    problems = [
        f"TensorRT has no {node.op_type} ({node.name!r})"
        for node in program.graph
        if node.domain or node.op_type not in TAKEN
    ]
    if program.signature.has_cache:
        problems += _of_cache(program)
    return problems


def _of_cache(program: Program) -> Iterator[str]:
    """Yield each obstacle to a cache that is a buffer of fixed capacity."""
    if not program.facts.max_length:
        yield "the maximum length is unknown, and the cache needs one: pass --max-length"
    names = {port.name for port in program.signature.pasts}
    for value in program.graph.inputs:
        readers = g.users(value) if value.name in names else []
        for node in readers:
            if node.op_type != "Attention":
                yield f"{node.op_type} ({node.name!r}) reads the cache outside attention"
    mask = program.input(Role.MASK)
    for node in g.users(mask) if mask is not None else []:
        if node.op_type == "Shape":
            yield f"{node.op_type} ({node.name!r}) reads the length of the attention mask"
    for node in g.nodes(program.graph, "Attention"):
        op = AttentionOp.of(node)
        written_out = op.mask is not None and not is_landmark(op.mask, Landmark.PADDING_MASK)
        if op.past and written_out:
            yield f"the mask of {node.name!r} is more than causality, a window and padding"


def profiles_of(program: Program, batch: int, chunk: int) -> tuple[Profile, ...]:
    """Return the optimization profiles: prefill and decode, or one for all sizes.

    Args:
        program: The lowered Program.
        batch: Largest number of sequences.
        chunk: Largest number of new tokens in a call, where there is a cache.
    """
    limit = program.facts.max_length or USUAL * 4
    if not program.signature.has_cache:
        return (_profile(program, "all", batch, limit),)
    return (
        _profile(program, "prefill", batch, min(chunk, limit)),
        _profile(program, "decode", batch, 1),
    )


def _profile(program: Program, name: str, batch: int, tokens: int) -> Profile:
    shapes = {}
    for value in program.graph.inputs:
        sizes = g.shape(value) or []
        if any(not isinstance(size, int) for size in sizes):
            shapes[str(value.name)] = InputRange(
                _sizes(sizes, 1, 1),
                _sizes(sizes, 1, min(USUAL, tokens)),
                _sizes(sizes, batch, tokens),
            )
    values = {}
    keep = program.signature.find(Role.LOGITS_TO_KEEP)
    if keep is not None:
        values[keep.name] = InputRange((1,), (1,), (tokens,))
    return Profile(name, shapes, values)


def _sizes(dims: list[g.Dim], batch: int, tokens: int) -> Sizes:
    return tuple(d if isinstance(d, int) else (batch if d == "B" else tokens) for d in dims)
