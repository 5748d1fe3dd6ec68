"""Modules of PyTorch in place of patterns."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import spa  # noqa: E402
from spa.errors import OptionError  # noqa: E402
from spa.frameworks.modules import named  # noqa: E402


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(n, m) for n, m in ((5, 16), (16, 24), (24, 3))]
    return torch.nn.Sequential(
        layers[0], torch.nn.ReLU(), torch.nn.Sequential(layers[1], torch.nn.ReLU()), layers[2]
    ).eval()


def test_modules_become_their_names(net: torch.nn.Module) -> None:
    assert named(net, {"ignore": [net[2], "x*"], "only": net[0], "ratio": 0.3}) == {
        "ignore": ("2", "x*"),
        "only": ("0",),
        "ratio": 0.3,
    }
    assert named(net, {"ignore": [net[2][0]]}) == {"ignore": ("2.0",)}
    assert named(net, {"only": [net]}) == {"only": ("*",)}
    assert named("model.onnx", {"ignore": "x*", "only": ["a"]}) == {"ignore": "x*", "only": ["a"]}
    with pytest.raises(OptionError, match="the Linear that is given is no part of the model"):
        named(net, {"ignore": [torch.nn.Linear(2, 2)]})
    with pytest.raises(OptionError, match="no part of the model"):
        named("model.onnx", {"ignore": [net[0]]})


def test_a_module_alone_is_pruned(net: torch.nn.Module) -> None:
    common = {"criterion": "l2", "round_to": 1, "example_inputs": torch.randn(1, 5), "of": "channels", "ratio": 0.25}
    only = spa.prune(net, only=[net[2]], **common).pruned
    assert (only[0].out_features, only[2][0].out_features) == (16, 18)
    spared = spa.prune(net, ignore=[net[3]], **common).pruned
    assert (spared[0].out_features, spared[2][0].out_features) == (12, 24)
