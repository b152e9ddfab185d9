"""Rows of an embedding table, float32.

Roofline: 8·E bytes a token, from anywhere in the table.
"""

from __future__ import annotations

from tvm.script import tirx as T  # noqa: N812 - the script language's own name

from llmopt.backends.tvm.features import Features
from llmopt.backends.tvm.kernels.activations import LOOPS, Rows
from llmopt.backends.tvm.kernels.kernel import Kernel
from llmopt.backends.tvm.kernels.vectors import at, fitting, load


def gather(width: int, features: Features, rows: Rows = "many") -> Kernel:
    """Return rows of a table: ``table [V, E]``, ``ids [M] int64`` to ``y [M, E]``.

    An id below 0 counts from the end; any other outside 0 … V - 1 is an error of the call.
    """
    lanes, loop = fitting(features, width), LOOPS[rows]

    @T.prim_func(s_tir=True)
    def gather(table: T.handle, ids: T.handle, y: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        count, size = T.int64(), T.int64()
        entries = T.match_buffer(table, (size, width), "float32")
        wanted = T.match_buffer(ids, (count,), "int64")
        out = T.match_buffer(y, (count, width), "float32")
        for m in T.serial(count):
            assert -size <= wanted[m] and wanted[m] < size, "an id is outside the table"
        for m in loop(count):
            entry: T.let = T.if_then_else(wanted[m] < 0, wanted[m] + size, wanted[m])
            for j in T.serial(width // lanes):
                out[m, at(j * lanes, lanes)] = load(entries, (entry, j * lanes), 0, lanes)

    return Kernel(f"gather_w{width}_{rows}_{features.label}", gather, ("table", "ids"), ("y",))
