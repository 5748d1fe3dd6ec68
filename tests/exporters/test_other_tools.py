"""What comes out is valid for the next tool: optimisers, quantisers, converters and other runtimes take it.

Tools that are not installed are skipped; ``pip install -e '.[tools]'`` installs those that have no other extra.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, helper, version_converter

import spa
from spa.running.feeds import make_feeds
from spa.running.runtime import load_session
from tests.oracle import distance

pytestmark = [pytest.mark.tools, pytest.mark.filterwarnings("ignore")]  # of the tools' own
MODELS = Path(__file__).parents[2] / "models"
NAMES = ["digits_resnet", "digits_vit", "digits_lstm"]


@cache
def pruned(name: str) -> ModelProto:
    """A pruned network, of a source whose initializers are listed with their shapes, as PyTorch writes them."""
    model = onnx.load(MODELS / f"{name}.onnx")
    model.graph.value_info.extend(
        helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in model.graph.initializer
    )
    return spa.prune(model, criterion="l2", ratio=0.4).model


@cache
def expected(name: str) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    feeds = make_feeds(pruned(name), seed=0, batch=4)
    return feeds, load_session(pruned(name)).run(None, feeds)


def compared(name: str, run: Callable[[dict[str, np.ndarray]], list[np.ndarray]]) -> float:
    feeds, outputs = expected(name)
    return max(distance(a, b) for a, b in zip(run(feeds), outputs, strict=True))


def of_model(model: ModelProto | Path) -> Callable[[dict[str, np.ndarray]], list[np.ndarray]]:
    return lambda feeds: load_session(model).run(None, feeds)


@pytest.mark.parametrize("name", NAMES)
def test_the_checker_and_strict_inference_take_it(name: str) -> None:
    onnx.checker.check_model(pruned(name), full_check=True)
    onnx.shape_inference.infer_shapes(pruned(name), check_type=True, strict_mode=True, data_prop=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("opset", [18, 22])
def test_the_version_converter_takes_it(name: str, opset: int) -> None:
    assert compared(name, of_model(version_converter.convert_version(pruned(name), opset))) <= 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_dynamic_quantisation_takes_it(name: str, tmp_path: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    onnx.save(pruned(name), tmp_path / "m.onnx")
    quantize_dynamic(tmp_path / "m.onnx", tmp_path / "q.onnx", weight_type=QuantType.QUInt8)
    assert compared(name, of_model(tmp_path / "q.onnx")) <= 0.2  # of eight bits


@pytest.mark.parametrize("name", NAMES)
def test_static_quantisation_takes_it(name: str, tmp_path: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [expected(name)[0]]

        def get_next(self) -> dict[str, np.ndarray] | None:  # type: ignore[override]
            return self.left.pop() if self.left else None

    onnx.save(pruned(name), tmp_path / "m.onnx")
    quantize_static(tmp_path / "m.onnx", tmp_path / "q.onnx", Reader())
    assert compared(name, of_model(tmp_path / "q.onnx")) <= 0.3  # of eight bits for activations, too


@pytest.mark.parametrize("name", ["digits_vit"])
def test_the_transformer_optimiser_takes_it(name: str, tmp_path: Path) -> None:
    from onnxruntime.transformers.optimizer import optimize_model

    onnx.save(pruned(name), tmp_path / "m.onnx")
    fused = optimize_model(str(tmp_path / "m.onnx"), model_type="vit", num_heads=0, hidden_size=0)
    assert compared(name, of_model(fused.model)) <= 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_onnxslim_takes_it(name: str) -> None:
    onnxslim = pytest.importorskip("onnxslim")
    assert compared(name, of_model(onnxslim.slim(pruned(name)))) <= 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_onnxsim_takes_it(name: str) -> None:
    onnxsim = pytest.importorskip("onnxsim")
    simple, checked = onnxsim.simplify(pruned(name))
    assert checked
    assert compared(name, of_model(simple)) <= 1e-5


@pytest.mark.parametrize("name", ["digits_resnet"])  # it knows neither the operators nor the types of the others
def test_onnx2torch_takes_it(name: str) -> None:
    torch = pytest.importorskip("torch")
    onnx2torch = pytest.importorskip("onnx2torch")
    module = onnx2torch.convert(pruned(name)).eval()

    def run(feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        with torch.no_grad():
            result = module(*map(torch.tensor, feeds.values()))
        return [result.numpy()]

    assert compared(name, run) <= 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_openvino_takes_it(name: str, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    precise = {"INFERENCE_PRECISION_HINT": "f32"}
    onnx.save(pruned(name), tmp_path / "m.onnx")
    compiled = openvino.compile_model(openvino.convert_model(tmp_path / "m.onnx"), "CPU", precise)
    assert compared(name, lambda feeds: [np.asarray(v) for v in compiled(feeds).values()]) <= 1e-4  # its own kernels
