"""Normalisations: what is exact against the masked original; what crosses runs, in the right shapes.

How to read an expectation: see tests/oracle.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from onnx import ModelProto

from tests.oracle import Data, verify, weight, wrap

Cases = dict[str, tuple[str, Callable[[], ModelProto]]]

CASES: Cases = {
    "bn": (
        "2 7 5 | 2 7 5",
        lambda: wrap("BatchNormalization", Data(2, 7, 5), weight(7), weight(7), weight(7), weight(7, positive=True)),
    ),
    "bn op7": (
        "2 7 5 | 2 7 5",
        lambda: wrap(
            "BatchNormalization", Data(2, 7, 5), weight(7), weight(7), weight(7), weight(7, positive=True), opset=7
        ),
    ),
    "bn op13": (
        "2 7 5 | 2 7 5",
        lambda: wrap(
            "BatchNormalization", Data(2, 7, 5), weight(7), weight(7), weight(7), weight(7, positive=True), opset=13
        ),
    ),
    "bn train": (
        "2~ 7 5~ | 2~ 7 5~ | 7 | 7",
        lambda: wrap(
            "BatchNormalization",
            Data(2, 7, 5),
            weight(7),
            weight(7),
            weight(7),
            weight(7, positive=True),
            training_mode=1,
            outputs=3,
            read=[0],
        ),
    ),
    "in": ("2 7 5~ | 2 7 5~", lambda: wrap("InstanceNormalization", Data(2, 7, 5), weight(7), weight(7))),
    "ln": ("2 5 7~ | 2 5 7~", lambda: wrap("LayerNormalization", Data(2, 5, 7), weight(7), weight(7))),
    "ln axis1": (
        "2 5~ 7~ | 2 5~ 7~",
        lambda: wrap("LayerNormalization", Data(2, 5, 7), weight(5, 7), weight(5, 7), axis=1),
    ),
    "ln nobias 3out": (
        "2 5 7~ | 2 5 7~ | 2 5 1 | 2 5 1",
        lambda: wrap("LayerNormalization", Data(2, 5, 7), weight(7), outputs=3),
    ),
    "rms": ("2 5 7~ | 2 5 7~", lambda: wrap("RMSNormalization", Data(2, 5, 7), weight(7), opset=23)),
    "gn18": (
        "2 (3 2~) 5~ | 2 (3 2~) 5~",
        lambda: wrap("GroupNormalization", Data(2, 6, 5), weight(3), weight(3), num_groups=3, opset=18),
    ),
    "gn21": (
        "2 (3 2~) 5~ | 2 (3 2~) 5~",
        lambda: wrap("GroupNormalization", Data(2, 6, 5), weight(6), weight(6), num_groups=3, opset=21),
    ),
    "lpnorm": ("3 5~ 7 | 3 5~ 7", lambda: wrap("LpNormalization", Data(3, 5, 7), axis=1)),
    "lpnorm def": ("3 5 7~ | 3 5 7~", lambda: wrap("LpNormalization", Data(3, 5, 7), opset=22)),
    "mvn": (
        "2~ 3 5~ 5~ | 2~ 3 5~ 5~",
        lambda: wrap("MeanVarianceNormalization", Data(2, 3, 5, 5), opset=13, shapes=[(2, 3, 5, 5)]),
    ),
    "mvn ax": ("2 3 5~ | 2 3 5~", lambda: wrap("MeanVarianceNormalization", Data(2, 3, 5), axes=[2], opset=9)),
    "lrn": ("2 7~ 5 5 | 2 7~ 5 5", lambda: wrap("LRN", Data(2, 7, 5, 5), size=3)),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_free_is_removed_exactly_and_nothing_else_is_frozen(name: str) -> None:
    expected, build = CASES[name]
    verify(build(), expected)


@pytest.mark.parametrize("name", ["Softmax", "LogSoftmax", "Hardmax"])
def test_a_softmax_crosses_its_axis_and_in_old_versions_all_axes_from_it_on(name: str) -> None:
    verify(wrap(name, Data(2, 5, 7)), "2 5 7~ | 2 5 7~")
    verify(wrap(name, Data(2, 5, 7), axis=1), "2 5~ 7 | 2 5~ 7")
    verify(wrap(name, Data(2, 5, 7), opset=11), "2 5~ 7~ | 2 5~ 7~")
    verify(wrap(name, Data(2, 5, 7), opset=7, axis=2), "2 5 7~ | 2 5 7~")
