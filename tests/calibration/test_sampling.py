"""Sequences that causal language models write themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import spa
from spa.calibration.imagery import Imagery
from spa.calibration.sampling import ROUNDS, Sampler, _drawn
from spa.calibration.synthetic import Synthesiser
from spa.calibration.tokens import Text

F, I64 = TensorProto.FLOAT, TensorProto.INT64
WORDS = 1000


def network(nodes: list[Any], inputs: dict[str, int], tensors: dict[str, np.ndarray]) -> ModelProto:
    values = [helper.make_tensor_value_info(name, kind, ["batch", "sequence"]) for name, kind in inputs.items()]
    output = helper.make_tensor_value_info("logits", F, ["batch", "sequence", WORDS])
    weights = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = helper.make_graph(nodes, "g", values, [output], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def bigrams(mask: bool = False, reads_all: bool = False) -> ModelProto:
    """After word i comes word 7 i + 3, nearly for certain; with ``reads_all`` all positions are seen from each."""
    table = np.zeros((WORDS, WORDS), np.float32)
    table[np.arange(WORDS), (7 * np.arange(WORDS) + 3) % WORDS] = 40
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["seen"])]
    if reads_all:
        nodes += [helper.make_node("ReduceMean", ["seen"], ["mean"], axes=[1])]
        nodes += [helper.make_node("Add", ["seen", "mean"], ["all"])]
    nodes += [helper.make_node("Identity", ["all" if reads_all else "seen"], ["logits"])]
    return network(nodes, {"input_ids": I64} | ({"attention_mask": I64} if mask else {}), {"table": table})


def sampled(model: ModelProto, samples: int = 6) -> tuple[list[dict[str, np.ndarray]], Sampler | None]:
    maker = Synthesiser(model, sizes={"sequence": 16})
    sampler = maker.sampler()
    return maker.batches(samples, sampler=sampler), sampler


def test_the_first_tokens_are_those_that_the_network_writes_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spa.calibration.sampling.MOST_LOGITS", 4 * 16 * WORDS * 4)  # four of six in one run
    (batch,), sampler = sampled(bigrams())
    assert sampler is not None and sampler.rows == 4
    ids = batch["input_ids"]
    for at in range(ROUNDS):
        np.testing.assert_array_equal(ids[:, at + 1], (7 * ids[:, at] + 3) % WORDS)
    assert len(np.unique(ids[:, 0])) > 1
    (again,), _ = sampled(bigrams())
    np.testing.assert_array_equal(ids, again["input_ids"])


def test_padding_stays_padding() -> None:
    (batch,), sampler = sampled(bigrams(mask=True), 40)
    assert sampler is not None and sampler.masks == ("attention_mask",)
    is_token = batch["attention_mask"] == 1
    assert (~is_token).any()
    assert (batch["input_ids"][~is_token] == 0).all()
    pair = batch["input_ids"][:, :2]
    np.testing.assert_array_equal(pair[:, 1], (7 * pair[:, 0] + 3) % WORDS)


def test_networks_that_see_what_comes_are_no_sources() -> None:
    assert sampled(bigrams(reads_all=True))[1] is None


def test_networks_that_read_something_else_are_no_sources() -> None:
    model = bigrams()
    model.graph.input.append(helper.make_tensor_value_info("embedding", F, ["batch", 4]))
    assert Synthesiser(model).sampler() is None
    shorter = bigrams()
    shorter.graph.node[1].CopyFrom(helper.make_node("ReduceMean", ["seen"], ["logits"], axes=[2], keepdims=0))
    shorter.graph.output[0].CopyFrom(helper.make_tensor_value_info("logits", F, ["batch", "sequence"]))
    assert Synthesiser(shorter).sampler() is None


def test_elsewhere_is_text_that_the_network_has_not_written() -> None:
    maker = Synthesiser(bigrams())
    one, other = (maker.elsewhere(Imagery(), Text(), sampled=sampled) for sampled in (True, False))
    assert one is not None and other is not None
    assert (one.said, other.said) == ("ids by Zipf's law", "ids at random")
    (batch,) = maker.batches(8, text=other.text)
    assert 0.4 < np.median(batch["input_ids"]) / WORDS < 0.6


def test_classes_are_drawn_as_often_as_the_softmax_says() -> None:
    logits = np.log(np.array([0.1, 0.6, 0.3], np.float32)) + 5
    drawn = _drawn(np.broadcast_to(logits, (3000, 3)), np.random.default_rng(0).random(3000, np.float32))
    np.testing.assert_allclose(np.bincount(drawn) / 3000, [0.1, 0.6, 0.3], atol=0.03)
    assert _drawn(np.array([[0.0, -np.inf]], np.float32), np.ones(1, np.float32)) == [0]


def perceptron() -> ModelProto:
    """Scores of the next word, by the last one alone."""
    rng = np.random.default_rng(0)
    sizes = {"table": (WORDS, 8), "a": (8, 32), "b": (32, WORDS)}
    tensors = {n: rng.standard_normal(s).astype(np.float32) for n, s in sizes.items()}
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["e"]),
        helper.make_node("MatMul", ["e", "a"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "b"], ["logits"]),
    ]
    return network(nodes, {"input_ids": I64}, tensors)


def notes_of(said: str, samples: int = 8, **options: Any) -> list[str]:
    result = spa.prune(perceptron(), ratio=0.3, criterion="activation_l2", samples=samples, **options)
    return [note for note in result.report.notes if said in note]


def test_a_pruning_samples_from_the_network_where_that_is_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    said, sizes = "sampled from the network itself", {"sequence": 12}
    assert notes_of(said, sizes=sizes) == [
        "token ids (input_ids) were then sampled from the network itself, a causal language model"
    ]
    monkeypatch.setattr("spa.calibration.sampling.MOST_MACS", 1e6)
    assert notes_of(said, sizes=sizes) == []


def test_lengths_are_mixed_unless_sizes_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spa.calibration.sampling.MOST_MACS", 0)
    assert len(notes_of("differ in length")) == 1
    assert notes_of("differ in length", sizes={"sequence": 128}) == []
