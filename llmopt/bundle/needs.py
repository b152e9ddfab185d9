"""What a machine must have to run an artifact, found in the artifact's manifest."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final, Literal

from llmopt.artifact.manifest import Manifest
from llmopt.bundle.contents import Needs, Runtime
from llmopt.spelling import name_of

X86: Final = "x86_64"
ARM: Final = "aarch64"
RUNTIME_BYTES: Final = 120_000_000
"""What Python, numpy and a runtime take, model apart; the tests hold them to it."""

_OPENVINO: Final = "onnxruntime-ep-openvino"
_TEXT: Final = frozenset({".json", ".txt", ".jinja"})


@dataclass(frozen=True)
class _Kind:
    """What all artifacts of a target need.

    Args:
        package: Package of the runtime, for pip.
        version: Key of its version in the manifest's versions.
        compatible: Versions that run what one of them was made with.
        machines: Processors they run on, the intended one first; empty where the artifact says.
        copies: Number of copies of the weights in memory: 2 where the runtime repacks them.
        device: ``"cuda"``, or empty.
    """

    package: str
    version: str
    compatible: Literal["newer", "minor", "same"]
    machines: tuple[str, ...] = ()
    copies: int = 2
    device: str = ""


_KINDS: Final[Mapping[str, _Kind]] = {
    "onnxruntime-arm64": _Kind("onnxruntime", "onnxruntime", "newer", (ARM, X86)),
    "onnxruntime-cpu": _Kind("onnxruntime", "onnxruntime", "newer", (X86, ARM)),
    "onnxruntime-cuda": _Kind("onnxruntime-gpu", "onnxruntime", "newer", device="cuda"),
    "reference": _Kind("onnx", "onnx", "newer"),
    "tensorrt": _Kind("tensorrt", "tensorrt", "same", device="cuda"),
    "tensorrt-rtx": _Kind("tensorrt-rtx-cu13-bindings", "tensorrt_rtx", "same", device="cuda"),
    "tvm-arm64": _Kind("apache-tvm", "tvm", "minor", (ARM,), copies=1),
    "tvm-cpu": _Kind("apache-tvm", "tvm", "minor", (X86,), copies=1),
    "tvm-cuda": _Kind("apache-tvm", "tvm", "minor", device="cuda"),
}


def needs_of(manifest: Manifest) -> Needs:
    """Return what a machine must have to run the artifact of a manifest.

    Of a target that is not known here, only what its manifest requires is known.
    """
    requires = manifest.requires
    kind = _KINDS.get(name_of(manifest.target), _Kind("", "", "newer"))
    openvino = requires.get("ep") == "openvino"
    machine = X86 if openvino else requires.get("machine")
    weights = sum(
        record.size_bytes
        for record in manifest.files
        if PurePosixPath(record.path).suffix not in _TEXT
    )
    return Needs(
        runtime=_runtime(kind, str(manifest.versions.get(kind.version, ""))),
        plugins=(_OPENVINO,) if openvino else (),
        machines=kind.machines if machine is None else (str(machine),),
        cpu_features=tuple(sorted(map(str, requires.get("cpu_features", ())))),
        device=kind.device,
        memory_bytes=kind.copies * weights + RUNTIME_BYTES,
    )


def numbers(version: str) -> tuple[int, ...]:
    """Return the numbers that a version begins with.

    >>> numbers("1.32.0"), numbers("0.27.0.post1"), numbers("2.1rc1"), numbers("absent")
    ((1, 32, 0), (0, 27, 0), (2, 1), ())
    """
    found = re.match(r"\d+(\.\d+)*", version)
    return () if found is None else tuple(map(int, found[0].split(".")))


def _runtime(kind: _Kind, built_with: str) -> Runtime:
    """Return the versions of a runtime that run an artifact of one version."""
    version = numbers(built_with)
    if len(version) < 2:  # it was made where the runtime was not installed
        return Runtime(kind.package)
    if kind.compatible == "same":
        return Runtime(kind.package, _text(version), _text((*version[:-1], version[-1] + 1)))
    major, minor = version[:2]
    below = _text((major, minor + 1)) if kind.compatible == "minor" else ""
    return Runtime(kind.package, _text((major, minor)), below)


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
