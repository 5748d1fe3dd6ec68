"""Models of frameworks: recognised, converted, pruned, and given back as what they were."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import spa
from spa.frameworks.kinds import equal_by_default, kind_of
from spa.running.runtime import load_session, run

RESNET = Path(__file__).parent.parent / "models" / "digits_resnet.onnx"


class Small(nn.Module):
    """Two convolutions with BatchNorm, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 24, 3, stride=2)
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n 3 h w] -> [n 5]."""
        return self.head(self.conv2(self.norm(self.conv1(x)).relu()).relu().mean((2, 3)))


def test_what_belongs_to_which_framework(tmp_path: Path) -> None:
    assert kind_of(Small()) == "torch"
    assert kind_of("net.pt2") == "torch"
    assert kind_of(tmp_path) is None  # a folder that holds no model
    (tmp_path / "saved_model.pb").touch()
    assert kind_of("net.keras") == kind_of(tmp_path) == "tensorflow"
    assert kind_of(lambda params, x: x) == "jax"
    assert kind_of({"weight": torch.zeros(1)}, {"factory": Small}) == "torch"
    assert kind_of(RESNET) is kind_of(b"") is kind_of({}) is None
    with pytest.raises(spa.ModelError, match=r"cannot tell which framework 'net\.xyz' belongs to"):
        spa.convert("net.xyz")


def test_what_is_equal_by_default_depends_on_the_framework() -> None:
    module = Small()
    assert equal_by_default("torch", module) == equal_by_default("jax", None) == ("heads", "parts")
    assert equal_by_default("tensorflow", None) == equal_by_default(None, RESNET) == ()
    module.config = SimpleNamespace(to_dict=dict)
    assert equal_by_default("torch", module) == ("heads", "parts")
    module.save_pretrained = print
    assert equal_by_default("torch", module) == ("heads", "parts", "layers")


def test_a_module_comes_back_as_its_own_class_and_trains() -> None:
    torch.manual_seed(0)
    module, x = Small().eval(), torch.randn(4, 3, 12, 12)
    result = spa.prune(module, ratio=0.5, criterion="l2", round_to=1, example_inputs=x)
    small = result.pruned
    assert type(small) is Small
    assert small.conv1.out_channels < 16 == module.conv1.out_channels
    name = result.model.graph.input[0].name
    expected = run(load_session(result.model), {name: x.numpy()})[0]
    np.testing.assert_allclose(small.eval()(x).detach().numpy(), expected, atol=1e-5)
    optimiser = torch.optim.SGD(small.parameters(), 0.1)
    before = nn.functional.cross_entropy(small(x), torch.arange(4))
    before.backward()
    optimiser.step()
    assert nn.functional.cross_entropy(small(x), torch.arange(4)) < before
    again = spa.prune(small, ratio=0.3, criterion="l2", round_to=1, example_inputs=x).pruned
    assert again.conv1.out_channels < small.conv1.out_channels


def test_a_class_that_stays_wider_in_part_says_so() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 48, batch_first=True, dropout=0.0).eval()
    result = spa.prune(layer, ratio=0.4, criterion="l2", example_inputs=torch.randn(2, 5, 16), round_to=1)
    with pytest.warns(UserWarning, match=r"MultiheadAttention \(self_attn\) is wider than pruning left it"):
        assert type(result.pruned) is nn.TransformerEncoderLayer


def test_an_onnx_result_goes_to_torch_and_nowhere_unknown() -> None:
    result = spa.prune(RESNET, ratio=0.3, criterion="l2")
    assert result.pruned is result.model is result.to("onnx")
    x = np.random.default_rng(0).normal(size=(2, 1, 8, 8)).astype(np.float32)
    module = result.to("torch").eval()
    expected = run(load_session(result.model), {result.model.graph.input[0].name: x})[0]
    np.testing.assert_allclose(module(torch.from_numpy(x)).detach().numpy(), expected, atol=1e-4)
    with pytest.raises(spa.PlanError, match="cannot give a result to 'caffe'"):
        result.to("caffe")


def test_missing_and_unknown_options_are_refused_before_work() -> None:
    with pytest.raises(spa.PlanError, match="example_inputs"):
        spa.prune(Small())
    with pytest.raises(spa.PlanError, match="unexpected keyword argument 'nonsense'"):
        spa.convert(Small(), torch.randn(1, 3, 8, 8), nonsense=1)


def test_recovery_brings_the_outputs_nearer() -> None:
    request = {"ratio": 0.6, "criterion": "l2", "samples": 256, "data": RESNET.parent / "digits_train.npz"}
    report = spa.prune(RESNET, **request, recover=2).report
    assert report.calibration is not None
    assert report.calibration["after"] < 0.9 * report.calibration["before"]
