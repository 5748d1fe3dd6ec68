"""Models that onnxruntime cannot run are pruned by their weights, written, and said not to have been run."""

from __future__ import annotations

import re
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import spa
from spa.errors import InvariantError, ModelError, UnsupportedError
from spa.exporters.checks import check
from spa.model.graph import Graph
from spa.running.obstacle import obstacle
from tests.oracle import Net


def bfloat16() -> ModelProto:
    net = Net(dtype=TensorProto.BFLOAT16)
    x = net.node("Cast", net.input("x", ["n", 5], TensorProto.FLOAT), to=TensorProto.BFLOAT16)
    hidden = net.node("Relu", net.matmul(x, 5, 11, bias=False))
    net.nodes.append(helper.make_node("Cast", [net.matmul(hidden, 11, 3, bias=False)], ["y"], to=TensorProto.FLOAT))
    return model_of(net)


def plugin(domain: str = "") -> ModelProto:
    net = Net()
    hidden = net.node("Relu", net.matmul(net.input("x", ["n", 5]), 5, 11))
    net.nodes.append(helper.make_node("Plugin_TRT", [net.matmul(hidden, 11, 3)], ["y"], domain=domain))
    return model_of(net, domain)


def strings() -> ModelProto:
    net = Net()
    hidden = net.node("Relu", net.matmul(net.input("x", ["n", 5]), 5, 11))
    net.nodes.append(helper.make_node("Identity", [net.input("words", ["n"], TensorProto.STRING)], ["echo"]))
    net.nodes.append(helper.make_node("Identity", [net.matmul(hidden, 11, 3)], ["y"]))
    model = model_of(net)
    model.graph.output.append(helper.make_tensor_value_info("echo", TensorProto.STRING, ["n"]))
    return model


def model_of(net: Net, domain: str = "") -> ModelProto:
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])]
    graph = helper.make_graph(net.nodes, "net", net.inputs, outputs, list(net.weights.values()))
    opsets = [helper.make_opsetid("", 21), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


MODELS = {
    "bfloat16": (bfloat16, "Could not find an implementation for MatMul"),
    "plugin": (plugin, "No Op registered for Plugin_TRT"),
    "custom domain": (lambda: plugin("my.domain"), "my.domain:Plugin_TRT.* is not a registered"),
    "strings": (strings, "no values can be made up for input 'words'"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_cannot_be_run_is_pruned_by_its_weights_and_said_to_be_unrun(name: str, tmp_path: Path) -> None:
    build, reason = MODELS[name]
    onnx.save(build(), tmp_path / "m.onnx")
    result = spa.prune(tmp_path / "m.onnx", criterion="l2", ratio=0.25, round_to=1)
    (note,) = [note for note in result.report.notes if "has not been run" in note]
    assert re.search(reason, note)
    result.save(tmp_path / "small.onnx")
    weights = onnx.load(tmp_path / "small.onnx").graph.initializer
    (kept,) = result.plan.kept.values()
    dense = next(t for t in build().graph.initializer if t.name == weights[0].name)
    assert numpy_helper.to_array(weights[0]).tobytes() == numpy_helper.to_array(dense)[:, list(kept)].tobytes()
    with pytest.raises((ModelError, UnsupportedError), match=r"l2, say|words"):
        spa.prune(tmp_path / "m.onnx", ratio=0.25)


def test_a_model_that_runs_has_no_obstacle_and_one_that_is_malformed_keeps_its_message(tmp_path: Path) -> None:
    net = Net(dtype=TensorProto.DOUBLE)
    model = net.model(net.matmul(net.input("x", ["n", 5]), 5, 3))
    assert obstacle(Graph(model)) is None
    del model.graph.node[0].input[1]
    onnx.save(model, tmp_path / "m.onnx")
    assert obstacle(Graph(model)) is None
    with pytest.raises(ModelError, match=r"fails onnx\.checker"):
        check(tmp_path / "m.onnx", None)


def test_onnxruntime_may_object_to_nothing_else_in_what_it_cannot_run(tmp_path: Path) -> None:
    model = bfloat16()
    onnx.save(model, tmp_path / "dense.onnx")
    check(tmp_path / "dense.onnx", tmp_path / "dense.onnx", obstacle="it has no kernel")
    narrow = numpy_helper.from_array(np.zeros((10, 3), ml_dtypes.bfloat16), model.graph.node[3].input[1])
    next(t for t in model.graph.initializer if t.name == narrow.name).CopyFrom(narrow)
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(InvariantError, match="does not load"):
        check(tmp_path / "m.onnx", tmp_path / "dense.onnx", obstacle="it has no kernel")
