"""What this machine can do at most: bytes read and numbers multiplied in a second.

Reading is measured over memory several times as large as the last cache, each thread its own
part. Multiplying is the fastest product of large matrices that can be had here, of numpy's or of
ONNX Runtime's: a ceiling that somebody's code reaches, not one of a data sheet. The best of
several tries counts, because whatever else runs can only lower it.
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

_CACHES: Final = 4  # times the last cache: little of it can be left from the try before
_LEAST: Final = 1 << 29
_TRIES: Final = 8
_SIZE: Final = 2048
"""Rows, columns and depth of the products: large enough for every engine's best."""


@dataclass(frozen=True)
class Ceilings:
    """The most that this machine does in a second.

    Args:
        threads: How many did it.
        read_bytes_per_s: Memory read.
        macs_per_s: Multiply-adds by element type: ``"float32"``, and ``"int8"`` where known.
        by: What reached them.
        cache_bytes: The last cache; 0 where the system does not say.
    """

    threads: int
    read_bytes_per_s: float
    macs_per_s: Mapping[str, float]
    by: Mapping[str, str] = field(default_factory=dict)
    cache_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)


def measure_ceilings(threads: int, dtypes: frozenset[str] = frozenset({"float32"})) -> Ceilings:
    """Return what this machine can do at most with so many threads.

    Args:
        threads: How many.
        dtypes: What is multiplied; of others than ``"float32"`` and ``"int8"`` nothing is known.
    """
    best, by = {}, {}
    for dtype in sorted(dtypes):
        found = dict(_multiplying(dtype, threads))
        if found:
            by[dtype] = max(found, key=lambda name: found[name])
            best[dtype] = found[by[dtype]]
    return Ceilings(threads, read_bytes_per_s(threads), best, by, cache_bytes())


def read_bytes_per_s(threads: int) -> float:
    """Return how fast memory is read that is far larger than the caches."""
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
    """Return how many bytes are read: several times the last cache, a quarter of memory at most."""
    wanted = max(_LEAST, _CACHES * cache_bytes())
    return min([wanted, *(limit // 4 for limit in _memory_limits())])


def _memory_limits(root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """Yield how much memory there is, and how much this process may have of it."""
    whole = this_machine().memory_bytes
    if whole is not None:
        yield whole
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # the file may be missing, or say "max"
            yield int((root / name).read_text(encoding="ascii"))


def cache_bytes(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Return the size of the largest cache; 0 where the system does not say.

    Args:
        root: Where the system tells of the first processor's caches.
    """
    sizes = [0]
    for path in root.glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            text = path.read_text(encoding="ascii").strip()
            unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
            sizes.append(int(text.rstrip("KMG")) * unit)
    return max(sizes)


def _multiplying(dtype: str, threads: int) -> Iterator[tuple[str, float]]:
    """Yield what can multiply here, and its multiply-adds in a second."""
    rng = np.random.default_rng(0)
    if dtype == "float32":
        x, w = (rng.standard_normal((_SIZE, _SIZE), np.float32) for _ in range(2))
        yield "numpy", _SIZE**3 / _best(lambda: np.matmul(x, w))
        yield from _by_onnxruntime("MatMul", x, w, threads)
    elif dtype == "int8":
        # Codes as they are quantized: both operands in eight bits, the one without a sign.
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
    """Return the shortest of several times, the first not counted."""
    run()
    times = []
    for _ in range(_TRIES):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
