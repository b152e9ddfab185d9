"""ONNX Runtime: it runs everywhere, so it is the one the others are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Final

import onnx_ir as ir
from typing_extensions import override

from llmopt.backends.base import Availability, Backend, Demand, Lowered, Run
from llmopt.backends.onnxruntime.genai import FILE as GENAI
from llmopt.backends.onnxruntime.genai import genai_config
from llmopt.backends.onnxruntime.lower_attention import LowerAttention
from llmopt.backends.onnxruntime.lower_norms import FuseSkipNorm, LowerActivations
from llmopt.backends.onnxruntime.lower_weights import LowerWeights
from llmopt.backends.onnxruntime.session import open_session
from llmopt.ir.dialect import OPSET
from llmopt.ir.program import Program, Role
from llmopt.ir.saving import save_with_data
from llmopt.passes.base import Pass

ENTRY: Final = "model.onnx"
DATA: Final = "model.onnx.data"
_ALIGNMENT: Final = 4096  # a page: ONNX Runtime maps external data


@dataclass(frozen=True)
class OnnxRuntimeCpu(Backend):
    """ONNX with ONNX Runtime's fused operators, prepared for x86-64 processors."""

    name: ClassVar[str] = "onnxruntime-cpu"
    summary: ClassVar[str] = "ONNX with ONNX Runtime's fused operators, for x86-64 processors"
    schemes: ClassVar[frozenset[str]] = frozenset({"w4", "w8", "w8a8-dynamic"})

    @override
    def available(self) -> Availability:
        missing = "pip install 'llmopt[compile]'" if find_spec("onnx_ir") is None else ""
        runtime = "pip install 'llmopt[runtime]'" if find_spec("onnxruntime") is None else ""
        return Availability(missing, runtime)

    @override
    def check(self, program: Program) -> list[str]:
        return unsupported(program)

    @override
    def passes(self, scheme: str | None) -> tuple[Pass, ...]:
        return (LowerWeights(), LowerAttention(), FuseSkipNorm(), LowerActivations())

    @override
    def write(self, program: Program, folder: Path, demand: Demand) -> Lowered:
        model = program.model
        finish(model)
        _declare_last_token(program)
        save_with_data(model, folder / ENTRY, DATA, alignment=_ALIGNMENT)
        if (config := genai_config(program, ENTRY)) is not None:
            (folder / GENAI).write_bytes(config)
        return Lowered(ENTRY, program, {"onnxruntime": installed("onnxruntime"), "opset": OPSET})

    @override
    def open(self, entry: Path, *, exact: bool = False) -> Run:
        return open_session(entry, exact=exact)


def _declare_last_token(program: Program) -> None:
    """Declare logits of one token, the default of ``logits_to_keep``.

    onnxruntime-genai sizes its buffer by what is declared. With ``logits_to_keep`` overridden the
    shape is another, which ONNX Runtime allows and warns of.
    """
    logits, keep = program.output(Role.LOGITS), program.signature.find(Role.LOGITS_TO_KEEP)
    if logits is not None and keep is not None and logits.shape is not None:
        batch, _, vocabulary = logits.shape
        logits.shape = ir.Shape([batch, 1, vocabulary])


def finish(model: ir.Model) -> None:
    """Give every node and value a name of its own, and import the domains that are used."""
    from onnx_ir.passes.common import NameFixPass

    for node in model.graph:
        for output in node.outputs:
            if node.domain == "com.microsoft" and _unread(output):
                output.name = ""
    NameFixPass()(model)
    if any(node.domain == "com.microsoft" for node in model.graph):
        model.graph.opset_imports["com.microsoft"] = 1


def _unread(value: ir.Value) -> bool:
    node = value.producer()
    optional = node is not None and value.index() not in (0, None)
    return optional and not value.uses() and not value.is_graph_output()


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
        and not _decomposes(node)
    ]


def _decomposes(node: ir.Node) -> bool:
    """Whether ONNX defines the operator by others, so that any runtime can inline it."""
    import onnx

    if not onnx.defs.has(node.op_type, node.domain):
        return False
    schema = onnx.defs.get_schema(node.op_type, OPSET, node.domain)
    return bool(schema.has_function or schema.has_context_dependent_function)  # type: ignore[attr-defined]


_LOWERED: Final = frozenset({"Swish"})  # operators of the dialect that a lowering pass replaces


def installed(package: str) -> str:
    """Return the version of an installed package, or ``"absent"``."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
