"""The table of traits: its operators exist, and each trait is what onnxruntime computes on small inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnxruntime as ort
import pytest
from onnx import helper
from onnxruntime.capi import onnxruntime_pybind11_state as state

from spa.model.shape_values import FOLDERS
from spa.model.traits import FLOAT_NAMES, FLOATS, NUMPY_FLOATS, OPERATORS, Trait, operators, traits

Array = np.ndarray
OPSET = 21  # onnxruntime has no kernels of some later versions that changed nothing but types
BITS = "BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor".split()
LOGIC = "And Not Or Xor".split()
# Attributes without a default, and those that make a function out of the ordinary.
ATTRIBUTES: dict[str, dict[str, Any]] = {
    "BitCast": {"to": onnx.TensorProto.INT32},
    "BitShift": {"direction": "LEFT"},
    "Cast": {"to": onnx.TensorProto.INT32},
    "DepthToSpace": {"blocksize": 2},
    "SpaceToDepth": {"blocksize": 2},
    "Transpose": {"perm": [2, 0, 3, 1]},
    "Gather": {"axis": 1},
    "Concat": {"axis": 1},
    "Split": {"axis": 1},
    "Einsum": {"equation": "ab,bc->ac"},
    "LpPool": {"kernel_shape": [2, 2]},
    "AveragePool": {"kernel_shape": [2, 2]},
    "MaxPool": {"kernel_shape": [2, 2]},
    "RandomNormal": {"shape": [5, 7]},
    "RandomUniform": {"shape": [5, 7]},
    "Multinomial": {"sample_size": 40},
}
# Operands that say where elements go.
CONTROLS: dict[str, list[Array]] = {
    "Reshape": [np.array([4, 3, -1])],
    "Squeeze": [np.array([0])],
    "Unsqueeze": [np.array([1])],
    "Gather": [np.array([2, 0])],
    "Slice": [np.array([1]), np.array([3]), np.array([1])],
    "Split": [np.array([1, 3])],
    "Expand": [np.array([5, 4, 6, 2])],
    "GatherElements": [np.zeros((1, 4, 6, 2), np.int64)],
    "GatherND": [np.array([[0, 3], [0, 1]])],
    "Pad": [np.array([0, 1, 0, 0, 0, 0, 0, 0])],
    "Tile": [np.array([1, 2, 1, 1])],
    "Mod": [np.array(3, np.int64)],
    "Clip": [np.array(1.0, np.float32), np.array(4.0, np.float32)],
}


def run(key: str, *operands: Array, outputs: int = 1, **attributes: Any) -> list[Array]:
    """One operator by itself, in onnxruntime or, where that has no kernel, in onnx's reference evaluator."""
    domain, _, op = key.rpartition("::")
    names = [f"x{i}" for i in range(len(operands))]
    infos = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
        for n, x in zip(names, operands, strict=True)
    ]
    made = [f"y{i}" for i in range(outputs)]
    node = helper.make_node(op, names, made, domain=domain, **ATTRIBUTES.get(key, {}) | attributes)
    graph = helper.make_graph([node], "one", infos, [helper.make_empty_tensor_value_info(n) for n in made])
    newer = not domain and not onnx.defs.has(op, max_inclusive_version=OPSET)
    opset = onnx.defs.get_schema(op).since_version if newer else OPSET
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    feeds = dict(zip(names, operands, strict=True))
    try:
        return list(ort.InferenceSession(model.SerializeToString()).run(None, feeds))
    except (state.NotImplemented, state.Fail, state.InvalidGraph):
        if domain:
            raise
    return [np.asarray(y) for y in onnx.reference.ReferenceEvaluator(model).run(None, feeds)]


def number_of_operands(key: str) -> int:
    domain, _, op = key.rpartition("::")
    if domain:
        return {"FastGelu": 2, "BiasGelu": 2, "BiasAdd": 3}.get(op, 1)
    return 3 if op in ("Clip", "Where") else 2


def typed(key: str, operand: int, value: Array) -> Array:
    """A positive operand in a type that the operator takes."""
    if key in LOGIC or (key == "Where" and operand == 0):
        return value > np.median(value)
    if key in BITS:
        return (3 * value).astype(np.uint8)
    return (5 * value).astype(np.int64) if key == "Mod" else value.astype(np.float32)


def test_every_operator_of_the_table_has_a_schema() -> None:
    standard = {s.name for s in onnx.defs.get_all_schemas() if s.domain == ""}
    contributed = {f"{s.domain}::{s.name}" for s in state.get_all_operator_schema()}
    assert sorted(OPERATORS.keys() - standard - contributed) == []


def test_every_trait_is_defined_in_words_and_has_operators() -> None:
    for trait in Trait:
        assert f"        {trait.name}: " in (Trait.__doc__ or ""), trait
        assert operators(trait), trait
    assert all(OPERATORS.values())
    assert traits("my::Unknown") == frozenset()


@pytest.mark.parametrize("key", operators(Trait.UNARY))
def test_unary_operators_work_element_by_element(key: str) -> None:
    rng = np.random.default_rng(0)
    x = typed(key, 0, rng.uniform(1.0, 3.0, 30) if key == "Acosh" else rng.uniform(0.05, 0.95, 30))
    if key in ("Round", "Ceil", "Floor", "Cast"):
        x = x * np.asarray(7, x.dtype)
    order = rng.permutation(30)
    (whole,) = run(key, x)
    (moved,) = run(key, x[order].reshape(5, 6))
    # Kernels compute the ends of a vector by other instructions than its middle: the last digit may differ.
    np.testing.assert_allclose(moved, whole[order].reshape(5, 6), rtol=1e-6)
    for i in range(30):  # no element looks at its neighbours
        np.testing.assert_allclose(run(key, x[i : i + 1])[0], whole[i : i + 1], rtol=1e-6)


@pytest.mark.parametrize("key", [k for k in operators(Trait.UNARY) if k not in (*LOGIC, *BITS)])
def test_what_is_zero_at_zero_is_told_exactly(key: str) -> None:
    with np.errstate(divide="ignore"):
        (y,) = run(key, np.zeros(3, np.float32))
    assert (Trait.ZERO_AT_ZERO in traits(key)) == (not y.any())


WITHOUT_KERNEL = {"com.microsoft::BiasAdd"}  # on the CPU


@pytest.mark.parametrize("key", [k for k in operators(Trait.BROADCASTING) if k not in WITHOUT_KERNEL])
def test_broadcasting_operators_work_element_by_element(key: str) -> None:
    rng = np.random.default_rng(1)
    channels = key.startswith("com.microsoft")  # their biases lie along the last axis
    shapes = [(2, 5, 6)] + [(6,) if channels and i == 1 else (2, 5, 6) for i in range(1, number_of_operands(key))]
    given = [typed(key, i, rng.uniform(0.4, 2.6, s)) for i, s in enumerate(shapes)]
    if key == "Clip":
        given[1:] = [np.asarray(v, np.float32) for v in (0.8, 1.9)]
    orders = [rng.permutation(n) for n in (2, 5, 6)]
    (whole,) = run(key, *given)
    assert whole.shape == (2, 5, 6)

    def turned(x: Array) -> Array:
        for axis, order in enumerate(orders[3 - x.ndim :]):
            x = x.take(order, axis)
        return np.ascontiguousarray(x)

    np.testing.assert_allclose(run(key, *map(turned, given))[0], turned(whole), rtol=1e-6)
    if not channels and key != "Clip":
        given[-1] = np.ascontiguousarray(given[-1][0, :1])  # (1, 6)
        stretched = [*given[:-1], np.ascontiguousarray(np.broadcast_to(given[-1], (2, 5, 6)))]
        np.testing.assert_array_equal(run(key, *given)[0], run(key, *stretched)[0])


@pytest.mark.parametrize("key", operators(Trait.SMOOTH))
def test_differences_give_the_slope_of_smooth_operators(key: str) -> None:
    rng = np.random.default_rng(2)
    x = rng.uniform(1.1, 2.4, (1, 40)).astype(np.float32)  # no function has a kink there
    others = [rng.uniform(0.5, 1.5, (1, 40)).astype(np.float32)] if Trait.BROADCASTING in traits(key) else []
    if key == "Clip":
        others = []
    if key == "BatchNormalization":
        others = [rng.uniform(0.5, 1.5, 40).astype(np.float32) for _ in range(4)]

    def slope(step: float) -> Array:
        up, down = (run(key, (x + s * step).astype(np.float32), *others)[0].astype(np.float64) for s in (1, -1))
        return (up - down) / (2 * step)

    assert np.abs(slope(0.05)).max() > 1e-3
    np.testing.assert_allclose(slope(0.05), slope(0.02), rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("key", operators(Trait.VIEW))
def test_views_keep_the_row_major_order(key: str) -> None:
    x = np.arange(48, dtype=np.float32).reshape(1, 4, 6, 2)
    (y,) = run(key, x, *CONTROLS.get(key, []))
    assert y.shape != x.shape
    np.testing.assert_array_equal(y.reshape(-1), x.reshape(-1))


@pytest.mark.parametrize("key", operators(Trait.PERMUTATION))
def test_permutations_keep_every_element_once(key: str) -> None:
    x = np.arange(48, dtype=np.float32).reshape(1, 4, 6, 2)
    (y,) = run(key, x)
    np.testing.assert_array_equal(np.sort(y.reshape(-1)), x.reshape(-1))
    assert (y.reshape(-1) != x.reshape(-1)).any()


@pytest.mark.parametrize("key", operators(Trait.SELECTION))
def test_selections_give_whole_indices_of_an_axis(key: str) -> None:
    x = np.arange(48, dtype=np.float32).reshape(1, 4, 6, 2)
    pieces = run(key, x, *CONTROLS[key], outputs=2 if key == "Split" else 1)
    for piece in pieces:
        for i in range(piece.shape[1]):
            assert any((piece[:, i] == x[:, j]).all() for j in range(4))


@pytest.mark.parametrize("key", operators(Trait.CARRIER))
def test_carriers_keep_values_within_their_bounds(key: str) -> None:
    rng = np.random.default_rng(3)
    shape = (1, 4, 6, 2)
    x = rng.permutation(48).reshape(shape).astype(np.int64 if key == "Mod" else np.float32)
    controls = CONTROLS.get(key, [])
    if key in ("Concat", "Max", "Min", "Where"):
        controls = [x[:, ::-1].copy()]
    given = [x > 20, x, *controls] if key == "Where" else [x, *controls]
    (y, *_) = run(key, *given, outputs=2 if key == "Split" else 1)
    assert y.min() >= 0
    assert y.max() <= x.max()
    allowed = {*x.reshape(-1).tolist(), 0.0, *(c.item() for c in controls if key == "Clip")}
    assert allowed.issuperset(y.reshape(-1).tolist())


@pytest.mark.parametrize("key", (*operators(Trait.SUM), *operators(Trait.STATISTIC)))
def test_a_zero_adds_nothing_to_sums_and_changes_statistics(key: str) -> None:
    x = np.random.default_rng(4).uniform(1.5, 3.0, (3, 5)).astype(np.float32)
    more = np.concatenate([x, np.zeros((3, 1), np.float32)], axis=1)
    if key == "ReduceMax":
        x, more = -x, -more
    a, b = (run(key, v, np.array([1]))[0] for v in (x, more))
    assert (Trait.SUM in traits(key)) == np.allclose(a, b, rtol=1e-6)
    assert (Trait.SUM in traits(key)) != (Trait.STATISTIC in traits(key))


@pytest.mark.parametrize("key", operators(Trait.STATISTIC))
def test_which_statistics_are_means_is_told_exactly(key: str) -> None:
    (y,) = run(key, np.full((2, 5), 1.75, np.float32), np.array([1]))
    assert (Trait.MEAN in traits(key)) == bool((y == 1.75).all())


@pytest.mark.parametrize("key", operators(Trait.POOLING))
def test_pooling_keeps_samples_and_channels(key: str) -> None:
    x = np.random.default_rng(5).standard_normal((3, 5, 4, 7)).astype(np.float32)
    samples, channels = np.array([2, 0, 1]), np.array([4, 2, 0, 1, 3])
    (whole,) = run(key, x)
    (moved,) = run(key, np.ascontiguousarray(x[samples][:, channels]))
    np.testing.assert_array_equal(moved, whole[samples][:, channels])
    (same,) = run(key, np.full((3, 5, 4, 7), 1.75, np.float32))
    assert (Trait.MEAN in traits(key)) == bool(np.allclose(same, 1.75))


@pytest.mark.parametrize("key", operators(Trait.PRODUCT))
def test_products_are_linear_in_each_of_two_operands(key: str) -> None:
    rng = np.random.default_rng(6)
    convolution = key.startswith("Conv")
    first, second = ((2, 5, 4, 4), (5, 5, 2, 2)) if convolution else ((3, 5), (5, 7))
    a, b, c, d = (rng.integers(-3, 4, s).astype(np.float32) for s in (first, first, second, second))
    np.testing.assert_array_equal(run(key, a + b, c)[0], run(key, a, c)[0] + run(key, b, c)[0])
    np.testing.assert_array_equal(run(key, a, c + d)[0], run(key, a, c)[0] + run(key, a, d)[0])
    assert run(key, a, c)[0].any()


@pytest.mark.parametrize("key", operators(Trait.BIASED))
def test_the_third_operand_of_biased_products_is_added_to_each_channel(key: str) -> None:
    rng = np.random.default_rng(7)
    first, second = ((2, 5, 4, 4), (5, 5, 2, 2)) if key.startswith("Conv") else ((3, 5), (5, 5))
    a, w, bias = (rng.integers(-3, 4, s).astype(np.float32) for s in (first, second, (5,)))
    spread = bias.reshape(1, 5, 1, 1) if key.startswith("Conv") else bias
    np.testing.assert_array_equal(run(key, a, w, bias)[0], run(key, a, w)[0] + spread)


def test_biased_products_are_all_that_have_a_bias() -> None:
    formal = {k: [i.name for i in onnx.defs.get_schema(k).inputs] for k in operators(Trait.PRODUCT)}
    assert {k for k, names in formal.items() if len(names) > 2} == {*operators(Trait.BIASED)}


@pytest.mark.parametrize("key", operators(Trait.MEASURE))
def test_measures_look_at_the_shape_alone(key: str) -> None:
    a, b = np.zeros((3, 5), np.float32), np.random.default_rng(8).standard_normal((3, 5)).astype(np.float32)
    np.testing.assert_array_equal(run(key, a)[0], run(key, b)[0])


@pytest.mark.parametrize("key", operators(Trait.RANDOM))
def test_random_operators_differ_from_run_to_run(key: str) -> None:
    given = [] if key in ("RandomNormal", "RandomUniform") else [np.full((5, 7), 0.5, np.float32)]
    found = [run(key, *given, seed=float(seed))[0] for seed in (1, 2)]
    assert (found[0] != found[1]).any()


def test_nothing_else_of_the_standard_has_a_seed_but_dropout() -> None:
    seeded = {s.name for s in onnx.defs.get_all_schemas() if s.domain == "" and "seed" in s.attributes}
    assert seeded == {*operators(Trait.RANDOM), "Dropout"}


@pytest.mark.parametrize("key", operators(Trait.QUANTISING))
def test_quantising_operators_have_integers_on_one_side_alone(key: str) -> None:
    schema = onnx.defs.get_schema(key)
    sides = [{t for t in v[0].types if "int8" in t} for v in (schema.inputs, schema.outputs)]
    assert sum(map(bool, sides)) == 1


def test_operators_on_sequences_are_told_exactly() -> None:
    def holds(schema: onnx.defs.OpSchema) -> bool:
        formal = [{*v.types} for v in (*schema.inputs, *schema.outputs)]
        every = [all(t.startswith(("seq(", "optional(")) for t in types) for types in formal]
        return any(every) or schema.name.startswith("Optional")

    found = {s.name for s in onnx.defs.get_all_schemas() if s.domain == "" and holds(s)}
    passing = {"StringSplit"} & found
    assert found - passing == {*operators(Trait.SEQUENCE)}


def test_element_types_are_what_numpy_makes_of_them() -> None:
    assert {"float", "double", "float16", "bfloat16"} == FLOAT_NAMES
    kinds = {t: helper.tensor_dtype_to_np_dtype(t).kind for t in FLOATS}
    assert {t for t, kind in kinds.items() if kind == "f"} == NUMPY_FLOATS


def test_what_is_measured_is_folded() -> None:
    assert {*operators(Trait.MEASURE)} <= FOLDERS.keys()
