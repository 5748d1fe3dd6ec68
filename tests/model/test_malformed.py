"""Malformed and hostile files end in one message, and no value is computed that is too large to keep."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import spa
from spa import extras
from spa.errors import ModelError, UnsupportedError
from spa.model.diagnosis import diagnosed
from spa.model.io import Source, load
from tests.model.test_writing import network


def without_an_operand(model: ModelProto) -> None:
    del model.graph.node[0].input[1]


def with_an_attribute_twice(model: ModelProto) -> None:
    model.graph.node[0].CopyFrom(helper.make_node("Gemm", ["x", "w1"], ["a"]))
    for _ in range(2):
        model.graph.node[0].attribute.append(helper.make_attribute("transB", 0))


def with_an_initializer_twice(model: ModelProto) -> None:
    model.graph.initializer.add().CopyFrom(model.graph.initializer[0])


def with_an_initializer_twice_in_a_branch(model: ModelProto) -> None:
    branches = []
    for name in ("then", "else"):
        value = numpy_helper.from_array(np.zeros(2, np.float32), f"{name}_value")
        info = helper.make_tensor_value_info(value.name, TensorProto.FLOAT, [2])
        branches.append(helper.make_graph([], name, [], [info], [value, value]))
    condition = numpy_helper.from_array(np.array(True), "condition")
    model.graph.initializer.append(condition)
    node = helper.make_node("If", ["condition"], ["unused"], then_branch=branches[0], else_branch=branches[1])
    model.graph.node.append(node)


def with_an_if_that_reads_nothing(model: ModelProto) -> None:
    with_an_initializer_twice_in_a_branch(model)
    node = model.graph.node[-1]
    del node.input[:]
    for attribute in node.attribute:
        del attribute.g.initializer[1:]


def with_an_attribute_missing_before_an_if(model: ModelProto) -> None:
    with_an_initializer_twice_in_a_branch(model)
    for attribute in model.graph.node[-1].attribute:
        del attribute.g.initializer[1:]
    model.graph.node[-1].input[0] = "spread"
    model.graph.node.insert(0, helper.make_node("SpaceToDepth", ["x"], ["spread"]))


def with_recursive_functions(model: ModelProto) -> None:
    for name, other in (("A", "B"), ("B", "A")):
        node = helper.make_node(other, ["X"], ["Y"], domain="rec")
        model.functions.append(helper.make_function("rec", name, ["X"], ["Y"], [node], [helper.make_opsetid("rec", 1)]))
    model.opset_import.append(helper.make_opsetid("rec", 1))
    model.graph.node[1].CopyFrom(helper.make_node("A", ["a"], ["r"], domain="rec"))


def with_a_cast_to_nothing(model: ModelProto) -> None:
    sizes = numpy_helper.from_array(np.asarray([1, 2]), "sizes")
    model.graph.initializer.append(sizes)
    model.graph.node.append(helper.make_node("Cast", ["sizes"], ["z"]))


def with_an_operator_that_is_no_text(model: ModelProto) -> bytes:
    return model.SerializeToString().replace(b"Relu", b"\xff\xff\xff\xff")


def with_a_tensor_that_is_no_text(model: ModelProto) -> bytes:
    model.graph.node[1].output[0] = model.graph.node[2].input[0] = "rrrr"
    return model.SerializeToString().replace(b"rrrr", b"\xff\xff\xff\xff")


def with_a_type_that_there_is_not(model: ModelProto) -> None:
    model.graph.initializer[0].data_type = 999


def with_too_few_values(model: ModelProto) -> None:
    model.graph.initializer[1].raw_data = b"1234"


def with_a_negative_size(model: ModelProto) -> None:
    model.graph.initializer[0].dims[0] = -7


@pytest.mark.parametrize(
    "spoil",
    [
        without_an_operand,
        with_an_attribute_twice,
        with_an_initializer_twice,
        with_an_initializer_twice_in_a_branch,
        with_an_if_that_reads_nothing,
        with_an_attribute_missing_before_an_if,
        with_recursive_functions,
        with_a_cast_to_nothing,
        with_an_operator_that_is_no_text,
        with_a_tensor_that_is_no_text,
        with_a_type_that_there_is_not,
        with_too_few_values,
        with_a_negative_size,
    ],
)
@pytest.mark.parametrize("criterion", ["l2", "obspa"])
def test_a_malformed_model_is_refused_with_one_message(
    tmp_path: Path, spoil: Callable[[ModelProto], bytes | None], criterion: str
) -> None:
    model = network()
    path = tmp_path / "m.onnx"
    path.write_bytes(spoil(model) or model.SerializeToString())
    with pytest.raises(ModelError) as refusal:
        spa.prune(path, criterion=criterion, ratio=0.3, round_to=1).save(tmp_path / "o.onnx")
    assert len(str(refusal.value).splitlines()) == 1
    assert [f.name for f in tmp_path.iterdir()] == ["m.onnx"]


def test_what_nobody_foresaw_in_simplification_is_the_models_fault_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def stumble(source: Source) -> Source:
        raise KeyError("a bug")

    monkeypatch.setattr("spa.api.simplified", stumble)
    with pytest.raises(KeyError):
        spa.analyze(network())
    spoilt = network()
    spoilt.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(ModelError, match="the model is malformed: No Op registered for NoSuchOperator"):
        spa.analyze(spoilt)


def test_what_nobody_foresaw_is_the_models_fault_only_where_the_checker_says_so() -> None:
    with pytest.raises(KeyError), diagnosed(Source(network())):
        raise KeyError("a bug")
    spoilt = network()
    spoilt.graph.node[0].op_type = "NoSuchOperator"
    words = "the model is malformed: No Op registered for NoSuchOperator"
    with pytest.raises(ModelError, match=words), diagnosed(Source(spoilt)):
        raise KeyError("which follows from it")


def shape_arithmetic(nodes: list[object], constants: dict[str, np.ndarray]) -> ModelProto:
    model = network()
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items())
    model.graph.output.append(helper.make_empty_tensor_value_info("z"))
    return model


NODE = helper.make_node
BOMBS = {
    "Tile": ([NODE("Tile", ["a1", "n"], ["z"])], {"a1": [1, 2], "n": [500_000_000]}),
    "Tile of weights": (
        [NODE("Tile", ["w", "n"], ["t"]), NODE("ReduceMax", ["t"], ["m"]), NODE("Mul", ["x", "m"], ["z"])],
        {"w": np.ones(2, np.float32), "n": [500_000_000]},
    ),
    "Expand": ([NODE("Expand", ["a1", "n"], ["e"]), NODE("Neg", ["e"], ["z"])], {"a1": [1], "n": [500_000_000]}),
    "outer": (
        [NODE("Unsqueeze", ["v", "one"], ["u"]), NODE("Mul", ["u", "v"], ["z"])],
        {"v": np.arange(4000), "one": [1]},
    ),
    "ConstantOfShape": (
        [NODE("ConstantOfShape", ["n"], ["z"], value=numpy_helper.from_array(np.asarray([1])))],
        {"n": [2**32, 2**32]},  # whose product wraps around to 0
    ),
    "Range": ([NODE("Range", ["s", "n", "s"], ["z"])], {"s": np.asarray(1), "n": np.asarray(2**62)}),
    "Gather": ([NODE("Gather", ["v", "i"], ["z"])], {"v": np.ones((2, 2000), np.int64), "i": np.zeros(4000, np.int64)}),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_value_too_large_to_keep_is_not_computed(bomb: str) -> None:
    import tracemalloc

    source = shape_arithmetic(*BOMBS[bomb])
    spa.analyze(network())  # imports what it needs
    tracemalloc.start()
    began = time.monotonic()
    try:
        spa.analyze(source)
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()
    assert time.monotonic() - began < 5


def test_an_axis_of_very_many_channels_is_frozen() -> None:
    model = shape_arithmetic([NODE("Tile", ["v", "n"], ["z"])], {"v": np.ones(2, np.float32), "n": [500_000_000]})
    found = next(g for g in spa.analyze(model).groups if g.size > 2**22)
    assert found.frozen is not None


def test_packages_that_clash_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def clash() -> None:
        raise ValueError("operator 'my::Op' has a rule already. Remove one of them.")

    with pytest.raises(UnsupportedError, match="the package 'theirs' cannot be used: ValueError: operator 'my::Op'"):
        extras.load_entries([SimpleNamespace(name="theirs", load=clash)])


def test_names_of_any_letters_are_text() -> None:
    model = network()
    model.graph.node[0].name = "φ层"
    assert load(model).model.graph.node[0].name == "φ层"


def test_types_without_shape_are_no_bomb() -> None:
    model = network()
    model.graph.value_info.append(helper.make_tensor_value_info("a", TensorProto.FLOAT, None))
    assert spa.analyze(model).groups
