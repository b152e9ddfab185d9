"""Where the tokens are in a value: which axes hold them, and what else is in those axes.

A shape says how long an axis is. A flow says what an axis *is*: a product of atoms, outermost
first. ``[4*B, S, 8]`` of a query is ``((BATCH, 4), (TOKENS,), (8,))``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from llmopt.errors import NotIncrementalError
from llmopt.ir import graph as g
from llmopt.ir.sizes import factors

BATCH: Final = "batch"
TOKENS: Final = "tokens"
"""The new tokens, as queries."""
KEYS: Final = "keys"
"""All tokens, past and new, as keys."""
Atom = int | str
Axis = tuple[Atom, ...]
_SIZES: Final = {BATCH: "B", TOKENS: "S", KEYS: "S"}
_MIXED: Final = {
    BATCH: "mixes the sequences of a batch",
    TOKENS: "mixes tokens, including later ones",
    KEYS: "mixes keys other than by a softmax and a product with values",
}


@dataclass(frozen=True)
class Flow:
    """A value that depends on tokens, row by row.

    Args:
        axes: Meaning of each axis.
        layer: Attention whose scores or weights it is; -1 for any other value.
        causal: Whether keys after the query are masked.
        weights: Whether a softmax was taken, so that masked keys weigh nothing.
    """

    axes: tuple[Axis, ...]
    layer: int = -1
    causal: bool = False
    weights: bool = False

    def holds(self, atom: str) -> bool:
        """Whether an axis holds ``atom``."""
        return any(atom in axis for axis in self.axes)


def refuse(node: ir.Node, reason: str) -> NotIncrementalError:
    """Return the error that names ``node``."""
    return NotIncrementalError(node.name or node.op_type, f"{node.op_type} {reason}")


def tidy(axis: Iterable[Atom]) -> Axis:
    """Return an axis with neighbouring numbers multiplied and ones left out.

    >>> tidy((BATCH, 2, 4, 1))
    ('batch', 8)
    """
    found: list[Atom] = []
    for atom in axis:
        if isinstance(atom, int) and found and isinstance(found[-1], int):
            found[-1] *= atom
        elif atom != 1:
            found.append(atom)
    return tuple(found)


def special(axis: Axis) -> list[str]:
    """Return the atoms of an axis that are batch, tokens or keys."""
    return [atom for atom in axis if isinstance(atom, str) and atom in _SIZES]


def checked(node: ir.Node, flow: Flow) -> Flow:
    """Return ``flow`` if each of batch, tokens and keys is in it once.

    Raises:
        NotIncrementalError: tokens are related to tokens otherwise than as queries to keys.
    """
    held = [atom for axis in flow.axes for atom in special(axis)]
    if held.count(TOKENS) != 1 or held.count(KEYS) > 1:
        raise refuse(node, "relates tokens to each other, and is no attention")
    if held.count(BATCH) != 1:
        raise refuse(node, "relates the sequences of a batch to each other")
    return flow


def untouched(node: ir.Node, flow: Flow, axes: Iterable[int]) -> None:
    """Refuse an operator that runs along an axis of batch, tokens or keys."""
    for axis in axes:
        for atom in special(flow.axes[axis]):
            raise refuse(node, _MIXED[atom])


def sizes(node: ir.Node, value: ir.Value) -> list[g.Dim]:
    """Return the sizes of ``value``, which have to be known."""
    found = g.shape(value)
    if found is None:
        raise refuse(node, f"has {value.name!r} of unknown shape")
    return found


def plain(node: ir.Node, dims: Sequence[g.Dim]) -> tuple[Axis, ...]:
    """Return the axes of a value that has nothing to do with tokens."""
    for dim in dims:
        if not isinstance(dim, int):
            raise refuse(node, f"puts an axis of {dim} beside the tokens")
    return tuple(tidy((dim,)) for dim in dims)


def reshaped(axes: Sequence[Axis], after: Sequence[g.Dim]) -> tuple[Axis, ...] | None:
    """Return the axes after a reshape, or None where they cannot be inferred.

    >>> reshaped(((BATCH,), (4,), (TOKENS,), (8,)), ["4*B", "S", 8])
    (('batch', 4), ('tokens',), (8,))
    """
    left = deque(atom for axis in axes for atom in axis)
    found = []
    for dim in after:
        axis = _taken(left, dim)
        if axis is None:
            return None
        found.append(tidy(axis))
    return None if left else tuple(found)


def _taken(left: deque[Atom], dim: g.Dim) -> list[Atom] | None:
    """Take the atoms that make up ``dim`` off the left."""
    count, symbols = factors(dim)
    axis: list[Atom] = []
    while count > 1 or symbols:
        if not left:
            return None
        atom = left.popleft()
        if isinstance(atom, int):
            shared = _shared(atom, count)
            if shared is None:
                return None
            if shared != atom:
                left.appendleft(atom // shared)
            count //= shared
            axis.append(shared)
        elif (size := _SIZES.get(atom, atom)) in symbols:
            symbols.remove(size)
            axis.append(atom)
        elif not {*symbols} & {*_SIZES.values()}:  # a size that nobody could tell
            symbols.pop()
            axis.append(atom)
        else:
            return None
    return axis


def _shared(atom: int, count: int) -> int | None:
    """Return the part of ``atom`` that ``count`` takes: all of it, or all of ``count``."""
    if count > 1 and count % atom == 0:
        return atom
    return count if count > 1 and atom % count == 0 else None
