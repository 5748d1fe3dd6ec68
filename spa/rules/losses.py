"""Losses: labels index the classes, which stay whole."""

from spa.algebra.op import Op
from spa.rules import rule


def _loss(op: Op) -> None:
    scores, labels = op.axes(0), op.axes(1)
    op.freeze(scores[1], "classes of")
    if op.has(2):
        op.freeze(op.axes(2)[0], "classes of")
    for a, b in zip((scores[0], *scores[2:]), labels, strict=True):
        op.unify(a, b)
    if op.attr("reduction", "mean") == "none":
        op.set(0, labels)
        return
    for e in labels:
        op.freeze(e, "averaged or summed by")
    op.set(0, ())


@rule("NegativeLogLikelihoodLoss")
def negative_log_likelihood(op: Op) -> None:
    """input[n c *s], target[n *s], weight[c] → [n *s], or a scalar. Spec: onnx__NegativeLogLikelihoodLoss.html."""
    _loss(op)


@rule("SoftmaxCrossEntropyLoss")
def softmax_cross_entropy(op: Op) -> None:
    """scores[n c *s], labels[n *s], weights[c] → [n *s] or a scalar, and log_prob[n c *s].

    Spec: onnx__SoftmaxCrossEntropyLoss.html.
    """
    _loss(op)
    op.set(1, op.axes(0))
