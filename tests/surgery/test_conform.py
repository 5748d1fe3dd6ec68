"""What comes out is valid for the next tool, and what is unusual in a file stands in no criterion's way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import spa
from spa.errors import ModelError, PlanError

FLOAT = TensorProto.FLOAT
RNG = np.random.default_rng(0)
NODE = helper.make_node


def weight(name: str, *shape: int) -> TensorProto:
    return numpy_helper.from_array((RNG.standard_normal(shape) / 3).astype(np.float32), name)


def const(name: str, value: object) -> TensorProto:
    return numpy_helper.from_array(np.asarray(value), name)


def value(name: str, shape: list[int | str] | None, kind: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def mlp(*after: onnx.NodeProto, out: str = "y", shape: list[int | str] | None, **more: object) -> ModelProto:
    """Two layers, whose result ``h`` goes through further nodes."""
    nodes = [NODE("MatMul", ["x", "w1"], ["a"]), NODE("Relu", ["a"], ["r"]), NODE("MatMul", ["r", "w2"], ["h"]), *after]
    inputs = [value("x", ["N", 7]), *more.get("inputs", ())]  # type: ignore[misc] # of one kind each
    weights = [weight("w1", 7, 31), weight("w2", 31, 13), *more.get("weights", ())]  # type: ignore[misc]
    graph = helper.make_graph(nodes, "g", inputs, [value(out, shape)], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def declared() -> ModelProto:
    model = mlp(out="h", shape=["N", 13])
    model.graph.value_info.extend(value(t.name, list(t.dims)) for t in model.graph.initializer)
    return model


def data_dependent(threshold: float) -> ModelProto:
    return mlp(
        NODE("ReduceMax", ["h"], ["most"], axes=[1], keepdims=0),
        NODE("Greater", ["most", "threshold"], ["g"]),
        NODE("Compress", ["h", "g"], ["y"], axis=0),
        shape=["D", 13],
        weights=[const("threshold", np.float32(threshold))],
    )


def scalar() -> ModelProto:
    return mlp(NODE("ReduceMean", ["h"], ["y"], keepdims=0), shape=[])


def sparse() -> ModelProto:
    model = mlp(NODE("MatMul", ["h", "s"], ["y"]), shape=["N", 11])
    found = model.graph.sparse_initializer.add(dims=[13, 11])
    found.values.CopyFrom(weight("s", 6))
    found.indices.CopyFrom(const("", np.asarray([0, 17, 40, 77, 100, 141])))
    return model


def sparse_by_axis() -> ModelProto:
    model = sparse()
    flat = numpy_helper.to_array(model.graph.sparse_initializer[0].indices)
    model.graph.sparse_initializer[0].indices.CopyFrom(const("", np.stack(np.unravel_index(flat, (13, 11)), 1)))
    return model


def top_by_data() -> ModelProto:
    return mlp(
        NODE("TopK", ["h", "k"], ["y", "positions"], axis=1),
        shape=["N", "K"],
        inputs=[value("k", [1], TensorProto.INT64)],
    )


def old_convolutions() -> ModelProto:
    """IR version 3, in which every initializer is an input; obspa gives the second layer a bias."""
    weights = [weight("w1", 31, 7, 3, 3), weight("w2", 13, 31, 3, 3)]
    nodes = [NODE("Conv", ["x", "w1"], ["a"]), NODE("Relu", ["a"], ["r"]), NODE("Conv", ["r", "w2"], ["y"])]
    inputs = [value("x", ["N", 7, 11, 11]), *(value(t.name, list(t.dims)) for t in weights)]
    graph = helper.make_graph(nodes, "g", inputs, [value("y", ["N", 13, 7, 7])], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 9)], ir_version=3)


def old_shared_constant() -> ModelProto:
    """IR version 3; two groups share a small constant, of which surgery makes two."""
    weights = [weight("w1", 7, 31), weight("v1", 7, 31), weight("w2", 31, 13), weight("v2", 31, 13)]
    weights.append(const("s", np.full(31, 0.5, np.float32)))
    nodes = [
        NODE("MatMul", ["x", "w1"], ["a"]),
        NODE("Mul", ["a", "s"], ["as"]),
        NODE("MatMul", ["as", "w2"], ["c"]),
        NODE("MatMul", ["x", "v1"], ["b"]),
        NODE("Mul", ["b", "s"], ["bs"]),
        NODE("MatMul", ["bs", "v2"], ["d"]),
        NODE("Add", ["c", "d"], ["y"]),
    ]
    inputs = [value("x", ["N", 7]), *(value(t.name, list(t.dims)) for t in weights)]
    graph = helper.make_graph(nodes, "g", inputs, [value("y", ["N", 13])], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 9)], ir_version=3)


KINDS = {
    "declared": declared,
    "rows by data": lambda: data_dependent(0.5),
    "no rows": lambda: data_dependent(1e6),
    "scalar": scalar,
    "sparse": sparse,
    "sparse by axis": sparse_by_axis,
    "top by data": top_by_data,
    "old convolutions": old_convolutions,
    "old shared constant": old_shared_constant,
}


def valid(model: ModelProto | str) -> None:
    onnx.checker.check_model(model, full_check=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("criterion", ["l2", "obspa"])
def test_the_result_is_valid_and_equals_the_masked_original(tmp_path: Path, kind: str, criterion: str) -> None:
    model = KINDS[kind]()
    onnx.checker.check_model(model, full_check=not kind.startswith("sparse"))  # inference does not know these
    result = spa.prune(model, criterion=criterion, ratio=0.3, round_to=1, samples=32)
    valid(result.model)
    result.save(tmp_path / "o.onnx")
    valid(str(tmp_path / "o.onnx"))
    proof = result.prove()
    assert proof.holds
    assert proof.effect > 0 or kind == "no rows" or "sparse" in kind  # of which most rows are zeros


def test_declarations_of_initializers_follow_them() -> None:
    model = spa.prune(declared(), criterion="obspa", ratio=0.3, round_to=1, samples=32).model
    sizes = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.value_info}
    for tensor in model.graph.initializer:
        assert sizes.get(tensor.name, list(tensor.dims)) == list(tensor.dims)
    assert sizes["w1"][1] < 31


@pytest.mark.parametrize("make", [old_convolutions, old_shared_constant])
def test_before_ir_4_every_initializer_is_an_input(make: object) -> None:
    model = spa.prune(make(), criterion="obspa", ratio=0.3, round_to=1, samples=32).model  # type: ignore[operator]
    assert {t.name for t in model.graph.initializer} <= {i.name for i in model.graph.input}
    assert len(model.graph.initializer) > (2 if make is old_convolutions else 5)  # new ones are among them


@pytest.mark.parametrize("number", [np.nan, np.inf, np.finfo(np.float32).min])
@pytest.mark.parametrize("criterion", ["l2", "obspa"])
def test_weights_that_are_not_finite_leave_their_group_alone(number: float, criterion: str) -> None:
    model = mlp(
        NODE("Relu", ["x"], ["x2"]),
        NODE("MatMul", ["x2", "v1"], ["b"]),
        NODE("MatMul", ["b", "v2"], ["z"]),
        out="h",
        shape=["N", 13],
        weights=[weight("v1", 7, 29), weight("v2", 29, 11)],
    )
    model.graph.output.append(value("z", ["N", 11]))
    spoilt = numpy_helper.to_array(model.graph.initializer[0]).copy()
    spoilt[2, 3] = number
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(spoilt, "w1"))
    result = spa.prune(model, criterion=criterion, ratio=0.2, round_to=1, samples=32)
    assert ("w1[1]", 31, "'w1' holds values that are not finite, or whose squares are not") in result.report.skipped
    assert set(result.plan.kept) == {"v1[1]"}
    with pytest.raises(PlanError, match="holds values that are not finite"):
        spa.prune(model, criterion=criterion, ratio=0.2, round_to=1, ignore=["v1"], samples=32)


def test_an_axis_of_size_zero_has_nothing_to_learn_from() -> None:
    model = mlp(out="h", shape=[0, 13])
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 0
    assert spa.prune(model, criterion="l2", ratio=0.3, round_to=1).plan.removes
    with pytest.raises(ModelError, match="'x' is declared with a size of 0"):
        spa.prune(model, ratio=0.3, round_to=1)


def test_external_data_in_a_branch_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = weight("k", 13)
    (tmp_path / "k.bin").write_bytes(inner.raw_data)
    inner.ClearField("raw_data")
    inner.data_location = TensorProto.EXTERNAL
    inner.external_data.add(key="location", value="k.bin")
    then = helper.make_graph([NODE("Add", ["h", "k"], ["p"])], "then", [], [value("p", None)], [inner])
    other = helper.make_graph([NODE("Identity", ["h"], ["q"])], "else", [], [value("q", None)])
    model = mlp(
        NODE("If", ["flag"], ["y"], then_branch=then, else_branch=other),
        shape=["N", 13],
        inputs=[value("flag", [1], TensorProto.BOOL)],
    )
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    result = spa.prune(tmp_path / "m.onnx", ratio=0.3, round_to=1, samples=32)
    result.save("o.onnx")
    assert result.prove().holds


@pytest.mark.parametrize("places", [[0, 500], [[0, 0], [1, 99]]])
def test_a_sparse_initializer_that_contradicts_itself_is_refused(places: list[object]) -> None:
    model = sparse()
    model.graph.sparse_initializer[0].values.CopyFrom(weight("s", 2))
    model.graph.sparse_initializer[0].indices.CopyFrom(const("", np.asarray(places)))
    with pytest.raises(ModelError, match="the sparse initializer 's' is malformed"):
        spa.analyze(model)
