"""Rotary embedding of rows, where no cache is: encoders with rotary positions.

Half rotation: numbers i and i + rotary/2 of a head turn together, by the angle of the row's
position; those from ``rotary`` on stay. Roofline: 8 bytes a number at the bandwidth of memory.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T  # noqa: N812 - the script language's own name

from llmopt.backends.tvm.features import Features
from llmopt.backends.tvm.kernels.heads import Head, Rotation, lanes_for, rotate
from llmopt.backends.tvm.kernels.kernel import Kernel


def rotary(rotation: Rotation, heads: int, features: Features) -> Kernel:
    """Return the rotation of rows of heads.

    Inputs are ``x [M, heads·D]``, ``cos, sin [positions, rotary/2]`` and
    ``position_ids [B, S] int64``, M = B·S; the output is ``y`` of the shape of ``x``.

    Args:
        rotation: Width of a head and of its rotated part; its norm is not applied.
        heads: Number of heads in a row.
        features: Features of the processor.
    """
    plain = Rotation(rotation.width, rotation.rotary)
    name = f"rotary_h{heads}_d{rotation.width}_{plain.label}_{features.label}"
    function = _rotary(plain, heads, lanes_for(plain, features))
    return Kernel(name, function, ("x", "cos", "sin", "position_ids"), ("y",))


def _rotary(rotation: Rotation, heads: int, lanes: int) -> Any:
    width, half = rotation.width, rotation.rotary // 2

    @T.prim_func(s_tir=True)
    def rotary(
        x: T.handle, cos: T.handle, sin: T.handle, position_ids: T.handle, y: T.handle
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        rows, batch, length, angles = T.int64(), T.int64(), T.int64(), T.int64()
        given = T.match_buffer(x, (rows, heads * width), "float32")
        cosines = T.match_buffer(cos, (angles, half), "float32")
        sines = T.match_buffer(sin, (angles, half), "float32")
        positions = T.match_buffer(position_ids, (batch, length), "int64")
        out = T.match_buffer(y, (rows, heads * width), "float32")
        for m in T.parallel(rows):
            position = positions[m // length, m % length]
            for h in T.serial(heads):
                place = T.meta_var((m, h * width))
                tables = T.meta_var((cosines, sines, position))
                rotate(Head(rotation, lanes, (given, place), (out, place), tables, None, 1.0))

    return rotary
