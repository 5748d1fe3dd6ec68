"""Inputs that state how many steps there are get that number, whatever they are called."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import spa
from spa.running.feeds import make_feeds, working_feeds
from spa.running.ranges import lengths_for
from spa.running.runtime import input_specs, load_session


def decoder(*, cache: bool, less: bool = False) -> ModelProto:
    """A layer of grouped-query attention of which inputs `a` and `b` tell the lengths; `less` gives `b` one too few."""
    rng = np.random.default_rng(0)
    shapes = {"table": (50, 16), "wq": (16, 32), "wk": (16, 16), "wv": (16, 16), "wo": (32, 16)}
    weights = [
        numpy_helper.from_array((rng.standard_normal(s) / np.sqrt(s[0])).astype(np.float32), n)
        for n, s in shapes.items()
    ]
    weights.append(numpy_helper.from_array(np.asarray(1, np.int32), "one"))
    nodes = [helper.make_node("Gather", ["table", "ids"], ["x"])]
    nodes += [helper.make_node("MatMul", ["x", w], [o]) for w, o in (("wq", "q"), ("wk", "k"), ("wv", "v"))]
    nodes += [helper.make_node("Add", ["b", "one"], ["total"])] if less else []
    past, present = (["pk", "pv"], ["nk", "nv"]) if cache else (["", ""], [])
    operands = ["q", "k", "v", *past, "a", "total" if less else "b"]
    sizes = {"num_heads": 4, "kv_num_heads": 2}
    nodes += [
        helper.make_node("GroupQueryAttention", operands, ["h", *present], domain="com.microsoft", **sizes),
        helper.make_node("MatMul", ["h", "wo"], ["y"]),
    ]
    floats, ints = TensorProto.FLOAT, TensorProto.INT32
    inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", "s"])]
    inputs += [helper.make_tensor_value_info(n, floats, ["n", 2, "p", 8]) for n in past if n]
    inputs += [helper.make_tensor_value_info("a", ints, ["n"]), helper.make_tensor_value_info("b", ints, [])]
    outputs = [helper.make_tensor_value_info("y", floats, ["n", "s", 16])]
    outputs += [helper.make_tensor_value_info(n, floats, ["n", 2, "t", 8]) for n in present]
    graph = helper.make_graph(nodes, "decoder", inputs, outputs, weights)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


@pytest.mark.parametrize("cache", [False, True])
def test_lengths_are_those_of_the_steps_and_the_cache(cache: bool) -> None:
    feeds = make_feeds(decoder(cache=cache), sizes={"s": 5, **({"p": 7} if cache else {})})
    total = 5 + 7 * cache
    assert feeds["b"] == total
    assert feeds["a"].tolist() == [total - 1] * 2


def test_what_is_added_on_the_way_is_taken_off() -> None:
    assert make_feeds(decoder(cache=False, less=True), sizes={"s": 5})["b"] == 4


def test_a_model_without_such_an_operator_states_no_lengths() -> None:
    model = decoder(cache=False)
    assert set(lengths_for(model, input_specs(model)).more) == {"a", "b"}
    for node in model.graph.node:
        node.op_type = "MultiHeadAttention" if node.op_type == "GroupQueryAttention" else node.op_type
    assert not lengths_for(model, input_specs(model)).more


def test_decoders_that_are_told_lengths_are_run_and_scored() -> None:
    model = decoder(cache=True)
    assert working_feeds(load_session(model), model=model)["b"] > 6
    result = spa.prune(model, ratio=0.05, round_to=1, samples=8, insist=True)
    assert result.report.calibration is not None
