"""Normalisations: statistics over some axes cross those dimensions; scales and biases follow the channels."""

from __future__ import annotations

from spa.algebra.notation import apply
from spa.algebra.op import Op
from spa.rules import rule


@rule("BatchNormalization")
def batch_norm(op: Op) -> None:
    """Scale and shift each channel; in training mode, by statistics over all other axes.

    Spec: https://onnx.ai/onnx/operators/onnx__BatchNormalization.html.
    """
    apply(
        op,
        "X[n c *s], scale[c], B[c], input_mean[c], input_var[c]"
        " -> Y[n c *s], running_mean[c], running_var[c], saved_mean[c], saved_var[c]",
    )
    if op.attr("training_mode", 0):
        batch, _, *positions = op.axes(0)
        for e in (batch, *positions):
            op.cross(e)


rule(
    "InstanceNormalization",
    "input[n c ~*s], scale[c], B[c] -> output[n c *s]",
    doc="Normalise over the axes after the channels, which may hold channels of their own (a decomposed GroupNorm). "
    "Spec: https://onnx.ai/onnx/operators/onnx__InstanceNormalization.html.",
)


@rule("LayerNormalization", "RMSNormalization")
def layer_norm(op: Op) -> None:
    """Normalise by statistics over the axes from `axis` on; scale and bias broadcast.

    Spec: https://onnx.ai/onnx/operators/onnx__LayerNormalization.html.
    """
    axes = op.axes(0)
    axis = op.positive(op.attr("axis", -1), len(axes))
    for e in axes[axis:]:
        op.cross(e)
    op.broadcast([i for i in range(len(op.inputs)) if op.has(i)])
    for output in (1, 2):
        op.set(output, [*axes[:axis], *(op.dim(1) for _ in axes[axis:])])


@rule("GroupNormalization")
def group_norm(op: Op) -> None:
    """Normalise within each of num_groups groups: whole groups go exactly, places in a group and positions cross.

    Scale and bias are per group before opset 21, per channel since.

    Spec: https://onnx.ai/onnx/operators/onnx__GroupNormalization.html.
    """
    scale = "[g]" if op.node.version < 21 else "[(g c)]"
    apply(op, f"X[n (g ~c) ~*s], scale{scale}, bias{scale} -> Y[n (g c) *s]; num_groups = g")


@rule("LpNormalization")
def lp_normalization(op: Op) -> None:
    """Divide by the norm over `axis`. Spec: https://onnx.ai/onnx/operators/onnx__LpNormalization.html."""
    axes = op.axes(0)
    op.cross(axes[op.attr("axis", -1)])
    op.set(0, axes)


@rule("MeanVarianceNormalization")
def mean_variance_normalization(op: Op) -> None:
    """Standardise over `axes`, (0, 2, 3) by default.

    Spec: https://onnx.ai/onnx/operators/onnx__MeanVarianceNormalization.html.
    """
    axes = op.axes(0)
    for axis in op.attr("axes", [0, 2, 3]):
        op.cross(axes[axis])
    op.set(0, axes)


rule(
    "LRN",
    "X[n ~c *s] -> Y[n c *s]",
    doc="Divide by a sum of squares of neighbouring channels: they matter, so removal changes statistics. "
    "Spec: https://onnx.ai/onnx/operators/onnx__LRN.html.",
)


@rule("Softmax", "LogSoftmax", "Hardmax")
def softmax(op: Op) -> None:
    """Normalise over `axis`, before opset 13 over all axes from it on; Hardmax picks one.

    Spec: https://onnx.ai/onnx/operators/onnx__Softmax.html.
    """
    axes = op.axes(0)
    axis = op.positive(op.attr("axis", -1 if op.node.version >= 13 else 1), len(axes))
    for e in [axes[axis]] if op.node.version >= 13 else axes[axis:]:
        op.cross(e)
    op.set(0, axes)
