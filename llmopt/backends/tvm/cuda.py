"""TVM on NVIDIA GPUs: Relax's own operators, scheduled for a GPU by TVM's dlight."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final, Self

from typing_extensions import override

from llmopt.backends.base import TOLERANCE, Availability, Backend, Demand, Lowered
from llmopt.backends.onnxruntime import installed
from llmopt.errors import UsageError
from llmopt.interface.arrays import Run
from llmopt.ir.program import Program
from llmopt.passes.base import Pass
from llmopt.quantization.schemes import Cast, Scheme
from llmopt.runtime.engines import tvm_cuda
from llmopt.runtime.engines.tvm import INDEX, WEIGHTS

if TYPE_CHECKING:
    from llmopt.backends.tvm.cuda_module import CudaModule

ENTRY: Final = "model.so"
NARROWED: Final = 2e-2
"""What rounding every value to 11 bits leaves of the largest output after tens of layers."""
_BUILDS: Final = "pip install 'llmopt[cpu]'"
_ARCH: Final = re.compile(r"sm_\d{2,3}")


@dataclass(frozen=True)
class TvmCuda(Backend):
    """CUDA kernels for an NVIDIA GPU, compiled where there is nvcc or NVRTC, without a GPU.

    Args:
        arch: The first compute capability that the kernels run on: ``sm_80``; later ones compile
            them anew from PTX when they are loaded.
    """

    name: ClassVar[str] = "tvm-cuda"
    summary: ClassVar[str] = "CUDA kernels scheduled by TVM, for an NVIDIA GPU"
    schemes: ClassVar[frozenset[str]] = frozenset({"fp16"})
    arch: str = "sm_80"

    def __post_init__(self) -> None:
        """Refuse what is no architecture."""
        if not _ARCH.fullmatch(self.arch):
            raise UsageError(f"tvm-cuda{{arch={self.arch}}}: write sm_80, sm_86, sm_89, sm_90 …")

    @property
    @override
    def proven_by(self) -> str:
        if not tvm_cuda.lacking():
            return ""
        return f"the same Relax module, compiled for {platform.machine()}: no kernel was run"

    @override
    def tolerance(self, scheme: Scheme | None) -> float:
        return NARROWED if isinstance(scheme, Cast) else TOLERANCE

    @override
    def available(self) -> Availability:
        from llmopt.backends.tvm.cuda_build import NEEDED, compiler

        packages = all(find_spec(name) for name in ("tvm", "ziglang"))
        builds = "" if packages and compiler() else (NEEDED if packages else _BUILDS)
        return Availability(builds, tvm_cuda.lacking())

    @override
    def resolved(self, program: Program, scheme: Scheme | None) -> tuple[Self, tuple[str, ...]]:
        from llmopt.backends.tvm.cuda_build import require_compiler

        require_compiler()
        return self, ()

    @override
    def check(self, program: Program) -> list[str]:
        from llmopt.backends.tvm.cuda_rules import unsupported

        return unsupported(program)

    @override
    def passes(self, scheme: Scheme | None) -> tuple[Pass, ...]:
        return ()

    @override
    def write(self, program: Program, folder: Path, demand: Demand) -> Lowered:
        from llmopt.backends.tvm.cuda_build import build, target_of

        module = _module(program, demand)
        target = target_of(self.arch, platform.machine())
        kernels = folder / tvm_cuda.KERNELS
        source = build(module.convert(), target, folder / ENTRY, kernels)
        _describe(module, folder, hashlib.sha256(source.encode()).hexdigest())
        requires = {
            "machine": platform.machine(),
            "cuda_arch": self.arch,
            "batch": demand.batch,
        }
        return Lowered(ENTRY, program, {"tvm": installed("apache-tvm")}, requires)

    @override
    def proxy_backend(self) -> Backend | None:
        return Unscheduled() if tvm_cuda.lacking() else None

    @override
    def open(self, entry: Path, *, exact: bool = False) -> Run:
        return tvm_cuda.DeviceLibrary(entry, "cuda").run


@dataclass(frozen=True)
class Unscheduled(Backend):
    """The module of `TvmCuda` compiled by LLVM for this processor, where there is no GPU.

    What is proven so is the lowering to Relax and its legalization; schedules are not run.
    """

    name: ClassVar[str] = "tvm-cuda on a processor"
    summary: ClassVar[str] = "what proves tvm-cuda where there is no GPU"
    schemes: ClassVar[frozenset[str]] = TvmCuda.schemes

    @override
    def available(self) -> Availability:
        return Availability("" if find_spec("ziglang") else _BUILDS)

    @override
    def check(self, program: Program) -> list[str]:
        return TvmCuda().check(program)

    @override
    def passes(self, scheme: Scheme | None) -> tuple[Pass, ...]:
        return ()

    @override
    def write(self, program: Program, folder: Path, demand: Demand) -> Lowered:
        from llmopt.backends.tvm.build import build
        from llmopt.backends.tvm.features import find_processor

        module = _module(program, demand)
        build(module.convert(), find_processor(platform.machine(), "host"), folder / ENTRY)
        _describe(module, folder, "")
        return Lowered(ENTRY, program, {"tvm": installed("apache-tvm")})

    @override
    def open(self, entry: Path, *, exact: bool = False) -> Run:
        return tvm_cuda.DeviceLibrary(entry, "cpu").run


def _module(program: Program, demand: Demand) -> CudaModule:
    from llmopt.backends.tvm.cuda_module import CudaModule
    from llmopt.backends.tvm.entries import Capacity

    if program.signature.has_cache:
        facts = dataclasses.replace(program.facts.model, cache="concat")
        program.learn(model=facts)
    return CudaModule(program, Capacity(demand.batch, program.facts.max_length))


def _describe(module: CudaModule, folder: Path, source: str) -> None:
    """Write the weights, and what an engine has to know of them and of the functions."""
    index = {
        **dataclasses.asdict(module.program.signature),
        "functions": {entry.name: {} for entry in module.entries},
        "weights": module.weights.write(folder / WEIGHTS),
        "kernels_of": source,
    }
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
