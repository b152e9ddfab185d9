"""Kernels as plain loops, for what has no faster one."""

from __future__ import annotations

from tvm.script import tirx as T  # noqa: N812 - the script language's own name

from llmopt.backends.tvm.kernels.kernel import Kernel


def append(groups: int, width: int) -> Kernel:
    """Return the kernel that writes new keys or values behind those in use.

    ``new`` [B, S, G*D] float32 goes to ``cache`` [B, G, C, D] at T - S … T - 1, where T is the
    length of ``mask`` [B, T].
    """

    @T.prim_func(s_tir=True)
    def function(cache_: T.handle, new_: T.handle, mask_: T.handle) -> None:
        batch, capacity, tokens, total = T.int64(), T.int64(), T.int64(), T.int64()
        cache = T.match_buffer(cache_, (batch, groups, capacity, width), "float32")
        new = T.match_buffer(new_, (batch, tokens, groups * width), "float32")
        T.match_buffer(mask_, (batch, total), "int64")  # its shape alone is read
        for b, t, h, d in T.grid(batch, tokens, groups, width):
            cache[b, h, total - tokens + t, d] = new[b, t, h * width + d]

    return Kernel(f"append_g{groups}_d{width}", function, ("cache", "new", "mask"), ())
