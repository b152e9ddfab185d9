"""Operators that TensorRT's parser supports, and rewrites of others into them.

Rewrites::

    logits_to_keep, an input with a default value    into    logits_to_keep, an input
    Swish(x)                                         into    Mul(x, Sigmoid(x))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
import onnx_ir as ir
from typing_extensions import override

from llmopt.interface.signature import Role
from llmopt.ir import graph as g
from llmopt.ir.program import Program
from llmopt.passes.base import Outcome, Pass

_TAKEN: Final = """
    Abs Add And ArgMax ArgMin Attention Cast Ceil Clip Concat Constant ConstantOfShape Conv Cos
    CumSum DequantizeLinear Div Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor Gather
    GatherElements GatherND Gelu Gemm Greater GreaterOrEqual HardSigmoid HardSwish Identity IsInf
    IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax MatMul Max Mean Min Mod Mul
    Neg Not OneHot Or PRelu Pad Pow QuantizeLinear RMSNormalization Range Reciprocal ReduceL1
    ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
    ReduceSumSquare Relu Reshape RotaryEmbedding Round ScatterElements ScatterND Shape Sigmoid
    Sign Sin Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Swish
    Tan Tanh TensorScatter Tile TopK Transpose Trilu Unsqueeze Where Xor
"""
TAKEN: Final = frozenset(_TAKEN.split())
"""Operators of the standard domain that the parser of TensorRT 11 and TensorRT-RTX 1.7 imports and
that a Transformer may hold. Source: docs/operators.md of onnx/onnx-tensorrt."""


@dataclass(frozen=True)
class LegalizeOperators(Pass):
    """Remove defaults of inputs, and decompose Swish.

    TensorRT treats an input with a default value as a constant. It supports Swish, and fuses the
    product again; onnxruntime, which verifies the network, has no kernel for it.

    Numerics: within 1e-6 relative in float32.
    Scope: the graph. Leaves: everything else.
    """

    name: ClassVar[str] = "legalize-operators"
    lowers: ClassVar[bool] = True
    changes_signature: ClassVar[bool] = True

    @override
    def run(self, program: Program) -> Outcome:
        outcome = Outcome()
        port = program.signature.find(Role.LOGITS_TO_KEEP)
        if port is not None and port.name in program.graph.initializers:
            program.graph.initializers.pop(port.name).const_value = None
            outcome.hit()
        for node in g.nodes(program.graph, "Swish"):
            _decompose_swish(node)
            outcome.hit()
        if outcome.modified:
            g.remove_dead(program.model)
        return outcome


def _decompose_swish(node: ir.Node) -> None:
    build, x = g.Builder(node), g.operand(node, 0)
    alpha = float(g.attribute(node, "alpha", 1.0))
    inner = x
    if alpha != 1.0:
        dtype = np.float32 if x.dtype is None else x.dtype.numpy()
        inner = build.op("Mul", [x, build.constant(alpha, dtype)], like=x)
    gate = build.op("Sigmoid", [inner], like=x)
    g.replace(node.outputs[0], build.op("Mul", [x, gate]))
