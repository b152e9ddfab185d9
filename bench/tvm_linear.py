"""TVM's products with weights against what the machine can do, measured in turns.

python bench/tvm_linear.py [--threads N] [--rounds N] [--only TEXT] [--mcpu NAME] [--json FILE]

Decoding reads weights that no cache holds: GB/s, and the fraction of what a loop that only reads
reaches. Prefill: operations (two for a product), and the fraction of what a loop of nothing but
the processor's best instruction reaches. float32 is compared with torch on the same shape too.
A machine that does something else at the same time makes every figure smaller, the limits too;
with one thread it is the thread's own time that counts, and only caches and memory are shared.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from llmopt.benchmark.statistics import median
from llmopt.quantization.schemes import Blockwise, DynamicInt8
from llmopt.runtime.cores import usable_cores

SHAPES: Final = {
    "smollm2 qkv": (960, 576),
    "smollm2 out": (576, 576),
    "smollm2 gate+up": (3072, 576),
    "smollm2 down": (576, 1536),
    "smollm2 head": (49152, 576),
    "1.2 B qkv": (3072, 2048),
    "1.2 B out": (2048, 2048),
    "1.2 B gate+up": (16384, 2048),
    "1.2 B down": (2048, 8192),
    "1.2 B head": (128256, 2048),
}
DECODE: Final = (Blockwise(4, 32), Blockwise(4, 128), Blockwise(6, 32), Blockwise(8, 32), None)
PREFILL: Final = (Blockwise(4, 32), Blockwise(4, 128), Blockwise(8, 32), DynamicInt8(), None)
COLD: Final = 256_000_000  # bytes that are read before a weight is read again
ROWS: Final = 128
LOOPS: Final = 8192
STEPS: Final = 8  # products between the sums of 16 bits, where a processor has those


@dataclass(frozen=True)
class Row:
    """One measurement.

    Args:
        what: Kernel and shape.
        seconds: Median time of a call.
        rate: GB/s or billions of operations a second.
        fraction: Of the limit, measured in turns.
        torch: Times as fast as torch in float32, where that was measured.
    """

    what: str
    seconds: float
    rate: float
    fraction: float
    torch: float | None = None


class Bench:
    """The processor, and loops that show its limits."""

    def __init__(self, threads: int, rounds: int, mcpu: str) -> None:
        import tvm

        from llmopt.backends.tvm.features import find_processor

        self.tvm = tvm
        self.processor = find_processor("x86_64", mcpu)
        self.features = self.processor.features
        self.rounds = rounds
        self.clock = time.thread_time if threads == 1 else time.perf_counter

    def compiled(self, name: str, function: Any) -> Callable[..., None]:
        """Return a function that runs."""
        module = self.tvm.IRModule({name: function})
        target = self.tvm.target.Target(self.processor.target)
        found: Callable[..., None] = self.tvm.compile(module, target=target)[name]
        return found

    def compare(self, kernel: Callable[[], None], limit: Callable[[], None]) -> tuple[float, float]:
        """Return median seconds of a kernel and of its limit, called in turns."""
        times: list[list[float]] = [[], []]
        for call in (kernel, limit):
            call()
        for _ in range(self.rounds):
            for call, found in zip((kernel, limit), times, strict=True):
                start = self.clock()
                call()
                found.append(self.clock() - start)
        return median(times[0]), median(times[1])


def reading(bench: Bench) -> Callable[[], None]:
    """Return a loop that reads `COLD` bytes."""
    from llmopt.backends.tvm.kernels.script import (
        Register,
        T,
        load,
        number,
        parallel,
        serial,
        store,
    )
    from llmopt.backends.tvm.kernels.signature import Argument, function

    parts, steps, lanes, width = 1024, COLD // 1024 // 512, bench.features.lanes, 128

    def body(buffers: Any) -> None:
        with parallel(T.int64(parts)) as part:
            sums = [Register(lanes) for _ in range(0, width, lanes)]
            for one in sums:
                one.set(number(0, lanes))
            with serial(steps) as step:
                for i, one in enumerate(sums):
                    place = [part, step, i * lanes]
                    one.set(one.get() + load(buffers["data"], place, lanes))
            total = sums[0].get()
            for one in sums[1:]:
                total = total + one.get()
            store(buffers["sums"], [part, 0], total, lanes)

    arguments = [Argument("data", (parts, steps, width)), Argument("sums", (parts, 16))]
    run = bench.compiled("reading", function("reading", arguments, body))
    make = bench.tvm.runtime.tensor
    data = make(np.zeros((parts, steps, width), np.float32))
    sums = make(np.zeros((parts, 16), np.float32))
    return lambda: run(data, sums)


def multiplying(bench: Bench, threads: int, *, integers: bool) -> tuple[Callable[[], None], float]:
    """Return a loop of products in registers, and how many operations it does."""
    from llmopt.backends.tvm.kernels.linear.products import products
    from llmopt.backends.tvm.kernels.script import (
        Register,
        T,
        bind,
        integer,
        load,
        number,
        parallel,
        serial,
        store,
    )
    from llmopt.backends.tvm.kernels.signature import Argument, function

    unit = products(bench.features, largest=15, signed=False)
    lanes = unit.lanes if integers else bench.features.lanes
    dtype, chains = ("int32" if integers else "float32"), 12

    def body(buffers: Any) -> None:
        with parallel(T.int64(threads)) as part:
            sums = [Register(lanes, dtype) for _ in range(chains)]
            weights = [bind(load(buffers["data"], [i * lanes], lanes)) for i in range(2)]
            for one in sums:
                one.set(integer(0, lanes) if integers else number(0, lanes))
            with serial(LOOPS) as loop:
                for i, one in enumerate(sums):
                    if integers:  # different operands, lest a product be computed only once
                        w = bind(T.broadcast(T.Cast("int32", loop) * chains + i, lanes))
                        total = unit.start(one.get())
                        for j in range(STEPS):
                            x = load(buffers["data"], [j * lanes], lanes)
                            total = bind(unit.step(total, w, x))
                        one.set(unit.finish(one.get(), total))
                    else:
                        for _ in range(STEPS):
                            one.set(one.get() * weights[i % 2] + weights[1 - i % 2])
            for i, one in enumerate(sums):
                store(buffers["sums"], [part, i * lanes], one.get(), lanes)

    arguments = [Argument("data", (128,), dtype), Argument("sums", (threads, 192), dtype)]
    name = f"multiplying_{dtype}"
    run = bench.compiled(name, function(name, arguments, body))
    make = bench.tvm.runtime.tensor
    data, out = make(np.ones(128, dtype)), make(np.zeros((threads, 192), dtype))
    each = 8 if integers else 2
    return lambda: run(data, out), float(threads * LOOPS * STEPS * chains * lanes * each)


def calls(bench: Bench, wanted: Any, rows: int, copies_of: int) -> tuple[list[Any], Any, int]:
    """Return the operands of calls on different weights, the kernel, and bytes of a weight."""
    from llmopt.backends.tvm.kernels.linear.selection import choose

    chosen = choose(wanted)
    kernel = chosen.kernels[0]
    run = bench.compiled(kernel.name, kernel.function)
    rng, make = np.random.default_rng(0), bench.tvm.runtime.tensor
    arrays = {}
    for name, (shape, dtype) in chosen.packing.arrays.items():
        random = rng.integers(0, 15, shape, np.uint8) if dtype in {"uint8", "int8"} else None
        if dtype == "int32":
            random = rng.integers(0, 1 << 32, shape, np.uint32).view(np.int32)
        arrays[name] = rng.random(shape, np.float32) if random is None else random
        arrays[name] = arrays[name].astype(dtype, copy=False)
    size = sum(array.nbytes for array in arrays.values())
    x = make(rng.standard_normal((rows, wanted.k), np.float32))
    y = make(np.zeros((rows, wanted.columns), np.float32))
    sets = []
    for _ in range(max(1, copies_of // size)):
        named = {"x": x} | {name: make(array) for name, array in arrays.items()}
        sets.append([*(named[name] for name in kernel.inputs), y])
    return sets, run, size


def decode(bench: Bench, name: str, scheme: Any, limit: Callable[[], None]) -> Row:
    """Measure one row times a weight that lies in memory."""
    from llmopt.backends.tvm.kernels.linear.selection import Linear

    n, k = SHAPES[name]
    wanted = Linear(n, k, scheme, "one", (), bench.features)
    sets, run, size = calls(bench, wanted, 1, COLD)

    def kernel() -> None:
        for operands in sets:
            run(*operands)

    mine, its = bench.compare(kernel, limit)
    rate = size * len(sets) / mine / 1e9
    what = f"decode {scheme or 'fp32'} {name} {n}x{k}"
    return Row(what, mine / len(sets), rate, rate / (COLD / its / 1e9))


def prefill(bench: Bench, name: str, scheme: Any, limit: tuple[Callable[[], None], float]) -> Row:
    """Measure `ROWS` rows times a weight."""
    from llmopt.backends.tvm.kernels.linear.selection import Linear

    n, k = SHAPES[name]
    sets, run, _ = calls(bench, Linear(n, k, scheme, "many", (), bench.features), ROWS, 0)
    mine, its = bench.compare(lambda: run(*sets[0]), limit[0])
    rate = 2 * ROWS * n * k / mine / 1e9
    what = f"prefill {scheme or 'fp32'} {name} {ROWS}x{n}x{k}"
    ratio = with_torch(bench, (n, k), lambda: run(*sets[0])) if scheme is None else None
    return Row(what, mine, rate, rate / (limit[1] / its / 1e9), ratio)


def with_torch(bench: Bench, shape: tuple[int, int], kernel: Callable[[], None]) -> float:
    """Return how many times as fast as torch's float32 product a kernel is."""
    import torch

    torch.set_num_threads(int(os.environ["TVM_NUM_THREADS"]))
    n, k = shape
    x, weight = torch.ones(ROWS, k), torch.ones(n, k)

    def other() -> None:
        torch.nn.functional.linear(x, weight)

    with torch.inference_mode():
        mine, its = bench.compare(kernel, other)
    return its / mine


def measured(bench: Bench, threads: int, only: str) -> list[Row]:
    """Measure everything whose name contains ``only``, printing as it goes."""
    read = reading(bench)
    limits = {
        integers: multiplying(bench, threads, integers=integers) for integers in (True, False)
    }
    rows = []
    for name in SHAPES:
        for one in DECODE:
            if only in f"decode {one or 'fp32'} {name}":
                rows.append(decode(bench, name, one, read))
                show(rows[-1], "GB/s")
        for many in PREFILL if "head" not in name else ():
            if only in f"prefill {many or 'fp32'} {name}":
                rows.append(prefill(bench, name, many, limits[many is not None]))
                show(rows[-1], "GOP/s")
    return rows


def show(row: Row, unit: str) -> None:
    """Print one line."""
    beside = "" if row.torch is None else f"  {row.torch:.2f} x torch"
    figures = f"{row.seconds * 1e6:9.0f} us {row.rate:8.1f} {unit:5} {row.fraction:5.0%}"
    print(f"{row.what:52} {figures}{beside}", flush=True)


def main() -> None:
    """Parse the arguments, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="measure what contains this text")
    parser.add_argument(
        "--mcpu", default="host", help="a lesser processor, as LLVM names it: haswell"
    )
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    os.environ["TVM_NUM_THREADS"] = str(given.threads)
    os.environ["TVM_BIND_THREADS"] = "0"
    bench = Bench(given.threads, given.rounds, given.mcpu)
    rows = measured(bench, given.threads, given.only)
    if given.json:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
