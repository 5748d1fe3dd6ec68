"""Made-up sound, and states that networks carry from window to window."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import spa
from spa.calibration import streams
from spa.calibration.sound import levelled, sounds
from spa.calibration.streams import STEPS
from spa.calibration.synthetic import Synthesiser, synthesise
from spa.running.runtime import load_session, run

F = TensorProto.FLOAT


def listener(shape=("batch", 512), kernel: int = 128, state: str | None = "state", rows: int | str = "batch"):
    """Long filters, a mean over time, and a state that is half the old one and half what is heard."""
    rng = np.random.default_rng(0)
    constants = {
        "w": rng.standard_normal((8, 1, kernel)) / kernel**0.5,
        "v": rng.standard_normal((8, 4)),
        "half": np.array(0.5),
    }
    tensors = [onnx.numpy_helper.from_array(a.astype(np.float32), n) for n, a in constants.items()]
    tensors += [onnx.numpy_helper.from_array(np.array([i]), n) for i, n in enumerate(("zero", "one", "two"))]
    nodes = [
        helper.make_node("Unsqueeze", ["input", "one"], ["u"])
        if len(shape) == 2
        else helper.make_node("Identity", ["input"], ["u"]),
        helper.make_node("Conv", ["u", "w"], ["c"], strides=[64]),
        helper.make_node("Abs", ["c"], ["a"]),
        helper.make_node("ReduceMean", ["a"], ["m"], axes=[2], keepdims=0),
        helper.make_node("MatMul", ["m", "v"], ["y"]),
    ]
    inputs = [helper.make_tensor_value_info("input", F, list(shape))]
    outputs = [helper.make_tensor_value_info("y", F, [rows, 4])]
    if state:
        nodes += [
            helper.make_node("Unsqueeze", ["m", "zero"], ["n"]),
            helper.make_node("Add", [state, "n"], ["s"]),
            helper.make_node("Mul", ["s", "half"], ["next"]),
        ]
        inputs.append(helper.make_tensor_value_info(state, F, [1, rows, 8]))
        outputs.append(helper.make_tensor_value_info("next", F, [1, rows, 8]))
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def heard(sound: np.ndarray) -> np.ndarray:
    """What the network's mean over time makes of windows."""
    kernel = onnx.numpy_helper.to_array(next(t for t in listener().graph.initializer if t.name == "w"))[:, 0]
    windows = np.lib.stride_tricks.sliding_window_view(sound, 128, axis=-1)[..., ::64, :]
    return np.abs(windows @ kernel.T).mean(axis=-2)


def test_sounds_are_of_many_levels_and_change_with_time():
    made = sounds(64, 16_000, np.random.default_rng(0))
    peaks = np.abs(made).max(axis=1)
    assert peaks.max() <= 0.9 + 1e-6 and peaks.min() < 0.05
    level = made.reshape(64, -1, 400).std(axis=2) / peaks[:, None]
    changes = level.max(axis=1) / np.median(level, axis=1)
    assert np.median(changes) > 1.6, "syllables and notes stand out; of steady noise it is 1.2"


def test_voices_have_harmonics_that_noise_lacks():
    made = sounds(64, 4096, np.random.default_rng(0))
    spectrum = np.abs(np.fft.rfft(made * np.hanning(4096), axis=1)) ** 2
    flatness = np.exp(np.log(spectrum + 1e-12).mean(axis=1)) / spectrum.mean(axis=1)  # of white noise: about a half
    assert 0.1 < (flatness > 0.3).mean() < 0.5 and (flatness < 0.05).mean() > 0.3


def test_the_same_seed_gives_the_same_sound_and_another_one_another():
    first, again, other = (
        np.concatenate([b["input"] for b in synthesise(listener(), 32, seed=seed)]) for seed in (0, 0, 1)
    )
    assert (first == again).all() and (first != other).any()


@pytest.mark.parametrize("shape", [("batch", 512), ("batch", 1, 512)], ids=["rows", "one channel"])
def test_what_a_long_filter_reads_is_sound(shape):
    batches = synthesise(listener(shape, state=None), 64)
    made = np.concatenate([b["input"] for b in batches])
    assert made.shape == (64, *shape[1:]) and np.abs(made).max() <= 1
    assert made.std(axis=-1).min() < 0.05 * made.std(axis=-1).max()


@pytest.mark.parametrize("kernel", [63, 9])
def test_what_short_filters_read_is_none(kernel):
    made = synthesise(listener(kernel=kernel, state=None), 64)[0]["input"]
    assert np.abs(made).max() > 2


@pytest.mark.parametrize("batch", ["batch", 1], ids=["an open batch", "a batch of one"])
def test_states_are_what_the_network_made_of_the_windows_before(batch):
    batches = synthesise(listener((batch, 512), rows=batch), 48)
    assert len(batches) >= STEPS
    assert not any(b["state"].any() for b in batches[::STEPS])
    for before, after in pairwise(batches[:STEPS]):
        expected = (before["state"][0] + heard(before["input"])) / 2
        np.testing.assert_allclose(after["state"][0], expected, rtol=1e-4, atol=1e-6)
    assert batches[1]["state"].any()


@pytest.mark.parametrize("batch", ["batch", 1], ids=["an open batch", "a batch of one"])
def test_windows_of_a_stream_follow_one_another(batch, monkeypatch):
    def counting(count, length, rng):
        return np.arange(count * length, dtype=np.float32).reshape(count, length)

    monkeypatch.setattr(streams, "sounds", counting)
    batches = synthesise(listener((batch, 512), rows=batch), 2 * STEPS)[:STEPS]
    sound = np.concatenate([b["input"] for b in batches], axis=1)
    assert len(sound) == (1 if batch == 1 else 2)
    assert (np.diff(sound, axis=1) == 1).all()


@pytest.mark.parametrize("name", ["other", "past"])
def test_an_input_that_is_no_state_stays_random(name):
    batches = synthesise(listener(state=name), 32)
    assert all(b[name].std() > 0.5 for b in batches)


def test_the_report_says_what_was_made():
    result = spa.prune(listener(state=None), ratio=0.3, samples=32, round_to=1, insist=True)
    assert any(note.startswith("sound (input)") for note in result.report.notes)
    assert [note.partition(")")[0] for note in Synthesiser(listener()).notes] == ["sound (input", "states (state"]
    assert Synthesiser(listener(kernel=9, state=None)).notes == ()


@pytest.mark.parametrize("level", [False, True])
def test_windows_are_levelled_if_that_is_nearer_to_batch_normalisations(level: bool) -> None:
    """Behind the filters is a BatchNormalization that has seen sound as it is, or windows of mean 0 and deviation 1."""
    (seen,) = synthesise(listener(state=None), 64, batch=64, seed=5)
    graph = listener(state=None)
    windows = levelled(seen["input"]) if level else seen["input"]
    del graph.graph.node[2:]
    graph.graph.output[0].CopyFrom(helper.make_tensor_value_info("c", F, None))
    (c,) = run(load_session(graph), {"input": windows})
    statistics = {"scale": np.ones(8), "shift": np.zeros(8), "mean": c.mean((0, 2)), "var": c.var((0, 2))}
    graph.graph.initializer.extend(onnx.numpy_helper.from_array(a.astype(np.float32), n) for n, a in statistics.items())
    graph.graph.node.append(helper.make_node("BatchNormalization", ["c", *statistics], ["y"]))
    graph.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", F, None))
    maker = Synthesiser(graph)
    (made,) = maker.batches(12)
    assert np.allclose(made["input"].std(axis=1), 1, atol=1e-3) is level
    assert any("each window has mean 0 and deviation 1" in note for note in maker.notes) is level
    ranged = Synthesiser(graph, value_range=(-0.5, 0.5))
    assert not any("each window" in note for note in ranged.notes)
    (quiet,) = ranged.batches(12)
    assert np.abs(quiet["input"]).max() <= 0.5


def test_levelled_silence_is_silence() -> None:
    assert (levelled(np.full((2, 9), 0.5, np.float32)) == 0).all()
