"""Refits against an independent least squares, and what a group's loss counts.

Everything goes through :class:`Calibrated`, as pruning does, so that its constants are tested with it. The numbers below
are decision 7's; whoever changes them measures again.
"""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, numpy_helper

from spa.coupling.analysis import TIED, Analysis, couple
from spa.coupling.plan import make_plan
from spa.criteria import Context
from spa.model.graph import Graph
from spa.obspa import criterion
from spa.obspa.pipeline import Calibrated
from spa.surgery.apply import apply
from tests.oracle import Net

Array = np.ndarray
ROWS = 331
FEW = 1 + 512 / ROWS  # given inputs damp more, the fewer they are
DAMPING = 0.03
OWN_INPUTS = 0.85  # the fraction of the pruned network's own inputs in what a fit sees; of synthetic inputs, the next
OWN_INPUTS_SYNTHETIC = 0.7
FADING = 0.3
SHARED = 4.0
EPSILON = 1e-5


def arrays(model: ModelProto) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer}


def group(analysis: Analysis, name: str) -> str:
    return next(g.name for g in analysis.free if g.name.startswith(name))


def samples(*shape: int) -> Array:
    """Rows with a mean of their own and correlated columns."""
    rng = np.random.default_rng(7)
    mixed = rng.standard_normal(shape) @ rng.standard_normal((shape[-1], shape[-1]))
    return (0.5 * mixed + rng.standard_normal(shape[-1])).astype(np.float32)


def refitted(model: ModelProto, kept: dict[str, list[int]], x: Array, synthetic: bool = False) -> dict[str, Array]:
    """The weights after pruning and reconstruction."""
    analysis = couple(Graph(model))
    plan = make_plan(analysis, {group(analysis, n): np.array(k) for n, k in kept.items()})
    pruned = apply(analysis, plan)
    Calibrated(analysis, [{"x": part} for part in np.array_split(x, 3)], synthetic).reconstruct([(plan, pruned)])
    return arrays(pruned)


def ridge(x: Array, t: Array, prior: Array, more: float = 1.0) -> tuple[Array, Array]:
    """W and c that minimise mean |t − W x − c|² + λ |W − prior|², by one stacked least squares."""
    inputs = x.shape[1]
    strength = more * DAMPING * (1 + 10 * inputs / len(x)) * x.var(axis=0).mean()
    rows = np.concatenate([x, np.ones((len(x), 1))], axis=1) / np.sqrt(len(x))
    pull = np.sqrt(strength) * np.eye(inputs, inputs + 1)
    targets = np.concatenate([t / np.sqrt(len(x)), np.sqrt(strength) * prior.T])
    solution = np.linalg.lstsq(np.concatenate([rows, pull]), targets, rcond=None)[0]
    return solution[:-1].T, solution[-1]


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


def branches() -> ModelProto:
    """h = relu(a x) has two readers (so that `a` itself is not refitted); d reads what p has become; d's sum with q.

    out = relu(norm(d tanh(p h)) + q h), and each of p and q alone loses what h loses.
    """
    net = Net(seed=11)
    h = net.node("Relu", net.gemm(net.input("x", ["n", 5]), 5, 13, name="a"))
    skip = net.gemm(h, 13, 4, name="q")
    d = net.gemm(net.node("Tanh", net.gemm(h, 13, 7, name="p")), 7, 4, name="d")  # no unit is dead
    statistics = [net.weight(4, name=n, positive=n in ("gamma", "variance")) for n in ("gamma", "beta", "mean")]
    normed = net.node("BatchNormalization", d, *statistics, net.weight(4, name="variance", positive=True))
    return net.model(net.gemm(net.node("Relu", net.node("Add", normed, skip)), 4, 3, name="head"))


KEPT = [0, 2, 3, 6, 7, 8, 11]


@pytest.mark.parametrize("synthetic", [False, True])
def test_a_chain_of_refits_is_that_of_damped_least_squares_on_mixed_inputs(synthetic: bool) -> None:
    """Of the dense network's input nothing is lost, so that p and q see it whichever share is asked for."""
    model, x = branches(), samples(ROWS, 5)
    if synthetic:  # synthetic inputs bring their own statistics: make the stored ones just these
        stored = arrays(model)
        hidden = np.tanh(relu(x @ stored["a"].T + stored["a.bias"]) @ stored["p"].T + stored["p.bias"])
        d = hidden @ stored["d"].T + stored["d.bias"]
        for tensor in model.graph.initializer:
            if tensor.name in ("mean", "variance"):
                value = d.mean(axis=0) if tensor.name == "mean" else d.var(axis=0)
                tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float32), tensor.name))
    old, new = arrays(model), refitted(model, {"a": KEPT}, x, synthetic)
    more = 1.0 if synthetic else FEW
    h = relu(x @ old["a"].T + old["a.bias"])
    few = h[:, KEPT]
    np.testing.assert_allclose(new["a"], old["a"][KEPT], atol=1e-6)
    skip = h @ old["q"].T + old["q.bias"]
    w, c = ridge(few, skip, old["q"][:, KEPT], more)
    np.testing.assert_allclose(new["q"], w, atol=1e-4)
    np.testing.assert_allclose(new["q.bias"], c, atol=1e-4)
    p = h @ old["p"].T + old["p.bias"]
    w, c = ridge(few, p, old["p"][:, KEPT], more)
    np.testing.assert_allclose(new["p"], w, atol=1e-4)
    np.testing.assert_allclose(new["p.bias"], c, atol=1e-4)

    own, dense = np.tanh(few @ w.T + c), np.tanh(p)
    share = OWN_INPUTS_SYNTHETIC if synthetic else OWN_INPUTS
    mixed = dense + share * (own - dense)
    lost = skip - (few @ new["q"].T + new["q.bias"])
    assert np.abs(lost).max() > 0.05
    unit = old["gamma"] / np.sqrt(old["variance"] + EPSILON)
    target = dense @ old["d"].T + old["d.bias"] + lost / unit
    w, c = ridge(mixed, target, old["d"], more)
    np.testing.assert_allclose(new["d"], w, atol=2e-4)
    np.testing.assert_allclose(new["d.bias"], c, atol=2e-4)


def siamese(bias: str) -> ModelProto:
    """Two layers into one weight that an importer has marked as tied, with one bias, with two or without."""
    net = Net(seed=19)
    x, shared = net.input("x", ["n", 5]), net.weight(4, 13, name="w", fan_in=13)
    net.weights["w"].metadata_props.add(key=TIED, value="true")
    names = {"one": ["b", "b"], "two": ["b", "b2"]}.get(bias)
    for name in dict.fromkeys(names or ()):
        net.weight(4, name=name)
    turned = net.node("Transpose", shared, perm=[1, 0]) if names is None else ""
    ends = []
    for i, layer in enumerate(("a1", "a2")):
        h = net.node("Tanh", net.gemm(x, 5, 13, name=layer))
        y = net.node("Gemm", h, shared, names[i], transB=1) if names else net.node("MatMul", h, turned)
        ends.append(net.node("Relu", y))
    return net.model(*ends)


@pytest.mark.parametrize("bias", ["one", "two", "none"])
def test_a_weight_with_two_uses_is_fitted_to_both_about_the_means_that_biases_can_take(bias: str) -> None:
    model, x = siamese(bias), samples(ROWS, 5)
    old, new = arrays(model), refitted(model, {"w[": KEPT}, x)
    inputs, targets = [], []
    for layer in ("a1", "a2"):
        h = np.tanh(x @ old[layer].T + old[f"{layer}.bias"])
        inputs.append(h[:, KEPT])
        targets.append(h @ old["w"].T)
    if bias == "two":
        inputs, targets = ([part - part.mean(axis=0) for part in parts] for parts in (inputs, targets))
    rows, target = np.concatenate(inputs), np.concatenate(targets)
    if bias == "one":
        rows, target = rows - rows.mean(axis=0), target - target.mean(axis=0)
    covariance, prior = rows.T @ rows / len(rows), old["w"][:, KEPT]
    strength = FEW * DAMPING * (1 + 10 * len(KEPT) / len(rows)) * np.diag(covariance).mean()
    right = target.T @ rows / len(rows) + strength * prior
    expected = np.linalg.solve(covariance + strength * np.eye(len(KEPT)), right.T).T
    np.testing.assert_allclose(new["w"], expected, atol=1e-4)


def test_a_bias_that_other_layers_read_stays_as_it_is() -> None:
    """`shared` is also the bias of `other`, whose inputs are the graph's: a refit of `d` must not move it."""
    net = Net(seed=3)
    x = net.input("x", ["n", 5])
    shared = net.weight(4, name="shared")
    h = net.node("Relu", net.gemm(x, 5, 13, name="a"))
    d = net.node("Gemm", h, net.weight(4, 13, name="d", fan_in=13), shared, transB=1)
    other = net.node("Gemm", x, net.weight(4, 5, name="other", fan_in=5), shared, transB=1)
    model = net.model(net.node("Relu", d), other)
    old, new = arrays(model), refitted(model, {"a": KEPT}, samples(ROWS, 5))
    np.testing.assert_array_equal(new["shared"], old["shared"])
    assert np.abs(new["d"] - old["d"][:, KEPT]).max() > 1e-3  # the weights have been refitted all the same
    assert [n for n in new if n.startswith("shared")] == ["shared"]


def test_the_layer_before_a_cut_learns_what_the_other_branch_has_lost() -> None:
    """out = norm(d p x) + q relu(a x): of h two units stay, so that most of what d p is to give is what q has lost.

    No two units of p give that but those of the best regression of rank two, which Gauss-Newton steps come near.
    """
    net = Net(seed=23)
    x = net.input("x", ["n", 5])
    skip = net.gemm(net.node("Relu", net.gemm(x, 5, 13, name="a")), 13, 4, name="q")
    d = net.gemm(net.gemm(x, 5, 7, name="p"), 7, 4, name="d")
    statistics = [net.weight(4, name=n, positive=n == "gamma") for n in ("gamma", "beta", "mean")]
    normed = net.node("BatchNormalization", d, *statistics, net.weight(4, name="variance", positive=True))
    model = net.model(net.gemm(net.node("Relu", net.node("Add", normed, skip)), 4, 3, name="head"))
    for tensor in model.graph.initializer:
        if tensor.name == "d":
            tensor.CopyFrom(numpy_helper.from_array(0.05 * numpy_helper.to_array(tensor), "d"))

    x = samples(ROWS, 5)
    old, new = arrays(model), refitted(model, {"a": [4, 9], "p": [1, 2]}, x)

    def parts(w: dict[str, Array]) -> tuple[Array, Array]:
        d = (x @ w["p"].T + w["p.bias"]) @ w["d"].T + w["d.bias"]
        normed = (d - w["mean"]) * w["gamma"] / np.sqrt(w["variance"] + EPSILON) + w["beta"]
        return normed, relu(x @ w["a"].T + w["a.bias"]) @ w["q"].T + w["q.bias"]

    (normed, skip), (own_normed, own_skip) = parts(old), parts(new)
    target = normed + skip - own_skip
    target = target - target.mean(axis=0)
    rows = x - x.mean(axis=0)
    fitted = rows @ np.linalg.lstsq(rows, target, rcond=None)[0]
    left, size, right = np.linalg.svd(fitted, full_matrices=False)
    best = np.square(target - (left[:, :2] * size[:2]) @ right[:2]).sum()
    residual = normed + skip - own_normed - own_skip
    error = np.square(residual - residual.mean(axis=0)).sum()
    assert best < 0.2 * np.square(target).sum()
    assert error < 1.3 * best  # six damped steps end near, not at it; without what is lost it is twice that and more


# -- what losses count ------------------------------------------------------------------------------------------------


def chain(readers: int) -> ModelProto:
    """Three layers and a head; the second layer has several readers, whose outputs are not added."""
    net = Net(seed=5)
    h = net.node("Relu", net.gemm(net.input("x", ["n", 5]), 5, 11, name="a"))
    h = net.node("Relu", net.gemm(h, 11, 13, name="b"))
    return net.model(*(net.gemm(h, 13, 3, name=f"head{i}") for i in range(readers)))


def losses(model: ModelProto, fading: float | None, synthetic: bool = False) -> dict[str, Array]:
    analysis = couple(Graph(model))
    calibrated = Calibrated(analysis, [{"x": samples(ROWS, 5)}], synthetic)
    context = Context(analysis, analysis.free, inputs=calibrated.inputs())
    with pytest.MonkeyPatch.context() as patch:
        if fading is not None:
            patch.setattr(criterion, "refit_discounts", lambda context, inputs: (fading,))
        curves = criterion.loss_curves(context).candidates[0]
    return {name: curves[group(analysis, name)].loss for name in ("a", "b")}


def test_a_group_that_several_layers_read_counts_four_times_their_losses() -> None:
    """All channels gone, a reader has lost all its variance: one, where nothing is added to its outputs."""
    alone, several = losses(chain(1), 0.0), losses(chain(2), 0.0)
    assert alone["b"][-1] == pytest.approx(1, rel=1e-2)  # damped
    assert several["b"][-1] == pytest.approx(2 * SHARED, rel=1e-2)
    np.testing.assert_allclose(several["a"], alone["a"], rtol=1e-6)


@pytest.mark.parametrize("fading", [0.3, 1.0])
def test_a_loss_fades_with_the_readers_behind_it(fading: float) -> None:
    plain, faded = losses(chain(2), 0.0), losses(chain(2), fading)
    np.testing.assert_allclose(faded["a"], plain["a"] * 3.0**-fading, rtol=1e-9)  # both heads are behind
    np.testing.assert_allclose(faded["b"], plain["b"] * (2.0**-fading + 1) / 2, rtol=1e-9)  # one is behind the other


@pytest.mark.parametrize(("synthetic", "fading"), [(False, FADING), (True, 0.0)])
def test_losses_fade_by_themselves_on_given_inputs_alone(synthetic: bool, fading: float) -> None:
    default, explicit = losses(chain(1), None, synthetic), losses(chain(1), fading, synthetic)
    for name in ("a", "b"):
        np.testing.assert_array_equal(default[name], explicit[name])
    assert losses(chain(1), fading + 0.1, synthetic)["a"][-1] != explicit["a"][-1]
