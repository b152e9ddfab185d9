"""What ``run.sh`` starts: conformance and speed of the GPU targets, into one JSON and one table.

    python bench/gpu/suite.py --out DIR [--rehearse]

Each side of the speed comparison runs in fresh processes, in turns; figures are medians.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import conformance
from families import MODELS
from gpu import sides

GPU: Final = ("onnxruntime-cuda", "tvm-cuda", "tensorrt-rtx", "tensorrt")
SPEED: Final = ("fp16", "w4")
BLOCKS: Final = 3


def device() -> dict[str, str]:
    """Return the name, compute capability, driver and memory of the first GPU; empty if none."""
    fields = ("name", "compute_cap", "driver_version", "memory.total")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return {}
    first = done.stdout.splitlines()[:1] if done.returncode == 0 else []
    return dict(zip(fields, first[0].split(", "), strict=True)) if first else {}


def gpu_targets(capability: str) -> list[str]:
    """Return the targets for a GPU, with the option that names this one where they take it.

    >>> [t for t in gpu_targets("8.9") if "rtx" in t]
    ['tensorrt-rtx{sm=89}']
    """
    number = capability.replace(".", "")
    known = conformance.targets()
    options = {"tensorrt-rtx": f"sm={number}", "tvm-cuda": f"arch=sm_{number}"}
    named = {target: f"{target}{{{option}}}" for target, option in options.items()}
    return [named.get(target, target) for target in GPU if target in known]


def usable(targets: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the targets that build and run here, and what each of the others lacks."""
    lacking = {target: conformance.missing(target) for target in targets}
    return [t for t, why in lacking.items() if not why], {t: w for t, w in lacking.items() if w}


def speed(targets: Sequence[str], models: Sequence[str], kind: str, folder: Path) -> Iterator[Any]:
    """Yield a row for each model, side and workload: the median over fresh processes."""
    for model in models:
        source = folder / model
        try:
            sides.write(model, source)
        except (FileNotFoundError, SystemExit) as reason:
            print(f"{model}: left out: {reason}", file=sys.stderr)
            continue
        ready = [*sides.TORCH, *built(targets, source, folder)]
        found: dict[str, list[dict[str, float]]] = {}
        for block in range(BLOCKS if kind == "cuda" else 1):
            for side in ready[:: 1 if block % 2 else -1]:
                if (sample := fresh(side, source, kind)) is not None:
                    found.setdefault(side, []).append(sample)
        for side in (side for side in ready if side in found):
            for workload in found[side][0]:
                rate = float(np.median([sample[workload] for sample in found[side]]))
                row = {"model": model, "side": Path(side).name, "workload": workload}
                yield {**row, "tokens_per_s": round(rate, 1)}


def built(targets: Sequence[str], source: Path, folder: Path) -> Iterator[str]:
    """Yield the artifact of each target and scheme, compiled with its proof."""
    import llmopt
    from llmopt.backends import find_backend

    for target in targets:
        known = find_backend(target).schemes
        for scheme in (*(s for s in SPEED if s in known), *((None,) * known.isdisjoint(SPEED))):
            name = f"{source.name}.{re.sub('[{}=]', '-', target)}.{scheme or 'fp32'}"
            try:
                llmopt.compile(source, target=target, quantize=scheme, output=folder / name)
            except llmopt.LlmoptError as reason:
                print(f"{name}: left out: {reason}", file=sys.stderr)
                continue
            yield str(folder / name)


def fresh(side: str, source: Path, kind: str) -> dict[str, float] | None:
    """Return tokens per second by workload, measured in a new process; None if it failed."""
    script = Path(__file__).with_name("sides.py")
    command = [sys.executable, str(script), side, str(source), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or ["no message"]
        print(f"{Path(side).name}: failed: {said[0]}", file=sys.stderr)
        return None
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(result: dict[str, Any]) -> str:
    """Return what was measured as Markdown."""
    gpu = result["device"].get("name", "no GPU")
    lines = [f"# {gpu}", "", "| target | model | scheme | worst error | allowed |"]
    lines += ["| --- | --- | --- | ---: | ---: |"]
    for row in result["conformance"]:
        worst = "failed" if "failed" in row else f"{max(row['errors'].values()):.1e}"
        cells = [row["target"], row["model"], row["scheme"], worst, f"{row.get('tolerance', '')}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| model | side | workload | tokens/s |", "| --- | --- | --- | ---: |"]
    for row in result["speed"]:
        cells = [row["model"], row["side"], row["workload"], f"{row['tokens_per_s']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"- {target}: left out: {why}" for target, why in result["missing"].items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    chosen = parser.parse_args()
    gpu = device()
    if not gpu and not chosen.rehearse:
        sys.exit("no NVIDIA GPU: nvidia-smi lists none; --rehearse shows what would be done")
    if chosen.rehearse:
        asked, models, kind = ["onnxruntime-cpu"], ["llama", "bert"], "cpu"
        measured = ["tiny-llama", "tiny-bert"]
    else:
        asked, models, kind = gpu_targets(gpu["compute_cap"]), list(MODELS), "cuda"
        measured = list(sides.MODELS)
    targets, lacking = usable(asked)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        proven = list(conformance.rows(targets, models, (), folder))
        speeds = list(speed(targets, measured, kind, folder))
    result = {"schema": 1, "device": gpu, "missing": lacking}
    result |= {"conformance": proven, "speed": speeds}
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    (chosen.out / "table.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
