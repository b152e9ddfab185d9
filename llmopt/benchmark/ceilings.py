"""Ceilings of this machine: peak memory bandwidth and peak multiply-adds per second.

Bandwidth is measured on memory several times the size of the last-level cache, split among the
threads. Compute is the fastest large matrix product available here, numpy's or ONNX Runtime's: a
rate that real code reaches, not one from a data sheet. The best of several tries counts, because
other load can only lower the rate.
Source for the size of the memory: J. D. McCalpin, STREAM, https://www.cs.virginia.edu/stream/ref.html.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np

from llmopt.benchmark.machine import this_machine
from llmopt.benchmark.tiny_model import product_model

_CACHES: Final = 4  # times the last-level cache, so that little survives from the try before
_MIN_BYTES: Final = 1 << 29
_TRIES: Final = 8
_SIZE: Final = 2048
"""Rows, columns and depth of the products: large enough for every engine's peak rate."""


@dataclass(frozen=True)
class Ceilings:
    """The peak rates of this machine.

    Args:
        threads: Number of threads measured with.
        read_bytes_per_s: Memory bandwidth of reads.
        macs_per_s: Multiply-adds by element type: ``"float32"``, and ``"int8"`` if measured.
        by: Library that reached each rate.
        cache_bytes: Size of the last-level cache; 0 if unknown.
    """

    threads: int
    read_bytes_per_s: float
    macs_per_s: Mapping[str, float]
    by: Mapping[str, str] = field(default_factory=dict)
    cache_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the ceilings for JSON."""
        return asdict(self)


def measure_ceilings(threads: int, dtypes: frozenset[str] = frozenset({"float32"})) -> Ceilings:
    """Return the peak rates of this machine with a number of threads.

    Args:
        threads: Number of threads.
        dtypes: Element types to multiply; others than ``"float32"`` and ``"int8"`` are ignored.
    """
    best, by = {}, {}
    for dtype in sorted(dtypes):
        rates = dict(_mac_rates(dtype, threads))
        if rates:
            by[dtype] = max(rates, key=lambda name: rates[name])
            best[dtype] = rates[by[dtype]]
    return Ceilings(threads, read_bytes_per_s(threads), best, by, cache_bytes())


def read_bytes_per_s(threads: int) -> float:
    """Return the read bandwidth of memory far larger than the caches."""
    total = memory_to_read()
    parts = [np.ones(total // threads // 4, np.float32) for _ in range(threads)]

    def read() -> None:
        workers = [threading.Thread(target=np.max, args=(part,)) for part in parts]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    return sum(part.nbytes for part in parts) / _best(read)


def memory_to_read() -> int:
    """Return the bytes to read: several times the last-level cache, at most a quarter of memory."""
    target = max(_MIN_BYTES, _CACHES * cache_bytes())
    return min([target, *(limit // 4 for limit in _memory_limits())])


def _memory_limits(root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """Yield the machine's memory, and the limits of this process's control groups."""
    total = this_machine().memory_bytes
    if total is not None:
        yield total
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # the file may be missing, or say "max"
            yield int((root / name).read_text(encoding="ascii"))


def cache_bytes(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Return the size of the largest cache; 0 if the system does not report it.

    Args:
        root: Directory in sysfs that describes the caches of the first core.
    """
    sizes = [0]
    for path in root.glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            text = path.read_text(encoding="ascii").strip()
            unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
            sizes.append(int(text.rstrip("KMG")) * unit)
    return max(sizes)


def _mac_rates(dtype: str, threads: int) -> Iterator[tuple[str, float]]:
    """Yield each library that multiplies this type here, and its multiply-adds per second."""
    rng = np.random.default_rng(0)
    if dtype == "float32":
        x, w = (rng.standard_normal((_SIZE, _SIZE), np.float32) for _ in range(2))
        yield "numpy", _SIZE**3 / _best(lambda: np.matmul(x, w))
        yield from _by_onnxruntime("MatMul", x, w, threads)
    elif dtype == "int8":
        # As quantized products have them: unsigned activations, signed weights.
        codes = rng.integers(0, 255, (_SIZE, _SIZE)).astype(np.uint8)
        weight = rng.integers(-127, 127, (_SIZE, _SIZE)).astype(np.int8)
        yield from _by_onnxruntime("MatMulInteger", codes, weight, threads)


def _by_onnxruntime(op: str, x: Any, weight: Any, threads: int) -> Iterator[tuple[str, float]]:
    if find_spec("onnxruntime") is None:
        return
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    y = "float32" if op == "MatMul" else "int32"
    model = product_model(op, weight, (x.dtype.name, x.shape), y)
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    yield "onnxruntime", _SIZE**3 / _best(lambda: session.run(None, {"x": x}))


def _best(run: Callable[[], object]) -> float:
    """Return the shortest of several durations, after one warm-up."""
    run()
    times = []
    for _ in range(_TRIES):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
