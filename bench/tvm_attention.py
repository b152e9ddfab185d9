"""Attention kernels of TVM beside this machine's limits: `python bench/tvm_attention.py`.

For each shape the arithmetic or the traffic it needs a second, and which part that is of what a
kernel reaches here that does nothing but multiply and add, or nothing but read as many bytes again
and again. One thread, processor time, the best of many calls: a neighbour's load shows least.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import tvm
from tvm.script import tirx as T  # noqa: N812 - the script language's own name

from llmopt.backends.tvm.features import find_processor
from llmopt.backends.tvm.kernels.attention.selection import (
    AttentionForm,
    Rotation,
    attention,
    decode,
)
from llmopt.backends.tvm.kernels.kernel import Kernel
from llmopt.backends.tvm.kernels.vectors import Registers, load, store

PROCESSOR = find_processor("x86_64", "host")
LANES = PROCESSOR.features.lanes
PREFILL = [
    ("SmolLM2, 128 tokens", 1, 128, AttentionForm(9, 3, 64, causal=True, packed=True)),
    ("SmolLM2, 512 tokens", 1, 512, AttentionForm(9, 3, 64, causal=True, packed=True)),
    ("Llama 1.2 B, 512 tokens", 1, 512, AttentionForm(32, 8, 64, causal=True, packed=True)),
    ("MiniLM, 1 x 128", 1, 128, AttentionForm(12, 12, 32, packed=True)),
    ("BERT-base, 1 x 128", 1, 128, AttentionForm(12, 12, 64, packed=True)),
    ("BERT-base, 8 x 128", 8, 128, AttentionForm(12, 12, 64, packed=True)),
]
DECODE = [
    ("SmolLM2, 192 keys", 192, AttentionForm(9, 3, 64, causal=True, cached=True)),
    ("SmolLM2, 2048 keys", 2048, AttentionForm(9, 3, 64, causal=True, cached=True)),
    ("Llama 1.2 B, 192 keys", 192, AttentionForm(32, 8, 64, causal=True, cached=True)),
    ("Llama 1.2 B, 2048 keys", 2048, AttentionForm(32, 8, 64, causal=True, cached=True)),
]
STEPS = 100_000
REGISTERS = 12


def best_s(kernel: Kernel, arrays: Sequence[Any], least_s: float = 0.5) -> float:
    """Return the shortest processor time of a call."""
    module = tvm.IRModule({"main": kernel.function.with_attr("global_symbol", "main")})
    call = tvm.compile(module, target=tvm.target.Target(PROCESSOR.target))["main"]
    tensors = [tvm.runtime.tensor(array) for array in arrays]
    call(*tensors)
    best, until = float("inf"), time.monotonic() + least_s
    while time.monotonic() < until:
        begin = time.thread_time()
        call(*tensors)
        best = min(best, time.thread_time() - begin)
    return best


def arithmetic() -> Kernel:
    """Return multiplications and additions in registers alone."""

    @T.prim_func(s_tir=True)
    def arithmetic(x: T.handle, y: T.handle) -> None:
        given = T.match_buffer(x, (REGISTERS, LANES), "float32")
        out = T.match_buffer(y, (REGISTERS, LANES), "float32")
        acc = T.meta_var(Registers.allocated(REGISTERS, 1, LANES))
        acc.clear()
        for _ in T.serial(STEPS):
            acc.add_products(rows_of(given), [load(given, (0, 0), 0, LANES)])
        write(acc, out)

    return Kernel("arithmetic", arithmetic, ("x",), ("y",))


def rows_of(given: Any) -> list[Any]:
    """Return the rows of a buffer [REGISTERS, LANES]."""
    return [load(given, (row, 0), 0, LANES) for row in range(REGISTERS)]


def write(acc: Registers, out: Any) -> None:
    """Write registers to a buffer [rows, LANES]."""
    for row in range(len(acc.vectors)):
        store((out, (row, 0)), 0, acc.get(row, 0))


def reading(rows: int) -> Kernel:
    """Return the sum of ``rows`` times `REGISTERS` vectors."""

    @T.prim_func(s_tir=True)
    def reading(x: T.handle, y: T.handle) -> None:
        given = T.match_buffer(x, (rows, REGISTERS, LANES), "float32")
        out = T.match_buffer(y, (REGISTERS, LANES), "float32")
        acc = T.meta_var(Registers.allocated(REGISTERS, 1, LANES))
        acc.clear()
        for j in T.serial(rows):
            add(acc, given, j)
        write(acc, out)

    return Kernel("reading", reading, ("x",), ("y",))


def add(acc: Registers, given: Any, j: Any) -> None:
    """Add row j of a buffer [rows, REGISTERS, LANES]."""
    for i in range(REGISTERS):
        acc.put(i, 0, acc.get(i, 0) + load(given, (j, i, 0), 0, LANES))


def peak_flops() -> float:
    """Return operations a second of multiplying and adding in registers."""
    rng = np.random.default_rng(0)
    x = 1e-3 * rng.random((REGISTERS, LANES), dtype=np.float32)
    return 2 * STEPS * REGISTERS * LANES / best_s(arithmetic(), [x, np.zeros_like(x)])


def peak_bytes(size: int) -> float:
    """Return bytes a second of reading ``size`` bytes over and over."""
    rows = -(-size // (4 * REGISTERS * LANES))
    x = np.zeros((rows, REGISTERS, LANES), np.float32)
    return x.nbytes / best_s(reading(rows), [x, x[0]])


def prefill(batch: int, length: int, form: AttentionForm) -> tuple[float, float]:
    """Return seconds, and operations a second."""
    rows, width = batch * length, form.heads * form.width
    qkv = np.random.default_rng(0).standard_normal(
        (rows, width + 2 * form.kv_heads * form.width), dtype=np.float32
    )
    mask = np.ones((batch, length), np.int64)
    y = np.zeros((rows, width), np.float32)
    seconds = best_s(attention(form, PROCESSOR.features), [qkv, mask, y])
    return seconds, 4 * rows * length * width * (0.5 if form.causal else 1) / seconds


def decoding(keys: int, form: AttentionForm) -> tuple[float, int]:
    """Return seconds, and the bytes of the cache."""
    rng, width = np.random.default_rng(0), form.width
    cache = rng.standard_normal((2, 1, form.kv_heads, keys, width), dtype=np.float32)
    given = {
        "qkv": rng.standard_normal((1, (form.heads + 2 * form.kv_heads) * width), np.float32),
        "cos": np.ones((keys, width // 2), np.float32),
        "sin": np.zeros((keys, width // 2), np.float32),
        "position_ids": np.array([[keys - 1]]),
        "mask": np.ones((1, keys), np.int64),
        "k_cache": cache[0],
        "v_cache": cache[1],
    }
    kernel = decode(form, Rotation(width, width), PROCESSOR.features)
    arrays = [given[name] for name in kernel.inputs]
    seconds = best_s(kernel, [*arrays, np.zeros((1, form.heads * width), np.float32)])
    return seconds, cache.nbytes


def main() -> None:
    """Print a table."""
    print(f"{PROCESSOR.mcpu}, {PROCESSOR.features.label}, one thread")
    for name, batch, length, form in PREFILL:
        seconds, rate = prefill(batch, length, form)
        print(
            f"{name:24} {1e6 * seconds:8.0f} us {rate / 1e9:6.1f} GFLOP/s "
            f"{rate / peak_flops():5.0%} of multiplying and adding in registers"
        )
    for name, keys, form in DECODE:
        seconds, size = decoding(keys, form)
        rate = size / seconds
        print(
            f"{name:24} {1e6 * seconds:8.1f} us {rate / 1e9:6.1f} GB/s    "
            f"{rate / peak_bytes(size):5.0%} of reading {size / 1e6:.1f} MB"
        )


if __name__ == "__main__":
    main()
