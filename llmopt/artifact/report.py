"""``build-report.json``: times, memory and the machine; the one file without a digest."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path

from llmopt.artifact.manifest import REPORT


def write_report(folder: Path, stages: Mapping[str, float], peak_mb: float) -> None:
    """Write the time of each stage, the peak resident memory and the machine."""
    report = {
        "stages_s": {name: round(spent, 3) for name, spent in stages.items()},
        "peak_memory_mb": round(peak_mb, 1),
        "machine": {
            "platform": platform.platform(),
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        },
    }
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
