"""Inputs of one number at which the graph stops counting or cuts a sequence: they are fed the number of steps."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, helper

from spa.coupling.analysis import couple
from spa.model.graph import Graph
from spa.running.feeds import working_feeds
from spa.running.runtime import load_session
from tests.model.test_stated import network
from tests.oracle import check

COUNTED = "zero = Constant<value_int=0>() one = Constant<value_int=1>() r = Range(zero, n, one)"
POSITIONS = (
    f"{COUNTED} e = Gather(table, ids) p = Gather(pos, r) s = Add(e, p) h = MatMul(s, w) a = Relu(h) y = MatMul(a, u)"
)
CUT = "k = Unsqueeze(n, start) e = Gather(table, ids) s = Slice(e, start, k, axes) h = MatMul(s, w) a = Relu(h) y = MatMul(a, u)"
SENTENCES = {"table": (50, 12), "w": (12, 23), "u": (23, 5)}


def positions() -> ModelProto:
    return network(POSITIONS, "int64[batch,sequence] ids, int64 n", **SENTENCES, pos=(200, 12))


def cut() -> ModelProto:
    return network(CUT, "int64[batch,sequence] ids, int64 n", **SENTENCES, start=[0], axes=[1])


@pytest.mark.parametrize(("model", "n", "free"), [(positions(), 9, [12, 23]), (cut(), 3, [23])], ids=["counted", "cut"])
def test_the_number_is_that_of_the_steps_and_nothing_relies_on_it(model: ModelProto, n: int, free: list[int]) -> None:
    feeds = working_feeds(load_session(model), model=model)
    assert feeds["n"] == feeds["ids"].shape[1] == 128
    analysis = couple(Graph(model))
    assert analysis.points.first.shape["s"] == (2, 128, 12)
    assert [g.size for g in analysis.free] == free
    check(model, feeds={"ids": np.random.default_rng(0).integers(0, 50, (3, 9)), "n": np.asarray(n)})


@pytest.mark.parametrize(
    "taken", ["k = Unsqueeze(n, start) s = Slice(h, start, k, axes)", f"{COUNTED} s = Gather<axis=1>(h, r)"]
)
def test_channels_that_a_caller_chooses_among_stay(taken: str) -> None:
    """Of as many channels as there are steps at most, all seem to be taken."""
    body = f"h = MatMul(x, w) {taken} y = ReduceSum(s, axes)"
    model = network(body, "float[batch,sequence,7] z, float[batch,7] x, int64 n", w=(7, 23), start=[0], axes=[1])
    assert not couple(Graph(model)).free


def test_a_number_beside_a_cache_says_nothing() -> None:
    model = positions()
    model.graph.input.append(helper.make_tensor_value_info("past_key", 1, ["batch", 2, "p", 3]))
    assert "n" not in couple(Graph(model)).points.first.given
