"""Inputs for a Program, made from what its signature says each input means."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from llmopt.interface.arrays import Arrays
from llmopt.interface.signature import Port, Role, Signature


@dataclass(frozen=True)
class Case:
    """One point of the matrix that a Program is run on.

    Args:
        batch: Sequences, B.
        new: New tokens of each, S.
        past: Tokens already in the cache, P.
        padding: ``"none"``, ``"left"`` or ``"right"``.
        seed: Seed of the random numbers.
    """

    batch: int = 1
    new: int = 7
    past: int = 0
    padding: str = "none"
    seed: int = 0

    @property
    def label(self) -> str:
        """A short name: ``"B3 S7 P0 left"``."""
        return f"B{self.batch} S{self.new} P{self.past} {self.padding}"

    def mask(self) -> npt.NDArray[np.int64]:
        """Return the attention mask [B, P+S]: row b has b fewer tokens on the padded side.

        Row 0 is never padded, and every row keeps at least one token among the new ones.
        """
        total = self.past + self.new
        mask = np.ones((self.batch, total), np.int64)
        for row in range(self.batch):
            pads = min(row * max(1, self.new // 4), self.new - 1)
            if self.padding == "left":
                mask[row, :pads] = 0
            elif self.padding == "right" and pads:
                mask[row, -pads:] = 0
        return mask


def feeds(
    signature: Signature, case: Case, vocabulary: int, only: Container[str] | None = None
) -> Arrays:
    """Return one array for every input of ``signature``, random where it may be.

    Args:
        signature: The inputs.
        case: Sizes, padding and seed.
        vocabulary: Tokens are below this.
        only: The inputs wanted; all if not given.
    """
    rng = np.random.default_rng(case.seed)
    sizes = {"B": case.batch, "S": case.new, "P": case.past, "T": case.past + case.new}
    draw = _Draw(case, case.mask(), vocabulary, rng)
    arrays: Arrays = {}
    for port in signature.inputs:
        if only is not None and port.name not in only:
            continue
        shape = [resolve(dim, sizes) for dim in port.shape]
        arrays[port.name] = _make(port, shape, draw)
    return arrays


def taken(signature: Signature, arrays: Mapping[str, npt.NDArray[Any]]) -> Arrays:
    """Return those of ``arrays`` that ``signature`` has an input for, by name."""
    names = {port.name for port in signature.inputs}
    return {name: array for name, array in arrays.items() if name in names}


def resolve(dim: int | str, sizes: Mapping[str, int]) -> int:
    """Return a dimension's size; an unknown symbol counts as 2, an expression is computed.

    >>> resolve("P + S", {"P": 3, "S": 4})
    7
    """
    if isinstance(dim, int):
        return dim
    try:
        return _compute(ast.parse(dim.strip(), mode="eval").body, sizes)
    except (SyntaxError, ValueError):
        return 2


def known(dim: int | str, sizes: Mapping[str, int]) -> bool:
    """Whether every symbol in ``dim`` has a size."""
    if isinstance(dim, int):
        return True
    try:
        names = [n.id for n in ast.walk(ast.parse(dim.strip())) if isinstance(n, ast.Name)]
    except SyntaxError:
        return False
    return bool(names) and all(name in sizes for name in names)


def _compute(node: ast.expr, sizes: Mapping[str, int]) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.Name):
        return sizes.get(node.id, 2)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _compute(node.left, sizes), _compute(node.right, sizes)
        return _OPERATORS[type(node.op)](left, right)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_compute(node.operand, sizes)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        arguments = [_compute(argument, sizes) for argument in node.args]
        if (function := _FUNCTIONS.get(node.func.id)) is not None:
            return function(arguments)
    raise ValueError(ast.dump(node))


_OPERATORS: Final[Mapping[type[ast.operator], Callable[[int, int], int]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_FUNCTIONS: Final[Mapping[str, Callable[[Iterable[int]], int]]] = {"Max": max, "Min": min}


@dataclass(frozen=True)
class _Draw:
    """What the arrays of one case are drawn from."""

    case: Case
    mask: npt.NDArray[np.int64]
    vocabulary: int
    rng: np.random.Generator


def _make(port: Port, shape: list[int], draw: _Draw) -> npt.NDArray[Any]:
    make = _BY_ROLE.get(port.role)
    if make is not None:
        return make(shape, draw).astype(port.dtype)
    if port.dtype.startswith(("float", "bfloat")):
        return draw.rng.standard_normal(shape, np.float32).astype(port.dtype)
    return np.ones(shape, port.dtype)


_BY_ROLE: Final[Mapping[str, Callable[[list[int], _Draw], npt.NDArray[Any]]]] = {
    Role.TOKENS: lambda shape, draw: draw.rng.integers(0, draw.vocabulary, shape),
    Role.MASK: lambda _, draw: draw.mask,
    Role.POSITIONS: lambda _, draw: positions(draw.mask)[:, draw.case.past :],
    Role.TOKEN_TYPES: lambda shape, _: np.arange(math.prod(shape)).reshape(shape) % 5 // 4,
    Role.LOGITS_TO_KEEP: lambda *_: np.asarray(0, np.int64),
}


def positions(mask: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return each token's position among the unpadded ones of its row; 0 where padded.

    >>> positions(np.array([[0, 0, 1, 1, 1]]))
    array([[0, 0, 0, 1, 2]])
    """
    return np.where(mask == 1, np.cumsum(mask, axis=1) - 1, 0)
