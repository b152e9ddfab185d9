"""What 4 bits cost: our artifacts and llama.cpp's Q4_0 against float32, on the same tokens.

    python bench/vs_peers.py --install --work DIR
    python bench/quality_vs_llamacpp.py --work DIR [--windows 32] [--side T:S]... [--json FILE] CASE

A case is ``smollm2``, on English text that comes with Python and with installed packages, or
``llama-1.2b``, random, on random tokens (use ``--windows 2``). A side is one of ours, a target and
a scheme: ``tvm-cpu:w4``. Ours are compiled anew, without proof, and timed; llama.cpp runs in the
environment that ``vs_peers.py`` made, on the file that it made. Text is cut into windows of 256
tokens, of which some are drawn, seeded; every side sees each window alone. Standard errors take
positions as independent.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import metadata
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Final

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).parent))
import vs_peers

Tokens = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]
WINDOW: Final = 256
PEER: Final = "llama.cpp Q4_0"
SIDES: Final = ("tvm-cpu:w4", "onnxruntime-cpu:w4")
PACKAGES: Final = ("h11", "mpmath", "onnx", "pluggy", "pytest", "sympy", "tokenizers", "torch")
"""Whose descriptions are read, after the chapters of Python's own help."""


def texts() -> list[str]:
    """Return what is read: Python's help on its language, and what packages say of themselves."""
    described = [metadata(name)["Description"] or "" for name in PACKAGES]
    return [*(topics[name] for name in sorted(topics)), *described]


def windows(source: Path, count: int) -> Tokens:
    """Return [count, 256] tokens: of text where the model has learned any, else at random."""
    rng = np.random.default_rng(0)
    config = json.loads((source / "config.json").read_text())
    if source.name != "smollm2":
        return rng.integers(0, config["vocab_size"], (count, WINDOW))
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokens = np.array([i for text in texts() for i in tokenizer.encode(text).ids], np.int64)
    whole = tokens[: len(tokens) // WINDOW * WINDOW].reshape(-1, WINDOW)
    return whole[np.sort(rng.permutation(len(whole))[:count])]


def peer_logits(model: Path, tokens: Path, place: Path) -> None:
    """Write llama.cpp's logits [W, S, V] of tokens [W, S]: in the environment that has it."""
    import llama_cpp

    rows = np.load(tokens)
    llm = llama_cpp.Llama(
        str(model), n_ctx=2 * WINDOW, n_batch=WINDOW, logits_all=True, verbose=False
    )
    shape = (*rows.shape, llm.n_vocab())
    out = np.lib.format.open_memmap(place, "w+", np.float32, shape)
    for index, row in enumerate(rows):
        llm.reset()
        llm.eval(row.tolist())
        out[index] = llm.scores[: len(row)]
    out.flush()


def foreign(work: Path, case: str, rows: Tokens, scratch: Path) -> Logits:
    """Return llama.cpp's logits, mapped from a file that a process of its own wrote."""
    side = vs_peers.CASES[case][1][PEER]
    given, place = scratch / "tokens.npy", scratch / "logits.npy"
    np.save(given, rows)
    command = [vs_peers.interpreter(side, work), __file__, case, "--work", str(work)]
    model = work / f"{case}-{side.file}"
    subprocess.run([*command, "--child", str(model), str(given), str(place)], check=True)
    mapped: Logits = np.load(place, mmap_mode="r")
    return mapped


def compiled(source: Path, side: str, place: Path) -> tuple[float, int]:
    """Compile one of ours; return seconds and the bytes of its largest file, the weights."""
    target, scheme = side.split(":", 1)
    command = [sys.executable, "-m", "llmopt", "compile", str(source), "--target", target]
    command += ["--quantize", scheme, "--verify", "off", "-o", str(place), "--json"]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    return seconds, max(path.stat().st_size for path in place.iterdir())


def reference(source: Path, rows: Sequence[Tokens]) -> Iterator[Logits]:
    """Yield the logits [S, V] of the source in float32."""
    from llmopt.evaluation import source_results
    from llmopt.frontend.base import SourceOptions
    from llmopt.frontend.source import open_source

    opened = open_source(str(source), SourceOptions())
    for outputs in source_results(opened.program.signature, opened.reference)(rows):
        yield outputs["logits"][0]


def compare(case: str, chosen: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """Return one row for each side: what it weighs and what it lost."""
    import llmopt
    from llmopt.quantization.evaluation import QualityMeter

    names = argparse.Namespace(work=chosen.work, side=[PEER], avx2=False)
    ready = vs_peers.prepare(case, names)
    source = chosen.work / case
    rows = windows(source, chosen.windows)
    sides = [side for side in chosen.side or SIDES if side]
    weighed: dict[str, tuple[float | None, int]] = {
        side: compiled(source, side, scratch / side) for side in sides
    }
    runners = {side: llmopt.load(scratch / side) for side in sides}
    theirs = foreign(chosen.work, case, rows, scratch) if ready else None
    meters = {name: QualityMeter() for name in (*sides, *ready)}
    for index, wanted in enumerate(reference(source, list(rows))):
        row = rows[index]
        found = {side: runner.logits(row[None])[0] for side, runner in runners.items()}
        if theirs is not None:
            found[PEER] = theirs[index]
        for name, logits in found.items():
            meters[name].add(wanted[:-1], logits[:-1], row[1:])
    if ready:
        file = chosen.work / f"{case}-{ready[PEER].file}"
        weighed[PEER] = (None, file.stat().st_size)
    return [row_of(name, meter, *weighed[name]) for name, meter in meters.items()]


def row_of(name: str, meter: Any, seconds: float | None, size_bytes: int) -> dict[str, Any]:
    """Return what was measured of a side, as the report has it."""
    found: dict[str, Any] = json.loads(meter.result().to_json())
    spent = None if seconds is None else round(seconds, 1)
    return {"side": name, "compile_s": spent, "weights_bytes": size_bytes} | found


def report(case: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table."""
    samples = rows[0]["samples"]
    reference = rows[0]["perplexity_reference"]["value"]
    print(f"{case}: {samples} positions, perplexity of the source {reference:.2f}")
    print("| side | weights MB | compile s | KL mean | KL p99 | top-1 % | perplexity |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        mean, tail = row["kl_mean"], row["kl_p99"]
        cells = [
            row["side"],
            f"{row['weights_bytes'] / 1e6:.1f}",
            "-" if row["compile_s"] is None else f"{row['compile_s']:.0f}",
            f"{mean['value']:.4g} ± {mean['error']:.1g}",
            "-" if tail is None else f"{tail['value']:.3g}",
            f"{100 * row['top1']['value']:.1f}",
            f"{row['perplexity']['value']:.2f}",
        ]
        print(f"| {' | '.join(cells)} |")


def arguments() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("case", choices=["smollm2", "llama-1.2b"], metavar="CASE")
    parser.add_argument("--work", type=Path, required=True, help="the folder of vs_peers.py")
    parser.add_argument("--windows", type=int, default=32, help="of 256 tokens each")
    parser.add_argument("--side", action="append", help=f"ours; {' and '.join(SIDES)} if not given")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=3, type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure a case."""
    chosen = arguments()
    if chosen.child:
        peer_logits(*chosen.child)
        return
    with tempfile.TemporaryDirectory(dir=chosen.work) as scratch:
        rows = compare(chosen.case, chosen, Path(scratch))
    report(chosen.case, rows)
    if chosen.json is not None:
        chosen.json.write_text(json.dumps({chosen.case: rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
