"""Convolutions and matrix products: every rule and axis against the masked original.

How to read an expectation: see tests/oracle.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from onnx import ModelProto

from tests.oracle import Data, verify, weight, wrap

Cases = dict[str, tuple[str, Callable[[], ModelProto]]]

CASES: Cases = {
    "conv": ("2 10 7! 7! | 2 6 5! 5!", lambda: wrap("Conv", Data(2, 10, 7, 7), weight(6, 10, 3, 3), weight(6))),
    "conv grouped": (
        "2 (2 5) 7! 7! | 2 (2 3) 5! 5!",
        lambda: wrap("Conv", Data(2, 10, 7, 7), weight(6, 5, 3, 3), weight(6), group=2),
    ),
    "conv depthwise": (
        "2 7 5! 5! | 2 7 3! 3!",
        lambda: wrap("Conv", Data(2, 7, 5, 5), weight(7, 1, 3, 3), weight(7), group=7),
    ),
    "conv depthwise mult": (
        "2 7 5! 5! | 2 (7 3) 3! 3!",
        lambda: wrap("Conv", Data(2, 7, 5, 5), weight(21, 1, 3, 3), weight(21), group=7),
    ),
    "conv 1d": ("2 7 11! | 2 5 5!", lambda: wrap("Conv", Data(2, 7, 11), weight(5, 7, 3), strides=[2])),
    "conv 3d": (
        "2 7 5! 5! 5! | 2 3 4! 4! 4!",
        lambda: wrap("Conv", Data(2, 7, 5, 5, 5), weight(3, 7, 2, 2, 2), weight(3), opset=11),
    ),
    "conv computed w": (
        "2 10 7! 7! | 6 10 3! 3! | 2 6 5! 5!",
        lambda: wrap("Conv", Data(2, 10, 7, 7), Data(6, 10, 3, 3)),
    ),
    "convT": (
        "2 7 5! 5! | 2 3 10! 10!",
        lambda: wrap("ConvTranspose", Data(2, 7, 5, 5), weight(7, 3, 2, 2), weight(3), strides=[2, 2]),
    ),
    "convT grouped": (
        "2 (2 3) 5! 5! | 2 (2 5) 7! 7!",
        lambda: wrap("ConvTranspose", Data(2, 6, 5, 5), weight(6, 5, 3, 3), weight(10), group=2),
    ),
    "convT depthwise": (
        "2 6 5! 5! | 2 6 7! 7!",
        lambda: wrap("ConvTranspose", Data(2, 6, 5, 5), weight(6, 1, 3, 3), weight(6), group=6),
    ),
    "convT 1d out_shape": (
        "2 7 5! | 2 3 7!",
        lambda: wrap("ConvTranspose", Data(2, 7, 5), weight(7, 3, 3), output_shape=[7]),
    ),
    "gemm C full": ("5 7 | 5 3 | 5 3", lambda: wrap("Gemm", Data(5, 7), weight(7, 3), Data(5, 3))),
    "gemm C column": ("5 7 | 5 1 | 5 3", lambda: wrap("Gemm", Data(5, 7), weight(7, 3), Data(5, 1))),
    "gemm C scalar": ("5 7 | 5 3", lambda: wrap("Gemm", Data(5, 7), weight(7, 3), weight(1))),
    "gemm no C opset7": ("5 7 | 5 3", lambda: wrap("Gemm", Data(5, 7), weight(7, 3), weight(3), opset=7)),
    "gemm no C": ("5 7 | 5 3", lambda: wrap("Gemm", Data(5, 7), weight(7, 3))),
    "gemm data data": ("5 7 | 7 3 | 5 3", lambda: wrap("Gemm", Data(5, 7), Data(7, 3))),
    "matmul": ("2 5 7 | 2 5 3", lambda: wrap("MatMul", Data(2, 5, 7), weight(7, 3))),
    "matmul left w": ("2 5 7 | 2 3 7", lambda: wrap("MatMul", weight(3, 5), Data(2, 5, 7))),
    "matmul batch": ("2 3 5 7 | 2 3 7 11 | 2 3 5 11", lambda: wrap("MatMul", Data(2, 3, 5, 7), Data(2, 3, 7, 11))),
    "matmul bcast": ("2 3 5 7 | 3 7 11 | 2 3 5 11", lambda: wrap("MatMul", Data(2, 3, 5, 7), Data(3, 7, 11))),
    "matmul bcast1": ("2 1 5 7 | 3 7 11 | 2 3 5 11", lambda: wrap("MatMul", Data(2, 1, 5, 7), Data(3, 7, 11))),
    "matmul vec right": ("2 5 7 | 2 5", lambda: wrap("MatMul", Data(2, 5, 7), weight(7))),
    "matmul vec left": ("7 | 2 7 3 | 2 3", lambda: wrap("MatMul", Data(7), Data(2, 7, 3))),
    "matmul opset7": ("2 5 7 | 2 5 3", lambda: wrap("MatMul", Data(2, 5, 7), weight(7, 3), opset=7)),
    "einsum w": ("2 5 7 | 2 5 3 11", lambda: wrap("Einsum", Data(2, 5, 7), weight(7, 3, 11), equation="abc,cde->abde")),
    "det": ("5 3! 3! | 5", lambda: wrap("Det", Data(5, 3, 3))),
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

EINSUMS = {
    "ij,jk->ik": "5 7 | 7 3 | 5 3",
    "bij,bkj->bik": "2 5 7 | 2 3 7 | 2 5 3",
    "bhid,bhjd->bhij": "2 3 5 7 | 2 3 11 7 | 2 3 5 11",
    "...ij,jk->...ik": "2 3 5 | 5 7 | 2 3 7",
    "ij->ji": "5 7 | 7 5",
    "ij->i": "5 7 | 5",
    "ij,kj": "5 7 | 3 7 | 5 3",
    "ii->i": "5 5 | 5",
    "ii->": "5 5 | ",
    "ijj->i": "3 5 5 | 3",
    "i,j->ij": "5 | 7 | 5 7",
    "ij,ij->": "5 7 | 5 7 | ",
    "abc,cd,de->abe": "2 3 5 | 5 7 | 7 11 | 2 3 11",
    "b i j , b j -> b i": "2 3 5 | 2 5 | 2 3",
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_free_is_removed_exactly_and_nothing_else_is_frozen(name: str) -> None:
    expected, build = CASES[name]
    verify(build(), expected)


@pytest.mark.parametrize("a", [False, True])
@pytest.mark.parametrize("b", [False, True])
def test_gemm_swaps_the_letters_of_transposed_operands(a: bool, b: bool) -> None:
    x, w = (Data(7, 5) if a else Data(5, 7)), (weight(3, 7) if b else weight(7, 3))
    model = wrap("Gemm", x, w, weight(3), transA=int(a), transB=int(b), alpha=0.5, beta=2.0)
    verify(model, f"{'7 5' if a else '5 7'} | 5 3")


@pytest.mark.parametrize("equation", EINSUMS)
def test_the_equation_of_an_einsum_is_its_law(equation: str) -> None:
    expected = EINSUMS[equation]
    shapes = [[int(n) for n in part.split()] for part in expected.split("|")[: equation.count(",") + 1]]
    verify(wrap("Einsum", *(Data(*s) for s in shapes), equation=equation), expected)
