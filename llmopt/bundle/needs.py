"""Requirements of an artifact, from its manifest."""

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
"""Memory of Python, numpy and a runtime without a model; the tests check it."""

_OPENVINO: Final = "onnxruntime-ep-openvino"
_TEXT: Final = frozenset({".json", ".txt", ".jinja"})


@dataclass(frozen=True)
class _Kind:
    """Requirements that all artifacts of a target share.

    Args:
        package: Name of the runtime on PyPI.
        version: Key of the runtime among the manifest's versions.
        compatible: Range of versions that run artifacts of one version.
        machines: Architectures, the target's first; empty where the manifest names one.
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
    """Return the requirements of an artifact.

    For an unknown target they are those in the manifest alone.
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
    """Return the leading numbers of a version.

    >>> numbers("1.32.0"), numbers("0.27.0.post1"), numbers("2.1rc1"), numbers("absent")
    ((1, 32, 0), (0, 27, 0), (2, 1), ())
    """
    match = re.match(r"\d+(\.\d+)*", version)
    return () if match is None else tuple(map(int, match[0].split(".")))


def _runtime(kind: _Kind, built: str) -> Runtime:
    """Return the versions that run an artifact of version ``built``."""
    version = numbers(built)
    if len(version) < 2:  # built where the runtime was not installed
        return Runtime(kind.package)
    if kind.compatible == "same":
        return Runtime(kind.package, _text(version), _text((*version[:-1], version[-1] + 1)))
    major, minor = version[:2]
    below = _text((major, minor + 1)) if kind.compatible == "minor" else ""
    return Runtime(kind.package, _text((major, minor)), below)


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
