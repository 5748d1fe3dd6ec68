"""Weights that an importer marks as tied stay one tensor, however small."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import spa
from spa.coupling.analysis import TIED


def siamese(tied: bool) -> ModelProto:
    """Two inputs through one small weight, each into a reader of its own."""
    rng = np.random.default_rng(0)
    shapes = {"shared": (5, 13), "left": (13, 3), "right": (13, 2)}
    weights = [numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), n) for n, s in shapes.items()]
    if tied:
        weights[0].metadata_props.add(key=TIED, value="true")
    ends = [("a", "h", "left", "y"), ("b", "k", "right", "z")]
    nodes = [
        node
        for entry, hidden, reader, out in ends
        for node in (
            helper.make_node("MatMul", [entry, "shared"], [hidden]),
            helper.make_node("MatMul", [hidden, reader], [out]),
        )
    ]
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 5]) for n in "ab"]
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", w]) for n, w in (("y", 3), ("z", 2))]
    graph = helper.make_graph(nodes, "siamese", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


@pytest.mark.parametrize("tied", [True, False])
def test_marked_weights_are_cut_the_same_for_all_readers(tied: bool) -> None:
    result = spa.prune(siamese(tied), criterion="l2", ratio=0.4, round_to=1)
    assert len(result.report.groups) == (1 if tied else 2)
    copies = [t for t in result.model.graph.initializer if t.name.startswith("shared")]
    assert len(copies) == (1 if tied else 2)
    assert all(any(p.key == TIED for p in t.metadata_props) is tied for t in copies)
