"""What compiling costs: wall time and peak memory of a fresh process, verification included.

    python bench/cost.py [--json FILE] [SmolLM2 and the 1.2 B shape are made in a temporary folder]

The peak is the resident set of the compiling process, mapped pages included, as the kernel
accounts it (``ru_maxrss`` of the finished child).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import shapes

BOUNDS = {
    "smollm2 w4": (60.0, 1600.0),
    "llama-1.2b w4": (150.0, 4500.0),
    "llama-1.2b w4, unverified": (150.0, 2000.0),
}


def measure(source: Path, *arguments: str) -> tuple[float, float]:
    """Return seconds and peak megabytes of one ``llmopt compile``."""
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        command = [sys.executable, "-m", "llmopt", "compile", str(source), "--target", "cpu"]
        command += ["--quantize", "w4", "-o", f"{folder}/out", *arguments]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        spent = time.perf_counter() - start
        if status:
            sys.exit(f"{' '.join(command)} failed with status {status}")
        return spent, usage.ru_maxrss / 1024


def main() -> None:
    """Measure all three and print them beside their bounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--large", type=Path, help="a 1.2 B folder made by shapes.py")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        large = chosen.large or Path(folder, "llama-1.2b")
        if chosen.large is None:  # not in this process: a child's peak starts at its parent's
            maker = [sys.executable, str(Path(shapes.__file__)), "llama-1.2b", str(large)]
            subprocess.run(maker, check=True, stdout=subprocess.DEVNULL)
        found = {
            "smollm2 w4": measure(shapes.smollm2_gguf()),
            "llama-1.2b w4": measure(large),
            "llama-1.2b w4, unverified": measure(large, "--verify", "off"),
        }
    rows: dict[str, Any] = {}
    for name, (spent, peak) in found.items():
        allowed = BOUNDS[name]
        rows[name] = {"seconds": round(spent, 1), "peak_mb": round(peak), "allowed": allowed}
        print(f"{name:28} {spent:7.1f} s of {allowed[0]:.0f}  {peak:6.0f} MB of {allowed[1]:.0f}")
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
