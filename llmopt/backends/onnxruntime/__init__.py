"""ONNX Runtime: it runs everywhere, so it is the one the others are compared with."""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Final, Self

from typing_extensions import override

from llmopt.backends.base import Availability, Backend, Demand, Lowered
from llmopt.backends.onnxruntime import openvino
from llmopt.backends.onnxruntime.artifact import DATA, ENTRY, finish, installed, write_model
from llmopt.backends.onnxruntime.kernels import decomposes
from llmopt.backends.onnxruntime.lower_attention import LowerAttention
from llmopt.backends.onnxruntime.lower_experts import LowerExperts
from llmopt.backends.onnxruntime.lower_norms import FuseSkipNorm, LowerActivations
from llmopt.backends.onnxruntime.lower_weights import LowerWeights
from llmopt.backends.onnxruntime.session import open_session
from llmopt.errors import UnknownNameError
from llmopt.interface.arrays import Run
from llmopt.ir.program import Program
from llmopt.passes.base import Pass
from llmopt.passes.quantize_experts import QuantizeExperts
from llmopt.quantization.schemes import Blockwise, Scheme

__all__ = ["DATA", "ENTRY", "OnnxRuntimeArm64", "OnnxRuntimeCpu", "finish", "installed"]


@dataclass(frozen=True)
class _OnProcessor(Backend):
    """Common part of the CPU targets: the graph is the same."""

    schemes: ClassVar[frozenset[str]] = frozenset({"w4", "w8", "w8a8-dynamic"})
    takes_components: ClassVar[bool] = True

    @override
    def available(self) -> Availability:
        missing = "pip install 'llmopt[compile]'" if find_spec("onnx_ir") is None else ""
        runtime = "pip install 'llmopt[runtime]'" if find_spec("onnxruntime") is None else ""
        return Availability(missing, runtime)

    @override
    def check(self, program: Program) -> list[str]:
        return unsupported(program)

    @override
    def passes(self, scheme: Scheme | None) -> tuple[Pass, ...]:
        rounded = (QuantizeExperts.of(scheme),) if isinstance(scheme, Blockwise) else ()
        weights = (*rounded, LowerExperts(), LowerWeights())
        return (*weights, LowerAttention(), FuseSkipNorm(), LowerActivations())

    @override
    def partially_lowered(self, program: Program) -> Program:
        LowerActivations().run(program)  # of the dialect, Swish alone has no kernel
        return program

    @override
    def write(self, program: Program, folder: Path, demand: Demand) -> Lowered:
        return write_model(program, folder)

    @override
    def open(self, entry: Path, *, exact: bool = False) -> Run:
        return open_session(entry, exact=exact)


@dataclass(frozen=True)
class OnnxRuntimeCpu(_OnProcessor):
    """ONNX with ONNX Runtime's fused operators, prepared for x86-64 processors.

    Args:
        ep: The execution provider: ``cpu``, ONNX Runtime's own; ``openvino``, a plugin for
            Intel processors, encoders only; ``auto``, the faster one, measured here.
    """

    name: ClassVar[str] = "onnxruntime-cpu"
    summary: ClassVar[str] = "ONNX with ONNX Runtime's fused operators, for x86-64 processors"
    ep: str = openvino.CPU

    def __post_init__(self) -> None:
        """Refuse a provider that there is none of."""
        if self.ep not in _PROVIDERS:
            raise UnknownNameError("ep of onnxruntime-cpu", self.ep, _PROVIDERS)

    @override
    def resolved(self, program: Program, scheme: Scheme | None) -> tuple[Self, tuple[str, ...]]:
        if self.ep == openvino.OPENVINO:
            openvino.require_encoder(program)
        return self, ()

    @override
    def write(self, program: Program, folder: Path, demand: Demand) -> Lowered:
        lowered = super().write(program, folder, demand)
        if self.ep == openvino.CPU:
            return lowered
        ep, notes = self.ep, tuple[str, ...]()
        if self.ep == openvino.AUTO:
            ep, note = openvino.choose(folder / lowered.entry, program)
            notes = (note,)
        return replace(lowered, requires={"ep": ep}, notes=notes)

    @override
    def open(self, entry: Path, *, exact: bool = False) -> Run:
        ep = openvino.chosen(entry) if self.ep == openvino.AUTO else self.ep
        return open_session(entry, exact=exact, provider=openvino.provider_of(ep))


_PROVIDERS: Final = (openvino.CPU, openvino.OPENVINO, openvino.AUTO)


@dataclass(frozen=True)
class OnnxRuntimeArm64(_OnProcessor):
    """ONNX with ONNX Runtime's fused operators, shaped for arm64 kernels.

    The graph is the one for x86-64: on arm64 the same operators have kernels with dot products
    (accuracy level 4 of MatMulNBits; 4 bits, symmetric, blocks of 32 is what KleidiAI takes), and
    int8 products of unsigned with signed codes do not saturate there.
    """

    name: ClassVar[str] = "onnxruntime-arm64"
    summary: ClassVar[str] = "ONNX with ONNX Runtime's fused operators, for arm64 processors"

    @property
    @override
    def proven_by(self) -> str:
        here = platform.machine()
        return "" if here in {"aarch64", "arm64"} else f"the same graph on {here}"


def unsupported(program: Program) -> list[str]:
    """Return the operators of ``program`` that ONNX Runtime has no CPU kernel for.

    Where onnxruntime is not installed, nothing is known and nothing is listed.
    """
    if find_spec("onnxruntime") is None:
        return []
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kernels = {
        (kernel.op_name, kernel.domain or "")
        for kernel in state.get_all_opkernel_def()
        if kernel.provider == "CPUExecutionProvider"
    }
    return [
        f"no CPU kernel for {node.op_type} ({node.name!r})"
        for node in program.graph
        if (node.op_type, node.domain) not in kernels
        and node.op_type not in _LOWERED
        and not decomposes(node)
    ]


_LOWERED: Final = frozenset({"Swish"})  # operators of the dialect that a lowering pass replaces
