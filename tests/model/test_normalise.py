"""Sequences of constant splits become slices: what splits write is pruned like what slices write."""

from __future__ import annotations

import numpy as np
import onnx.parser
import pytest
from onnx import ModelProto, helper, numpy_helper

from spa.model.normalise import normalise
from spa.running.feeds import make_feeds
from spa.running.runtime import load_session
from tests.oracle import check, distance

HEAD = "a = MatMul(x, w) r = Relu(a) "


def network(body: str, **given: tuple[int, ...] | list[int] | int) -> ModelProto:
    """A network as text; tuples are shapes of random weights, lists and numbers are integers."""
    graph = onnx.parser.parse_graph(f"net (float[n,t,7] x) => (float y) {{ {HEAD}{body} }}")
    rng = np.random.default_rng(3)
    for name, value in {"w": (7, 33), **given}.items():
        random = isinstance(value, tuple)
        array = rng.standard_normal(value).astype(np.float32) if random else np.asarray(value, np.int64)
        graph.initializer.append(numpy_helper.from_array(array, name))
    graph.output[0].CopyFrom(helper.make_tensor_value_info("y", 1, None))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


BY_SIZES = "s = SplitToSequence<axis=-1>(r, k) b = SequenceAt(s, i) c = SequenceAt(s, j) d = Add(b, c) y = MatMul(d, v)"
ONE_BY_ONE = """x2 = Reshape(r, to) s = SplitToSequence<axis=2,keepdims=KEEP>(x2) b = SequenceAt(s, i) c = SequenceAt(s, j)
    d = Sub(b, c) y = MatMul(d, v)"""


@pytest.mark.parametrize(
    ("model", "operator"),
    [
        (network(BY_SIZES, k=[11, 13, 9], i=0, j=0, v=(11, 5)), "Slice"),
        (network(BY_SIZES, k=[11, 11, 11], i=1, j=-1, v=(11, 5)), "Slice"),
        (network(BY_SIZES, k=11, i=2, j=1, v=(11, 5)), "Slice"),
        (network(ONE_BY_ONE.replace("KEEP", "0"), to=[0, 0, 3, 11], i=0, j=-1, v=(11, 5)), "Gather"),
        (network(ONE_BY_ONE.replace("KEEP", "1"), to=[0, 0, 3, 11], i=1, j=-1, v=(11, 5)), "Gather"),
    ],
    ids=["sizes", "from the end", "one size", "single elements", "single elements with their axis"],
)
def test_pieces_of_known_sizes_are_slices(model: ModelProto, operator: str) -> None:
    normal = normalise(model, own=False)
    assert [n.op_type for n in normal.graph.node].count(operator) == 2
    assert not {"SplitToSequence", "SequenceAt"} & {n.op_type for n in normal.graph.node}
    feeds = make_feeds(model, seed=1, batch=3)
    assert distance(load_session(normal).run(None, feeds)[0], load_session(model).run(None, feeds)[0]) == 0
    assert check(normal).groups


@pytest.mark.parametrize("position", [-1, 0])
def test_pieces_of_an_unknown_number_are_counted_from_the_front_alone(position: int) -> None:
    model = network(BY_SIZES, k=11, i=0, j=position, v=(11, 5))
    assert (normalise(model, own=False) is model) == (position < 0)
