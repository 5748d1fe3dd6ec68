"""Fourier transforms: batches pass, the transformed axis stays whole."""

from spa.algebra.op import Op
from spa.rules import rule


@rule("DFT")
def dft(op: Op) -> None:
    """Transform along one axis; the last axis holds real and imaginary parts.

    `axis` is an attribute (1 by default) before opset 20, the third operand (-2 by default) since.

    Spec: https://onnx.ai/onnx/operators/onnx__DFT.html.
    """
    axes, shape = op.axes(0), op.out_shapes[0] or ()
    given = op.attr("axis", 1) if op.node.version < 20 else (op.ints("axis", 2) or [-2])[0]
    whole = {op.positive(given, len(axes)), len(axes) - 1}
    for axis in whole:
        op.freeze(axes[axis], "transforms it")
    op.set(0, [op.opaque(shape[i]) if i in whole else e for i, e in enumerate(axes)])


rule(
    "STFT",
    "signal[b *t], frame_step, window?, frame_length? -> output[b *f]; frozen *t: transforms it",
    doc="Transforms of frames pass the batch alone. Spec: https://onnx.ai/onnx/operators/onnx__STFT.html.",
)
