"""What pruned classes say of themselves: Hugging Face's configuration, timm's number of features."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spa
from spa.errors import UnsupportedError
from spa.exporters.pytorch.following import follow, value_of
from tests.exporters.test_write_back import IMAGE, size

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


class Config(SimpleNamespace):
    """As transformers' configurations: plain numbers."""

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class Pretrained(nn.Module):
    """Has a configuration, and saves it with its weights, as transformers' classes do."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        layers = [(nn.Linear(16, config.inner), nn.Linear(config.inner, 16)) for _ in range(config.layers)]
        self.layers = nn.ModuleList(nn.ModuleList(pair) for pair in layers)
        self.inner = config.inner  # which no code reads
        self.head = nn.Linear(16, 3)
        self.register_buffer("table", torch.tensor([config.inner / 20.0]) ** config.power, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        for wide, narrow in self.layers:
            x = x + narrow(F.relu(wide(x)) * self.table)
        return self.head(x)

    def save_pretrained(self, folder: Path) -> None:
        torch.save((vars(self.config), self.state_dict()), folder / "model.pt")

    @classmethod
    def from_pretrained(cls, folder: Path) -> Pretrained:
        config, weights = torch.load(folder / "model.pt")
        module = cls(Config(**config))
        module.load_state_dict(weights)
        return module.eval()


def pruned(power: int, **options: object) -> Pretrained:
    torch.manual_seed(0)
    module = Pretrained(Config(inner=40, layers=2, power=power)).eval()
    request = {"ratio": 0.3, "of": "params", "criterion": "l2", "round_to": 1, **options}
    small = spa.prune(module, **request, example_inputs=X, convert_options={"exporter": "torchscript"}).pruned
    assert size(small) < size(module) and module.config.inner == 40
    return small


def test_save_pretrained_and_from_pretrained_make_the_pruned_network_again(tmp_path: Path) -> None:
    small = pruned(power=0)
    assert small.config.inner == small.inner == small.layers[0][0].out_features == small.layers[1][0].out_features < 40
    small.save_pretrained(tmp_path)
    again = Pretrained.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(X), small(X))
    spa.save(small, tmp_path / "small.pt")
    again = spa.load(tmp_path / "small.pt", Pretrained(Config(inner=40, layers=2, power=0)))
    assert again.config.inner == small.config.inner


def test_what_no_configuration_makes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"the buffer 'table', which no file holds, has other values.*spa\.save"):
        pruned(power=1).save_pretrained(tmp_path)
    unequal = pruned(power=0, equal=[], ratio_of={"layers.0.0": 0.2, "layers.1.0": 0.6}, ratio=None, of="macs")
    with pytest.raises(UnsupportedError, match=r"has another shape.*equal=\['layers'\]"):
        unequal.save_pretrained(tmp_path)
    assert unequal.config.inner == 40
    assert not list(tmp_path.iterdir())
    assert copy.deepcopy(unequal).save_pretrained.reason == unequal.save_pretrained.reason


def test_numbers_of_heads_that_differ_are_refused() -> None:
    module = Pretrained(Config(inner=40, layers=1, power=0))
    small = copy.deepcopy(module)
    small.num_heads = 4
    follow(module, small)
    with pytest.raises(UnsupportedError, match=r"Pretrained has num_heads = 4"):
        small.save_pretrained(Path())


class Timm(nn.Module):
    """Says how many features its classifier takes, as timm's classes do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last, self.head = nn.Conv2d(3, 24, 3), nn.Conv2d(24, 40, 1), nn.Linear(40, 5)
        self.num_features = self.head_hidden_size = 40
        self.width = 24

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.last(F.relu(self.conv(x)))).mean((2, 3)))


def test_the_number_of_features_is_that_of_the_classifier() -> None:
    torch.manual_seed(0)
    request = {"ratio": 0.4, "criterion": "l2", "round_to": 1, "convert_options": {"exporter": "torchscript"}}
    small = spa.prune(Timm().eval(), **request, example_inputs=IMAGE).pruned
    assert small.num_features == small.head_hidden_size == small.head.in_features < 40
    assert small.width == 24


class Layered:
    """Refuses a number that layers may override, as configurations of transformers do."""

    def __init__(self) -> None:
        self.heads = 4

    def __getattribute__(self, name: str) -> object:
        if name == "heads":
            raise AttributeError("ask each layer")
        return super().__getattribute__(name)


def test_numbers_that_layers_may_override_are_read() -> None:
    assert value_of((Layered(), "heads")) == 4


class Named(nn.Module):
    """Keeps its classifier elsewhere; ``head`` is the name of its kind, as in timm's HRNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.classifier, self.head = nn.Conv2d(3, 24, 3), nn.Linear(24, 5), "classification"
        self.num_features = 24

    def get_classifier(self) -> nn.Module:
        return self.classifier

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.relu(self.conv(x)).mean((2, 3)))


def test_a_head_may_be_anything() -> None:
    torch.manual_seed(0)
    request = {"ratio": 0.4, "criterion": "l2", "round_to": 1, "convert_options": {"exporter": "torchscript"}}
    small = spa.prune(Named().eval(), **request, example_inputs=IMAGE).pruned
    assert (small.head, small.num_features) == ("classification", small.classifier.in_features)
    assert small.num_features < 24
