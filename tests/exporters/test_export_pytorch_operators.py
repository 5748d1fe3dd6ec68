"""Operators in PyTorch, one by one: against ONNX's own test cases, and against onnxruntime on the rules' test cases."""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Callable, Iterator
from pkgutil import iter_modules
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, numpy_helper

import tests.rules
from spa.errors import ModelError, UnsupportedError
from spa.exporters.pytorch import graph_module
from spa.exporters.pytorch.check import difference, made_up, outputs_of, reference
from spa.exporters.pytorch.operators import supported, tensor
from spa.frameworks.torch import array
from spa.rules import supported as traced
from tests.oracle import Net

# ONNX's cases that are not met, by a pattern of their names, each with the reason.
EXCEPTED = {
    r"training_dropout": "dropout drops while the module trains, whatever the node says",
    r"reduce_(max|min)_empty_set": "PyTorch has no extreme of nothing",
    r"resize_downsample_scales_(linear|cubic)_align_corners": "onnxruntime rounds the new size first, and so do we",
}
# Operators through which channels are traced, but which are not computed here.
MISSING = """
BitCast BlackmanWindow Col2Im Constant DFT DeformConv HammingWindow HannWindow MaxRoiPool MaxUnpool
MelWeightMatrix NegativeLogLikelihoodLoss RoiAlign STFT SoftmaxCrossEntropyLoss TensorScatter
com.microsoft::BitmaskBiasDropout com.microsoft::CDist com.microsoft::DynamicQuantizeLSTM com.microsoft::GatedAdd
com.microsoft::GatedRMSNorm com.microsoft::GemmFastGelu com.microsoft::MatMulNBits com.microsoft::MoE
com.microsoft::MulInteger com.microsoft::NhwcFusedConv com.microsoft::NhwcMaxPool com.microsoft::QAttention
com.microsoft::QEmbedLayerNormalization com.microsoft::QLinearConv com.microsoft::QLinearReduceMean
com.microsoft::QLinearSoftmax com.microsoft::QLinearWhere com.microsoft::ScaledSiLU com.microsoft::SkipGroupNorm
""".split()
# Of these ONNX has no case of its own, or none without sequences as inputs.
WITHOUT_CASES = {
    *("ConcatFromSequence", "GlobalLpPool", "SequenceAt", "SequenceConstruct", "SequenceEmpty"),
    *("SequenceLength", "SimplifiedLayerNormalization"),
}


def test_what_is_traced_but_not_computed_is_what_was_counted() -> None:
    assert sorted(set(traced()) - set(supported())) == sorted(MISSING)


# -- ONNX's own cases --------------------------------------------------------------------------------------------


def onnx_cases() -> Iterator[Any]:
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the cases themselves overflow and divide by zero
        yield from collect_testcases(None)


def plain(value: Any) -> Any:
    """A case's value as numpy's arrays, or a list of them."""
    if isinstance(value, list):
        return [plain(v) for v in value]
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)


def as_tensors(value: Any) -> Any:
    return [as_tensors(v) for v in value] if isinstance(value, list) else tensor(value)


def objection(case: Any) -> str | None:
    """What is wrong with a case's results, or None."""
    module = graph_module(case.model).eval()
    for inputs, wanted in case.data_sets:
        with torch.no_grad():
            got = module(*as_tensors(plain(list(inputs))))
        got = got if isinstance(got, tuple) else (got,)
        for g, w in zip(got, plain(list(wanted)), strict=True):
            pairs = zip(g, w, strict=True) if isinstance(g, list) else [(g, w)]
            for a, b in pairs:
                if (said := apart(array(a), b, case)) is not None:
                    return said
    return None


def apart(a: np.ndarray, b: np.ndarray, case: Any) -> str | None:
    if a.shape != b.shape:
        return f"shape {a.shape}, expected {b.shape}"
    # Half precision rounds after each operation, and ONNX's cases after the last one only.
    coarse = {np.dtype(np.float16): 4e-3, np.dtype(ml_dtypes.bfloat16): 3e-2}.get(b.dtype, 0.0)
    if b.dtype.kind not in "fV":
        return None if a.dtype == b.dtype and np.array_equal(a, b) else f"{a.dtype} differs"
    x, y = a.astype(np.float64), b.astype(np.float64)
    near = np.isclose(x, y, rtol=max(case.rtol, coarse), atol=max(case.atol, 1e-6, coarse), equal_nan=True)
    return None if near.all() else f"{int((~near).sum())} of {near.size} differ"


def test_the_comparison_finds_what_is_wrong() -> None:
    case = SimpleNamespace(rtol=1e-3, atol=1e-7)
    x = np.linspace(1, 2, 6, dtype=np.float32)
    assert apart(x, x, case) is None
    assert apart(2 * x, x, case) == "6 of 6 differ"
    assert apart(x[:5], x, case) == "shape (5,), expected (6,)"
    assert apart(np.arange(3, dtype=np.int32), np.arange(3), case) == "int32 differs"


@pytest.mark.filterwarnings("ignore")  # PyTorch warns about log of zero and the like, which cases test
def test_operators_meet_onnxs_own_cases() -> None:
    torch.manual_seed(0)
    failed, met, refused = {}, set(), 0
    for case in onnx_cases():
        if any(re.search(pattern, case.name) for pattern in EXCEPTED):
            continue
        try:
            said = objection(case)
        except UnsupportedError:
            refused += 1
            continue
        if said is not None:
            failed[case.name] = said
        elif "_expanded" not in case.name:
            met |= {n.op_type for n in case.model.graph.node}
    assert failed == {}
    assert refused < 550
    standard = {key for key in supported() if "::" not in key}
    assert standard - met == WITHOUT_CASES


# -- the rules' cases --------------------------------------------------------------------------------------------


def rule_cases(module: str) -> dict[str, Callable[[], ModelProto]]:
    """The models in the tables of a test module of the rules."""
    found = {}
    for table in vars(importlib.import_module(f"tests.rules.{module}")).values():
        if isinstance(table, dict):
            for name, entry in table.items():
                if isinstance(entry, tuple) and len(entry) == 2 and callable(entry[1]):
                    found[name] = entry[1]
    return found


# Sums of quantised values fall on the other side of a half.
FLIPS = ("QLinear", "QGemm", "quantise", "Quantize")


@pytest.mark.parametrize("module", [m.name for m in iter_modules(tests.rules.__path__)])
def test_the_rules_cases_give_what_onnxruntime_gives(module: str) -> None:
    failed = {}
    for name, build in rule_cases(module).items():
        try:
            model = build()
            feeds = made_up(model, None)
            wanted = reference(model, None, feeds)
            made = graph_module(model)
        except (ModelError, UnsupportedError):
            continue  # what onnxruntime does not run, or MISSING
        off = difference(outputs_of(made, (), {n: tensor(v) for n, v in feeds.items()}), wanted)
        if not off < (5e-2 if any(f in n.op_type for n in model.graph.node for f in FLIPS) else 1e-5):
            failed[name] = off
    assert failed == {}


@pytest.mark.parametrize("op", ["Gather", "GatherND"])
def test_one_element_may_be_looked_up(op: str) -> None:
    """The result has no axes, to which reshape wants a shape all the same."""
    net = Net()
    index = net.constant(np.array(1) if op == "Gather" else np.array([1]))
    module = graph_module(net.model(net.node(op, net.input("x", [3]), index)))
    assert module(torch.tensor([4.0, 5.0, 6.0])).tolist() == 5.0
