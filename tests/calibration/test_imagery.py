"""Made-up images: what they show, the values that they have, and how a network tells which it expects."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import spa
from spa.calibration.drawings import drawings, textures
from spa.calibration.imagery import OTHERS, Imagery, choose, misfits, responding
from spa.calibration.leaves import dead_leaves
from spa.calibration.lettering import lettering
from spa.calibration.synthetic import Synthesiser
from spa.calibration.tokens import Text
from spa.errors import PlanError
from spa.report.text import calibrated


def filters(scale: float, norm: tuple[np.ndarray, np.ndarray] | None = None) -> ModelProto:
    """Sixteen filters with biases, for values of some scale; behind them a BatchNormalization with a mean and variance."""
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.standard_normal((16, 3, 3, 3)).astype(np.float32) / np.float32(scale),
        "b": rng.standard_normal(16).astype(np.float32),
    }
    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    if norm is not None:
        one, zero = np.ones(16, np.float32), np.zeros(16, np.float32)
        weights |= {"g": one, "z": zero, "m": norm[0].astype(np.float32), "v": norm[1].astype(np.float32)}
        nodes[1:] = [
            helper.make_node("BatchNormalization", ["h", "g", "z", "m", "v"], ["n"]),
            helper.make_node("Relu", ["n"], ["y"]),
        ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 48, 64])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 16, 46, 62])
    graph = helper.make_graph(nodes, "g", [x], [y], [numpy_helper.from_array(a, n) for n, a in weights.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def statistics(imagery: Imagery) -> tuple[np.ndarray, np.ndarray]:
    """The mean and variance of each filter's outputs on such images."""
    from spa.running.runtime import load_session, run

    graph = filters(1.0)
    graph.graph.node.pop()
    graph.graph.output[0].name = "h"
    (batch,) = Synthesiser(graph).batches(48, imagery=imagery, seed=7)
    h = run(load_session(graph), batch)[0]
    return h.mean(axis=(0, 2, 3)), h.var(axis=(0, 2, 3))


# -- what they show ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 3, 48, 160), (2, 1, 16, 16), (1, 4, 33, 20), (0, 3, 32, 32)])
def test_lettering_comes_in_any_size_by_seed(shape: tuple[int, ...]) -> None:
    images = lettering(*shape, np.random.default_rng(3))
    assert images.shape == shape
    assert images.dtype == np.float32
    assert not images.size or (images.min() >= 0 and images.max() <= 1)
    np.testing.assert_array_equal(images, lettering(*shape, np.random.default_rng(3)))


def test_lettering_has_sharper_edges_than_its_ground() -> None:
    images = lettering(40, 3, 48, 160, np.random.default_rng(0)).mean(axis=1)
    steps = np.abs(np.diff(images, axis=2)).max(axis=(1, 2))
    assert (steps > 0.15).mean() > 0.9  # there is something to read on nearly all


def test_a_mixture_is_half_text_and_small_images_are_leaves() -> None:
    rng = np.random.default_rng
    mixed = Imagery("mixed").draw(10, 3, 40, 56, rng(5))
    leaves = Imagery("photo").draw(10, 3, 40, 56, rng(5))
    np.testing.assert_array_equal(leaves, dead_leaves(10, 3, 40, 56, rng(5)))
    assert mixed.shape == leaves.shape
    # Leaves have grain everywhere; plain grounds have none.
    plain = (np.abs(np.diff(mixed, axis=3)) == 0).mean(axis=(1, 2, 3)) > 0.3
    assert 1 <= plain.sum() <= 5
    assert not plain[0::2].any() or not plain[1::2].any()
    small = Imagery("text").draw(4, 1, 9, 9, rng(5))
    np.testing.assert_array_equal(small, dead_leaves(4, 1, 9, 9, rng(5)))


# -- what a network expects --------------------------------------------------------------------------------


def test_the_scale_is_the_one_that_most_channels_respond_to() -> None:
    of_bytes, usual = Synthesiser(filters(255.0)), Synthesiser(filters(1.0))
    found = of_bytes.imagery()
    assert found.values.startswith("0 to 255")
    assert "of the channels respond" in found.note
    (batch,) = of_bytes.batches(8, imagery=found)
    assert batch["x"].max() > 100
    unsurprising = usual.imagery()
    assert (unsurprising.mean, unsurprising.std, unsurprising.note) == (None, None, "")


def test_given_values_are_not_decided() -> None:
    found = Synthesiser(filters(255.0)).imagery(mean=0.5, std=0.5)
    assert (found.mean, found.std, found.note) == (0.5, 0.5, "")
    with pytest.raises(PlanError, match=r"mean has 2 entries; input 'x' has 3 channels"):
        Synthesiser(filters(1.0)).imagery(mean=(0.1, 0.2))


def test_a_range_that_is_given_holds_for_images_and_is_not_decided() -> None:
    maker = Synthesiser(filters(1.0), value_range=(-20, 235))
    found = maker.imagery()
    (batch,) = maker.batches(8, imagery=found)
    assert batch["x"].mean() < 160
    assert -20 - 1e-3 <= batch["x"].min() < 10 and 150 < batch["x"].max() <= 235 + 1e-3
    assert "made-up values of x lie from -20 to 235, as --range says" in maker.notes


@pytest.mark.parametrize("domain", ["photo", "mixed", "drawing"])
def test_with_batch_normalisations_their_statistics_decide(domain: str) -> None:
    model = filters(1.0, statistics(Imagery(domain)))
    found = Synthesiser(model).imagery()
    assert found.domain == domain
    assert bool(found.note) == (domain != "photo")
    others = domain, "mixed" if domain == "photo" else "photo"
    near, far = misfits(model, [Synthesiser(model).batches(32, imagery=Imagery(d))[0] for d in others])
    assert near < 0.5 * far


@pytest.mark.parametrize("source", [drawings, textures])
@pytest.mark.parametrize("shape", [(3, 3, 40, 56), (2, 1, 8, 9), (2, 4, 16, 33), (0, 3, 32, 32)])
def test_drawings_and_textures_come_in_any_size_by_seed(source, shape: tuple[int, ...]) -> None:
    images = source(*shape, np.random.default_rng(3))
    assert images.shape == shape and images.dtype == np.float32
    assert not images.size or (images.min() >= 0 and images.max() <= 1 and images.std() > 0.02)
    np.testing.assert_array_equal(images, source(*shape, np.random.default_rng(3)))


def test_drawings_are_plain_but_for_their_strokes_and_textures_have_no_edges() -> None:
    steps = {d: np.abs(np.diff(Imagery(d).draw(24, 1, 64, 64, np.random.default_rng(0)), axis=3)) for d in OTHERS}
    assert np.median((steps["drawing"] == 0).mean(axis=(1, 2, 3))) > 0.7
    assert (steps["drawing"].max(axis=(1, 2, 3)) > 0.3).mean() > 0.9
    assert (steps["texture"].max(axis=(1, 2, 3)) > 0.5).mean() < 0.1
    assert np.median((steps["texture"] == 0).mean(axis=(1, 2, 3))) < 0.2


def answering(wanted: str, monkeypatch: pytest.MonkeyPatch, share: float) -> Imagery:
    """What is chosen if this fraction of the channels answers one domain, and a half all others."""
    shares = lambda _model, made, _threads: [share if m["domain"] == wanted else 0.5 for m in made]  # noqa: E731
    monkeypatch.setattr("spa.calibration.imagery.responding", shares)
    return choose(filters(1.0), lambda imagery: {"domain": imagery.domain}, "auto", fixed=False)


@pytest.mark.parametrize("domain", OTHERS)
def test_drawings_and_textures_are_taken_only_if_far_more_channels_respond(
    domain: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert answering(domain, monkeypatch, 0.55) == Imagery("mixed")
    found = answering(domain, monkeypatch, 0.8)
    assert found.domain == domain and "80% of the channels respond (50% to images half like" in found.note
    kept = choose(filters(1.0), lambda imagery: {"domain": imagery.domain}, "auto", fixed=True)
    assert kept.domain == domain
    asked = choose(filters(1.0), lambda imagery: {"domain": imagery.domain}, "photo", fixed=False)
    assert asked.domain == "photo"


def test_a_domain_that_is_asked_for_is_taken() -> None:
    assert Synthesiser(filters(1.0)).imagery("text").domain == "text"
    assert Synthesiser(filters(1.0)).imagery().domain == "mixed"


def test_networks_without_maps_or_statistics_are_not_asked() -> None:
    model = filters(1.0)
    del model.graph.node[:]
    model.graph.node.append(helper.make_node("Flatten", ["x"], ["y"]))
    assert responding(model, [{}]) == [0.0]
    assert misfits(model, [{}]) == []
    asked: list[Imagery] = []

    def make(imagery: Imagery) -> dict[str, np.ndarray]:
        asked.append(imagery)
        return {}

    assert choose(model, make, "photo", fixed=True) == Imagery("photo")
    assert asked == []


def test_the_report_says_what_was_made_up() -> None:
    result = spa.prune("models/digits_vgg.onnx", ratio=0.2, samples=16, domain="photo", mean=0.0, std=1.0)
    assert result.report.requested["inputs"]["domain"] == "photo"


def test_a_range_reaches_made_up_inputs_and_the_report() -> None:
    result = spa.prune("models/digits_vgg.onnx", ratio=0.2, samples=8, value_range=(0, 16), criterion="activation_l2")
    assert "made-up values of input lie from 0 to 16, as --range says" in result.report.notes
    assert result.report.requested["inputs"]["value_range"] == [0.0, 16.0]


# -- a domain that was not used ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("used", "size", "other", "said"),
    [
        ("photo", 48, "text", "of text"),
        ("photo", 9, "drawing", "drawings"),
        ("mixed", 48, "drawing", "drawings"),
        ("texture", 48, "photo", "photographs"),
    ],
)
def test_what_is_elsewhere_was_not_used(used: str, size: int, other: str, said: str) -> None:
    model = filters(1.0)
    for value in (model.graph.input[0], model.graph.output[0]):
        for dim in value.type.tensor_type.shape.dim[2:]:
            dim.dim_value = size - 2 * (value is not model.graph.input[0])
    found = Synthesiser(model).elsewhere(Imagery(used, mean=0.1, std=0.2), Text())
    assert found is not None and (found.imagery.domain, found.said) == (other, said)
    assert (found.imagery.mean, found.imagery.std) == (0.1, 0.2)


def test_the_report_says_the_change_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []

    def spied(self: Synthesiser, samples: int, imagery: Imagery, **how: object) -> list[dict[str, np.ndarray]]:
        drawn.append(imagery.domain)
        return made(self, samples, imagery=imagery, **how)

    made = Synthesiser.batches
    monkeypatch.setattr(Synthesiser, "batches", spied)
    options = {"ratio": 0.4, "samples": 16, "criterion": "activation_l2", "domain": "photo"}
    result = spa.prune("models/digits_resnet.onnx", **options)
    found = result.report.calibration
    assert drawn == ["photo", "photo", "drawing"]
    assert found["elsewhere"]["inputs"] == "drawings"
    assert found["elsewhere"]["after"] > 0 and found["elsewhere"]["after"] != found["after"]
    assert f", {found['elsewhere']['after']:.3f} on drawings instead" in calibrated(found)
    given = np.random.default_rng(0).standard_normal((16, 1, 8, 8)).astype(np.float32)
    assert (
        "elsewhere"
        not in spa.prune("models/digits_resnet.onnx", ratio=0.4, criterion="l2", data=given).report.calibration
    )
