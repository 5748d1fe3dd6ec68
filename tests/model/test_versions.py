"""The newest versions are what onnx and onnxruntime both know, whichever knows less."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import pytest

from spa.errors import ModelError, UnsupportedError
from spa.model import versions
from spa.model.io import load
from spa.model.versions import CERTAIN_OPSET, OLDEST_IR, OLDEST_OPSET, covers_opset, newest_ir, newest_opset
from spa.running.runtime import load_session
from tests.oracle import Net


@pytest.fixture(autouse=True)
def _ask_anew() -> Iterator[None]:
    for newest in (newest_opset, newest_ir):
        newest.cache_clear()
    yield
    for newest in (newest_opset, newest_ir):
        newest.cache_clear()


def relu(opset: int = 17, ir_version: int = 8) -> onnx.ModelProto:
    net = Net(opset=17)
    model = net.model(net.node("Relu", net.input("x", [2, 3])))
    model.opset_import[0].version, model.ir_version = opset, ir_version
    return model


def test_the_newest_opset_loads_and_the_next_is_unknown_to_onnx_or_onnxruntime() -> None:
    load_session(relu(opset=newest_opset()))
    if newest_opset() < onnx.defs.onnx_opset_version():
        with pytest.raises(ModelError, match="opset"):
            load_session(relu(opset=newest_opset() + 1))


def test_the_newest_ir_version_loads_and_the_next_is_unknown_to_onnx_or_onnxruntime() -> None:
    load_session(relu(ir_version=newest_ir()))
    if newest_ir() < onnx.IR_VERSION:
        with pytest.raises(ModelError, match="IR version"):
            load_session(relu(ir_version=newest_ir() + 1))


def test_onnxruntime_refuses_what_onnx_does_not_know_yet() -> None:
    assert not versions._loads(999, OLDEST_IR)
    assert not versions._loads(OLDEST_OPSET, 999)


@pytest.mark.parametrize(
    ("onnx_knows", "runtime_knows", "newest"), [(19, 17, 17), (17, 19, 17), (17, 17, 17), (19, 7, 7)]
)
def test_the_older_of_the_two_decides(
    monkeypatch: pytest.MonkeyPatch, onnx_knows: int, runtime_knows: int, newest: int
) -> None:
    monkeypatch.setattr(versions, "_loads", lambda opset, ir: max(opset, ir) <= runtime_knows)
    monkeypatch.setattr(onnx.defs, "onnx_opset_version", lambda: onnx_knows)
    monkeypatch.setattr(onnx, "IR_VERSION", onnx_knows)
    assert (newest_opset(), newest_ir()) == (newest, newest)


def test_a_model_is_read_up_to_the_newest_opset(monkeypatch: pytest.MonkeyPatch) -> None:
    newest = CERTAIN_OPSET + 1
    monkeypatch.setattr(versions, "_loads", lambda opset, ir: opset <= newest)
    load(relu(opset=newest))
    message = rf"has opset {newest + 1}; 7 to {newest} are covered\. .* or update onnxruntime"
    with pytest.raises(UnsupportedError, match=message):
        load(relu(opset=newest + 1))


def test_what_every_allowed_onnxruntime_knows_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Holds with the oldest versions, too, which `.ci/lowest` installs."""
    assert newest_opset() >= CERTAIN_OPSET
    newest_opset.cache_clear()
    monkeypatch.setattr(versions, "_loads", lambda opset, ir: pytest.fail("onnxruntime was asked"))
    assert covers_opset(CERTAIN_OPSET)
    assert not covers_opset(OLDEST_OPSET - 1)
