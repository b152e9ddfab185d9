"""ONNX Runtime on NVIDIA GPUs: 16 bits, and nothing that runs on the host in secret."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Literal, Self

from typing_extensions import override

from llmopt.backends.base import Availability, Backend, Demand, Lowered
from llmopt.backends.onnxruntime.artifact import write_model
from llmopt.backends.onnxruntime.compact_rows import CompactRows
from llmopt.backends.onnxruntime.kernels import cuda_kernels
from llmopt.backends.onnxruntime.lower_attention import LowerAttention
from llmopt.backends.onnxruntime.lower_norms import FuseSkipNorm, LowerActivations
from llmopt.backends.onnxruntime.lower_weights import LowerWeights
from llmopt.backends.onnxruntime.session import open_session
from llmopt.errors import UnsupportedModelError
from llmopt.interface.arrays import Run
from llmopt.ir.program import Program
from llmopt.passes.base import Pass
from llmopt.passes.convert_float import LEFT, ConvertFloat
from llmopt.passes.pipeline import Pipeline
from llmopt.quantization.schemes import Blockwise, Cast, Scheme
from llmopt.runtime.engines.providers import CUDA


@dataclass(frozen=True)
class OnnxRuntimeCuda(Backend):
    """ONNX with ONNX Runtime's fused operators for NVIDIA GPUs.

    Args:
        dtype: Type of activations and caches: ``float16``, or ``bfloat16``, which needs compute
            capability 8.0.
        graph: Whether a step of one token is captured once as a CUDA graph and played back.
    """

    name: ClassVar[str] = "onnxruntime-cuda"
    summary: ClassVar[str] = "ONNX with ONNX Runtime's fused operators, for NVIDIA GPUs, 16 bits"
    schemes: ClassVar[frozenset[str]] = frozenset({"fp16", "bf16", "w4", "w8"})
    dtype: Literal["float16", "bfloat16"] = "float16"
    graph: bool = False

    @property
    @override
    def default_scheme(self) -> Scheme:
        return Cast(self.dtype)

    @property
    @override
    def proven_by(self) -> str:
        return "onnxruntime's CPU provider, the same graph in float32"

    @override
    def resolved(self, program: Program, scheme: Scheme | None) -> tuple[Self, tuple[str, ...]]:
        return (replace(self, dtype=scheme.dtype) if isinstance(scheme, Cast) else self), ()

    @override
    def storage_scheme(self, scheme: Scheme) -> Scheme:
        return replace(scheme, scale=self.dtype) if isinstance(scheme, Blockwise) else scheme

    @override
    def tolerance(self, scheme: Scheme | None) -> float:
        return LEFT[self.dtype]

    @override
    def available(self) -> Availability:
        missing = "pip install 'llmopt[compile]'" if find_spec("onnx_ir") is None else ""
        return Availability(missing, _missing_device())

    @override
    def check(self, program: Program) -> list[str]:
        lowered = Pipeline(self.passes(None)).run(program.clone())
        return cuda_kernels().lacking(lowered.graph)

    @override
    def passes(self, scheme: Scheme | None) -> tuple[Pass, ...]:
        narrow = () if isinstance(scheme, Cast) else (ConvertFloat(self.dtype),)
        return (
            *narrow,
            CompactRows(),  # before weights leave the dialect: it has to know every operator
            LowerWeights(accuracy_level=0),
            LowerAttention(bias=False),
            FuseSkipNorm(),
            LowerActivations(),
        )

    @override
    def write(self, program: Program, folder: Path, demand: Demand) -> Lowered:
        if problems := cuda_kernels().lacking(program.graph):
            hint = "choose another scheme or target, or replace the operation"
            raise UnsupportedModelError("the lowered model", problems, hint)
        return write_model(program, folder, {"cuda": self._settings()})

    @override
    def open(self, entry: Path, *, exact: bool = False) -> Run:
        return open_session(entry, exact=exact, widened=exact or self.dtype == "bfloat16")

    def _settings(self) -> dict[str, str]:
        captured = "1" if self.graph else "0"
        return {"enable_cuda_graph": captured, "enable_skip_layer_norm_strict_mode": "1"}


def _missing_device() -> str:
    """Return what an artifact lacks to run here, empty if nothing."""
    if find_spec("onnxruntime") is None:
        return "pip install 'llmopt[cuda]'"
    import onnxruntime

    if CUDA not in onnxruntime.get_available_providers():
        return "pip uninstall onnxruntime; pip install onnxruntime-gpu"
    if not Path("/dev/nvidiactl").exists() and not Path("/dev/dxg").exists():
        return "an NVIDIA GPU and its driver"
    return ""
