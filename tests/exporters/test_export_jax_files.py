"""Networks as programs that JAX alone reads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

import spa
from spa.errors import PlanError, SpaError, UnsupportedError
from spa.running.runtime import load_session, run
from tests.oracle import Net

jax = pytest.importorskip("jax", reason="needs  pip install 'spa-onnx[jax]'")
pytest.importorskip("jax.export")

from spa.exporters import jax_files  # noqa: E402

MODELS = Path(__file__).parents[2] / "models"
PICTURES = np.random.default_rng(0).random((5, 1, 8, 8), np.float32)


def tiny() -> onnx.ModelProto:
    net = Net(opset=17)
    return net.model(net.gemm(net.node("Tanh", net.gemm(net.input("x", ["batch", 6]), 6, 9)), 9, 4))


def read(folder: Path) -> tuple[Any, dict[str, np.ndarray]]:
    program = jax.export.deserialize(bytearray((folder / "model.jax").read_bytes()))
    return program, dict(np.load(folder / "params.npz"))


@pytest.mark.parametrize("name", ["digits_resnet", "digits_vit", "digits_lstm"])
def test_a_program_computes_the_same_at_any_batch(tmp_path: Path, name: str) -> None:
    path = spa.export(MODELS / f"{name}.onnx", "jax", tmp_path / "small")
    assert path == tmp_path / "small" / "model.jax"
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.jax", "params.npz"]
    program, params = read(path.parent)
    expected = run(load_session(MODELS / f"{name}.onnx"), {"input": PICTURES})[0]
    assert np.allclose(program.call(params, PICTURES), expected, atol=1e-5)
    known = {t.name for t in onnx.load(MODELS / f"{name}.onnx").graph.initializer}
    assert set(params) <= known and len(params) > 5


def test_a_program_can_be_differentiated_by_its_parameters(tmp_path: Path) -> None:
    spa.export(tiny(), "jax", tmp_path / "small")
    program, params = read(tmp_path / "small")
    x, step = np.linspace(-1, 1, 30, dtype=np.float32).reshape(5, 6), 1e-2
    gradients = jax.grad(lambda p: program.call(p, x).sum())(params)
    name = next(n for n, v in params.items() if v.shape == (9, 6))
    there, back = (program.call(params | {name: params[name] + s * gradients[name]}, x).sum() for s in (step, -step))
    assert there - back == pytest.approx(2 * step * float((gradients[name] ** 2).sum()), rel=1e-2)


def test_a_program_needs_neither_this_package_nor_onnx(tmp_path: Path) -> None:
    spa.export(tiny(), "jax", tmp_path / "small")
    code = (
        "import sys; sys.modules['spa'] = sys.modules['onnx'] = None\n"
        "import jax.export, numpy as np\n"
        "program = jax.export.deserialize(bytearray(open('small/model.jax', 'rb').read()))\n"
        "print(program.call(dict(np.load('small/params.npz')), np.zeros((7, 6), np.float32)).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(7, 4)"


def test_equal_models_give_equal_parameters(tmp_path: Path) -> None:
    for name in ("a", "b"):
        spa.export(tiny(), "jax", tmp_path / name)
    a, b = ((tmp_path / name / "params.npz").read_bytes() for name in ("a", "b"))
    assert a == b


def test_the_result_of_pruning_is_exported(tmp_path: Path) -> None:
    result = spa.prune(MODELS / "digits_resnet.onnx", criterion="l2", ratio=0.4)
    spa.export(result, "jax", tmp_path / "small")
    program, params = read(tmp_path / "small")
    assert np.allclose(
        program.call(params, PICTURES), run(load_session(result.model), {"input": PICTURES})[0], atol=1e-5
    )


def test_several_inputs_and_outputs_integers_and_two_open_sizes(tmp_path: Path) -> None:
    net = Net(opset=17)
    ids, x = net.input("ids", ["batch", "length"], TensorProto.INT64), net.input("x", ["batch", "length", 4])
    table = net.weight(9, 4)
    total = net.node("Add", net.node("Gather", table, ids), x)
    model = net.model(total, net.node("ReduceMax", ids, axes=[1], keepdims=0))
    spa.export(model, "jax", tmp_path / "small")
    program, params = read(tmp_path / "small")
    feeds = {"ids": np.arange(6).reshape(2, 3) % 9, "x": np.ones((2, 3, 4), np.float32)}
    outputs = program.call(params, feeds["ids"].astype(np.int32), feeds["x"])
    for mine, theirs in zip(outputs, run(load_session(model), feeds), strict=True):
        assert np.allclose(mine, theirs)


def test_a_size_that_the_program_must_know_is_fixed(tmp_path: Path) -> None:
    net = Net(opset=17)
    x = net.input("x", ["batch", 6])
    # Over the whole batch, so that no sample stands alone.
    flat = net.node("Reshape", x, net.constant(np.array([-1])))
    zero, one = (net.constant(np.array(n)) for n in (0, 1))
    model = net.model(net.node("Range", zero, net.node("Size", flat), one), flat)
    spa.export(model, "jax", tmp_path / "small")
    program, _ = read(tmp_path / "small")
    assert all(isinstance(n, int) for aval in program.in_avals for n in aval.shape)


def test_half_precision_is_rounded_by_the_program(tmp_path: Path) -> None:
    net = Net(opset=17, dtype=TensorProto.BFLOAT16)
    narrow = net.node("Cast", net.input("x", ["batch", 6], TensorProto.FLOAT), to=TensorProto.BFLOAT16)
    weights = net.node("Cast", net.weight(6, 7), to=TensorProto.FLOAT)
    model = net.model(net.node("MatMul", net.node("Cast", narrow, to=TensorProto.FLOAT), weights))
    spa.export(model, "jax", tmp_path / "small")
    program, params = read(tmp_path / "small")
    assert {v.dtype for v in params.values()} == {np.dtype(np.float32)}
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 6)).astype(np.float32)}
    assert np.allclose(program.call(params, feeds["x"]), run(load_session(model), feeds)[0], atol=1e-5)


def test_a_program_that_differs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax_files, "allowed", lambda model: -1.0)
    with pytest.raises(UnsupportedError, match=r"its outputs differ from onnxruntime's by .*Export to onnx"):
        spa.export(tiny(), "jax", tmp_path / "small")
    assert list((tmp_path / "small").iterdir()) == []


def test_an_operator_that_jax_lacks_options_and_missing_folders_are_said(tmp_path: Path) -> None:
    net = Net(opset=17)
    model = net.model(net.node("Unique", net.input("x", ["n", 3])))
    with pytest.raises(UnsupportedError, match="there is no JAX function for Unique"):
        spa.export(model, "jax", tmp_path / "small")
    with pytest.raises(PlanError, match="the target jax takes no opset"):
        spa.export(model, "jax", tmp_path / "small", opset=18)
    with pytest.raises(SpaError, match="cannot write"):
        spa.export(tiny(), "jax", tmp_path / "none" / "small")
