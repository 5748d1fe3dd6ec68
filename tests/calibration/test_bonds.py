"""Made-up inputs that must agree with one another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from spa.calibration.bonds import Bonds
from spa.calibration.synthetic import Synthesiser
from spa.running.feeds import make_feeds

F, I64 = TensorProto.FLOAT, TensorProto.INT64


def model(nodes: list[Any], inputs: dict[str, tuple[int, list[Any]]], tensors: dict[str, np.ndarray]) -> ModelProto:
    values = [helper.make_tensor_value_info(name, *about) for name, about in inputs.items()]
    output = helper.make_tensor_value_info("y", F, None)
    weights = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = helper.make_graph(nodes, "g", values, [output], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def message_passing(nodes: Any = "num_nodes") -> ModelProto:
    """A layer of a graph network: messages of the edges' sources are added up at their targets."""
    return model(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("Gather", ["edges", "zero"], ["from"], axis=0),
            helper.make_node("Gather", ["edges", "one"], ["to"], axis=0),
            helper.make_node("Gather", ["h", "from"], ["message"], axis=0),
            helper.make_node("Unsqueeze", ["to", "last"], ["rows"]),
            helper.make_node("ScatterND", ["h", "rows", "message"], ["y"], reduction="add"),
        ],
        {"x": (F, [nodes, 6]), "edges": (I64, [2, "num_edges"])},
        {
            "w": np.ones((6, 5), np.float32),
            "zero": np.array(0),
            "one": np.array(1),
            "last": np.array([1]),
        },
    )


def test_edges_join_nodes_that_are_there() -> None:
    maker = Synthesiser(message_passing())
    batches = maker.batches(40, batch=16)
    assert [len(b["x"]) for b in batches] == [16, 16, 8]
    for batch in batches:
        assert batch["edges"].min() >= 0
        assert batch["edges"].max() == len(batch["x"]) - 1  # of some 128 edges
    assert "made-up inputs agree: edges below the size of x[0]" in maker.notes


def test_edges_of_a_graph_of_fixed_size() -> None:
    (batch, *_) = Synthesiser(message_passing(9)).batches(9)
    assert set(np.unique(batch["edges"])) == set(range(9))


def test_targets_alone_are_bounded_by_what_they_are_added_to() -> None:
    graph = message_passing()
    del graph.graph.node[1], graph.graph.node[2]
    graph.graph.input.append(helper.make_tensor_value_info("message", F, ["num_edges", 5]))
    (batch,) = Synthesiser(graph).batches(12)
    assert batch["edges"].max() == 11


def regions(features: bool = False) -> ModelProto:
    """Features of regions of an image, or of features that are four times smaller than it."""
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["c"], strides=[4, 4]),
        helper.make_node(
            "RoiAlign",
            ["image" if features else "c", "where", "which"],
            ["y"],
            output_height=2,
            output_width=2,
            spatial_scale=0.25,
        ),
    ]
    inputs = {"image": (F, ["n", 3, 32, 64]), "where": (F, ["r", 4]), "which": (I64, ["r"])}
    return model(nodes[features:], inputs, {} if features else {"w": np.ones((8, 3, 4, 4), np.float32)})


@pytest.mark.parametrize(("features", "width", "height"), [(False, 64, 32), (True, 256, 128)])
def test_regions_lie_in_their_image(features: bool, width: int, height: int) -> None:
    maker = Synthesiser(regions(features), sizes={"r": 200})
    (batch,) = maker.batches(3)
    x1, y1, x2, y2 = batch["where"].T
    assert (x1 < x2).all() and (y1 < y2).all() and batch["where"].min() >= 0
    assert 0.9 * width < x2.max() <= width and 0.9 * height < y2.max() <= height
    assert "where are regions of image" in maker.notes[-1]


def test_regions_name_images_that_are_there() -> None:
    (batch,) = Synthesiser(regions(), sizes={"r": 200}).batches(3)
    assert set(np.unique(batch["which"])) == {0, 1, 2}


def test_the_corners_of_boxes_are_in_order() -> None:
    """As of documents whose words have places: tables of left edges, and of widths, which must not be negative."""
    nodes = [
        helper.make_node("Gather", ["bbox", "zero"], ["left"], axis=2),
        helper.make_node("Gather", ["bbox", "two"], ["right"], axis=2),
        helper.make_node("Sub", ["right", "left"], ["width"]),
        helper.make_node("Gather", ["table", "right"], ["a"]),
        helper.make_node("OneHot", ["width", "depth", "values"], ["b"]),
        helper.make_node("ReduceSum", ["b", "last"], ["c"]),
        helper.make_node("Add", ["a", "c"], ["y"]),
    ]
    tensors = {"zero": np.array(0), "two": np.array(2), "table": np.ones((64, 1), np.float32)}
    tensors |= {"depth": np.array(64), "values": np.array([0, 1], np.float32), "last": np.array([-1])}
    graph = model(nodes, {"bbox": (I64, ["n", "seq", 4])}, tensors)
    boxes = make_feeds(graph, seed=3, batch=8)["bbox"]
    assert (boxes[..., :2] <= boxes[..., 2:]).all() and 50 < boxes.max() < 64
    named = model([helper.make_node("Identity", ["boxes"], ["y"])], {"boxes": (F, ["n", 40, 4])}, {})
    (batch,) = Synthesiser(named).batches(8)
    assert (batch["boxes"][..., :2] <= batch["boxes"][..., 2:]).all()
    assert batch["boxes"].min() >= 0 and batch["boxes"].max() < 1


def test_bonds_that_the_network_refuses_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Bonds(indices={"edges": 1 << 20})
    monkeypatch.setattr("spa.calibration.synthetic.bonds_of", lambda *_: wrong)
    (batch,) = Synthesiser(message_passing()).batches(8)
    assert batch["edges"].max() < 8
