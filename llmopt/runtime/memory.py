"""How much memory this process took."""

from __future__ import annotations

from pathlib import Path


def peak_bytes(status: Path = Path("/proc/self/status")) -> int | None:
    """Return the most memory this process had resident at once; None where nothing says so.

    Pages of mapped files count. Linux alone says so, and counts from this program's start, where
    ``getrusage`` would go on from the program that started it.
    """
    try:
        lines = status.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    peaks = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(peaks[0]) * 1024 if peaks else None
