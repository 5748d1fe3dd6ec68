"""Selection, images, signals and losses: every rule and axis against the masked original.

How to read an expectation: see tests/oracle.py.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from onnx import ModelProto

from tests.oracle import Data, Indices, verify, weight, wrap

Cases = dict[str, tuple[str, Callable[[], ModelProto]]]


def scalar(value: int) -> np.ndarray:
    return np.asarray(value)


def floats(*values: object) -> np.ndarray:
    return np.asarray(values, np.float32)


CASES: Cases = {
    "onehot": ("3! 5! 7!", lambda: wrap("OneHot", Indices((3, 5), 7), scalar(7), floats(0, 1))),
    "compress": (
        "3! 5! | 1009! 5!",
        lambda: wrap("Compress", Data(3, 5), np.asarray([True, False, True]), axis=0, ranks=[2]),
    ),
    "compress flat": (
        "3! 5! | 1009!",
        lambda: wrap("Compress", Data(3, 5), np.asarray([True, False, True]), ranks=[1]),
    ),
    "col2im": ("2 (5 2! 2!) 9! | 2 5 4! 4!", lambda: wrap("Col2Im", Data(2, 20, 9), [4, 4], [2, 2])),
    "centercrop": ("2 3 5! 7! | 2 3 4! 9!", lambda: wrap("CenterCropPad", Data(2, 3, 5, 7), [4, 9], axes=[2, 3])),
    "centercrop all": ("2 3 5! | 2 3 4!", lambda: wrap("CenterCropPad", Data(2, 3, 5), [2, 3, 4])),
    "affinegrid": ("2 2! 3! | 2 3! 5! 2!", lambda: wrap("AffineGrid", Data(2, 2, 3), [2, 1, 3, 5])),
    "gridsample": (
        "2 3 5! 5! | 2 4! 4! 2! | 2 3 4! 4!",
        lambda: wrap("GridSample", Data(2, 3, 5, 5), Data(2, 4, 4, 2)),
    ),
    "nll": (
        "2! 3! 5! | 2! 5!",
        lambda: wrap("NegativeLogLikelihoodLoss", Data(2, 3, 5), Indices((2, 5), 3), weight(3), reduction="none"),
    ),
    "nll mean": ("2! 3! 5! | ", lambda: wrap("NegativeLogLikelihoodLoss", Data(2, 3, 5), Indices((2, 5), 3))),
    "sce": (
        "2! 3! 5! | 2! 5! | 2! 3! 5!",
        lambda: wrap("SoftmaxCrossEntropyLoss", Data(2, 3, 5), Indices((2, 5), 3), outputs=2, reduction="none"),
    ),
    "dft": ("2 5! 7 1 | 2 5! 7 2!", lambda: wrap("DFT", Data(2, 5, 7, 1), None, scalar(1))),
    "dft17": ("2 5 7! 2! | 2 5 7! 2!", lambda: wrap("DFT", Data(2, 5, 7, 2), axis=2, opset=17)),
    "stft": ("3 16! 1 | 3 3! 8! 2!", lambda: wrap("STFT", Data(3, 16, 1), scalar(4), weight(8), scalar(8), onesided=0)),
    "deformconv": (
        "2 (2 3) 5! 5! | 2 (2 18!) 3! 3! | 2 4 3! 3!",
        lambda: wrap("DeformConv", Data(2, 6, 5, 5), weight(4, 6, 3, 3), Data(2, 36, 3, 3), weight(4), offset_group=2),
    ),
    "deformconv mask": (
        "2 (2! 3!) 5! 5! | 2 (3! 18!) 3! 3! | 2 (3! 9!) 3! 3! | 2 (2! 2) 3! 3!",
        lambda: wrap(
            "DeformConv",
            Data(2, 6, 5, 5),
            weight(4, 3, 3, 3),
            Data(2, 54, 3, 3),
            weight(4),
            Data(2, 27, 3, 3),
            offset_group=3,
            group=2,
        ),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_free_is_removed_exactly_and_nothing_else_is_frozen(name: str) -> None:
    expected, build = CASES[name]
    verify(build(), expected)
