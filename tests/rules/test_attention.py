"""Attention in all its forms: every axis against the masked original; what crosses runs, in the right shapes.

How to read an expectation: see tests/oracle.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto

from spa.coupling.analysis import couple
from spa.model.graph import Graph
from tests.oracle import Data, Indices, check, freedom, verify, weight, wrap

Cases = dict[str, tuple[str, Callable[[], ModelProto]]]


def contrib(op: str, *operands: Any, **options: Any) -> ModelProto:
    """An operator of com.microsoft between weights."""
    return wrap(op, *operands, domain="com.microsoft", **options)


STANDARD: Cases = {
    "three axes": (
        "2 5 (2 3 7) | 2 7~ (2 7) | 2 7~ (2 11) | 2 5 (2 3 11)",
        lambda: wrap(
            "Attention", Data(2, 5, 42), Data(2, 7, 14), Data(2, 7, 22), q_num_heads=6, kv_num_heads=2, opset=23
        ),
    ),
    "four axes": (
        "2 (2 3) 5 7 | 2 2 11~ 7 | 2 2 11~ 3 | 2 (2 3) 5 3",
        lambda: wrap("Attention", Data(2, 6, 5, 7), Data(2, 2, 11, 7), Data(2, 2, 11, 3), opset=24, softcap=0.5),
    ),
    "mask with heads": (
        "2 (2 3) 5 7 | 2 2 11~ 7 | 2 2 11~ 3 | 2 (2 3) 5 11~ | 2 (2 3) 5 3",
        lambda: wrap("Attention", Data(2, 6, 5, 7), Data(2, 2, 11, 7), Data(2, 2, 11, 3), Data(2, 6, 5, 11), opset=23),
    ),
    "mask without heads": (
        "2 3 5 7 | 2 3 11~ 7 | 2 3 11~ 3 | 5 11~ | 2 3 5 3",
        lambda: wrap("Attention", Data(2, 3, 5, 7), Data(2, 3, 11, 7), Data(2, 3, 11, 3), Data(5, 11), opset=23),
    ),
    "cache": (
        "2 (2 3) 5! 7 | 2 2 11! 7 | 2 2 11! 3 | 5! 13! | 2 2 2! 7 | 2 2 2! 3 | 2 (2 3) 5! 3 | 2 2 2!+11! 7 | 2 2 2!+11! 3",
        lambda: wrap(
            "Attention",
            *(Data(2, 6, 5, 7), Data(2, 2, 11, 7), Data(2, 2, 11, 3), Data(5, 13), Data(2, 2, 2, 7), Data(2, 2, 2, 3)),
            opset=24,
            outputs=3,
            is_causal=1,
            scale=0.3,
        ),
    ),
    "lengths": (
        "2! 3 5! 7 | 2! 3 11! 7 | 2! 3 11! 3 | 2! 3 5! 3",
        lambda: wrap(
            "Attention",
            *(Data(2, 3, 5, 7), Data(2, 3, 11, 7), Data(2, 3, 11, 3), None, None, None, np.asarray([11, 7])),
            opset=24,
        ),
    ),
}

ROTARY: Cases = {
    "three axes": (
        "2! 5! (3 (7+7)) | 11! 7 | 11! 7 | 2! 5! (3 (7+7))",
        lambda: wrap(
            "RotaryEmbedding",
            Data(2, 5, 42),
            Data(11, 7),
            Data(11, 7),
            Indices((2, 5), 11),
            opset=23,
            num_heads=3,
        ),
    ),
    "pairs": (
        "2! 5! (3 7 2!) | 11! 7 | 11! 7 | 2! 5! (3 7 2!)",
        lambda: wrap(
            "RotaryEmbedding",
            *(Data(2, 5, 42), Data(11, 7), Data(11, 7), Indices((2, 5), 11)),
            opset=23,
            num_heads=3,
            interleaved=1,
        ),
    ),
    "caches without positions": (
        "2 3 5 7+7 | 2 5 7 | 2 5 7 | 2 3 5 7+7",
        lambda: wrap("RotaryEmbedding", Data(2, 3, 5, 14), Data(2, 5, 7), Data(2, 5, 7), opset=23),
    ),
    "a part": (
        "2 3 5 3+3+8 | 2 5 3 | 2 5 3 | 2 3 5 3+3+8",
        lambda: wrap(
            "RotaryEmbedding",
            *(Data(2, 3, 5, 14), Data(2, 5, 3), Data(2, 5, 3)),
            opset=23,
            rotary_embedding_dim=6,
        ),
    ),
    "a part in pairs": (
        "2 3 5 (3 2!)+8 | 2 5 3 | 2 5 3 | 2 3 5 (3 2!)+8",
        lambda: wrap(
            "RotaryEmbedding",
            *(Data(2, 3, 5, 14), Data(2, 5, 3), Data(2, 5, 3)),
            opset=24,
            rotary_embedding_dim=6,
            interleaved=1,
        ),
    ),
    "contrib, an offset": (
        "2 5! (3 (7+7)) | 11! 7 | 11! 7 | 2 5! (3 (7+7))",
        lambda: contrib(
            "RotaryEmbedding", Data(2, 5, 42), np.asarray([3]), Data(11, 7), Data(11, 7), shapes=[(2, 5, 42)]
        ),
    ),
    "contrib, pairs": (
        "2! 3 5! (7 2!) | 11! 7 | 11! 7 | 2! 3 5! (7 2!)",
        lambda: contrib(
            "RotaryEmbedding",
            *(Data(2, 3, 5, 14), Indices((2, 5), 11), Data(11, 7), Data(11, 7)),
            interleaved=1,
            shapes=[(2, 3, 5, 14)],
        ),
    ),
    "contrib, a part": (
        "2! 5! (3 (3+3+8)) | 11! 3 | 11! 3 | 2! 5! (3 (3+3+8))",
        lambda: contrib(
            "RotaryEmbedding",
            *(Data(2, 5, 42), Indices((2, 5), 11), Data(11, 3), Data(11, 3)),
            num_heads=3,
            rotary_embedding_dim=6,
            shapes=[(2, 5, 42)],
        ),
    ),
}

MULTI_HEAD: Cases = {
    "no bias": (
        "2 5 (3 7) | 2 7~ (3 7) | 2 7~ (3 11) | 2 5 (3 11)",
        lambda: contrib(
            "MultiHeadAttention", Data(2, 5, 21), Data(2, 7, 21), Data(2, 7, 33), num_heads=3, shapes=[(2, 5, 33)]
        ),
    ),
    "bias": (
        "2 5 (3 7) | 2 7~ (3 7) | 2 7~ (3 11) | 2 5 (3 11)",
        lambda: contrib(
            "MultiHeadAttention",
            *(Data(2, 5, 21), Data(2, 7, 21), Data(2, 7, 33), weight(75)),
            num_heads=3,
            scale=0.3,
            shapes=[(2, 5, 33)],
        ),
    ),
    "keys with heads": (
        "2 5 (3 7) | 2 3 11~ 7 | 2 3 11~ 7 | 2 5 (3 7)",
        lambda: contrib(
            "MultiHeadAttention",
            *(Data(2, 5, 21), Data(2, 3, 11, 7), Data(2, 3, 11, 7)),
            num_heads=3,
            shapes=[(2, 5, 21)],
        ),
    ),
    "cache": (
        "2 5! (3 7) | 2 5! (3 7) | 2 5! (3 7) | 2 3 5! 7! | 2 3 2! 7 | 2 3 2! 7"
        " | 2 5! (3 7) | 2 3 2!+5! 7 | 2 3 2!+5! 7",
        lambda: contrib(
            "MultiHeadAttention",
            *(Data(2, 5, 21), Data(2, 5, 21), Data(2, 5, 21), weight(63), None),
            *(Data(2, 3, 5, 7), Data(2, 3, 2, 7), Data(2, 3, 2, 7)),
            num_heads=3,
            unidirectional=1,
            outputs=3,
            shapes=[(2, 5, 21), (2, 3, 7, 7), (2, 3, 7, 7)],
        ),
    ),
    "lengths": (
        "2 5! (3 7) | 2 5! (3 7) | 2 5! (3 7) | 2 5! (3 7)",
        lambda: contrib(
            "MultiHeadAttention",
            *(Data(2, 5, 21), Data(2, 5, 21), Data(2, 5, 21), weight(63), np.asarray([5, 3], np.int32)),
            num_heads=3,
            shapes=[(2, 5, 21)],
        ),
    ),
    "marks": (
        "2 5 (3 7) | 2 5~ (3 7) | 2 5~ (3 7) | 2 5 (3 7)",
        lambda: contrib(
            "MultiHeadAttention",
            *(Data(2, 5, 21), Data(2, 5, 21), Data(2, 5, 21), weight(63)),
            np.asarray([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]], np.int32),
            num_heads=3,
            shapes=[(2, 5, 21)],
        ),
    ),
}

PACKED: Cases = {
    "plain": (
        "2 5~ 13 | 2 5~ (3 7)",
        lambda: contrib("Attention", Data(2, 5, 13), weight(13, 63), weight(63), num_heads=3, shapes=[(2, 5, 21)]),
    ),
    "values of another size": (
        "2 5! 13 | 2 5! (3 11)",
        lambda: contrib(
            "Attention",
            *(Data(2, 5, 13), weight(13, 75), weight(75), np.asarray([5, 3], np.int32)),
            num_heads=3,
            qkv_hidden_sizes=[21, 21, 33],
            unidirectional=1,
            scale=0.2,
            shapes=[(2, 5, 33)],
        ),
    ),
    "cache": (
        "2 5~ 13 | 2! 2 3 4~ 7 | 2 5~ (3 7) | 2! 2 3 4~+5~ 7",
        lambda: contrib(
            "Attention",
            *(Data(2, 5, 13), weight(13, 63), weight(63), None, Data(2, 2, 3, 4, 7)),
            num_heads=3,
            outputs=2,
            shapes=[(2, 5, 21), (2, 2, 3, 9, 7)],
        ),
    ),
    "bias of scores": (
        "2 5~ 13 | 2 3 5~ 5~ | 2 5~ (3 7)",
        lambda: contrib(
            "Attention",
            *(Data(2, 5, 13), weight(13, 63), weight(63), None, None, Data(2, 3, 5, 5)),
            num_heads=3,
            shapes=[(2, 5, 21)],
        ),
    ),
}

LENGTHS, TOTAL = np.asarray([4, 4], np.int32), np.asarray(5, np.int32)

GROUPED: Cases = {
    "separate": (
        "2 5! (2 3 5 8!) | 2 5! (2 5 8!) | 2 5! (2 5 8!) | 2 5! (2 3 5 8!)",
        lambda: contrib(
            "GroupQueryAttention",
            *(Data(2, 5, 240), Data(2, 5, 80), Data(2, 5, 80), None, None, LENGTHS, TOTAL),
            num_heads=6,
            kv_num_heads=2,
            shapes=[(2, 5, 240)],
        ),
    ),
    "cache": (
        "2 1 (2 3 5 8!) | 2 1 (2 5 8!) | 2 1 (2 5 8!) | 2 2 3! (5 8!) | 2 2 3! (5 8!) | 2 1 (2 3 5 8!)"
        " | 2 2 4! (5 8!) | 2 2 4! (5 8!)",
        lambda: contrib(
            "GroupQueryAttention",
            *(Data(2, 1, 240), Data(2, 1, 80), Data(2, 1, 80), Data(2, 2, 3, 40), Data(2, 2, 3, 40)),
            *(np.asarray([3, 3], np.int32), np.asarray(4, np.int32)),
            num_heads=6,
            kv_num_heads=2,
            outputs=3,
            shapes=[(2, 1, 240), (2, 2, 4, 40), (2, 2, 4, 40)],
        ),
    ),
    "packed, rotary, with a sink": (
        "2 5! (2 3 ((5 8!)+(5 8!)))+(2 ((5 8!)+(5 8!)))+(2 ((5 8!)+(5 8!))) | 11! (5 8!) | 11! (5 8!)"
        " | 2 5! (2 3 ((5 8!)+(5 8!)))",
        lambda: contrib(
            "GroupQueryAttention",
            *(Data(2, 5, 800), None, None, None, None, LENGTHS, TOTAL, Data(11, 40), Data(11, 40), None),
            *(Data(2, 6, 5, 5), weight(6)),
            num_heads=6,
            kv_num_heads=2,
            do_rotary=1,
            shapes=[(2, 5, 480)],
        ),
    ),
    "a part rotated in pairs": (
        "2 5! (2 3 ((3 8! 2!)+(2 16!))) | 2 5! (2 ((3 8! 2!)+(2 16!))) | 2 5! (2 ((3 8! 2!)+(2 16!)))"
        " | 2 5! (2 3 ((3 8! 2!)+(2 16!)))",
        lambda: contrib(
            "GroupQueryAttention",
            *(Data(2, 5, 480), Data(2, 5, 160), Data(2, 5, 160), None, None, LENGTHS, TOTAL),
            *(weight(11, 24), weight(11, 24)),
            num_heads=6,
            kv_num_heads=2,
            do_rotary=1,
            rotary_interleaved=1,
            scale=0.2,
            shapes=[(2, 5, 480)],
        ),
    ),
    "a size that onnxruntime takes no less of": (
        "2 5! (2 3 (8!+8!)) | 2 5! (2 (8!+8!)) | 2 5! (2 (8!+8!)) | 2 5! (2 3 (8!+8!))",
        lambda: contrib(
            "GroupQueryAttention",
            *(Data(2, 5, 96), Data(2, 5, 32), Data(2, 5, 32), None, None, LENGTHS, TOTAL),
            *(weight(11, 8), weight(11, 8)),
            num_heads=6,
            kv_num_heads=2,
            do_rotary=1,
            shapes=[(2, 5, 96)],
        ),
    ),
}

ALL = {
    f"{family}: {name}": case
    for family, cases in {
        "Attention": STANDARD,
        "RotaryEmbedding": ROTARY,
        "MultiHeadAttention": MULTI_HEAD,
        "packed Attention": PACKED,
        "GroupQueryAttention": GROUPED,
    }.items()
    for name, case in cases.items()
}


@pytest.mark.parametrize("name", ALL)
def test_what_is_free_is_removed_exactly_and_nothing_else_is_frozen(name: str) -> None:
    expected, build = ALL[name]
    verify(build(), expected)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        # onnxruntime has no CPU kernel for these packings: analysis only.
        (
            lambda: contrib("MultiHeadAttention", Data(2, 5, 3, 3, 7), num_heads=3, shapes=[(2, 5, 21)]),
            "2 5~ 3 3! 7 | 2 5~ (3 7)",
        ),
        (
            lambda: contrib(
                "MultiHeadAttention", Data(2, 5, 21), Data(2, 11, 3, 2, 7), num_heads=3, shapes=[(2, 5, 21)]
            ),
            "2 5 (3 7) | 2 11~ 3 2! 7 | 2 5 (3 7)",
        ),
    ],
)
def test_packed_projections_share_their_head_dimension(build: Callable[[], ModelProto], expected: str) -> None:
    assert " | ".join(freedom(build()).values()) == expected


def test_the_scores_of_attention_carry_heads_rows_and_keys() -> None:
    model = wrap(
        "Attention",
        *(Data(2, 6, 5, 7), Data(2, 2, 11, 7), Data(2, 2, 11, 3)),
        opset=23,
        outputs=4,
        read=[0, 3],
        shapes=[(2, 6, 5, 3), (), (), (2, 6, 5, 11)],
    )
    tested = next(n for n in model.graph.node if n.name == "tested")
    tested.output[1] = tested.output[2] = ""
    verify(model, "2 (2 3) 5 7 | 2 2 11~ 7 | 2 2 11~ 3 | 2 (2 3) 5 3 | 2 (2 3) 5 11~")


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("Attention: four axes", 7),
        ("MultiHeadAttention: no bias", 7),
        ("packed Attention: plain", 7),
        ("GroupQueryAttention: separate", 40),
    ],
)
def test_the_scale_that_followed_the_head_size_is_written_down_when_the_head_size_shrinks(name: str, size: int) -> None:
    model = ALL[name][1]()
    assert _attribute(model, "scale") is None
    assert _attribute(check(model).pruned, "scale") == pytest.approx(1 / math.sqrt(size))


def test_a_scale_that_is_given_or_still_right_stays_as_it_is() -> None:
    given = ALL["Attention: cache"][1]()
    assert _attribute(check(given).pruned, "scale") == pytest.approx(0.3)
    model = ALL["Attention: four axes"][1]()
    heads = next(g.name for g in couple(Graph(model)).free if g.size == 2)
    assert _attribute(check(model, groups=[heads]).pruned, "scale") is None


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (
            lambda: contrib(
                "MultiHeadAttention",
                *(Data(2, 1, 21), Data(2, 1, 21), Data(2, 1, 21), None, None, None),
                *(Data(2, 3, 4, 7), Data(2, 3, 4, 7), np.asarray([3], np.int32)),
                num_heads=3,
                shapes=[(2, 1, 21)],
            ),
            "its cache is shared with its output",
        ),
        (
            lambda: contrib(
                "RotaryEmbedding",
                *(Data(2, 3, 5, 14), Indices((2, 5), 11), Data(11, 7), Data(11, 7)),
                is_packed_batching=1,
                num_heads=3,
                shapes=[(2, 3, 5, 14)],
            ),
            "its batch is packed",
        ),
        (
            lambda: contrib(
                "GroupQueryAttention",
                *(Data(2, 5, 48), Data(2, 5, 16), Data(2, 5, 16), None, None, LENGTHS, TOTAL, None, None, None),
                *(None, None, weight(1), weight(1)),
                num_heads=6,
                kv_num_heads=2,
                shapes=[(2, 5, 48)],
            ),
            "its cache is quantised",
        ),
    ],
)
def test_forms_that_are_not_traced_say_why(build: Callable[[], ModelProto], reason: str) -> None:
    assert reason in couple(Graph(build())).barriers.values()


def _attribute(model: ModelProto, name: str) -> float | None:
    node = next(n for n in model.graph.node if n.name == "tested")
    return next((a.f for a in node.attribute if a.name == name), None)
