"""TVM: a shared library of our own kernels, for the processors that LLVM compiles for."""

from __future__ import annotations

import dataclasses
import json
import platform
from abc import abstractmethod
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final

from typing_extensions import override

from llmopt.backends.base import Availability, Backend, Demand, Lowered
from llmopt.backends.onnxruntime import installed
from llmopt.backends.tvm.lower_attention import LowerPackedAttention
from llmopt.backends.tvm.lower_linear import LowerLinear
from llmopt.backends.tvm.separate_pairs import SeparatePairs
from llmopt.interface.arrays import Run
from llmopt.ir.program import Program
from llmopt.passes.base import Pass
from llmopt.quantization.schemes import Blockwise, Scheme
from llmopt.runtime.engines.tvm import INDEX, WEIGHTS

if TYPE_CHECKING:
    from llmopt.backends.tvm.entries import Capacity
    from llmopt.backends.tvm.features import Processor
    from llmopt.backends.tvm.module import Module

ENTRY: Final = "model.so"
HOST: Final = "host"
CHUNK: Final = 512
"""New tokens that a decoder takes at once; a longer prompt goes in pieces."""
_BUILDS: Final = "pip install 'llmopt[cpu]'"
_RUNS: Final = "pip install 'llmopt[runtime-tvm]'"


@dataclass(frozen=True)
class Tvm(Backend):
    """What the targets of TVM share.

    Args:
        mcpu: The processor by LLVM's name; ``host`` for this machine's.
        without: Features that the processor has and code must do without, joined by ``+``, in
            LLVM's names: ``avx512f+amx-tile``.
    """

    schemes: ClassVar[frozenset[str]] = frozenset({"w4", "w6", "w8", "w8a8-dynamic"})
    islands: ClassVar[str] = "activations"
    mcpu: str = HOST
    without: str = ""

    @abstractmethod
    def processor(self) -> Processor:
        """Return what is compiled for."""

    @override
    def available(self) -> Availability:
        builds = all(find_spec(name) for name in ("tvm", "ziglang"))
        runs = "" if find_spec("tvm") else _RUNS
        return Availability("" if builds else _BUILDS, runs)

    @override
    def storage_scheme(self, scheme: Scheme) -> Scheme:
        if not isinstance(scheme, Blockwise):
            return scheme
        return dataclasses.replace(scheme, scale="float16")

    @override
    def cache_obstacle(self, program: Program) -> str | None:
        from llmopt.backends.caches import shared_cache_obstacle

        return shared_cache_obstacle(program)

    @override
    def check(self, program: Program) -> list[str]:
        from llmopt.backends.tvm.rules import unsupported

        return unsupported(program)

    @override
    def passes(self, scheme: Scheme | None) -> tuple[Pass, ...]:
        return (SeparatePairs(), LowerPackedAttention(), LowerLinear())

    @override
    def write(self, program: Program, folder: Path, demand: Demand) -> Lowered:
        from llmopt.backends.tvm.build import build
        from llmopt.backends.tvm.module import Module

        processor = self.processor()
        limits = _limits(program, demand)
        module = Module(program, processor.features, limits)
        build(module.convert(), processor, folder / ENTRY)
        _describe(module, folder)
        requires = {
            "machine": processor.machine,
            "cpu_features": processor.required,
            "batch": limits.batch,
            "tokens": limits.tokens,
        }
        if program.signature.has_cache:
            _share_cache(program)
        return Lowered(ENTRY, program, {"tvm": installed("apache-tvm")}, requires)

    @override
    def proxy_backend(self) -> Backend | None:
        if self.processor().runs_here:
            return None
        native = {"x86_64": TvmCpu, "aarch64": TvmArm64}[platform.machine()]
        return native(mcpu=HOST)

    @override
    def open(self, entry: Path, *, exact: bool = False) -> Run:
        from llmopt.backends.tvm.session import open_session

        return open_session(entry, exact=exact)


@dataclass(frozen=True)
class TvmCpu(Tvm):
    """A shared library for an x86-64 processor."""

    name: ClassVar[str] = "tvm-cpu"
    schemes: ClassVar[frozenset[str]] = Tvm.schemes | {"bf16"}
    summary: ClassVar[str] = "a shared library of our own kernels, for an x86-64 processor"

    @override
    def processor(self) -> Processor:
        from llmopt.backends.tvm.features import find_processor

        return find_processor("x86_64", self.mcpu, filter(None, self.without.split("+")))


@dataclass(frozen=True)
class TvmArm64(Tvm):
    """A shared library for an arm64 processor, compiled and linked on any machine.

    Args:
        mcpu: The processor by LLVM's name: ``cortex-a76``, ``neoverse-n1``; all run ``generic``.
    """

    name: ClassVar[str] = "tvm-arm64"
    summary: ClassVar[str] = "a shared library of our own kernels, for an arm64 processor"
    mcpu: str = "generic"

    @override
    def available(self) -> Availability:
        found = super().available()
        if platform.machine() == "aarch64":
            return found
        return dataclasses.replace(found, runs=found.runs or "an arm64 processor")

    @override
    def processor(self) -> Processor:
        from llmopt.backends.tvm.features import find_processor

        return find_processor("aarch64", self.mcpu, filter(None, self.without.split("+")))


def _describe(module: Module, folder: Path) -> None:
    """Write the weights, and what an engine has to know of them and of the functions."""
    index = {
        **dataclasses.asdict(module.program.signature),
        **dataclasses.asdict(module.limits),
        "functions": {
            entry.name: {"exact": entry.exact}
            | ({} if entry.exact else {"calls": module.calls.get(entry.name, {})})
            for entry in module.entries
        },
        "weights": module.weights.write(folder / WEIGHTS),
    }
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _limits(program: Program, demand: Demand) -> Capacity:
    """Return what memory is planned for."""
    from llmopt.backends.tvm.entries import Capacity

    longest = program.facts.max_length
    if program.signature.has_cache:
        return Capacity(demand.batch, min(longest, CHUNK) if longest else CHUNK)
    return Capacity(demand.batch, longest)


def _share_cache(program: Program) -> None:
    """Note that past and present are one buffer."""
    program.learn(model=dataclasses.replace(program.facts.model, cache="shared"))
