"""Bodies of Loop, Scan and If laid flat: pruned like any others, and graphs again in what is written."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import onnx
import onnx.checker
import onnx.parser
import pytest
from onnx import ModelProto, helper, numpy_helper

import spa
from spa.coupling.analysis import Analysis, couple
from spa.coupling.cost import measure
from spa.errors import ModelError
from spa.model.bodies import flattened, nested
from spa.model.graph import Graph
from spa.model.io import load
from spa.model.simplify import simplified
from spa.running.feeds import make_feeds
from spa.running.runtime import load_session
from spa.running.stream import Stream
from spa.widths import latency
from tests.oracle import Checked, check, distance


def network(
    body: str, inputs: str, outputs: str, opset: int = 17, **weights: tuple[int, ...] | np.ndarray
) -> ModelProto:
    """A network as text, with random weights of given shapes (matrices scaled by their first axis) and arrays."""
    graph = onnx.parser.parse_graph(f"net ({inputs}) => ({outputs}) {{ {body} }}")
    rng = np.random.default_rng(3)
    for name, given in weights.items():
        value = given if isinstance(given, np.ndarray) else rng.standard_normal(given) / np.sqrt(given[0])
        value = value if value.dtype == np.int64 else value.astype(np.float32)
        graph.initializer.append(numpy_helper.from_array(value, name))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def flat(model: ModelProto) -> ModelProto:
    """The flat form, which computes the same and nests to a valid model that does."""
    result = simplified(load(model)).model
    assert result is not model
    onnx.checker.check_model(nested(result), full_check=True)
    feeds = make_feeds(model, seed=1, batch=3)
    for a, b in zip(load_session(model).run(None, feeds), load_session(result).run(None, feeds), strict=True):
        assert distance(a, b) < 1e-6
    return result


def groups(model: ModelProto) -> dict[str, int]:
    return {g.name: g.size for g in couple(Graph(model)).free}


def checked(model: ModelProto) -> Checked:
    """The oracle on the flat form; what is written is valid."""
    found = check(flat(model))
    onnx.checker.check_model(nested(found.pruned), full_check=True)
    assert any(n.op_type in ("Loop", "Scan", "If") for n in nested(found.pruned).graph.node)
    return found


COUNTED = "trips = Constant<value_int=3>() go = Constant<value_int=1>() c = Cast<to=9>(go)"

LOOP = f"""
    {COUNTED} h = MatMul(x, w)
    s = Loop(trips, c, h) <body = step (int64 i, bool c1, float[n,13] s1) => (bool c2, float[n,13] o) {{
        c2 = Identity(c1) m = MatMul(s1, v) o = Tanh(m) }}>
    y = MatMul(s, u)"""


def loop() -> ModelProto:
    return network(LOOP, "float[n,7] x", "float[n,5] y", w=(7, 13), v=(13, 13), u=(13, 5))


def scan(attributes: str = "", x: str = "float[n,5,7] x", z: str = "float[n,5,2] z", dtype: str = "") -> ModelProto:
    """A recurrent cell with two states, of which the second counts channels of its own."""
    body = f"""
    h0 = MatMul(a, w) g0 = MatMul(a, wg)
    hT, gT, hs = Scan<num_scan_inputs=1, {attributes}
      body = step (float[n,11] h, float[n,3] g, float[n,7] xt) => (float[n,11] h1, float[n,3] g1, float[n,11] h2) {{
        p = MatMul(xt, wx) q = MatMul(h, wh) r = MatMul(g, wr) pq = Add(p, q) pqr = Add(pq, r) b = Add(pqr, bias)
        h1 = Tanh(b) k = MatMul(h1, wk) g1 = Sigmoid(k) h2 = Neg(h1) }}>(h0, g0, x)
    y1 = MatMul(hT, u) y2 = MatMul(gT, ug) y = Add(y1, y2) z = MatMul(hs, u2)"""
    return network(
        body,
        f"float[n,8] a, {x}",
        f"float[n,5] y, {z}",
        w=(8, 11),
        wg=(8, 3),
        wx=(7, 11),
        wh=(11, 11),
        wr=(3, 11),
        bias=(11,),
        wk=(11, 3),
        u=(11, 5),
        ug=(3, 5),
        u2=(11, 2),
    )


ALONG_TIME = "scan_input_axes=[1], scan_output_axes=[1],"


def test_a_loop_is_pruned_inside_and_its_state_stays_one() -> None:
    assert groups(flat(loop())) == {"w[1]": 13}
    found = checked(loop())
    inside = next(n for n in nested(found.pruned).graph.node if n.op_type == "Loop").attribute[0].g
    sizes = {i.name: [d.dim_value or d.dim_param for d in i.type.tensor_type.shape.dim] for i in inside.input}
    assert sizes["s1"] == ["n", 9]


@pytest.mark.parametrize(
    "model",
    [
        scan(ALONG_TIME),
        scan("scan_input_axes=[-2], scan_output_axes=[-2], scan_input_directions=[1], scan_output_directions=[1],"),
        scan("", "float[5,n,7] x", "float[5,n,2] z"),
    ],
    ids=["along time", "reversed and counted from the end", "time first"],
)
def test_a_scan_is_pruned_inside_whatever_its_axes_and_directions(model: ModelProto) -> None:
    assert groups(flat(model)) == {"w[1]": 11, "wg[1]": 3}
    checked(model)


GATES = """
    pre = Gemm<transB=1>(xt, wx, bx) rec = Gemm<transB=1>(h, wh, bh)
"""
LSTM_STEP = f"""{GATES} all = Add(pre, rec) i0, f0, g0, o0 = Split<axis=-1, num_outputs=4>(all)
    i1 = Sigmoid(i0) f1 = Sigmoid(f0) g1 = Tanh(g0) o1 = Sigmoid(o0)
    fc = Mul(f1, c) ig = Mul(i1, g1) c1 = Add(fc, ig) tc = Tanh(c1) h1 = Mul(o1, tc) h2 = Identity(h1)"""
GRU_STEP = f"""{GATES} r0, z0, n0 = Split<axis=-1, num_outputs=3>(pre) rh, zh, nh = Split<axis=-1, num_outputs=3>(rec)
    ra = Add(r0, rh) r1 = Sigmoid(ra) za = Add(z0, zh) z1 = Sigmoid(za) rn = Mul(r1, nh) na = Add(n0, rn) n1 = Tanh(na)
    nz = Sub(h, n1) zd = Mul(z1, nz) h1 = Add(n1, zd) h2 = Identity(h1)"""


def cell(step: str, gates: int, states: dict[str, str]) -> ModelProto:
    """A recurrent layer as exporters write one that ONNX's own operators do not cover: gates in one matrix, in a Scan."""
    taken = ", ".join(f"float[n,11] {name}" for name in states)
    given = ", ".join(f"float[n,11] {name}" for name in states.values())
    begun = " ".join(f"{name}0 = MatMul(a, w{name}0)" for name in states)
    body = f"""{begun} e = MatMul(x, we)
    {", ".join(f"{name}T" for name in states)}, hs = Scan<num_scan_inputs=1, body = step ({taken}, float[n,7] xt)
      => ({given}, float[n,11] h2) {{ {step} }}>({", ".join(f"{name}0" for name in states)}, e)
    y = MatMul(hs, u)"""
    weights: dict[str, tuple[int, ...] | np.ndarray] = {f"w{name}0": (8, 11) for name in states}
    weights |= {"we": (3, 7), "wx": (11 * gates, 7), "wh": (11 * gates, 11), "bx": (11 * gates,), "bh": (11 * gates,)}
    return network(body, "float[n,8] a, float[5,n,3] x", "float[5,n,2] y", opset=18, **weights, u=(11, 2))


@pytest.mark.parametrize(
    ("model", "gates"),
    [(cell(LSTM_STEP, 4, {"h": "h1", "c": "c1"}), 4), (cell(GRU_STEP, 3, {"h": "h1"}), 3)],
    ids=["LSTM", "GRU"],
)
def test_cells_with_all_gates_in_one_matrix_lose_units_of_all_gates_and_states(model: ModelProto, gates: int) -> None:
    assert sorted(groups(flat(model)).values()) == [7, 11]  # what goes into the cell, and its units: gates and states
    checked(model)
    result = spa.prune(model, ratio=0.3, round_to=1, samples=32, insist=True)
    assert any(n.op_type == "Scan" for n in result.model.graph.node)
    shapes = {t.name: tuple(t.dims) for t in result.model.graph.initializer}
    units = shapes["wh"][1]
    assert units < 11
    assert (shapes["wh"][0], shapes["bx"], shapes["u"]) == (gates * units, (gates * units,), (units, 2))


def test_weights_of_the_body_and_those_around_it_are_cut() -> None:
    body = """
    h = MatMul(x, w)
    s = Loop(trips, c, h) <body = step (int64 i, bool c1, float[n,13] s1)
      => (bool c2, float[n,13] o) <float[13,13] v = {}, int64[1] axis = {1}> {
        one = Constant<value_float=0.5>() c2 = Identity(c1) hv = MatMul(s1, v) t = Tanh(hv) half = Mul(t, one)
        wide = MatMul(h, around) both = Add(half, wide) o = Relu(both) }>
    y = MatMul(s, u)"""
    numbers = ", ".join(f"{v:.3f}" for v in np.random.default_rng(0).standard_normal(169) / 4)
    model = network(
        COUNTED + body.replace("v = {}", f"v = {{{numbers}}}"),
        "float[n,7] x",
        "float[n,5] y",
        w=(7, 13),
        around=(13, 13),
        u=(13, 5),
    )
    found = checked(model)
    assert {tuple(t.dims) for t in found.pruned.graph.initializer if t.name in ("v", "around")} == {(9, 9)}
    assert "h" in {
        n for node in nested(found.pruned).graph.node for g in _bodies(node) for b in g.node for n in b.input
    }


def _bodies(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]


def test_loops_in_loops_and_what_both_capture_are_pruned() -> None:
    body = f"""
    {COUNTED} h = MatMul(x, w)
    s = Loop(trips, c, h) <body = outer (int64 i, bool c1, float[n,13] s1) => (bool c2, float[n,13] o) {{
        c2 = Identity(c1)
        t, ts = Loop(trips, , s1) <body = inner (int64 j, bool d1, float[n,13] r1)
          => (bool d2, float[n,13] q, float[n,6] kept) {{
            d2 = Identity(d1) m = MatMul(r1, v) mh = Add(m, h) q = Tanh(mh) kept = MatMul(q, k) }}>
        all = ReduceSum<keepdims=0>(ts, zero) back = MatMul(all, kb) o = Add(t, back) }}>
    y = MatMul(s, u)"""
    weights: dict[str, Any] = {"w": (7, 13), "v": (13, 13), "k": (13, 6), "kb": (6, 13), "u": (13, 5)}
    model = network(body, "float[n,7] x", "float[n,5] y", zero=np.zeros(1, np.int64), **weights)
    assert groups(flat(model)) == {"w[1]": 13, "k[1]": 6}
    checked(model)


def test_a_name_that_several_bodies_define_is_each_ones_own() -> None:
    once = """Loop(trips, c, {}) <body = step (int64 i, bool c1, float[n,13] s1) => (bool c2, float[n,13] o) {{
        c2 = Identity(c1) m = MatMul(s1, {}) o = Tanh(m) }}>"""
    body = f"{COUNTED} h = MatMul(x, w) s = {once.format('h', 'v')} k = MatMul(s, k1) r = {once.format('k', 'v2')}"
    weights = {"w": (7, 13), "v": (13, 13), "k1": (13, 13), "v2": (13, 13), "u": (13, 5)}
    model = network(f"{body} y = MatMul(r, u)", "float[n,7] x", "float[n,5] y", **weights)
    assert groups(flat(model)) == {"w[1]": 13, "k1[1]": 13}
    checked(model)


def test_a_loop_over_as_many_steps_as_the_input_has_is_pruned() -> None:
    """As TorchScript writes `for t in range(x.size(1))`: the counter chooses the step, the body may give nothing."""
    body = """
    shape = Shape(x) one = Constant<value_int=1>() trips = Gather(shape, one) go = Constant<value_int=1>()
    c = Cast<to=9>(go) h = MatMul(a, w)
    s, ys = Loop(trips, c, h) <body = step (int64 i, bool c1, float[n,13] s1) => (bool c2, float[n,13] o, float[n,13] p) {
        c2 = Cast<to=9>(c1) xt = Gather<axis=1>(x, i) e = MatMul(xt, we) m = MatMul(s1, v) em = Add(e, m) o = Tanh(em)
        p = Identity(o) }>
    z1 = Transpose<perm=[1,0,2]>(ys) z = MatMul(z1, u)"""
    weights = {"w": (8, 13), "we": (7, 13), "v": (13, 13), "u": (13, 5)}
    model = network(body, "float[n,8] a, float[n,t,7] x", "float[n,t,5] z", **weights)
    analysis = couple(Graph(flat(model)))
    assert {g.name: g.size for g in analysis.free} == {"w[1]": 13}
    assert analysis.points.first.shape["z"] == (*analysis.points.first.shape["x"][:2], 5)
    checked(model)


@pytest.mark.parametrize("handed", ["v1", "again"])
def test_weights_that_are_handed_on_as_states_are_weights(handed: str) -> None:
    """As tf2onnx writes the variables that a cell reads; what the loop gives of them is read, too."""
    body = f"""
    {COUNTED} h = MatMul(x, w)
    s, v2 = Loop(trips, c, h, v) <body = step (int64 i, bool c1, float[n,13] s1, float[13,13] v1)
      => (bool c2, float[n,13] o, float[13,13] {handed}) {{
        c2 = Identity(c1) m = MatMul(s1, v1) o = Tanh(m) again = Identity(v1) }}>
    t = MatMul(s, v2) y = MatMul(t, u)"""
    if handed == "again":  # nothing reads what the loop gives of it
        body = body.replace("MatMul(s, v2)", "Neg(s)")
    if handed == "v1":
        body = body.replace("again = Identity(v1)", "")
    model = network(body, "float[n,7] x", "float[n,5] y", w=(7, 13), v=(13, 13), u=(13, 5))
    laid = flat(model)
    assert next(list(n.input) for n in laid.graph.node if n.op_type == "LoopEnter") == ["trips", "c", "h"]
    for each in (laid, simplified(load(model), fold=False).model):  # classes of frameworks keep the names of weights
        assert len(Graph(each).users["v"]) == (2 if handed == "v1" else 1)
    checked(model)
    result = spa.prune(model, ratio=0.3, round_to=1, samples=64)
    assert result.report.calibration is not None and result.report.calibration["after"] < 0.3


def test_products_of_two_tensors_of_a_body_are_left_alone_by_obspa() -> None:
    body = """
    h = MatMul(x, w) hT = Scan<num_scan_inputs=1, body = step (float[13,13] s, float[n,13] e) => (float[13,13] o) {
        q = MatMul(e, v) m = MatMul(q, s) t = Tanh(m) k = MatMul(kt, t) o = Sigmoid(k) }>(begin, seq)
    y1 = MatMul(h, hT) y = MatMul(y1, u)"""
    weights: dict[str, Any] = {"w": (7, 13), "v": (13, 13), "kt": (13, 3), "u": (13, 5)}
    begin = np.random.default_rng(1).standard_normal((13, 13))
    model = network(body, "float[3,7] x, float[4,3,13] seq", "float[3,5] y", begin=begin, **weights)
    stream = Stream(flat(model), None, [make_feeds(model, seed=0)])
    inside = {n.outputs[0]: stream.sees(n) for n in stream.graph.nodes if n.op == "MatMul"}
    assert inside == {"h": True, "q": True, "m": False, "k": True, "y1": True, "y": True}
    result = spa.prune(model, ratio=0.1, round_to=1, samples=16, insist=True)
    onnx.checker.check_model(result.model, full_check=True)


def test_a_loop_of_torchscript_is_pruned_at_any_number_of_steps() -> None:
    torch = pytest.importorskip("torch")

    class Recurrent(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = torch.nn.Linear(7, 13)
            self.state = torch.nn.Linear(13, 13)
            self.out = torch.nn.Linear(13, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.zeros(x.size(0), 13)
            for t in range(x.size(1)):
                h = torch.tanh(self.step(x[:, t]) + self.state(h))
            return self.out(h)

    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an exporter that PyTorch has a newer one for
        axes = {"x": {0: "n", 1: "t"}, "y": {0: "n"}}
        module = torch.jit.script(Recurrent())
        options = {"dynamo": False, "opset_version": 17, "input_names": ["x"], "output_names": ["y"]}
        torch.onnx.export(module, (torch.randn(2, 6, 7),), file, dynamic_axes=axes, **options)
    model = onnx.load_model_from_string(file.getvalue())
    result = spa.prune(model, ratio=0.3, round_to=1, criterion="l2")
    assert len(result.plan.kept["step.weight[0]"]) < 13
    assert result.prove(seeds=1).holds
    for steps in (1, 4):
        (y,) = load_session(result.model).run(None, {"x": np.zeros((3, steps, 7), np.float32)})
        assert y.shape == (3, 5)


def test_a_loop_that_data_may_end_is_pruned_and_left_as_it_was_cut() -> None:
    body = """
    trips = Constant<value_int=9>() go = Constant<value_int=1>() c = Cast<to=9>(go) h = MatMul(x, w)
    s = Loop(trips, c, h) <body = step (int64 i, bool c1, float[n,13] s1) => (bool c2, float[n,13] o) {
        m = MatMul(s1, v) o = Tanh(m) top = ReduceMax<keepdims=0>(x) small = Constant<value_float=-100.0>()
        c2 = Greater(top, small) }>
    y = MatMul(s, u)"""
    model = network(body, "float[n,7] x", "float[n,5] y", w=(7, 13), v=(13, 13), u=(13, 5))
    checked(model)
    result = spa.prune(model, ratio=0.3, round_to=1, samples=32, insist=True)
    assert len(result.plan.kept["w[1]"]) < 13


def test_a_loop_that_ends_its_state_as_something_else_stays_whole() -> None:
    body = f"""
    {COUNTED} h = MatMul(x, w)
    s = Loop(trips, c, h) <body = step (int64 i, bool c1, float[n,k] s1) => (bool c2, float[n,l] o) {{
        c2 = Identity(c1) o = Concat<axis=1>(s1, s1) }}>
    total = ReduceSum<keepdims=1>(s, last) z = MatMul(x, w1) y1 = MatMul(z, u) y = Add(y1, total)"""
    last = np.ones(1, np.int64)
    model = network(body, "float[n,7] x", "float[n,5] y", w=(7, 13), w1=(7, 11), u=(11, 5), last=last)
    result = simplified(load(model)).model
    assert flattened(model) is None
    analysis = couple(Graph(result))
    assert {g.name for g in analysis.free} == {"w1[1]"}
    assert "states change their shapes" in next(iter(analysis.barriers.values()))


def test_a_loop_that_stays_whole_may_hand_weights_on() -> None:
    body = f"""
    {COUNTED} h = MatMul(x, w)
    v2, s = Loop(trips, c, v, h) <body = step (int64 i, bool c1, float[13,13] v1, float[n,13] s1)
      => (bool c2, float[13,13] v1, float[m,13] o) {{
        c2 = Identity(c1) m = MatMul(s1, v1) o = Concat<axis=0>(m, s1) }}>
    y = MatMul(s, u)"""
    model = network(body, "float[n,7] x", "float[k,5] y", w=(7, 13), v=(13, 13), u=(13, 5))
    assert flattened(simplified(load(model)).model) is None


IF = """
    h = MatMul(x, w) top = ReduceMax<keepdims=0>(x) c = Greater(top, small)
    s = If(c) <then_branch = one () => (float[n,13] p) { m = MatMul(h, v) p = Tanh(m) },
               else_branch = two () => (float[n,13] q) { k = MatMul(h, k1) r = Relu(k) q = MatMul(r, k2) }>
    y = MatMul(s, u)"""


def branched() -> ModelProto:
    weights: dict[str, Any] = {"w": (7, 13), "v": (13, 13), "k1": (13, 6), "k2": (6, 13), "u": (13, 5)}
    return network(IF, "float[n,7] x", "float[n,5] y", small=np.asarray(4.0), **weights)


@pytest.mark.parametrize("value", [0.0, 9.0], ids=["one branch", "the other"])
def test_both_branches_of_an_if_are_pruned(value: float) -> None:
    laid = flattened(branched())
    assert laid is not None and groups(laid) == {"w[1]": 13, "v[1]": 13, "k1[1]": 6}
    feeds = dict(make_feeds(branched(), seed=2, batch=3))
    feeds["x"][0, 0] = value
    check(laid, feeds=feeds, sensitive=value > 0)


def test_steps_are_as_many_samples_to_whoever_observes_a_body() -> None:
    laid = flat(scan(ALONG_TIME))
    graph = Graph(laid)
    node = next(n for n in graph.nodes if n.inputs[:2] == ("h1", "wk"))
    feeds = make_feeds(laid, seed=0, batch=3)
    stream = Stream(laid, None, [feeds])
    assert stream.sees(node)
    stream.after(node)
    seen = stream.live[0]["h1"]
    steps = load_session(laid).run(["hT"], dict(feeds))[0] if "hT" in graph.outputs else seen[-3:]
    assert seen.shape == (5 * 3, 11)
    np.testing.assert_allclose(seen[-3:], steps)
    wanted = np.tanh(
        feeds["x"][:, 0] @ graph.array("wx")
        + (feeds["a"] @ graph.array("w")) @ graph.array("wh")
        + (feeds["a"] @ graph.array("wg")) @ graph.array("wr")
        + graph.array("bias")
    )
    np.testing.assert_allclose(seen[:3], wanted, atol=1e-5)
    outputs = stream.finish()[0]
    for name, value in zip(graph.outputs, load_session(laid).run(None, dict(feeds)), strict=True):
        np.testing.assert_allclose(outputs[name], value, atol=1e-6)


def test_macs_of_a_body_count_at_every_step() -> None:
    analysis = couple(Graph(flat(loop())))
    assert measure(analysis).macs == 7 * 13 + 3 * 13 * 13 + 13 * 5


@pytest.mark.parametrize("criterion", ["obspa", "wanda"])
def test_criteria_of_activations_look_inside_bodies(criterion: str) -> None:
    result = spa.prune(loop(), ratio=0.3, round_to=1, criterion=criterion, samples=64, reconstruct="none")
    assert len(result.plan.kept["w[1]"]) < 13


def test_obspa_refits_a_loops_body() -> None:
    cut = spa.prune(loop(), ratio=0.3, round_to=1, samples=64, reconstruct="none")
    result = spa.prune(loop(), ratio=0.3, round_to=1, samples=64)
    assert result.report.calibration is not None and cut.report.calibration is not None
    assert result.report.calibration["after"] < 0.5 * cut.report.calibration["after"]
    onnx.checker.check_model(result.model, full_check=True)
    assert [n.op_type for n in result.model.graph.node if n.op_type != "Constant"] == ["MatMul", "Loop", "MatMul"]


def test_steps_one_by_one_speak_of_the_file_as_it_is() -> None:
    analysis: Analysis = spa.analyze(scan(ALONG_TIME))
    plan = spa.plan(analysis, spa.score(analysis, criterion="l2"), ratio=0.3, round_to=1)
    pruned = spa.apply(analysis, plan)
    assert "Scan" in {n.op_type for n in pruned.graph.node}
    repaired = spa.repair(analysis, plan, pruned, samples=32)
    onnx.checker.check_model(repaired, full_check=True)


def test_latency_times_a_loop_as_one() -> None:
    analysis = couple(Graph(flat(loop())))
    assert [[n.op for n in part] for part in latency._parts(analysis)] == [
        ["MatMul"],
        ["LoopEnter", "Identity", "MatMul", "Tanh", "LoopLeave"],
        ["MatMul"],
    ]
    network = latency._Network(analysis.graph.model, None, analysis.points.sizes[0], analysis)
    cut = network.cut(latency._parts(analysis)[1])
    (h,) = load_session(cut.model()).run(None, cut.feeds())
    v = analysis.graph.array("v")
    np.testing.assert_allclose(h, np.tanh(np.tanh(np.tanh(cut.feeds()["h"] @ v) @ v) @ v), atol=1e-6)


def test_dead_channels_of_a_state_go_without_loss() -> None:
    model = loop()
    for tensor in model.graph.initializer:
        value = numpy_helper.to_array(tensor).copy()
        if tensor.name in ("u", "v"):
            value[4] = 0  # nobody reads it
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    result = spa.prune(model, criterion="zero")
    assert result.plan.kept == {"w[1]": tuple(i for i in range(13) if i != 4)}
    feeds = make_feeds(model, seed=0, batch=3)
    assert distance(load_session(result.model).run(None, feeds)[0], load_session(model).run(None, feeds)[0]) < 1e-6


def test_a_channel_that_only_the_state_itself_reads_back_is_not_lost() -> None:
    """Outputs read channel 2, which channel 4 feeds at the next step, which channel 7 feeds: liveness goes round."""
    model = loop()
    v, u = np.zeros((13, 13), np.float32), np.zeros((13, 5), np.float32)
    v[4, 2] = v[7, 4] = v[7, 7] = 1
    u[2] = np.arange(1, 6)
    for tensor in model.graph.initializer:
        if tensor.name in ("u", "v"):
            tensor.CopyFrom(numpy_helper.from_array(u if tensor.name == "u" else v, tensor.name))
    result = spa.prune(model, criterion="zero")
    assert result.plan.kept["w[1]"] == (2, 4, 7)
    feeds = make_feeds(model, seed=0, batch=3)
    assert distance(load_session(result.model).run(None, feeds)[0], load_session(model).run(None, feeds)[0]) < 1e-6


def test_a_state_that_begins_as_a_constant_is_none() -> None:
    body = f"""
    {COUNTED} s = Loop(trips, c, h) <body = step (int64 i, bool c1, float[1,13] s1) => (bool c2, float[1,13] o) {{
        c2 = Identity(c1) e = MatMul(x, w) m = MatMul(s1, v) em = Add(e, m) o = Tanh(em) }}>
    y = MatMul(s, u)"""
    model = network(body, "float[1,7] x", "float[1,5] y", h=np.ones((1, 13)), w=(7, 13), v=(13, 13), u=(13, 5))
    analysis = couple(Graph(flat(model)))
    assert not analysis.is_constant("s1") and not analysis.is_constant("m")
    checked(model)


def test_a_part_of_a_body_is_no_network() -> None:
    laid = flat(loop())
    cut = ModelProto()
    cut.CopyFrom(laid)
    at = next(i for i, n in enumerate(cut.graph.node) if n.op_type == "LoopLeave")
    del cut.graph.node[at]
    with pytest.raises(ModelError, match=r"LoopEnter .*: a part of a loop's body does not run by itself\."):
        nested(cut)


def test_a_file_that_uses_the_marks_domain_is_refused() -> None:
    model = loop()
    model.opset_import.append(helper.make_opsetid("spa.flat", 1))
    with pytest.raises(ModelError, match=r"imports the domain 'spa\.flat', which is our own"):
        spa.analyze(model)


BRANCHING = f"""
    {COUNTED} h = MatMul(x, w)
    s = Loop(trips, c, h) <body = step (int64 i, bool c1, float[n,13] s1) => (bool c2, float[n,13] o) {{
        c2 = Identity(c1) one = Constant<value_int=1>() early = Less(i, one)
        m = If(early) <then_branch = a () => (float[n,13] p) {{ p = MatMul(s1, v) }},
                       else_branch = b () => (float[n,13] q) {{ q = MatMul(s1, z) }}>
        o = Tanh(m) }}>
    y = MatMul(s, u)"""
ENDED_BY_DATA = """
    trips = Constant<value_int=3>() go = Constant<value_int=1>() c = Cast<to=9>(go) h = MatMul(x, w)
    s = Loop(trips, c, h) <body = step (int64 i, bool c1, float[n,13] s1) => (bool c2, float[n,13] o) {
        m = MatMul(s1, v) o = Tanh(m) sum = ReduceSum<keepdims=0>(o) five = Constant<value_float=5.0>()
        c2 = Less(sum, five) }>
    y = MatMul(s, u)"""


@pytest.mark.parametrize(
    ("body", "weights", "note"),
    [
        (
            BRANCHING,
            {"v": (13, 13), "z": (13, 13)},
            "MatMul 'p', MatMul 'q' were cut and not refitted: each lies in a branch, which does not always run",
        ),
        (
            ENDED_BY_DATA,
            {"v": (13, 13)},
            "MatMul 'm' was cut and not refitted: it lies in a loop that runs as often as data decide",
        ),
        (LOOP, {"v": (13, 13)}, None),
    ],
    ids=["a branch in a loop", "a loop that data end", "a loop of three steps"],
)
def test_reports_say_which_layers_of_bodies_were_not_refitted(
    body: str, weights: dict[str, tuple[int, ...]], note: str | None
) -> None:
    model = network(body, "float[n,7] x", "float[n,5] y", w=(7, 13), u=(13, 5), **weights)
    result = spa.prune(model, ratio=0.2, round_to=1, samples=32, insist=True)
    assert [n for n in result.report.notes if "not refitted" in n] == ([] if note is None else [note])
    cut = spa.prune(model, ratio=0.2, round_to=1, samples=32, insist=True, reconstruct="none")
    assert not any("not refitted" in n for n in cut.report.notes)
