"""What runs on the arm64 machine: artifacts on given inputs, their outputs into files.

    python guest.py --versions
    python guest.py JOBS.json
    python guest.py --selftest ARTIFACT...

JOBS.json is a list of ``{"artifact": …, "feeds": NPZ, "output": NPZ, "prefill": n}``. With a
prefill the artifact is a decoder: its logits are those of one step of n tokens and one step for
each after it. Without, it runs once. A self-test prints its JSON, one after the other. Only what a
device has is imported.
"""

from __future__ import annotations

import importlib
import json
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np


def versions() -> dict[str, str]:
    """Return what this machine is, after importing what runs artifacts."""
    names = ("numpy", "onnxruntime", "tokenizers", "tvm_ffi")
    found = {name: str(importlib.import_module(name).__version__) for name in names}
    return found | {"machine": platform.machine(), "python": platform.python_version()}


def run(job: dict[str, Any]) -> None:
    """Run one artifact."""
    from llmopt.runtime import load

    runner = load(job["artifact"], threads=1)
    with np.load(job["feeds"]) as file:
        feeds = dict(file)
    if job["prefill"]:
        ids, mask = feeds["input_ids"], feeds["attention_mask"]
        found = {"logits": runner.logits(ids, prefill=job["prefill"], mask=mask)}
    else:
        found = runner.run(feeds)
    np.savez(job["output"], **found)  # type: ignore[arg-type]  # numpy's stub takes no mapping


def selftest(artifacts: list[str]) -> None:
    """Let artifacts test themselves, as their users do."""
    from llmopt.runtime.__main__ import main as runtime

    codes = [runtime([each, "--selftest", "--json", "--threads", "1"]) for each in artifacts]
    if any(codes):
        sys.exit(f"exit codes {codes}")


def main() -> None:
    """Do what the arguments say."""
    if sys.argv[1:2] == ["--selftest"]:
        selftest(sys.argv[2:])
        return
    if sys.argv[1:] == ["--versions"]:
        sys.stdout.write(json.dumps(versions()))
        return
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(job)
    sys.stdout.write(json.dumps(versions()))


if __name__ == "__main__":
    main()
