"""Operators that make a tensor of their own: constants, sizes, ranges, windows."""

from spa.rules import rule

rule(
    "Constant",
    "-> output[*s]",
    doc="Make a value that is no plain tensor (sparse, or strings); its axes stay whole. "
    "Spec: https://onnx.ai/onnx/operators/onnx__Constant.html.",
)
rule(
    *["Shape", "Size"],
    "data[*s] -> _[*t]; frozen *s: measures it",
    doc="Turn sizes into data; known ones are folded before any rule is asked, and only there may an axis shrink. "
    "Spec: https://onnx.ai/onnx/operators/onnx__Shape.html.",
)
rule(
    *["BlackmanWindow", "HammingWindow", "HannWindow", "MelWeightMatrix", "Range"],
    "_* -> output[*s]",
    doc="Compute values from a few scalars; the axes stay whole. "
    "Spec: https://onnx.ai/onnx/operators/onnx__Range.html.",
)
