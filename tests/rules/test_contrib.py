"""Fused operators of onnxruntime: every axis against the masked original; what crosses runs, in the right shapes.

How to read an expectation: see tests/oracle.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnxruntime.capi.onnxruntime_pybind11_state as onnxruntime_state
import pytest
from onnx import ModelProto, TensorProto, helper

from spa.coupling.analysis import couple
from spa.coupling.plan import make_plan
from spa.model.graph import Graph
from spa.rules import barriers, supported
from spa.surgery.apply import apply
from tests.oracle import Data, Net, _produced, freedom, random_keeps, verify, weight, wrap

Cases = dict[str, tuple[str, Callable[[], ModelProto]]]


def contrib(op: str, *operands: Any, **options: Any) -> ModelProto:
    """An operator of com.microsoft between weights."""
    return wrap(op, *operands, domain="com.microsoft", **options)


IDS = np.asarray([[1, 4, 2, 0, 3], [2, 2, 1, 4, 0]], np.int32)

CASES: Cases = {
    "SkipLayerNormalization": (
        "2 5 7~ | 2 5 7~ | 2 5 7~ | 2 5 1 | 2 5 1 | 2 5 7~",
        lambda: contrib(
            "SkipLayerNormalization",
            *(Data(2, 5, 7), Data(2, 5, 7), weight(7), weight(7), weight(7)),
            outputs=4,
            read=[0, 3],
            shapes=[(2, 5, 7), (2, 5, 1), (2, 5, 1), (2, 5, 7)],
        ),
    ),
    "SkipLayerNormalization, one skip for all": (
        "2 5 7~ | 5 7~ | 2 5 7~",
        lambda: contrib(
            "SkipLayerNormalization", Data(2, 5, 7), Data(5, 7), weight(7), epsilon=1e-3, shapes=[(2, 5, 7)]
        ),
    ),
    "SkipSimplifiedLayerNormalization": (
        "2 5 7~ | 2 5 7~ | 2 5 7~",
        lambda: contrib(
            "SkipSimplifiedLayerNormalization", Data(2, 5, 7), Data(2, 5, 7), weight(7), shapes=[(2, 5, 7)]
        ),
    ),
    "SimplifiedLayerNormalization": (
        "2 5 7~ | 2 5 7~",
        lambda: wrap("SimplifiedLayerNormalization", Data(2, 5, 7), weight(7), shapes=[(2, 5, 7)]),
    ),
    "SimplifiedLayerNormalization over two axes": (
        "2 5~ 7~ | 2 5~ 7~ | 2 1 1",
        lambda: wrap(
            "SimplifiedLayerNormalization",
            *(Data(2, 5, 7), weight(5, 7)),
            axis=1,
            outputs=2,
            read=[0],
            shapes=[(2, 5, 7), (2, 1, 1)],
        ),
    ),
    "EmbedLayerNormalization": (
        "11! 7~ | 5! 7~ | 3! 7~ | 2 5! 7~ | 2",
        lambda: contrib(
            "EmbedLayerNormalization",
            *(IDS, IDS % 3, Data(11, 7), Data(5, 7), Data(3, 7), weight(7), weight(7)),
            outputs=2,
            read=[0],
            shapes=[(2, 5, 7), (2,)],
        ),
    ),
    "EmbedLayerNormalization with its sum": (
        "11! 7~ | 6! 7~ | 2 5! 7~ | 2 | 2 5! 7~",
        lambda: contrib(
            "EmbedLayerNormalization",
            *(IDS, None, Data(11, 7), Data(6, 7), None, weight(7), weight(7), np.ones((2, 5), np.int32), IDS),
            outputs=3,
            read=[0, 2],
            shapes=[(2, 5, 7), (2,), (2, 5, 7)],
        ),
    ),
    "Gelu": ("2 5 7 | 2 5 7", lambda: contrib("Gelu", Data(2, 5, 7), shapes=[(2, 5, 7)])),
    "QuickGelu": ("2 5 7 | 2 5 7", lambda: contrib("QuickGelu", Data(2, 5, 7), alpha=1.2, shapes=[(2, 5, 7)])),
    "BiasGelu": ("2 5 7 | 2 5 7", lambda: contrib("BiasGelu", Data(2, 5, 7), weight(7), shapes=[(2, 5, 7)])),
    "FastGelu": ("2 5 7 | 2 5 7", lambda: contrib("FastGelu", Data(2, 5, 7), shapes=[(2, 5, 7)])),
    "FastGelu with bias": ("2 5 7 | 2 5 7", lambda: contrib("FastGelu", Data(2, 5, 7), weight(7), shapes=[(2, 5, 7)])),
    "FusedMatMul": (
        "2 5 7 | 2 7 3",
        lambda: contrib("FusedMatMul", Data(2, 5, 7), weight(5, 3), transA=1, alpha=0.5, shapes=[(2, 7, 3)]),
    ),
    "FusedMatMul of data": (
        "2 5 7 | 2 3 7 | 2 5 3",
        lambda: contrib("FusedMatMul", Data(2, 5, 7), Data(2, 3, 7), transB=1, shapes=[(2, 5, 3)]),
    ),
    "TransposeMatMul": (
        "2 5 7 | 2 5 3",
        lambda: contrib("TransposeMatMul", Data(2, 5, 7), weight(7, 3), shapes=[(2, 5, 3)]),
    ),
    "FusedGemm": (
        "5 7 | 5 3",
        lambda: contrib("FusedGemm", Data(5, 7), weight(3, 7), weight(3), transB=1, activation="Relu", shapes=[(5, 3)]),
    ),
    "FusedConv": (
        "2 10 7! 7! | 2 6 4! 4! | 2 6 4! 4!",
        lambda: contrib(
            "FusedConv",
            *(Data(2, 10, 7, 7), weight(6, 10, 3, 3), weight(6), Data(2, 6, 4, 4)),
            strides=[2, 2],
            pads=[1, 1, 1, 1],
            activation="Relu",
            shapes=[(2, 6, 4, 4)],
        ),
    ),
    "FusedConv, grouped": (
        "2 (2 5) 7! 7! | 2 (2 3) 7! 7!",
        lambda: contrib(
            "FusedConv",
            *(Data(2, 10, 7, 7), weight(6, 5, 3, 3)),
            group=2,
            auto_pad="SAME_UPPER",
            activation="LeakyRelu",
            activation_params=[0.1],
            shapes=[(2, 6, 7, 7)],
        ),
    ),
    "CDist": (
        "5 7 | 3 7 | 5 3",
        lambda: contrib("CDist", Data(5, 7), Data(3, 7), metric="sqeuclidean", shapes=[(5, 3)]),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_free_is_removed_exactly_and_nothing_else_is_frozen(name: str) -> None:
    expected, build = CASES[name]
    verify(build(), expected)


# -- operators without a CPU kernel: analysis, and surgery against the shape functions ------------------------------


def unrun(op: str, *operands: Any, shapes: Sequence[Sequence[int]], **attributes: Any) -> ModelProto:
    """As :func:`wrap`, for an operator that onnxruntime cannot run on a CPU."""
    net = Net(com_microsoft=1)
    names = []
    for position, operand in enumerate(operands):
        if isinstance(operand, Data):
            names.append(_produced(net, operand, position))
        else:
            names.append("" if operand is None else net.constant(operand, f"C{position}"))
    results = [f"Y{i}" for i in range(len(shapes))]
    net.nodes.append(helper.make_node(op, names, results, name="tested", domain="com.microsoft", **attributes))
    outputs = []
    for y, shape in zip(results, shapes, strict=True):
        y = net.node("Cast", y, to=TensorProto.FLOAT)
        for axis, size in enumerate(shape):
            if size != 1:
                y = net.project(y, axis, len(shape), size, 2)
        outputs.append(helper.make_tensor_value_info(y, TensorProto.FLOAT, [min(n, 2) for n in shape]))
    graph = helper.make_graph(net.nodes, "unrun", net.inputs, outputs, list(net.weights.values()))
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    )


UNRUN: Cases = {
    "GroupNorm": (
        "2 7~ 7~ (3 2~) | 2 7~ 7~ (3 2~)",
        lambda: unrun(
            "GroupNorm", Data(2, 7, 7, 6), weight(6), weight(6), groups=3, activation=1, shapes=[(2, 7, 7, 6)]
        ),
    ),
    "GroupNorm, channels first": (
        "2 (3 2~) 7~ 7~ | 2 (3 2~) 7~ 7~",
        lambda: unrun(
            "GroupNorm",
            *(Data(2, 6, 7, 7), weight(6), weight(6)),
            groups=3,
            activation=0,
            channels_last=0,
            shapes=[(2, 6, 7, 7)],
        ),
    ),
    "SkipGroupNorm": (
        "2 5~ 7~ (3 2~) | 2 (3 2~) | 2 5~ 7~ (3 2~) | 2 5~ 7~ (3 2~)",
        lambda: unrun(
            "SkipGroupNorm",
            *(Data(2, 5, 7, 6), weight(6), weight(6), Data(2, 6), weight(6)),
            groups=3,
            activation=0,
            shapes=[(2, 5, 7, 6), (2, 5, 7, 6)],
        ),
    ),
    "SkipGroupNorm with a whole skip": (
        "2 5~ 7~ (3 2~) | 2 5~ 7~ (3 2~) | 2 5~ 7~ (3 2~)",
        lambda: unrun(
            "SkipGroupNorm",
            *(Data(2, 5, 7, 6), weight(6), weight(6), Data(2, 5, 7, 6)),
            groups=3,
            activation=0,
            shapes=[(2, 5, 7, 6)],
        ),
    ),
    "BiasAdd": (
        "2 5 7 | 2 5 7 | 2 5 7",
        lambda: unrun("BiasAdd", Data(2, 5, 7), weight(7), Data(2, 5, 7), shapes=[(2, 5, 7)]),
    ),
    "BiasSplitGelu": (
        "2 5 7+7 | 2 5 7",
        lambda: unrun("BiasSplitGelu", Data(2, 5, 14), weight(14), shapes=[(2, 5, 7)]),
    ),
    "BiasDropout": (
        "2 5 7 | 2 5 7 | 2 5 7 | 2 5 7",
        lambda: unrun("BiasDropout", Data(2, 5, 7), weight(7), Data(2, 5, 7), shapes=[(2, 5, 7), (2, 5, 7)]),
    ),
    "BiasSoftmax": (
        "2 5 7~ | 2 1 7~ | 2 5 7~",
        lambda: unrun("BiasSoftmax", Data(2, 5, 7), Data(2, 1, 7), axis=2, is_inner_broadcast=1, shapes=[(2, 5, 7)]),
    ),
    "GatedAdd": (
        "2 5 7 | 2 5 7 | 2 5 1 | 2 5 7",
        lambda: unrun("GatedAdd", Data(2, 5, 7), Data(2, 5, 7), Data(2, 5, 1), shapes=[(2, 5, 7)]),
    ),
    "GatedRMSNorm": (
        "2 5 (3 7~) | 2 5 (3 7~) | 2 5 (3 7~)",
        lambda: unrun("GatedRMSNorm", Data(2, 5, 21), weight(7), Data(2, 5, 21), shapes=[(2, 5, 21)]),
    ),
    "ScaledSiLU": ("2 5 7 | 2 5 7", lambda: unrun("ScaledSiLU", Data(2, 5, 7), shapes=[(2, 5, 7)])),
    "NhwcFusedConv": (
        "2 7! 7! 10 | 2 5! 5! 6 | 2 5! 5! 6",
        lambda: unrun(
            "NhwcFusedConv",
            *(Data(2, 7, 7, 10), weight(6, 10, 3, 3), weight(6), Data(2, 5, 5, 6)),
            activation="Relu",
            shapes=[(2, 5, 5, 6)],
        ),
    ),
    "GemmFastGelu": (
        "2 5 7 | 2 5 3",
        lambda: unrun("GemmFastGelu", Data(2, 5, 7), weight(7, 3), weight(3), shapes=[(2, 5, 3)]),
    ),
    "BitmaskBiasDropout": (
        "2 5 7 | 2 5 7",
        lambda: unrun("BitmaskBiasDropout", Data(2, 5, 7), weight(7), shapes=[(2, 5, 7)]),
    ),
    "MulInteger": (
        "2 5 7",
        lambda: unrun(
            "MulInteger",
            np.arange(70, dtype=np.uint8).reshape(2, 5, 7),
            np.uint8(3),
            np.ones((5, 7), np.uint8),
            shapes=[(2, 5, 7)],
        ),
    ),
    "QEmbedLayerNormalization": (
        "2 5! 7~",
        lambda: unrun(
            "QEmbedLayerNormalization",
            *(IDS, None, *(np.arange(n * 7, dtype=np.uint8).reshape(n, 7) for n in (11, 5)), None),
            *(np.arange(7, dtype=np.uint8), np.arange(7, dtype=np.uint8), None),
            *(np.float32(0.01), np.float32(0.02), None, np.float32(0.1), np.float32(0.1)),
            *(np.uint8(3), np.uint8(4), None, np.uint8(5), np.uint8(6)),
            shapes=[(2, 5, 7)],
        ),
    ),
}


@pytest.mark.parametrize("name", UNRUN)
def test_what_no_cpu_runs_is_traced_and_keeps_its_shapes(name: str) -> None:
    expected, build = UNRUN[name]
    analysis = couple(Graph(build()))
    assert " | ".join(freedom(analysis).values()) == expected
    groups = [g for g in analysis.prunable if g.size > 1]
    apply(analysis, make_plan(analysis, random_keeps(groups)))  # checks every shape against the algebra


# -- what is listed -------------------------------------------------------------------------------------------------


def test_what_onnxruntime_writes_is_covered() -> None:
    written = """
    Attention BiasAdd BiasDropout BiasGelu BiasSoftmax BiasSplitGelu DequantizeLinear DynamicQuantizeMatMul
    EmbedLayerNormalization FastGelu FusedConv FusedGemm FusedMatMul Gelu GemmFastGelu GroupNorm GroupQueryAttention
    MatMulIntegerToFloat MatMulNBits MultiHeadAttention NhwcFusedConv NhwcMaxPool QAttention QGemm QLinearAdd
    QLinearAveragePool QLinearConcat QLinearConv QLinearGlobalAveragePool QLinearLeakyRelu QLinearMul QLinearReduceMean
    QLinearSigmoid QLinearSoftmax QLinearWhere QuantizeLinear QuickGelu RotaryEmbedding SkipGroupNorm
    SkipLayerNormalization SkipSimplifiedLayerNormalization
    """.split()
    assert sorted({f"com.microsoft::{key}" for key in written} - supported().keys()) == []


@pytest.mark.newest
def test_what_is_covered_or_listed_exists() -> None:
    known = {f"{s.domain}::{s.name}" for s in onnxruntime_state.get_all_operator_schema()}
    ours = {key for key in {*supported(), *barriers()} if key.startswith("com.microsoft")}
    assert sorted(ours - known) == []


BARRIERS: dict[str, Callable[[], ModelProto]] = {
    "its weights are packed in blocks of bits": lambda: unrun(
        "GatherBlockQuantized",
        *(np.zeros((11, 16), np.uint8), np.asarray([[1, 2, 0]]), weight(11, 2)),
        quantize_axis=1,
        block_size=16,
        shapes=[(1, 3, 32)],
    ),
}


@pytest.mark.parametrize("reason", BARRIERS)
def test_a_barrier_freezes_what_it_touches_and_no_more(reason: str) -> None:
    analysis = couple(Graph(BARRIERS[reason]()))
    assert analysis.barriers == {next(iter(analysis.barriers)): reason}
    free = {n for words in freedom(analysis).values() for n in words.split() if n != "1" and not n.endswith("!")}
    assert free == set()


def test_a_barrier_says_why() -> None:
    model = unrun("Inverse", Data(2, 5, 5), shapes=[(2, 5, 5)])
    model.graph.value_info.append(helper.make_tensor_value_info("Y0", TensorProto.FLOAT, [2, 5, 5]))
    assert couple(Graph(model)).barriers == {
        "Inverse 'tested'": "its result depends on the values and places of all elements"
    }
    assert freedom(model) == {"X0": "2! 5! 5!", "Y0": "2! 5! 5!"}
