"""The machine that a measurement was taken on."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from llmopt.runtime.cores import usable_cores

_PACKAGES: Final = ("llmopt", "numpy", "onnxruntime", "tokenizers")
_X86: Final = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16")
_AMX: Final = ("amx_tile", "amx_int8", "amx_bf16")
_ARM: Final = ("asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2")
_FEATURES: Final = frozenset({*_X86, *_AMX, *_ARM, "f16c", "fma"})
"""CPU features that select kernels."""


@dataclass(frozen=True)
class MachineFingerprint:
    """The facts that must match for two latencies to be comparable.

    Args:
        processor: Name of the CPU, as the system reports it.
        architecture: ``"x86_64"``, ``"aarch64"``.
        cores: Cores that this process may use.
        features: CPU features that select kernels.
        memory_bytes: Installed memory; None if unknown.
        system: Name and release of the kernel.
        versions: Versions of Python and of the packages that run models.
    """

    processor: str
    architecture: str
    cores: int
    features: tuple[str, ...]
    memory_bytes: int | None
    system: str
    versions: Mapping[str, str]

    @property
    def fingerprint(self) -> str:
        """A short digest of all facts."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def this_machine(proc: Path = Path("/proc")) -> MachineFingerprint:
    """Return the machine that this process runs on.

    Args:
        proc: Mount point of procfs.
    """
    facts = _cpu_facts(proc / "cpuinfo")
    flags = (facts.get("flags") or facts.get("Features") or "").split()
    return MachineFingerprint(
        processor=facts.get("model name") or platform.processor() or "unknown",
        architecture=platform.machine(),
        cores=usable_cores(),
        features=tuple(sorted(_FEATURES.intersection(flags))),
        memory_bytes=_memory_bytes(),
        system=f"{platform.system()} {platform.release()}",
        versions={"python": platform.python_version()} | _versions(),
    )


def _cpu_facts(path: Path) -> dict[str, str]:
    """Return the fields of the first core."""
    try:
        lines = path.read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None


def _versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
