"""Losses: labels index the classes, which stay whole."""

from spa.algebra.op import Op
from spa.rules import rule


def _loss(op: Op) -> None:
    scores, labels = op.axes(0), op.axes(1)
    op.freeze(scores[1], "has labels that index it")
    if op.has(2):
        op.freeze(op.axes(2)[0], "has labels that index it")
    for a, b in zip((scores[0], *scores[2:]), labels, strict=True):
        op.unify(a, b)
    if op.attr("reduction", "mean") == "none":
        op.set(0, labels)
        return
    for e in labels:
        op.freeze(e, "averages or sums over it")
    op.set(0, ())


@rule("NegativeLogLikelihoodLoss")
def negative_log_likelihood(op: Op) -> None:
    """Reduce input[n c *s] and target[n *s], with weight[c], to [n *s] or a scalar.

    Spec: https://onnx.ai/onnx/operators/onnx__NegativeLogLikelihoodLoss.html.
    """
    _loss(op)


@rule("SoftmaxCrossEntropyLoss")
def softmax_cross_entropy(op: Op) -> None:
    """Reduce scores[n c *s] and labels[n *s], with weights[c], to [n *s] or a scalar; log_prob is [n c *s].

    Spec: https://onnx.ai/onnx/operators/onnx__SoftmaxCrossEntropyLoss.html.
    """
    _loss(op)
    op.set(1, op.axes(0))
