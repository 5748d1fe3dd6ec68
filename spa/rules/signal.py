"""Fourier transforms: batches pass, the transformed axis stays whole."""

from spa.algebra.op import Op
from spa.rules import rule


@rule("DFT")
def dft(op: Op) -> None:
    """A transform along one axis; the last axis holds real and imaginary parts. Spec: onnx__DFT.html.

    `axis` is an attribute (1 by default) before opset 20, the third operand (-2 by default) since.
    """
    axes, shape = op.axes(0), op.out_shapes[0] or ()
    given = op.attr("axis", 1) if op.node.version < 20 else (op.ints("axis", 2) or [-2])[0]
    whole = {op.positive(given, len(axes)), len(axes) - 1}
    for axis in whole:
        op.freeze(axes[axis], "transformed by")
    op.set(0, [op.opaque(shape[i]) if i in whole else e for i, e in enumerate(axes)])


@rule("STFT")
def stft(op: Op) -> None:
    """Transforms of frames: signal[b t c] → [b frames bins 2]. Spec: onnx__STFT.html."""
    batch, *rest = op.axes(0)
    for e in rest:
        op.freeze(e, "transformed by")
    op.set(0, [batch, *(op.opaque(n) for n in (op.out_shapes[0] or ())[1:])])
