"""One example with its outputs, for machines that build the engine themselves."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx_ir as ir

from llmopt.backends.tensorrt.typed_run import open_typed
from llmopt.interface.signature import Role
from llmopt.ir.feeds import Case, feeds
from llmopt.ir.program import Program
from llmopt.runtime.engines.tensorrt_recipe import GOLDEN, NETWORK
from llmopt.runtime.npz import write_npz

_TOKENS = 7
_PASTS = (Role.PAST_KEY, Role.PAST_VALUE)
_WANTED = (Role.LOGITS, Role.HIDDEN, Role.EMBEDDING, Role.OTHER)


def golden_tolerance(program: Program) -> float:
    """Return the tolerance of an engine against the example: what its types round."""
    dtypes = {value.dtype for value in program.graph.initializers.values()}
    if ir.DataType.BFLOAT16 in dtypes or any(n.op_type == "QuantizeLinear" for n in program.graph):
        return 1e-1
    return 2e-2 if ir.DataType.FLOAT16 in dtypes else 1e-2


def write_golden(program: Program, folder: Path) -> None:
    """Run the typed network in ``folder`` and write its example to ``golden.npz`` there.

    Without onnxruntime no example is written, and the engine is not checked.
    """
    if find_spec("onnxruntime") is None:
        return
    case = Case(1, min(_TOKENS, program.facts.max_length or _TOKENS))
    arrays = feeds(program.signature, case, program.facts.model.vocabulary or 2)
    if program.signature.has_cache:
        arrays[str(Role.LOGITS_TO_KEEP)] = np.asarray(0, np.int64)
    results = open_typed(folder / NETWORK)(arrays)
    kept = {port.name for port in program.signature.inputs if port.role not in _PASTS}
    inputs = {f"in.{name}": arrays[name] for name in arrays if name in kept}
    wanted = {port.name for port in program.signature.outputs if port.role in _WANTED}
    outputs = {f"out.{name}": results[name] for name in results if name in wanted}
    write_npz(folder / GOLDEN, inputs | outputs, force=True)
