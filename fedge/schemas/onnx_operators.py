"""Which operators a plan may use: those of `ai.onnx` that only compute.

No control flow, no random numbers, no strings, sequences or optional values: a graph of these ends,
gives the same numbers each time, and reads and writes nothing but its inputs and outputs. The
compiler emits no others; a device refuses all others.
"""

from __future__ import annotations

# fmt: off
ALLOWED_OPERATORS: frozenset[str] = frozenset({
    # arithmetic
    "Abs", "Add", "Ceil", "Clip", "CumSum", "Div", "Einsum", "Exp", "Floor", "Gemm", "Log",
    "MatMul", "Max", "Mean", "Min", "Mod", "Mul", "Neg", "Pow", "Range", "Reciprocal", "Round",
    "Sign", "Sqrt", "Sub", "Sum",
    # trigonometry
    "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Cos", "Cosh", "Erf", "Sin", "Sinh",
    "Tan", "Tanh",
    # activations
    "Celu", "Elu", "HardSigmoid", "HardSwish", "LeakyRelu", "LogSoftmax", "Mish", "PRelu",
    "Relu", "Selu", "Sigmoid", "Softmax", "Softplus", "Softsign", "ThresholdedRelu",
    # bits, comparisons, choice
    "And", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "Equal", "Greater",
    "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual", "Not", "Or", "Where", "Xor",
    # reductions
    "ArgMax", "ArgMin", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax",
    "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare", "TopK",
    # layers
    "AveragePool", "BatchNormalization", "Conv", "ConvTranspose", "GlobalAveragePool",
    "GlobalMaxPool", "GroupNormalization", "InstanceNormalization", "LayerNormalization",
    "MaxPool",
    # constants and types
    "Cast", "CastLike", "Constant", "ConstantOfShape", "EyeLike", "Identity",
    # shapes and places
    "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements", "GatherND",
    "OneHot", "Pad", "Reshape", "ScatterElements", "ScatterND", "Shape", "Size", "Slice",
    "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Trilu", "Unsqueeze",
})
# fmt: on
"""By their names in opset 18."""

INFER_OPERATORS: frozenset[str] = ALLOWED_OPERATORS | {"DequantizeLinear"}
"""Those of an `infer` graph, which only onnxruntime runs: its weights may be int8."""
