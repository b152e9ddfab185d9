"""Which variant of a bundle suits this machine, and why the others do not."""

from __future__ import annotations

import ctypes
import logging
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from llmopt.bundle.contents import Contents, Needs, Runtime, Variant
from llmopt.bundle.needs import numbers
from llmopt.errors import NoVariantError
from llmopt.runtime.cpu_features import processor_features

logger = logging.getLogger("llmopt")
_MACHINES: Final = {"arm64": "aarch64", "AMD64": "x86_64"}
_MODULES: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "apache-tvm": ("tvm", ("apache-tvm",)),
    "onnx": ("onnx", ("onnx",)),
    "onnxruntime": ("onnxruntime", ("onnxruntime", "onnxruntime-gpu")),
    "onnxruntime-ep-openvino": ("onnxruntime_ep_openvino", ("onnxruntime-ep-openvino",)),
    "onnxruntime-gpu": ("", ("onnxruntime-gpu",)),  # its module is onnxruntime's too
    "tensorrt": ("tensorrt", ("tensorrt",)),
    "tensorrt-rtx-cu13-bindings": ("tensorrt_rtx", ("tensorrt-rtx-cu13-bindings",)),
}
"""By a runtime's package: the module that it is imported by, and the packages that bring it."""


@dataclass(frozen=True)
class Machine:
    """What this machine has.

    Args:
        architecture: Architecture in Linux's name: ``"x86_64"``, ``"aarch64"``.
        cpu_features: CPU features in Linux's names.
        memory_bytes: All that a process may use; None where nobody says.
        packages: Versions of the runtimes that are installed; empty where one has none.
        cuda: Whether there is a driver for NVIDIA's GPUs.
    """

    architecture: str
    cpu_features: frozenset[str] = frozenset()
    memory_bytes: int | None = None
    packages: Mapping[str, str] = field(default_factory=dict)
    cuda: bool = False

    @classmethod
    def here(cls) -> Machine:
        """Return this one."""
        machine = platform.machine()
        installed = {package: _installed(package) for package in _MODULES}
        return cls(
            architecture=_MACHINES.get(machine, machine),
            cpu_features=processor_features(),
            memory_bytes=usable_memory(),
            packages={name: found for name, found in installed.items() if found is not None},
            cuda=_has_cuda(),
        )


def choose(contents: Contents, machine: Machine, path: Path) -> Variant:
    """Return the variant that runs best here.

    One that was made for this processor goes before one that merely runs on it, then one that
    surely fits into memory before one that may not; of those, the one that stands first in the
    bundle.

    Args:
        contents: Contents of the bundle.
        machine: Machine to run on.
        path: The bundle, for messages.

    Raises:
        NoVariantError: None runs here; it says for each why.
    """
    best = best_of(contents, machine)
    if best is None:
        reasons = [f"{each.name}: {obstacle(each.needs, machine)}" for each in contents.variants]
        raise NoVariantError(str(path), "; ".join(reasons))
    if is_tight(best.needs, machine):
        words = "%s may take %d MB of memory, and there are %d"
        there = machine.memory_bytes or 0
        logger.warning(words, best.name, best.needs.memory_bytes // 10**6, there // 10**6)
    return best


def best_of(contents: Contents, machine: Machine) -> Variant | None:
    """Return the variant that `choose` does; None where nothing suits."""
    suiting = [each for each in contents.variants if obstacle(each.needs, machine) is None]
    return min(suiting, key=lambda each: _rank(each.needs, machine), default=None)


def is_tight(needs: Needs, machine: Machine) -> bool:
    """Tell whether a machine may have too little memory for what has these needs."""
    return machine.memory_bytes is not None and needs.memory_bytes > machine.memory_bytes


def obstacle(needs: Needs, machine: Machine) -> str | None:
    """Return why a machine does not run what has these needs; None if it does."""
    return next(_obstacles(needs, machine), None)


def usable_memory(root: Path = Path("/")) -> int | None:
    """Return how much memory a process may use: the machine's, within the cgroup's limit.

    Args:
        root: Directory that holds ``proc`` and ``sys``.
    """
    found = []
    try:
        lines = (root / "proc/meminfo").read_text(encoding="utf-8").splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:")]
    except OSError:  # no Linux, or a sandbox that does not say
        pass
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            found.append(int((root / "sys/fs/cgroup" / name).read_text(encoding="utf-8")))
        except (OSError, ValueError):  # none, or "max"
            continue
    return min(found, default=None)


def _obstacles(needs: Needs, machine: Machine) -> Iterator[str]:
    if needs.machines and machine.architecture not in needs.machines:
        yield f"made for {needs.machines[0]}, and this is {machine.architecture}"
    if missing := sorted(set(needs.cpu_features) - machine.cpu_features):
        yield f"this processor lacks {', '.join(missing)}"
    if needs.device == "cuda" and not machine.cuda:
        yield "there is no driver for NVIDIA's GPUs"
    for runtime in (needs.runtime, *map(Runtime, needs.plugins)):
        if runtime.package and (why := _mismatch(runtime, machine.packages)):
            yield why


def _mismatch(runtime: Runtime, packages: Mapping[str, str]) -> str | None:
    found = packages.get(runtime.package)
    if found is None:
        return f"{runtime.package} is not installed; pip install '{runtime}'"
    here = numbers(found)
    older = runtime.at_least and here < numbers(runtime.at_least)
    newer = runtime.below and here >= numbers(runtime.below)
    if here and (older or newer):
        return f"it needs {runtime}, and {found} is installed; pip install '{runtime}'"
    return None


def _rank(needs: Needs, machine: Machine) -> tuple[int, bool]:
    machines = needs.machines or (machine.architecture,)
    return machines.index(machine.architecture), is_tight(needs, machine)


def _installed(package: str) -> str | None:
    """Return a runtime's version, empty if it has none, None if it is not here."""
    from importlib.metadata import PackageNotFoundError, version  # takes longer than the rest

    module, packages = _MODULES[package]
    for name in packages:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "" if module and find_spec(module) is not None else None  # built by hand


def _has_cuda() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
