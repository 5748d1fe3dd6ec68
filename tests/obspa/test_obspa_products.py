"""Queries and keys as readers of each other, against brute force and where the answer is known."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import ModelProto, helper, numpy_helper

from spa.coupling.analysis import couple
from spa.coupling.plan import make_plan
from spa.model.graph import Graph
from spa.obspa.curves import MomentReader
from spa.obspa.readers import products
from spa.obspa.refit import reconstruct
from spa.obspa.score import curves
from spa.running.stream import Stream
from spa.surgery.apply import apply
from tests.obspa.test_obspa import network
from tests.obspa.test_obspa_readers import PARTNER, check_reader, error, rebuilt

Array = np.ndarray


def attention(form: str, rng: np.random.Generator, redundant: bool = False) -> ModelProto:
    """x [b 5 6] -> self-attention of two heads with seven dimensions each -> y [b 5 3].

    Dimension 4 of query, key and value is three times dimension 2 where redundant.
    """
    heads, d, model, out = 2, 7, 6, 3
    w = rng.standard_normal((3, heads, d, model)) / 2
    b = rng.standard_normal((3, heads, d)) / 2
    if redundant:
        w[:, :, 4], b[:, :, 4] = 3 * w[:, :, PARTNER], 3 * b[:, :, PARTNER]
    weights = {"o": rng.standard_normal((heads * d, out)), "scale": np.asarray(0.3)}
    integers = {"split": [5, 5], "heads": [0, 0, heads, d], "rows": [0, 0, heads * d]}
    nodes = []
    if form == "separate":
        for i, n in enumerate("qkv"):
            weights[f"w{n}"], weights[f"b{n}"] = w[i].reshape(-1, model).T, b[i].reshape(-1)
            nodes += [
                helper.make_node("MatMul", ["x", f"w{n}"], [f"{n}m"]),
                helper.make_node("Add", [f"b{n}", f"{n}m"], [f"{n}a"]),
                helper.make_node("Reshape", [f"{n}a", "heads"], [f"{n}r"]),
                helper.make_node("Transpose", [f"{n}r"], [n if n != "k" else "kk"], perm=[0, 2, 1, 3]),
            ]
        nodes.append(helper.make_node("Transpose", ["kk"], ["kt"], perm=[0, 1, 3, 2]))
    elif form == "split":
        weights |= {"w": w.reshape(-1, model).T, "b": b.reshape(-1)}
        integers["pieces"] = [heads * d] * 3
        nodes += [
            helper.make_node("MatMul", ["x", "w"], ["m"]),
            helper.make_node("Add", ["m", "b"], ["a"]),
            helper.make_node("Split", ["a", "pieces"], ["qa", "ka", "va"], axis=2),
        ]
        for n in "qkv":
            nodes.append(helper.make_node("Reshape", [f"{n}a", "heads"], [f"{n}r"]))
        nodes += [
            helper.make_node("Transpose", ["qr"], ["q"], perm=[0, 2, 1, 3]),
            helper.make_node("Transpose", ["kr"], ["kt"], perm=[0, 2, 3, 1]),
            helper.make_node("Transpose", ["vr"], ["v"], perm=[0, 2, 1, 3]),
        ]
    else:
        weights |= {"w": w.reshape(-1, model).T, "b": b.reshape(-1)}
        integers |= {"all": [0, 0, 3, heads, d], "i0": 0, "i1": 1, "i2": 2}
        nodes += [
            helper.make_node("MatMul", ["x", "w"], ["m"]),
            helper.make_node("Add", ["m", "b"], ["a"]),
            helper.make_node("Reshape", ["a", "all"], ["r"]),
            helper.make_node("Transpose", ["r"], ["t"], perm=[2, 0, 3, 1, 4]),
            *(helper.make_node("Gather", ["t", f"i{i}"], [n]) for i, n in enumerate(("q", "k", "v"))),
            helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
        ]
    nodes += [
        helper.make_node("Mul", ["q", "scale"], ["qs"]),
        helper.make_node("MatMul", ["qs", "kt"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["p"]),
        helper.make_node("MatMul", ["p", "v"], ["z"]),
        helper.make_node("Transpose", ["z"], ["zt"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["zt", "rows"], ["zr"]),
        helper.make_node("MatMul", ["zr", "o"], ["y"]),
    ]
    model = network(nodes, weights, ["n", 5, 6], 3)
    for name, value in integers.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value, np.int64), name))
    return onnx.shape_inference.infer_shapes(model)


FORMS = ["separate", "split", "gather"]


def dims_of_queries(model: ModelProto) -> str:
    analysis = couple(Graph(model))
    product = analysis.graph.producer["logits"].index
    return next(g.name for g in analysis.free if product in g.readers)


def test_a_products_second_moments_are_those_of_its_terms() -> None:
    rng = np.random.default_rng(15)
    model = attention("separate", rng)
    analysis = couple(Graph(model))
    node = analysis.graph.producer["logits"]
    stream = Stream(model, None, [{"x": rng.standard_normal((3, 5, 6)).astype(np.float32)} for _ in range(2)])
    stream.after(stream.graph.nodes[node.index])
    (observation,) = products.ActivationProduct().observe(
        analysis, stream, stream.graph.nodes[node.index], np.random.default_rng(0)
    )
    reader = observation.make_reader(np.arange(7)[:, None])
    assert isinstance(reader, MomentReader)
    q, k = (np.concatenate([b[n] for b in stream.live]).astype(np.float64) for n in ("qs", "kt"))
    k = k - k.mean(axis=-1, keepdims=True)  # the softmax does not see it
    terms = np.einsum("bhmj,bhjn->jbhmn", q, k).reshape(7, -1)
    np.testing.assert_allclose(reader.h[0], terms @ terms.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        np.square(terms.sum(axis=0)).sum() * reader.w[0, 0, 0] ** 2, products.SOFTMAX_WEIGHT, rtol=1e-4
    )
    assert observation.columns(next(g.dim for g in analysis.free if node.index in g.readers), 7) is not None


def test_conjugate_gradients_find_the_best_mixture() -> None:
    rng = np.random.default_rng(16)
    q, k = rng.standard_normal((6, 2, 9, 5)) * [1, 2, 3, 4, 5], rng.standard_normal((6, 2, 5, 8))
    q2, k2 = q[..., :3], k[:, :, :3]
    s, t = q2.swapaxes(2, 3) @ q2, k2 @ k2.swapaxes(2, 3)
    c = (q2.swapaxes(2, 3) @ q) @ (k @ k2.swapaxes(2, 3))
    mixing = products.solve_mixing(s, t, c, 1e-9)
    for h in range(2):
        design = np.concatenate([np.kron(q2[n, h], k2[n, h].T) for n in range(6)])  # rows of vec(Q A Kᵀ)
        target = np.concatenate([(q[n, h] @ k[n, h]).reshape(-1) for n in range(6)])
        best = np.linalg.lstsq(design, target, rcond=None)[0].reshape(3, 3)
        np.testing.assert_allclose(mixing[h], best, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_queries_and_keys_are_scored_and_refitted(form: str) -> None:
    rng = np.random.default_rng(17)
    model = attention(form, rng, redundant=True)
    check_reader(model, dims_of_queries(model), 4, 7, rng.standard_normal((80, 5, 6)).astype(np.float32), atol=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_a_mixed_query_brings_the_product_nearer(form: str) -> None:
    rng = np.random.default_rng(18)
    model = attention(form, rng)
    analysis = couple(Graph(model))
    x = rng.standard_normal((80, 5, 6)).astype(np.float32)
    kept = np.array([0, 2, 3, 6])
    plan = make_plan(analysis, {dims_of_queries(model): kept})
    index = analysis.graph.producer["logits"].index
    errors = []
    for nodes in (set[int](), {index}):
        pruned = apply(analysis, plan)
        reconstruct(analysis, plan, pruned, [{"x": x[:40]}, {"x": x[40:]}], nodes=nodes)
        q, k = (Stream(m, None, [{"x": x}]) for m in (model, pruned))
        centred = []
        for stream in (q, k):
            stream.after(stream.graph.producer["logits"])
            logits = stream.live[0]["logits"]
            centred.append(logits - logits.mean(axis=-1, keepdims=True))
        errors.append(error(*centred))
    assert errors[1] < 0.8 * errors[0]


def test_a_product_that_sums_over_a_whole_axis_is_left_alone() -> None:
    rng = np.random.default_rng(20)
    model = attention("separate", rng)
    model.graph.input[0].name = "x0"
    model.graph.node.insert(0, helper.make_node("MatMul", ["x0", "stem"], ["x"]))
    stem = rng.standard_normal((6, 6)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(stem, "stem"))
    analysis = couple(Graph(model))
    plan = make_plan(analysis, {next(g.name for g in analysis.free if 0 in g.writers): np.array([0, 1, 3, 4])})
    pruned = apply(analysis, plan)
    before = pruned.SerializeToString()
    product = analysis.graph.producer["logits"].index  # its operands have changed, with their sizes as before
    x = rng.standard_normal((40, 5, 6)).astype(np.float32)
    reconstruct(analysis, plan, pruned, [{"x0": x}], nodes={product})
    assert pruned.SerializeToString() == before


def test_whole_heads_are_scored_and_refitted_through_the_output_projection() -> None:
    rng = np.random.default_rng(19)
    model = attention("separate", rng)
    analysis = couple(Graph(model))
    heads = next(g for g in analysis.free if g.size == 2)
    x = rng.standard_normal((80, 5, 6)).astype(np.float32)
    losses, _ = curves(analysis, analysis.free, [{"x": x}])
    stream = Stream(model, None, [{"x": x}])
    stream.after(stream.graph.producer["y"])
    rows = stream.live[0]["zr"].reshape(-1, 2, 7).astype(np.float64)
    rows -= rows.mean(axis=0)
    projection = Graph(model).array("o").astype(np.float64).reshape(2, 7, 3)
    energy = np.square(np.einsum("rhd,hdo->ro", rows, projection)).sum()
    whole = rows.reshape(-1, 14)
    left = []
    for h in range(2):  # what is left of head h after the best fit from the other one
        fit = np.linalg.lstsq(rows[:, 1 - h], whole @ projection.reshape(14, 3), rcond=None)[0]
        left.append(np.square(whole @ projection.reshape(14, 3) - rows[:, 1 - h] @ fit).sum())
    assert losses[heads.name].order[0] == np.argmin(left)
    np.testing.assert_allclose(losses[heads.name].loss[1], min(left) / energy, rtol=0.05)  # damping
    _, want, before, after = rebuilt(model, heads.name, np.array([1]), x)
    assert error(after, want) < error(before, want)


def test_a_refit_says_how_far_it_is() -> None:
    rng = np.random.default_rng(21)
    analysis = couple(Graph(attention("separate", rng)))
    plan = make_plan(analysis, {dims_of_queries(analysis.graph.model): np.array([0, 2, 3, 6])})
    said: list[tuple[str, float]] = []
    x = rng.standard_normal((40, 5, 6)).astype(np.float32)
    reconstruct(
        analysis, plan, apply(analysis, plan), [{"x": x}], progress=lambda stage, done: said.append((stage, done))
    )
    product = analysis.graph.producer["logits"].index
    assert ("reconstruct", product / len(analysis.graph.nodes)) in said
    assert said == sorted(said)
