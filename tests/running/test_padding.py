"""Padded positions are found where the network ignores them, and count in no fit and no comparison."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from spa.coupling.analysis import couple
from spa.coupling.plan import make_plan
from spa.model.graph import Graph
from spa.obspa.readers.base import FitSettings
from spa.obspa.refit import reconstruct
from spa.running.change import Yardstick
from spa.running.live import Live, PaddedBatch
from spa.running.padding import only_real, with_padding
from spa.running.stream import first_samples
from spa.surgery.apply import apply

Array = np.ndarray
NODE = helper.make_node


def attention(heeded: bool = True, pooled: bool = False) -> ModelProto:
    """Tokens that look at each other, but for padded ones if the mask is heeded; then two layers for each token."""
    rng = np.random.default_rng(0)
    weights = {
        "table": rng.standard_normal((50, 8)),
        "a": rng.standard_normal((8, 12)) / 3,
        "b": rng.standard_normal((12, 8)) / 3,
        "one": np.ones(1),
        "large": np.full(1, -1e4 if heeded else 0.0),
    }
    nodes = [
        NODE("Gather", ["table", "ids"], ["x"]),
        NODE("Transpose", ["x"], ["xt"], perm=[0, 2, 1]),
        NODE("MatMul", ["x", "xt"], ["scores"]),
        NODE("Cast", ["mask"], ["m"], to=TensorProto.FLOAT),
        NODE("Sub", ["one", "m"], ["padded"]),
        NODE("Mul", ["padded", "large"], ["bias2"]),
        NODE("Unsqueeze", ["bias2", "axis"], ["bias"]),
        NODE("Add", ["scores", "bias"], ["logits"]),
        NODE("Softmax", ["logits"], ["p"], axis=-1),
        NODE("MatMul", ["p", "x"], ["mixed"]),
        NODE("MatMul", ["mixed", "a"], ["h"]),
        NODE("Relu", ["h"], ["r"]),
        NODE("MatMul", ["r", "b"], ["tokens" if pooled else "y"]),
    ]
    if pooled:
        nodes.append(NODE("ReduceMean", ["tokens"], ["y"], axes=[1], keepdims=0))
    tensors = [numpy_helper.from_array(v.astype(np.float32), n) for n, v in weights.items()]
    tensors.append(numpy_helper.from_array(np.array([1], np.int64), "axis"))
    inputs = [helper.make_tensor_value_info(n, TensorProto.INT64, ["n", "s"]) for n in ("ids", "mask")]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8] if pooled else ["n", "s", 8])
    graph = helper.make_graph(nodes, "g", inputs, [y], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model)


def batch(samples: int = 24, length: int = 6, padded: int = 2, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    mask = np.ones((samples, length), np.int64)
    mask[:, length - padded :] = 0
    return {"ids": rng.integers(1, 50, mask.shape) * mask, "mask": mask}


def test_a_mask_that_the_network_heeds_marks_padding() -> None:
    (found,) = with_padding(Graph(attention()), [batch()])
    assert isinstance(found, PaddedBatch)
    np.testing.assert_array_equal(found.real, batch()["mask"] > 0)


@pytest.mark.parametrize("model", [attention(heeded=False), attention(pooled=True)], ids=["ignored", "pooled over"])
def test_a_mask_is_not_believed_where_an_output_depends_on_padding(model: ModelProto) -> None:
    (found,) = with_padding(Graph(model), [batch()])
    assert not isinstance(found, PaddedBatch)


def test_without_padding_batches_stay_as_they_are() -> None:
    whole, cut = with_padding(Graph(attention()), [batch(padded=0), batch()])
    assert not isinstance(whole, PaddedBatch) and isinstance(cut, PaddedBatch)
    given = [{"ids": batch()["ids"]}]
    assert with_padding(Graph(attention()), given) == given


def test_the_mark_is_of_the_samples_that_are_left() -> None:
    (first,) = first_samples(with_padding(Graph(attention()), [batch()]), 5)
    assert isinstance(first, PaddedBatch) and first.real.shape == (5, 6)
    assert Live(Live(first)).real is first.real
    value = np.arange(5 * 6 * 3).reshape(5, 6, 3)
    np.testing.assert_array_equal(only_real(value, first.real), value[:, :4].reshape(20, 1, 3))


def test_fits_and_comparisons_are_those_of_sequences_without_their_padding() -> None:
    model = attention()
    analysis = couple(Graph(model))
    name = next(g.name for g in analysis.free if g.size == 12)
    plan = make_plan(analysis, {name: np.arange(6)})
    padded = with_padding(analysis.graph, [batch(padded=2)])
    short = [{n: v[:, :4] for n, v in batch(padded=2).items()}]
    results = []
    for batches in (padded, short):
        pruned = apply(analysis, plan)
        reconstruct(analysis, plan, pruned, batches, FitSettings(damping=1e-2, producer_rounds=1))
        found = {t.name: numpy_helper.to_array(t) for t in pruned.graph.initializer}
        results.append((found, Yardstick(analysis.graph, batches).change(pruned).error))
    (a, change_a), (b, change_b) = results
    for weights in ("a", "b"):
        np.testing.assert_allclose(a[weights], b[weights], atol=2e-3)
    assert change_a is not None and change_b is not None
    assert 0.5 < change_a / change_b < 2  # one is relative to the variance over all tokens, the other by position
