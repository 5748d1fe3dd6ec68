"""The oracle is tested by sabotage: whatever is done wrong, it must fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, numpy_helper

from spa.coupling.analysis import Analysis
from spa.coupling.plan import Plan
from spa.errors import InvariantError
from spa.surgery.apply import apply
from spa.surgery.masking import masked
from tests.oracle import Data, Net, OracleError, check, distance, freedom, weight, wrap


def network() -> ModelProto:
    """Concat, grouped convolution, BatchNorm, flatten: one of each kind of expression."""
    net = Net()
    x = net.input("x", ["n", 3, 5, 5])
    a = net.node("Sigmoid", net.conv(x, 3, 7, name="a"))
    b = net.node("Sigmoid", net.conv(x, 3, 5, name="b"))
    joined = net.batch_norm(net.node("Concat", a, b, axis=1), 12)
    grouped = net.conv(net.node("Sigmoid", net.conv(x, 3, 6)), 6, 9, group=3, name="grouped")
    after = net.conv(net.node("Sigmoid", joined), 12, 6, name="after")
    flat = net.node("Flatten", after)
    y = net.gemm(flat, 150, 2, name="flat")
    z = net.gemm(net.node("Flatten", net.node("Sigmoid", grouped)), 225, 2, name="head")
    return net.model(y, z)


def edited(edit: Callable[[dict[str, np.ndarray], ModelProto], Any]) -> Callable[[Analysis, Plan], ModelProto]:
    """Surgery whose result is tampered with."""

    def surgeon(analysis: Analysis, plan: Plan) -> ModelProto:
        model = apply(analysis, plan)
        arrays = {t.name: numpy_helper.to_array(t).copy() for t in model.graph.initializer}
        edit(arrays, model)
        for tensor in model.graph.initializer:
            tensor.CopyFrom(numpy_helper.from_array(arrays[tensor.name], tensor.name))
        return model

    return surgeon


def sliced_with(change: Callable[[np.ndarray], np.ndarray], tensor: str, axis: int) -> Any:
    """Surgery that slices one axis of one tensor by other indices than the plan's."""

    def surgeon(analysis: Analysis, plan: Plan) -> ModelProto:
        model = apply(analysis, plan)
        original = analysis.graph.array(tensor)
        use = next(u for u in analysis.uses if u[0] == tensor)
        kept = analysis.kept(plan.masks(analysis))
        value = original
        for i, expr in enumerate(analysis.uses[use]):
            mask = kept.mask(expr)
            value = np.compress(change(mask) if i == axis else mask, value, axis=i)
        target = next(t for t in model.graph.initializer if t.name == tensor)
        target.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), tensor))
        return model

    return surgeon


def test_the_untouched_network_passes() -> None:
    found = check(network())
    assert found.error < 1e-6
    assert {g.size for g in found.groups} == {7, 5, 6, 3, 2}


@pytest.mark.parametrize("seed", range(4))
def test_any_seed_passes(seed: int) -> None:
    check(network(), seed=seed, fraction=0.6)


@pytest.mark.parametrize(
    ("tensor", "axis"), [("a", 0), ("a.bias", 0), ("b", 0), ("after", 1), ("after", 0), ("flat", 1), ("grouped", 0)]
)
def test_indices_shifted_by_one_fail(tensor: str, axis: int) -> None:
    with pytest.raises(OracleError, match="off the masked original"):
        check(network(), surgeon=sliced_with(lambda m: np.roll(m, 1), tensor, axis))


@pytest.mark.parametrize(("tensor", "axis"), [("a", 0), ("a.bias", 0), ("b", 0), ("after", 1), ("flat", 1)])
def test_indices_counted_from_the_end_fail(tensor: str, axis: int) -> None:
    with pytest.raises(OracleError, match="off the masked original"):
        check(network(), surgeon=sliced_with(lambda m: m[::-1], tensor, axis))


def test_two_swapped_offsets_of_a_concat_fail() -> None:
    with pytest.raises(OracleError, match="off the masked original"):
        check(network(), surgeon=sliced_with(lambda m: np.concatenate([m[7:], m[:7]]), "after", 1))


def test_two_swapped_rows_fail() -> None:
    def swap(arrays: dict[str, np.ndarray], model: ModelProto) -> None:
        arrays["a"][[0, 1]] = arrays["a"][[1, 0]]

    with pytest.raises(OracleError):
        check(network(), surgeon=edited(swap))


def test_a_dropped_index_fails() -> None:
    def drop(arrays: dict[str, np.ndarray], model: ModelProto) -> None:
        arrays["a"], arrays["a.bias"] = arrays["a"][:-1], arrays["a.bias"][:-1]

    with pytest.raises(Exception, match=r"(?i)off the masked original|shape|fail|dimension|channels"):
        check(network(), surgeon=edited(drop))


def test_a_shifted_axis_of_a_square_weight_fails() -> None:
    net = Net()
    x = net.input("x", ["n", 3])
    h = net.node("Sigmoid", net.gemm(x, 3, 7))
    h = net.node("Sigmoid", net.gemm(h, 7, 7, name="square"))
    model = net.model(net.gemm(h, 7, 2))
    check(model)

    def transposed(arrays: dict[str, np.ndarray], model: ModelProto) -> None:
        arrays["square"] = arrays["square"].T.copy()

    with pytest.raises(OracleError):
        check(model, surgeon=edited(transposed))


def test_a_wrong_group_attribute_fails() -> None:
    net = Net()
    x = net.input("x", ["n", 3, 5, 5])
    h = net.node("Sigmoid", net.conv(x, 3, 12))
    h = net.node("Sigmoid", net.conv(h, 12, 12, group=4, name="grouped"))
    model = net.model(net.conv(h, 12, 2))
    check(model)

    def regrouped(arrays: dict[str, np.ndarray], model: ModelProto) -> None:
        node = next(n for n in model.graph.node if "grouped" in n.input)
        attribute = next(a for a in node.attribute if a.name == "group")
        weights = arrays["grouped"]
        # As many channels and weights, but shared by other groups.
        assert attribute.i > 1
        each = weights.shape[1]
        arrays["grouped"] = np.tile(weights, (1, attribute.i, 1, 1))[:, : each * attribute.i]
        attribute.i = 1

    with pytest.raises(OracleError, match="off the masked original"):
        check(model, surgeon=edited(regrouped))


def test_masking_the_writers_fails() -> None:
    """BatchNorm and Sigmoid turn a zero into something else."""

    def writers(analysis: Analysis, plan: Plan) -> ModelProto:
        model = ModelProto()
        model.CopyFrom(analysis.graph.model)
        for tensor in model.graph.initializer:
            for axis, kept in plan.parameters.get(tensor.name, {}).items():
                if axis == 0:
                    array = numpy_helper.to_array(tensor).copy()
                    gone = np.setdiff1d(np.arange(array.shape[0]), kept)
                    array[gone] = 0
                    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        return model

    with pytest.raises(OracleError, match="off the masked original"):
        check(network(), mask=writers)


def test_an_unmasked_original_fails() -> None:
    with pytest.raises(OracleError, match="off the masked original"):
        check(network(), mask=lambda analysis, plan: analysis.graph.model)


def test_a_mask_that_forgets_a_reader_fails() -> None:
    def forgetful(analysis: Analysis, plan: Plan) -> ModelProto:
        model = masked(analysis, plan)
        index = next(i for i, n in enumerate(model.graph.node) if n.op_type == "Mul" and n.input[0] == "after")
        for node in model.graph.node:
            for position, name in enumerate(node.input):
                if name == model.graph.node[index].output[0]:
                    node.input[position] = "after"
        return model

    with pytest.raises(OracleError, match="off the masked original"):
        check(network(), mask=forgetful)


def test_surgery_that_does_nothing_fails() -> None:
    with pytest.raises(OracleError, match="off the masked original"):
        check(network(), surgeon=lambda analysis, plan: analysis.graph.model)


def test_a_changed_weight_fails() -> None:
    def nudge(arrays: dict[str, np.ndarray], model: ModelProto) -> None:
        arrays["head"][0, 0] += 0.01

    with pytest.raises(OracleError, match="off the masked original"):
        check(network(), surgeon=edited(nudge))


def test_a_changed_input_model_fails() -> None:
    def careless(analysis: Analysis, plan: Plan) -> ModelProto:
        pruned = apply(analysis, plan)
        analysis.graph.model.producer_name = "careless"
        return pruned

    with pytest.raises(OracleError, match="input model was changed"):
        check(network(), surgeon=careless)


def test_an_output_of_another_shape_fails() -> None:
    def cut(arrays: dict[str, np.ndarray], model: ModelProto) -> None:
        arrays["head"], arrays["head.bias"] = arrays["head"][:1], arrays["head.bias"][:1]
        del model.graph.output[1].type.tensor_type.shape.dim[1:]
        model.graph.output[1].type.tensor_type.shape.dim.add().dim_value = 1

    with pytest.raises(OracleError, match="became"):
        check(network(), surgeon=edited(cut))


def test_an_invisible_pruning_fails() -> None:
    net = Net()
    h = net.gemm(net.input("x", ["n", 3]), 3, 7)
    reader = net.constant(np.zeros((7, 2), np.float32))
    with pytest.raises(OracleError, match="changed no output"):
        check(net.model(net.node("MatMul", h, reader)))


def test_a_network_with_nothing_to_prune_fails() -> None:
    net = Net()
    with pytest.raises(OracleError, match="no group to prune"):
        check(net.model(net.gemm(net.input("x", ["n", 3]), 3, 2)))


def test_a_rule_that_couples_the_wrong_axes_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from spa.coupling import analysis as coupling

    def wrong(op: Any) -> None:
        op.set(0, op.axes(0)[::-1])  # a transposition that swaps the first two axes only

    monkeypatch.setattr(coupling, "find", lambda key, find=coupling.find: wrong if key == "Transpose" else find(key))
    model = wrap("Transpose", Data(7, 7, 7), perm=[1, 0, 2])
    with pytest.raises(OracleError):
        check(model)


def test_a_rule_that_treats_a_roll_as_elementwise_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from spa.coupling import analysis as coupling

    def wrong(op: Any) -> None:
        op.set(0, op.axes(0))

    monkeypatch.setattr(coupling, "find", lambda key, find=coupling.find: wrong if key == "Gather" else find(key))
    model = wrap("Gather", Data(7, 5), [3, 4, 5, 6, 0, 1, 2])
    # The indices are left as they are, so they either point outside, or at other channels.
    with pytest.raises(Exception, match=r"(?i)off the masked original|index|indices|shape"):
        check(model)


def test_surgery_checks_shapes_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    from spa.coupling import analysis as coupling

    def wrong(op: Any) -> None:
        x = op.axes(0)
        op.set(0, [op.dim(e.size) for e in x])  # forgets that its output is its input

    monkeypatch.setattr(coupling, "find", lambda key, find=coupling.find: wrong if key == "Relu" else find(key))
    with pytest.raises(InvariantError, match="the algebra expects"):
        check(wrap("Relu", Data(5, 7)), groups=["weight_1[1]"])


def test_distance_is_relative_to_the_largest_element() -> None:
    assert distance([1.0, 2.0], [1.0, 4.0]) == 0.5
    assert distance([np.nan], [1.0]) == np.inf
    assert distance([0], [0]) == 0
    assert distance(np.asarray(["a"]), np.asarray(["b"])) == np.inf


def test_freedom_is_read_as_the_docstring_says() -> None:
    assert freedom(wrap("Conv", Data(2, 10, 7, 7), weight(6, 10, 3, 3))) == {"X0": "2 10 7! 7!", "Y0": "2 6 5! 5!"}


def test_groups_can_be_named() -> None:
    found = check(network(), groups=["a[0]"])
    assert [g.name for g in found.groups] == ["a[0]"]
    assert set(found.plan.kept) == {"a[0]"}
    with pytest.raises(OracleError, match="no groups"):
        check(network(), groups=["nothing"])


def test_a_plan_with_other_indices_fails() -> None:
    def other(analysis: Analysis, plan: Plan) -> ModelProto:
        kept = {n: tuple(sorted((i + 1) % plan.sizes[n] for i in k)) for n, k in plan.kept.items()}
        return apply(analysis, replace(plan, kept=kept))

    with pytest.raises(OracleError, match="off the masked original"):
        check(network(), surgeon=other)
