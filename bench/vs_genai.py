"""Decode and prefill against onnxruntime-genai running its own builder's output.

    python bench/vs_genai.py [--rounds 20] [--json FILE] CASE ...

A case is ``smollm2:w4``, ``smollm2:fp32``, ``llama-1.2b:w4`` or ``llama-1.2b:fp32``. Both sides
run in one process with the same threads, in turns, on the same fresh random prompt of each
round; the order swaps from round to round. Where a session's weights come to lie in memory moves
its speed by several percent, so the rounds are spread over fresh processes that load the two in
turn first. Printed are medians and the median of the per-round ratios with a 95 % interval from
a bootstrap of processes and rounds within them, and the overhead of our runner over the same
session's bare ``run_with_iobinding`` on bound buffers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import peers
import shapes
from intervals import median_interval

PREFILL = 128
MAKERS: dict[str, Callable[[Path], None]] = {"smollm2": shapes.smollm2, "llama-1.2b": shapes.llama}


class Bare:
    """The runner's own session and steps: bound buffers and nothing else."""

    def __init__(self, ours: peers.Llmopt) -> None:
        import onnxruntime as ort

        from llmopt.runtime.engines.onnxruntime import OnnxRuntimeSession

        session = ours.runner.session
        assert isinstance(session, OnnxRuntimeSession)
        self.session = session._session  # noqa: SLF001 - the same weights in memory
        self.ort = ort

    def prefill_and_decode(self, prompt: peers.Tokens, decode: int) -> peers.Seconds:
        """Return seconds until the first token, and for each after it."""
        value = self.ort.OrtValue.ortvalue_from_numpy
        binding = self.session.io_binding()
        kept = []
        for port in self.session.get_inputs():
            if port.name.startswith("past_key_values"):
                _, heads, _, width = port.shape
                cache = value(np.zeros((1, heads, PREFILL + decode + 1, width), np.float32))
                kept.append(cache)
                binding.bind_ortvalue_input(port.name, cache)
                present = port.name.replace("past_key_values", "present")
                binding.bind_ortvalue_output(present, cache)
        vocabulary = self.session.get_outputs()[0].shape[2]
        logits = np.zeros((1, 1, vocabulary), np.float32)
        binding.bind_ortvalue_output("logits", value(logits))
        mask = np.ones((1, PREFILL + decode + 1), np.int64)

        def step(tokens: np.ndarray, start: int) -> None:
            end = start + tokens.shape[1]
            binding.bind_ortvalue_input("input_ids", value(tokens))
            binding.bind_ortvalue_input("attention_mask", value(mask[:, :end]))
            binding.bind_ortvalue_input("position_ids", value(np.arange(start, end)[None]))
            self.session.run_with_iobinding(binding)

        begin = time.perf_counter()
        step(prompt[None], 0)
        first = time.perf_counter()
        for index in range(decode):
            step(np.array([[index + 5]]), PREFILL + index)
        return first - begin, (time.perf_counter() - first) / decode


def prepare(case: str, work: Path) -> None:
    """Make the checkpoint and both models, where they are not there yet."""
    name, scheme = case.split(":")
    source, ours = work / name, work / f"{name}-{scheme}"
    theirs = work / f"{name}-{scheme}-genai"
    if not source.exists():
        MAKERS[name](source)
    if not ours.exists():
        peers.build_llmopt("cpu", scheme)(source, ours)
    if not (theirs / "genai_config.json").exists():
        peers.build_genai({"fp32": "fp32", "w4": "int4"}[scheme])(source, theirs)


def measure(case: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """Return the samples of one process: side to [rounds, (prefill, decode)] seconds."""
    name, scheme = case.split(":")
    work, threads, seed = chosen.work, chosen.threads, chosen.child
    folders = {"ours": work / f"{name}-{scheme}", "genai": work / f"{name}-{scheme}-genai"}
    makers: dict[str, type[peers.Llmopt | peers.Genai]] = {
        "ours": peers.Llmopt,
        "genai": peers.Genai,
    }
    loading = list(makers) if seed % 2 else list(makers)[::-1]
    sides: dict[str, peers.Decoder] = {
        side: makers[side](folders[side], threads) for side in loading
    }
    runner = sides["ours"]
    assert isinstance(runner, peers.Llmopt)
    sides["bare"] = Bare(runner)
    vocabulary = json.loads((work / name / "config.json").read_text())["vocab_size"]
    rng = np.random.default_rng(seed)
    samples: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for number in range(chosen.rounds + 2):
        prompt = rng.integers(10, vocabulary, PREFILL)
        order = list(sides) if number % 2 else list(sides)[::-1]
        for side in order:
            time.sleep(0.15)  # idle threads of the other side stop spinning
            found = sides[side].prefill_and_decode(prompt, chosen.decode)
            if number >= 2:  # two rounds of warm-up
                samples[side].append(found)
    return samples


def compare(case: str, work: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """Return the measurements of one case, from fresh processes."""
    prepare(case, work)
    found = []
    for seed in range(chosen.processes):
        command = [sys.executable, __file__, case, "--work", str(work), "--child", str(seed)]
        command += ["--rounds", str(chosen.rounds), "--threads", str(chosen.threads)]
        command += ["--decode", str(chosen.decode)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found.append(json.loads(done.stdout))
    sides = {side: np.array([each[side] for each in found]) for side in found[0]}
    return report(case, sides)


def report(case: str, samples: dict[str, np.ndarray]) -> dict[str, Any]:
    """Print and return medians, ratios and their intervals."""
    result: dict[str, Any] = {"case": case, "samples": {k: v.tolist() for k, v in samples.items()}}
    for index, metric in enumerate(("prefill", "decode")):
        tokens = PREFILL if metric == "prefill" else 1
        rates = {side: tokens / float(np.median(v[..., index])) for side, v in samples.items()}
        ratio = samples["genai"][..., index] / samples["ours"][..., index]
        low, high = median_interval(ratio)
        overhead = samples["ours"][..., index] / samples["bare"][..., index] - 1
        cost = median_interval(overhead)
        result[metric] = {"tokens_per_s": rates, "ratio": float(np.median(ratio))}
        result[metric] |= {"ratio_95": [low, high], "overhead_95": list(cost)}
        print(
            f"{case:18} {metric:8} ours {rates['ours']:8.1f}  genai {rates['genai']:8.1f} tok/s"
            f"  ratio {np.median(ratio):.3f} [{low:.3f}, {high:.3f}]"
            f"  overhead {np.median(overhead):+.1%} [{cost[0]:+.1%}, {cost[1]:+.1%}]"
        )
    return result


def main() -> None:
    """Measure the cases that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("cases", nargs="+", metavar="CASE")
    parser.add_argument("--rounds", type=int, default=6, help="of each process")
    parser.add_argument("--processes", type=int, default=6)
    parser.add_argument("--decode", type=int, default=64, help="tokens decoded in a round")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", type=Path, help="keeps checkpoints and models between runs")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    if chosen.child is not None:
        print(json.dumps(measure(chosen.cases[0], chosen)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        work = chosen.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        results = [compare(case, work, chosen) for case in chosen.cases]
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
