"""Graphs that take one size along axes that are declared open: it is found among what their constants state, or said."""

from __future__ import annotations

import numpy as np
import onnx.parser
import pytest
from onnx import ModelProto, helper, numpy_helper

import spa
from spa.algebra.axes import leaves
from spa.coupling.analysis import couple
from spa.errors import ModelError
from spa.model.graph import Graph
from spa.running.runtime import load_session
from tests.oracle import Net, check

TAGGER = "e = Gather(table, ids) {} h = MatMul(r, w) a = Relu(h) y = MatMul(a, u)"
IDS = "int64[batch,sequence] ids"
IMAGE = "c = Conv<strides=[4,4],kernel_shape=[4,4]>(x, k) a = Relu(c) f = Flatten(a) h = Gemm(f, v) b = Relu(h) y = Gemm(b, u)"
SERIES = IMAGE.replace("[4,4]", "[4]")
HEADS = """r1 = Reshape(e, split) t = Transpose<perm=[0,2,1,3]>(r1) t1 = Transpose<perm=[0,2,1,3]>(t) r = Reshape(t1, whole)"""


def network(body: str, inputs: str, **weights: tuple[int, ...] | list[int]) -> ModelProto:
    """A network as text; tuples are shapes of random weights, lists are integers."""
    graph = onnx.parser.parse_graph(f"net ({inputs}) => (float y) {{ {body} }}")
    rng = np.random.default_rng(3)
    for name, given in weights.items():
        random = isinstance(given, tuple)
        value = rng.standard_normal(given).astype(np.float32) if random else np.asarray(given, np.int64)
        graph.initializer.append(numpy_helper.from_array(value, name))
    graph.output[0].CopyFrom(helper.make_tensor_value_info("y", 1, None))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def tagger(step: str, rows: int = 12, **more: tuple[int, ...] | list[int]) -> ModelProto:
    return network(TAGGER.format(step), IDS, table=(50, 12), w=(rows, 23), u=(23, 5), **more)


@pytest.mark.parametrize(
    ("model", "shapes"),
    [
        (tagger("r = Reshape(e, to)", to=[2, 7, 12]), {"ids": (2, 7)}),
        (tagger("r = Reshape(e, to)", to=[1, 50, 12]), {"ids": (1, 50)}),
        (tagger("r = Reshape(e, to)", to=[-1, 23, 12]), {"ids": (2, 23)}),
        (tagger("r = Reshape(e, to)", to=[3, -1, 12]), {"ids": (3, 128)}),
        (tagger("r = Reshape(e, to)", rows=312, to=[-1, 312]), {"ids": (2, 26)}),
        (tagger("r = Add(e, p)", p=(1, 37, 12)), {"ids": (2, 37)}),
        (tagger(HEADS, split=[3, 19, 2, 6], whole=[3, 19, 12]), {"ids": (3, 19)}),
        (
            network(IMAGE, "float[batch,3,height,width] x", k=(7, 3, 4, 4), v=(847, 23), u=(23, 5)),
            {"x": (2, 3, 44, 44)},
        ),
        (network(SERIES, "float[batch,3,time] x", k=(7, 3, 4), v=(105, 23), u=(23, 5)), {"x": (2, 3, 60)}),
    ],
    ids=[
        "all of a target",
        "a batch of one",
        "steps of a target",
        "batch of a target",
        "steps times channels",
        "a table of positions",
        "heads",
        "an image flattened",
        "a series flattened",
    ],
)
def test_sizes_that_constants_state_are_found_and_inputs_made_at_them(
    model: ModelProto, shapes: dict[str, tuple[int, ...]]
) -> None:
    result = spa.prune(model, ratio=0.3, round_to=1, samples=16, insist=True)
    assert result.report.inputs == shapes
    assert not any("onnxruntime refuses the sizes" in note for note in result.report.notes)
    rng = np.random.default_rng(0)
    feeds = {n: rng.integers(0, 50, s) if n == "ids" else rng.random(s, np.float32) for n, s in shapes.items()}
    (before,), (after,) = (load_session(m).run(None, feeds) for m in (model, result.model))
    assert before.shape == after.shape and np.isfinite(after).all()


def test_sizes_that_are_not_found_are_said_and_may_be_given() -> None:
    both = """e = Gather(table, ids) k = Gather(table, other) q = Reshape(e, to) r1 = Reshape(k, other_to)
    t = Transpose<perm=[0,2,1]>(r1) s = MatMul(q, t) h = MatMul(s, w) a = Relu(h) y = MatMul(a, u)"""
    inputs = "int64[batch,source] ids, int64[batch,target] other"
    weights = {"table": (50, 12), "w": (33, 23), "u": (23, 5)}
    model = network(both, inputs, **weights, to=[1, 19, 12], other_to=[1, 33, 12])
    said = r"Reshape 'q' makes \[1, 19, 12\] of \[2, 128, 12\]: sizes are written into the graph\. .*\(--size\)\.$"
    with pytest.raises(ModelError, match=said):
        spa.prune(model, ratio=0.3, criterion="l2")
    result = spa.prune(model, ratio=0.3, round_to=1, samples=16, insist=True, sizes={"source": 19, "target": 33})
    assert result.report.inputs == {"ids": (1, 19), "other": (1, 33)}


def test_a_batch_stays_open_where_an_image_has_one_size() -> None:
    """A matrix mixes sixteen patches, and a Reshape takes its batch from the input's shape."""
    body = """p = Conv<strides=[8,8],kernel_shape=[8,8]>(x, k) t0 = Reshape(p, rows) t = MatMul(t0, mix)
    t1 = Transpose<perm=[0,2,1]>(t) h = MatMul(t1, w) a = Relu(h) shape = Shape(x) first = Slice(shape, zero, one)
    to = Concat<axis=0>(first, sixteen, four, six) v = Reshape(a, to) s = ReduceSum<keepdims=0>(v, two) y = MatMul(s, u)"""
    weights = {"k": (7, 3, 8, 8), "mix": (16, 16), "w": (7, 24), "u": (6, 5)}
    numbers = {"rows": [0, 7, -1], "zero": [0], "one": [1], "two": [2], "four": [4], "six": [6], "sixteen": [16]}
    model = network(body, "float[batch,3,height,width] x", **weights, **numbers)
    rng = np.random.default_rng(0)
    found = check(model, feeds=[{"x": rng.random((batch, 3, 32, 32), np.float32)} for batch in (1, 2, 4)])
    assert sorted(g.size for g in found.groups) == [4, 6, 7]


def test_a_table_of_positions_bounds_the_sizes() -> None:
    """128 tokens, the usual number, are more than a table of 40 positions has."""
    net = Net()
    x = net.input("x", ["batch", "tokens", 6])
    length = net.node("Gather", net.node("Shape", x), net.constant(np.array(1)))
    positions = net.node("Range", net.constant(np.array(0)), length, net.constant(np.array(1)))
    table = net.weight(40, 6, name="table")
    h = net.node("Add", x, net.node("Gather", table, positions))
    analysis = couple(Graph(net.model(net.matmul(net.node("Relu", net.matmul(h, 6, 9)), 9, 2))))
    assert analysis.points.first.shape["x"][1] <= 40
    assert all(
        d.size > 0 for axes in analysis.axes.values() for e in axes or () for d in leaves(analysis.space.resolve(e))
    )
    with pytest.raises(ModelError, match=r"looks up entry 40 of 40: the model takes no sizes as large"):
        couple(Graph(net.model(h)), {"x[1]": 50})
