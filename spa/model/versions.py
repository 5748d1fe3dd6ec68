"""Versions of ONNX that are covered: the oldest are fixed, the newest are what onnx and onnxruntime both know."""

from __future__ import annotations

from functools import cache

import onnx
from onnx import TensorProto, helper

OLDEST_OPSET = 7  # earlier operators broadcast by attributes
CERTAIN_OPSET = 21  # known to every onnx and onnxruntime that pyproject.toml allows, so that nobody need be asked
FREE_INITIALIZERS = 4  # the first IR version in which initializers need not be inputs
OLDEST_IR = FREE_INITIALIZERS


def covers_opset(opset: int) -> bool:
    """Return whether an opset of the standard domain is covered."""
    return opset >= OLDEST_OPSET and (opset <= CERTAIN_OPSET or opset <= newest_opset())


@cache
def newest_opset() -> int:
    """Return the newest opset of the standard domain that the installed onnx and onnxruntime both know."""
    newest = onnx.defs.onnx_opset_version()
    return next(opset for opset in range(newest, OLDEST_OPSET - 1, -1) if _loads(opset, OLDEST_IR))


@cache
def newest_ir() -> int:
    """Return the newest IR version of files that the installed onnx and onnxruntime both know."""
    return next(ir for ir in range(int(onnx.IR_VERSION), OLDEST_IR - 1, -1) if _loads(OLDEST_OPSET, ir))


def _loads(opset: int, ir_version: int) -> bool:
    """Load a model of one node in onnxruntime, which has no other way to say what it knows."""
    # Here and not in spa.running: reading a model needs the answer, and running lies above reading.
    import onnxruntime as ort
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "probe", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    options = ort.SessionOptions()
    options.log_severity_level = 4  # a refusal is an answer, not news
    options.intra_op_num_threads = 1
    try:
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Fail:
        return False
    return True
