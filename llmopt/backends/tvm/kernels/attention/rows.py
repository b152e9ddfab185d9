"""New rows of Q, K and V: where their heads are, what turns them, and their way into the caches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T  # noqa: N812 - the script language's own name

from llmopt.backends.tvm.kernels.attention.form import AttentionForm
from llmopt.backends.tvm.kernels.heads import Head, Rotation, rotate
from llmopt.backends.tvm.kernels.signature import Argument
from llmopt.backends.tvm.kernels.vectors import load, store, variable


def arguments(
    form: AttentionForm, rotation: Rotation, rows: str, length: int | str
) -> list[Argument]:
    """Return what is read of ``rows`` new rows, ``length`` of a sequence, and of its cache."""
    width, groups = form.width, form.kv_heads
    table, cache = ("angles", rotation.rotary // 2), ("batch", groups, "room", width)
    every = [
        Argument("qkv", (rows, (form.heads + 2 * groups) * width)),
        Argument("q_norm", (width,)),
        Argument("k_norm", (width,)),
        Argument("cos", table),
        Argument("sin", table),
        Argument("position_ids", ("batch", length), "int64"),
        Argument("mask", ("batch", "keys"), "int64"),
        Argument("k_cache", cache),
        Argument("v_cache", cache),
    ]
    needed = rotation.reads | {"qkv", "mask", "k_cache", "v_cache"}
    return [argument for argument in every if argument.name in needed]


@dataclass(frozen=True)
class Fresh:
    """The new row of a sequence: where its heads are, and what to do with them.

    Args:
        form: The attention.
        rotation: Norm and rotation.
        lanes: Lanes of a vector that divides the rotated width.
        qkv: [M, H·D + 2·G·D].
        norms: [D] for queries, [D] for keys; None where there is no norm.
        tables: cos, sin [positions, rotary / 2]; None where nothing is rotated.
        position_ids: [B, S] int64; None where nothing is rotated.
        length: S.
    """

    form: AttentionForm
    rotation: Rotation
    lanes: int
    qkv: Any
    norms: tuple[Any, Any]
    tables: tuple[Any, Any]
    position_ids: Any
    length: Any

    @classmethod
    def of(
        cls,
        form: AttentionForm,
        rotation: Rotation,
        lanes: int,
        buffers: Mapping[str, Any],
        length: Any,
    ) -> Fresh:
        """Return the rows that a kernel was given by the names of `arguments`."""
        norms = (buffers.get("q_norm"), buffers.get("k_norm"))
        tables = (buffers.get("cos"), buffers.get("sin"))
        positions = buffers.get("position_ids")
        return cls(form, rotation, lanes, buffers["qkv"], norms, tables, positions, length)

    def query(self, row: Any, h: Any, target: tuple[Any, tuple[Any, ...]], scale: float) -> Head:
        """Return query head h of a row, to be written to ``target``."""
        return self._head(row, h, target, (self.norms[0], scale))

    def key(self, row: Any, g: Any, target: tuple[Any, tuple[Any, ...]]) -> Head:
        """Return key head g of a row."""
        return self._head(row, self.form.heads + g, target, (self.norms[1], 1.0))

    def value(self, row: Any, g: Any, d: Any) -> Any:
        """Return numbers from d on of value head g of a row."""
        column = (self.form.heads + self.form.kv_heads + g) * self.form.width
        return load(self.qkv, (row, column), d, self.lanes)

    def _head(
        self,
        row: Any,
        h: Any,
        target: tuple[Any, tuple[Any, ...]],
        how: tuple[Any, float],
    ) -> Head:
        position = T.int64(0)
        if self.rotation.rotary:
            position = self.position_ids[row // self.length, row % self.length]
        source = (self.qkv, (row, h * self.form.width))
        tables = (*self.tables, position)
        return Head(self.rotation, self.lanes, source, target, tables, *how)


def append_row(new: Fresh, row: Any, g: Any, caches: tuple[Any, Any], slot: Any) -> None:
    """Write key (turned) and value of a row's head g to a place in the caches."""
    rotate(new.key(row, g, (caches[0], slot)))
    for d in range(0, new.form.width, new.lanes):
        store((caches[1], slot), d, new.value(row, g, d))


def append_all(new: Fresh, rows: Any, past: Any, targets: tuple[Any, Any, Any]) -> None:
    """Write caches and turned queries of all rows."""
    heads, group, width = new.form.heads, new.form.kv_heads, new.form.width
    with T.parallel(rows) as row:
        b, slot = variable(row // new.length), variable(past + row % new.length)
        with T.serial(heads) as h:
            rotate(new.query(row, h, (targets[2], (row, h * width)), 1.0))
        with T.serial(group) as g:
            append_row(new, row, g, targets[:2], (b, g, slot, 0))
