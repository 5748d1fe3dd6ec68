"""Gradient criteria, against torch's autograd and finite differences; gates, against scaled readers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from onnx import ModelProto

from spa import criteria
from spa.coupling.analysis import Analysis, Group, couple
from spa.criteria import gradient
from spa.criteria.autograd import from_autograd
from spa.criteria.gates import estimate_gates
from spa.criteria.registry import HESSIAN_GRADIENTS, SQUARED_GRADIENTS
from spa.errors import ModelError, PlanError, UnsupportedError
from spa.model.graph import Graph
from spa.running.runtime import load_session, run
from tests.oracle import Net

Array = np.ndarray
NEEDS = {n: formula.need for n, formula in gradient.FORMULAS.items()}
BY_HAND: dict[str, Callable[[Array, Array], Array]] = {  # rows of a channel's weights, rows of its derivatives
    "snip": lambda w, g: np.abs(w * g).sum(axis=1),
    "taylor": lambda w, g: np.abs((w * g).sum(axis=1)),
    "crop": lambda w, g: np.abs(w * g).sum(axis=1),
    "grasp": lambda w, g: (w * g).sum(axis=1),
    "fisher": lambda w, g: (w * w * g).sum(axis=1),
}


class Small(torch.nn.Module):
    """A convolution, a BatchNorm and two linear layers, of which one is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 5, 3)
        self.norm = torch.nn.BatchNorm2d(5)
        self.mid = torch.nn.Linear(20, 7)
        self.head = torch.nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.sigmoid(self.norm(self.conv(x))).flatten(1)
        return self.head(torch.tanh(self.mid(h)))


def small() -> tuple[Small, list[torch.Tensor], list[torch.Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Small().double()
        batches = [torch.randn(n, 2, 4, 4, dtype=torch.float64) for n in (4, 3)]
        labels = [torch.randint(0, 3, (n,)) for n in (4, 3)]
    return module, batches, labels


def as_onnx(module: Small) -> ModelProto:
    net = Net()
    state = {n: p.detach().numpy().astype(np.float32) for n, p in module.state_dict().items() if p.ndim}
    for name, value in state.items():
        net.constant(value, name)
    h = net.node("Conv", net.input("x", ["n", 2, 4, 4]), "conv.weight", "conv.bias")
    h = net.node("BatchNormalization", h, *(f"norm.{n}" for n in ("weight", "bias", "running_mean", "running_var")))
    h = net.node("Flatten", net.node("Sigmoid", h))
    h = net.node("Tanh", net.node("Gemm", h, "mid.weight", "mid.bias", transB=1))
    return net.model(net.node("Gemm", h, "head.weight", "head.bias", transB=1))


def flat_loss(module: Small, batches: list[torch.Tensor], labels: list[torch.Tensor]) -> Callable[[Array], float]:
    """The mean loss as a function of all parameters in a row."""

    def value(theta: Array) -> float:
        with torch.no_grad():
            torch.nn.utils.vector_to_parameters(torch.from_numpy(theta), module.parameters())
            total = sum(
                torch.nn.functional.cross_entropy(module(x), y, reduction="sum")
                for x, y in zip(batches, labels, strict=True)
            )
        return float(total) / sum(map(len, labels))

    return value


def flat(found: dict[str, Array], module: Small) -> Array:
    return np.concatenate([found[n].reshape(-1) for n, _ in module.named_parameters()])


# -- autograd ---------------------------------------------------------------------------------------------------------


def test_gradients_are_finite_differences_over_batches_of_unequal_size() -> None:
    module, batches, labels = small()
    found = flat(from_autograd(module, batches, labels), module)
    module.eval()
    value = flat_loss(module, batches, labels)
    theta = torch.nn.utils.parameters_to_vector(module.parameters()).detach().numpy().copy()
    expected = [(value(theta + e) - value(theta - e)) / 2e-5 for e in 1e-5 * np.eye(theta.size)]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)


def test_hessian_products_are_differences_of_gradients() -> None:
    module, batches, labels = small()
    found = from_autograd(module, batches, labels, need=HESSIAN_GRADIENTS)
    g = flat(from_autograd(module, batches, labels), module)
    theta = torch.nn.utils.parameters_to_vector(module.parameters()).detach().numpy().copy()
    ends = []
    for step in (1e-5, -1e-5):
        torch.nn.utils.vector_to_parameters(torch.from_numpy(theta + step * g), module.parameters())
        ends.append(flat(from_autograd(module, batches, labels), module))
    np.testing.assert_allclose(flat(found, module), (ends[0] - ends[1]) / 2e-5, rtol=1e-5, atol=1e-9)


def test_squares_are_of_single_batches() -> None:
    module, batches, labels = small()
    one_by_one = (
        [x[i : i + 1] for x in batches for i in range(len(x))],
        [y[i : i + 1] for y in labels for i in range(len(y))],
    )
    found = from_autograd(module, *one_by_one, need=SQUARED_GRADIENTS)
    each = [from_autograd(module, [x], [y]) for x, y in zip(*one_by_one, strict=True)]
    for name, array in found.items():
        np.testing.assert_allclose(array, np.mean([e[name] ** 2 for e in each], axis=0), rtol=1e-12)


def test_the_module_is_left_as_it_was_and_names_lead_to_initializers() -> None:
    module, batches, labels = small()
    module.train()
    module.head.weight.requires_grad_(False)
    before = {n: p.clone() for n, p in module.state_dict().items()}
    found = from_autograd(module, batches, labels, names={"W1": "head.weight"})
    assert module.training and module.norm.training and not module.head.weight.requires_grad
    assert all(torch.equal(p, before[n]) for n, p in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())
    np.testing.assert_array_equal(found["W1"], found["head.weight"])


def test_a_loss_without_labels_and_one_that_is_linear() -> None:
    linear = torch.nn.Linear(3, 1, bias=False).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    found = from_autograd(linear, [(x,)], loss=lambda y: y.mean())
    np.testing.assert_allclose(found["weight"], x.mean(dim=0, keepdim=True).numpy(), rtol=1e-12)
    curved = from_autograd(linear, [x], loss=lambda y: y.mean(), need=HESSIAN_GRADIENTS)
    np.testing.assert_array_equal(curved["weight"], np.zeros((1, 3)))


@pytest.mark.parametrize(
    ("batches", "labels", "message"),
    [
        ([], None, "there are 0 batches of inputs and 0 of labels. Give one for each."),
        ([torch.ones(1, 3)], [], "there are 1 batches of inputs and 0 of labels. Give one for each."),
    ],
)
def test_batches_without_partners_are_refused(batches: list[torch.Tensor], labels: object, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        from_autograd(torch.nn.Linear(3, 2), batches, labels)  # type: ignore[arg-type]


def test_a_loss_of_no_parameter_is_refused() -> None:
    with pytest.raises(PlanError, match="the loss depends on no parameter"):
        from_autograd(torch.nn.Linear(3, 2), [torch.ones(1, 3)], loss=lambda y: y.detach().sum())


def test_a_missing_torch_is_said_with_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'spa-onnx\[torch\]'"):
        from_autograd(torch.nn.Linear(3, 2), [])


# -- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", sorted(BY_HAND))
def test_scores_are_sums_over_the_channels_of_each_parameter(criterion: str) -> None:
    module, batches, labels = small()
    given = from_autograd(module, batches, labels, need=NEEDS[criterion])
    analysis = couple(Graph(as_onnx(module)))
    group = next(g for g in analysis.free if g.size == 5)  # conv writes it, mid reads it in blocks of four
    found = criteria.score(analysis, [group], criterion, "none", "sum", derivatives=given)[group.name]
    conv, mid = (np.asarray(module.get_parameter(f"{n}.weight").detach()).astype(np.float32) for n in ("conv", "mid"))
    rows = [(a.reshape(5, -1), b.reshape(7, 5, 4).swapaxes(0, 1).reshape(5, -1)) for a, b in
            ((conv, mid), (given["conv.weight"], given["mid.weight"]))]  # fmt: skip
    expected = sum(BY_HAND[criterion](w.astype(np.float64), g) for w, g in zip(*rows, strict=True))
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_the_first_order_loss_of_a_channel_is_its_taylor_score() -> None:
    module, batches, labels = small()
    given = from_autograd(module, batches, labels)
    analysis = couple(Graph(as_onnx(module)))
    group = next(g for g in analysis.free if g.size == 7)
    found = criteria.score(analysis, [group], "taylor", "none", "max", derivatives=given)[group.name]
    module.eval()
    value = flat_loss(module, batches, labels)
    start = torch.nn.utils.parameters_to_vector(module.parameters()).detach().numpy().copy()

    def scaled(name: str, axis: int, channel: int, step: float) -> float:
        torch.nn.utils.vector_to_parameters(torch.from_numpy(start.copy()), module.parameters())
        with torch.no_grad():
            module.get_parameter(name).select(axis, channel).mul_(1 + step)
        return value(torch.nn.utils.parameters_to_vector(module.parameters()).detach().numpy())

    slopes = [
        max(
            abs(scaled(n, axis, c, 1e-5) - scaled(n, axis, c, -1e-5)) / 2e-5
            for n, axis in (("mid.weight", 0), ("head.weight", 1))
        )
        for c in range(7)
    ]
    np.testing.assert_allclose(found, slopes, rtol=1e-4)


def test_grasp_keeps_its_sign_through_every_norm() -> None:
    module, batches, labels = small()
    given = from_autograd(module, batches, labels, need=HESSIAN_GRADIENTS)
    analysis = couple(Graph(as_onnx(module)))
    plain = criteria.score(analysis, analysis.free, "grasp", "none", "sum", derivatives=given)
    assert any((v < 0).any() for v in plain.values())
    alone = {n: g for n, g in given.items() if n in ("mid.weight", "head.weight")}
    group = next(g for g in analysis.free if g.size == 7)
    for norm in ("sum", "mean", "max"):
        found = criteria.score(analysis, [group], "grasp", norm, "max", derivatives=alone)[group.name]
        assert np.isfinite(found).all() and np.abs(found).max() <= 7


def test_which_derivatives_a_criterion_multiplies_with() -> None:
    first, second = {"w": np.ones(1)}, {"w": np.zeros(1)}
    assert {n: gradient.select_derivative(need, first, second) is second for n, need in NEEDS.items()} == {
        "snip": False, "taylor": False, "fisher": False, "crop": True, "grasp": True
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: None, "criterion 'snip' multiplies with the gradient of each parameter. Give them by initializer."),
        (
            lambda g: {"mid.weight": g["mid.weight"], "other": 0},
            "criterion 'snip': no gradient is given for 'conv.weight', 'head.weight'; there are others for 'other'. "
            "Name them as the model's initializers are",
        ),
        (
            lambda g: g | {"mid.weight": g["mid.weight"].T},
            r"the gradient of 'mid.weight' has shape \(20, 7\), expected \(7, 20\)",
        ),
        (
            lambda g: g | {"mid.weight": g["mid.weight"] * np.nan},
            "the gradient of 'mid.weight' has values that are not finite numbers",
        ),
        (
            lambda g: g | {"mid.weight": g["mid.weight"].astype(str)},
            "the gradient of 'mid.weight' has values that are not finite numbers",
        ),
    ],
)
def test_gradients_that_do_not_fit_are_refused(change: Callable[[dict[str, Array]], object], message: str) -> None:
    module, batches, labels = small()
    analysis = couple(Graph(as_onnx(module)))
    given = change(from_autograd(module, batches, labels))
    with pytest.raises(PlanError, match=message):
        criteria.score(analysis, analysis.free, "snip", derivatives=given)  # type: ignore[arg-type]


def test_other_frameworks_arrays_are_taken_as_they_are() -> None:
    module, batches, labels = small()
    analysis = couple(Graph(as_onnx(module)))
    given = from_autograd(module, batches, labels)
    tensors = {n: torch.from_numpy(g).float() for n, g in given.items()}
    for name, found in criteria.score(analysis, analysis.free, "snip", derivatives=tensors).items():
        expected = criteria.score(analysis, analysis.free, "snip", derivatives=given)[name]
        np.testing.assert_allclose(found, expected, rtol=1e-5)


# -- gates ------------------------------------------------------------------------------------------------------------


def gated(ending: str = "") -> tuple[Analysis, list[Group], list[dict[str, Array]], Array]:
    """A convolution, two groups, a flattened reader; four gates in one group, three in the other."""
    net = Net(seed=3)
    h = net.node("Sigmoid", net.conv(net.input("x", ["n", 2, 3, 3]), 2, 4, name="a", pads=[0] * 4))
    h = net.node("Tanh", net.gemm(net.node("Flatten", h), 4, 3, name="b"))
    y = net.gemm(h, 3, 5, name="c")
    model = net.model(net.node(ending, y) if ending else y)
    analysis = couple(Graph(model))
    rng = np.random.default_rng(0)
    batches = [{"x": rng.standard_normal((n, 2, 3, 3)).astype(np.float32)} for n in (6, 4)]
    return analysis, [g for g in analysis.free if g.size > 1], batches, rng.integers(0, 5, 10)


def outputs(analysis: Analysis, batches: list[dict[str, Array]], tensor: str, channel: int, factor: float) -> Array:
    """The network in float64 with the columns of one reader scaled, all samples."""
    weights = {n: analysis.graph.array(n).astype(np.float64) for n in analysis.graph.initializers}
    weights[tensor] = weights[tensor].copy()
    weights[tensor][:, channel] *= factor
    sigmoid = lambda v: 1 / (1 + np.exp(-v))  # noqa: E731
    x = np.concatenate([b["x"] for b in batches]).astype(np.float64)
    h = sigmoid(np.einsum("nchw,ochw->no", x, weights["a"]) + weights["a.bias"])
    h = np.tanh(h @ weights["b"].T + weights["b.bias"])
    return h @ weights["c"].T + weights["c.bias"]


def cross_entropy(scores: Array, labels: Array) -> float:
    return float(np.mean(np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(len(labels)), labels]))


PROBES = 3000


@pytest.mark.parametrize("ending", ["", "Softmax", "LogSoftmax"])
def test_with_labels_gates_are_derivatives_of_the_cross_entropy(ending: str) -> None:
    analysis, groups, batches, labels = gated(ending)
    found = np.concatenate([*estimate_gates(analysis, groups, batches, labels, probes=PROBES).values()])
    readers = [("b", c) for c in range(4)] + [("c", c) for c in range(3)]
    exact = np.array(
        [
            np.diff([cross_entropy(outputs(analysis, batches, n, c, f), labels) for f in (1 - 1e-4, 1 + 1e-4)])[0]
            / 2e-4
            for n, c in readers
        ]
    )
    deviation = np.sqrt((exact**2).sum() / PROBES)
    assert np.abs(found - exact).max() < 4 * deviation
    assert np.abs(exact).max() > 20 * deviation  # the estimate says something


def test_without_labels_gates_are_squared_derivatives_of_the_outputs() -> None:
    analysis, groups, batches, _ = gated()
    found = np.concatenate([*estimate_gates(analysis, groups, batches, probes=PROBES).values()])
    readers = [("b", c) for c in range(4)] + [("c", c) for c in range(3)]
    dense = outputs(analysis, batches, "c", 0, 1.0)
    energy = np.square(dense - dense.mean()).sum()
    exact = np.array(
        [
            np.square(
                (outputs(analysis, batches, n, c, 1 + 1e-4) - outputs(analysis, batches, n, c, 1 - 1e-4)) / 2e-4
            ).sum()
            for n, c in readers
        ]
    )
    exact /= energy
    deviation = exact.sum() * np.sqrt(2 / PROBES)
    assert np.abs(found - exact).max() < 3 * deviation
    assert exact.max() > 8 * deviation


def test_gates_are_the_same_for_the_same_seed_and_named_as_groups() -> None:
    analysis, groups, batches, labels = gated()
    one, two = (estimate_gates(analysis, groups, batches, labels, probes=4, seed=7) for _ in range(2))
    assert [(n, v.shape) for n, v in one.items()] == [(g.name, (g.size,)) for g in groups]
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])


def test_channels_that_nobody_reads_are_worth_less_than_noise() -> None:
    analysis, _, batches, _ = gated()
    model = ModelProto()
    model.CopyFrom(analysis.graph.model)
    for tensor in model.graph.initializer:
        if tensor.name == "c":
            value = analysis.graph.array("c").copy()
            value[:, 1] = 0
            tensor.raw_data = value.tobytes()
    again = couple(Graph(model))
    found = estimate_gates(again, [g for g in again.free if g.size == 3], batches, probes=200)
    (worth,) = found.values()
    assert np.argmin(worth) == 1 and abs(worth[1]) < 0.1 * worth.max()


def test_attention_gates_scale_heads_and_dimensions_together() -> None:
    net = Net()
    x = net.input("x", ["n", 5, 6])
    shape = net.constant(np.array([0, 0, 3, 2]))
    q, k = (net.node("Reshape", net.matmul(x, 6, 6, bias=False, name=n), shape) for n in ("q", "k"))
    q, k = net.node("Transpose", q, perm=[0, 2, 1, 3]), net.node("Transpose", k, perm=[0, 2, 3, 1])
    y = net.node(
        "Reshape",
        net.node("Transpose", net.node("MatMul", q, k), perm=[0, 2, 3, 1]),
        net.constant(np.array([0, 0, 15])),
    )
    model = net.model(net.matmul(y, 15, 2, name="out"))
    analysis = couple(Graph(model))
    groups = [g for g in analysis.free if g.size in (2, 3)]
    assert sorted(g.size for g in groups) == [2, 3]
    batches = [{"x": np.random.default_rng(1).standard_normal((8, 5, 6)).astype(np.float32)}]
    found = estimate_gates(analysis, groups, batches, probes=2000)
    for group in groups:
        others = {g.name: np.ones(g.size) for g in groups}
        ends = []
        for c in range(group.size):

            def ran(step: float, c: int = c, group: Group = group, others: dict[str, Array] = others) -> Array:
                gates = {n: v.copy() for n, v in others.items()}
                gates[group.name][c] += step
                heads, dims = (next(v for v in gates.values() if v.size == n) for n in (3, 2))
                weights = {n: analysis.graph.array(n).astype(np.float64) for n in analysis.graph.initializers}
                data = batches[0]["x"].astype(np.float64)
                qs = (data @ weights["q"]).reshape(8, 5, 3, 2) * dims
                ks = (data @ weights["k"]).reshape(8, 5, 3, 2)
                scores = (np.einsum("nihd,njhd->nijh", qs, ks) * heads).reshape(8, 5, 15)
                return scores @ weights["out"] + weights["out.bias"]

            ends.append((ran(1e-4) - ran(-1e-4)) / 2e-4)
        dense = np.asarray(run(load_session(model), batches[0])[0], np.float64)
        exact = np.array([np.square(e).sum() for e in ends]) / np.square(dense - dense.mean()).sum()
        np.testing.assert_allclose(found[group.name], exact, atol=0.15 * exact.max())


@pytest.mark.parametrize(
    ("probes", "inputs", "labels", "message"),
    [
        (1, True, None, "gates need at least 2 probes and 1 batch of inputs, not 1 and 2"),
        (4, False, None, "gates need at least 2 probes and 1 batch of inputs, not 4 and 0"),
        (
            4,
            True,
            np.zeros(7, int),
            r"has shape \(4, 5\), not one row of class scores per sample, of which 7 have labels",
        ),
    ],
)
def test_what_gates_cannot_be_estimated_on_is_refused(
    probes: int, inputs: bool, labels: Array | None, message: str
) -> None:
    analysis, groups, batches, _ = gated()
    with pytest.raises(PlanError, match=message):
        estimate_gates(analysis, groups, batches if inputs else [], labels, probes=probes)


def test_gates_of_outputs_that_are_not_finite_are_refused() -> None:
    analysis, groups, batches, _ = gated()
    batches[1]["x"][:] = np.nan
    with pytest.raises(ModelError, match="the outputs are not finite"):
        estimate_gates(analysis, groups, batches, probes=2)


def test_a_model_without_float_outputs_needs_labels() -> None:
    net = Net()
    h = net.node("Relu", net.gemm(net.input("x", ["n", 3]), 3, 4))
    analysis = couple(Graph(net.model(net.node("ArgMax", net.gemm(h, 4, 2), axis=1, keepdims=0))))
    with pytest.raises(PlanError, match="the model has no output of floats"):
        estimate_gates(analysis, analysis.free, [{"x": np.ones((2, 3), np.float32)}], probes=2)
