"""What refits cost: nothing grows with the number of batches, or of the uses of one matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import spa
from spa.obspa import score
from spa.obspa.moments import Moments
from tests.oracle import Net


def test_many_small_batches_are_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x, t = (rng.standard_normal((1, 2048, n)).astype(np.float32) for n in (31, 7))
    once, often, products = Moments(), Moments(), []
    accumulate = Moments._accumulate

    def counted(self: Moments) -> None:
        products.extend([self] if self._waiting else [])
        accumulate(self)

    monkeypatch.setattr(Moments, "_accumulate", counted)
    once.add(x, t)
    for start in range(0, 2048, 8):
        often.add(x[:, start : start + 8], t[:, start : start + 8])
    for mine, theirs in zip(often.products(), once.products(), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert products == [often, once]


def test_all_uses_of_one_matrix_are_one_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many second moments as matrices are held, however often an unrolled recurrent cell reads one."""
    net = Net()
    x = net.input("x", ["n", 8, 12])
    rows = net.node("Transpose", net.node("Relu", net.conv(x, 8, 13, (1,))), perm=[2, 0, 1])
    shared, steps = net.weight(13, 5, fan_in=13), []
    for step in range(12):
        one = net.node("Gather", rows, net.constant(np.asarray(step)), axis=0)
        steps.append(net.node("Tanh", net.node("MatMul", one, shared)))
    held: list[int] = []
    greedy = score.greedy

    def counted(readers: Sequence[Any], *rest: Any, **options: Any) -> Any:
        held.append(len(readers))
        return greedy(readers, *rest, **options)

    monkeypatch.setattr(score, "greedy", counted)
    spa.prune(net.model(net.node("Sum", *steps)), ratio=0.3, samples=16, insist=True, reconstruct="none")
    assert held == [1]
