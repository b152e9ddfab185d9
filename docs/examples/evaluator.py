"""A backend that runs the Program itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from llmopt.backends.base import Availability, Backend, Demand, Lowered
from llmopt.interface.arrays import Run
from llmopt.ir.dialect import OPSET
from llmopt.ir.program import Program
from llmopt.passes.base import Pass
from llmopt.quantization.schemes import Scheme


@dataclass(frozen=True)
class Evaluator(Backend):
    """The Program itself, run by ONNX's reference evaluator."""

    name: ClassVar[str] = "evaluator"
    summary: ClassVar[str] = "the Program itself, operator by operator; slow"
    schemes: ClassVar[frozenset[str]] = frozenset()

    def available(self) -> Availability:
        return Availability()

    def check(self, program: Program) -> list[str]:
        return [f"{n.op_type} {n.name!r}: no such operator" for n in program.graph if n.domain]

    def passes(self, scheme: Scheme | None) -> tuple[Pass, ...]:
        return ()

    def write(self, program: Program, folder: Path, demand: Demand) -> Lowered:
        ir.save(program.model, folder / "model.onnx")
        return Lowered("model.onnx", program, {"opset": OPSET})

    def open(self, entry: Path, *, exact: bool = False) -> Run:
        session = ReferenceEvaluator(onnx.load(entry))

        def run(feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
            known = {name: feeds[name] for name in session.input_names if name in feeds}
            outputs = map(np.asarray, session.run(None, known))
            return dict(zip(session.output_names, outputs, strict=True))

        return run
