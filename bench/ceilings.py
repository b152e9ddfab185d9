"""The ceilings of ``llmopt bench`` beside other measures of the same machine.

    python bench/ceilings.py [--threads N] [--rounds 12] [--json FILE]

Reading: ``stream.c``, compiled here with ``cc``. Products: torch's, ``mm`` in float32 and
``_int_mm`` in int8. The two sides run in turns, so that what else the machine does falls on both;
compared are the best of all rounds. ``MatMul`` of numpy or of ONNX Runtime, whichever is faster, is
our ceiling in float32, ONNX Runtime's ``MatMulInteger`` in int8. Exits with 1 where one of ours is
more than a tenth below the other. Shown too, and not judged: torch's quantized linear layer on
oneDNN, which gives 8 bits where the others give 32, and can be faster than any product of ours.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

ALLOWED: Final = 0.10
SIZE: Final = 2048
SLOW_S: Final = 2.0
"""Where torch has no kernel for a product, it takes so long once that trying again is no use."""
SHOWN: Final = "int8 layer"
STREAM: Final = Path(__file__).with_name("stream.c")
FLAGS: Final = ("-O3", "-march=native", "-ffast-math", "-pthread")


def compiled(folder: Path) -> Path:
    """Return ``stream.c`` as a program."""
    program = folder / "stream"
    subprocess.run(
        [os.environ.get("CC", "cc"), *FLAGS, str(STREAM), "-o", str(program)], check=True
    )
    return program


def stream_bytes_per_s(program: Path, threads: int, megabytes: int) -> float:
    """Return what the C program reads in a second."""
    command = [str(program), str(threads), str(megabytes), "8"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def torch_macs_per_s(threads: int) -> dict[str, float]:
    """Return torch's multiply-adds in a second, by element type."""
    import torch

    torch.set_num_threads(threads)
    x, w = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)
    codes, weight = (torch.randint(-127, 127, (SIZE, SIZE), dtype=torch.int8) for _ in range(2))
    return {
        "float32": _rate(lambda: torch.mm(x, w)),
        "int8": _rate(lambda: torch._int_mm(codes, weight)),  # noqa: SLF001 - it has no other name
        SHOWN: _rate(_quantized_linear(x, w)),
    }


def _quantized_linear(x: Any, w: Any) -> Callable[[], Any]:
    """Return torch's product of 8 bits by 8 bits, results in 8 bits, by oneDNN."""
    import torch

    torch.backends.quantized.engine = "onednn"
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # these tensors are to go; the layer's kernel is what counts
        codes = torch.quantize_per_tensor(x, 0.05, 128, torch.quint8)
        weight = torch.quantize_per_tensor(w, 0.05, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(weight, None)
    return lambda: torch.ops.quantized.linear(codes, packed, 1.0, 0)


def _rate(run: Callable[[], Any], tries: int = 8) -> float:
    run()
    best = float("inf")
    for _ in range(tries):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
        if best > SLOW_S:
            break
    return SIZE**3 / best


def compare(threads: int, rounds: int) -> list[dict[str, Any]]:
    """Return ours and theirs for each ceiling, best of rounds in turns."""
    from llmopt.benchmark import ceilings

    ours: dict[str, float] = {}
    theirs: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        program = compiled(Path(folder))
        for _ in range(rounds):
            megabytes = ceilings.memory_to_read() // 10**6
            found = ceilings.measure_ceilings(threads, frozenset({"float32", "int8"}))
            other = torch_macs_per_s(threads)
            other["read"] = stream_bytes_per_s(program, threads, megabytes)
            mine = {**found.macs_per_s, "read": found.read_bytes_per_s}
            mine[SHOWN] = mine["int8"]
            for name, rate in mine.items():
                ours[name] = max(rate, ours.get(name, 0.0))
                theirs[name] = max(other[name], theirs.get(name, 0.0))
    return [
        {"ceiling": name, "ours": ours[name], "theirs": theirs[name]}
        | {"ratio": ours[name] / theirs[name]}
        for name in ours
    ]


def main() -> None:
    """Measure both sides and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    rows = compare(chosen.threads, chosen.rounds)
    for row in rows:
        print(
            f"{row['ceiling']:10} ours {row['ours'] / 1e9:8.1f}  theirs {row['theirs'] / 1e9:8.1f}"
            f" G/s  ratio {row['ratio']:.3f}"
        )
    if chosen.json is not None:
        chosen.json.write_text(json.dumps({"threads": chosen.threads, "rows": rows}, indent=1))
    if any(row["ratio"] < 1 - ALLOWED for row in rows if row["ceiling"] != SHOWN):
        sys.exit("a ceiling of ours lies more than 10 % below the other measure")


if __name__ == "__main__":
    main()
