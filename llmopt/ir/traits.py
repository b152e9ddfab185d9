"""What kind of operator each is, where several passes ask; what is not here is unknown."""

from __future__ import annotations

from typing import Final

ELEMENTWISE: Final = frozenset(
    {
        *("Abs", "Acos", "And", "Asin", "Atan", "BitShift", "BitwiseAnd", "BitwiseNot"),
        *("BitwiseOr", "BitwiseXor", "Add", "Cast", "CastLike", "Ceil", "Celu", "Clip", "Cos"),
        *("Cosh", "Div", "Dropout", "Elu", "Equal", "Erf", "Exp", "Floor", "Gelu", "Greater"),
        *("GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN", "LeakyRelu"),
        *("Less", "LessOrEqual", "Log", "Max", "Min", "Mish", "Mod", "Mul", "Neg", "Not", "Or"),
        *("PRelu", "Pow", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Sinh"),
        *("Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Swish", "Tan", "Tanh"),
        *("ThresholdedRelu", "Where", "Xor"),
    }
)
"""Each number of the result is computed of those at its place, operands broadcast."""
REDUCTIONS: Final = frozenset(
    {
        *("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1"),
        *("ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare"),
    }
)
"""One number for all along the axes that the second operand names."""
ALONG_AXIS: Final = {"Softmax": -1, "LogSoftmax": -1, "Hardmax": -1, "LpNormalization": -1}
"""They keep the sizes and run along the attribute ``axis``, with what it is where it is not set."""
