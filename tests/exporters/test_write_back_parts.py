"""Classes whose code cuts a layer's outputs into parts: as wide as pruning left them, without zeros."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spa
from spa.exporters.pytorch.parts import Parts, restate_parts
from spa.exporters.pytorch.sizes import Cut, restate
from tests.exporters.test_write_back import apart, size


class Halves(nn.Module):
    """``chunk(2)``, whose halves go different ways."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.left = nn.Conv2d(16, 24, 3, padding=1)
        self.right = nn.Conv2d(16, 24, 1)
        self.head = nn.Conv2d(24, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = F.relu(self.stem(x)).chunk(2, dim=1)
        return self.head(F.relu(self.left(left) + self.right(right)))


class Partial(nn.Module):
    """Two numbers of its own for the parts, as in FasterNet; the second stage has the numbers of the first."""

    def __init__(self, part: int = 8, rest: int = 24) -> None:
        super().__init__()
        self.part, self.rest = part, rest
        self.conv = nn.Conv2d(part, part, 3, padding=1)
        self.mix = nn.Conv2d(part + rest, 32, 1)

    def forward(this, x: Tensor) -> Tensor:  # some code has another word for self
        a, b = torch.split(x, [this.part, this.rest], dim=1)
        return F.relu(this.mix(torch.cat([this.conv(a), b], 1)))


class Listed(nn.Module):
    """A tuple of sizes, of inputs that another module makes, and half of the number of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes, self.inputs = (6, 10, 16), 24
        self.convs = nn.ModuleList(nn.Conv2d(n, 12, 1) for n in self.sizes)
        self.down = nn.Conv2d(12, 24, 1)
        self.pair = nn.ModuleList(nn.Conv2d(12, 20, k, padding=k // 2) for k in (1, 3))

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(x, self.sizes, dim=1)
        x = self.down(F.relu(sum(conv(part) for conv, part in zip(self.convs, parts, strict=True))))
        halves = F.relu(x).split(self.inputs // 2, dim=1)
        return sum(conv(half) for conv, half in zip(self.pair, halves, strict=True))


class Stages(nn.Module):
    def __init__(self, *stages: nn.Module, last: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.stages = nn.Sequential(*stages)
        self.head = nn.Conv2d(last, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.stages(F.relu(self.stem(x)))))


class Blur(nn.Module):
    """Smooths each channel with weights that no state_dict has, and keeps how many there are, as timm's BlurPool2d."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
        self.register_buffer("kernel", kernel.repeat(channels, 1, 1, 1), persistent=False)
        self.register_buffer("gain", torch.tensor(1.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, padding=1, groups=self.channels) * self.gain


def blurred() -> nn.Module:
    """Two of one size, which lose different channels, and one of another."""
    second, third = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 48, 3, padding=1)
    second.weight.data[5:20] *= 0.1
    return Stages(Blur(32), second, nn.ReLU(), Blur(32), third, nn.ReLU(), Blur(48), last=48)


NETWORKS = {
    "buffers": blurred,
    "chunk": Halves,
    "numbers": lambda: Stages(Partial(), Partial()),
    "lists": lambda: Stages(Listed(), last=20),
}


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
@pytest.mark.parametrize("name", NETWORKS)
def test_classes_that_cut_an_axis_into_parts_come_back_without_zeros(name: str, exporter: str) -> None:
    torch.manual_seed(0)
    module, x = NETWORKS[name]().eval(), torch.randn(2, 3, 8, 8)
    options = {"ratio": 0.4, "of": "params", "criterion": "l2", "round_to": 1}
    result = spa.prune(module, **options, example_inputs=x, convert_options={"exporter": exporter})
    small = result.pruned  # without a warning that it is wider than pruning left it
    assert type(small) is type(module)
    before, after = (size(m) + sum(b.numel() for b in m.buffers()) for m in (module, small))
    assert before - after == result.report.before.params - result.report.after.params
    assert apart(small, result.model, x) < 1e-5
    axes = [[b.ndim for b in m.buffers()] for m in (module, small)]
    assert axes[0] == axes[1]


class Conv1D(nn.Module):
    """As that of transformers: weights are [inputs, outputs], and the widths are kept."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.nx, self.nf = inputs, outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs))


def test_a_new_width_is_not_taken_for_an_old_one() -> None:
    """What 48 outputs have become, 32, was the number of inputs."""
    layer = Conv1D(48, 32)
    layer.weight = nn.Parameter(torch.randn(20, 32))
    restate(nn.Sequential(layer), {"0.weight": Cut((32, 48), {0: np.arange(20), 1: np.arange(32)})})
    assert (layer.nx, layer.nf) == (20, 32)


def near(before: str, behind: str) -> dict[str, frozenset[str]]:
    return {"before": frozenset({before}), "behind": frozenset({behind})}


def test_parts_are_found_by_value_among_the_modules_own_layers() -> None:
    net = Stages(Partial(8, 24), Partial(8, 24))
    parts = [
        Parts((8, 24), (5, 20), near("stem.weight", "stages.0.conv.weight")),
        Parts((8, 24), (7, 11), near("stages.0.mix.weight", "stages.1.conv.weight")),
        Parts((32,), (9,), near("stages.1.mix.weight", "head.weight")),
    ]
    for side, expected in (
        ("behind", [(5, 20), (7, 11)]),
        ("either", [(8, 24), (7, 11)]),
        ("before", [(7, 11), (8, 24)]),
    ):
        again = copy.deepcopy(net)
        restate_parts(again, {Partial: side, nn.Conv2d: side}, parts)
        assert [(m.part, m.rest) for m in again.stages] == expected
    assert again.stem.out_channels == 32  # torch.nn's own are restated from the weights


def test_a_number_that_would_become_several_stays() -> None:
    net = Partial(16, 16)
    restate_parts(net, {Partial: "either"}, [Parts((16, 16), (12, 9), near("", "conv.weight"))])
    assert (net.part, net.rest) == (16, 16)
    assert Parts((6, 10), (4, 7), {}).of([6, 10]) == {(4, 7)}
    assert Parts((6, 10), (4, 7), {}).of(16) == {11}
