"""Modules in wrappers, and with weights in bfloat16, come back as their class."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import spa


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.a(x).to(self.norm.weight.dtype)).to(self.b.weight.dtype)
        return self.b(torch.relu(x))


def pruned(module: nn.Module, example: Tensor, **options: object) -> spa.Result:
    options = {"criterion": "l2", "ratio": 0.4, "round_to": 1, "example_inputs": example, **options}
    return spa.prune(module, convert_options={"exporter": "torchscript"}, **options)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda net: torch.compile(nn.DataParallel(net))])
def test_wrappers_are_looked_through(tmp_path: Path, wrap: object) -> None:
    torch.manual_seed(0)
    net, example = Net().eval(), torch.randn(2, 3, 8, 8)
    wrapped = wrap(net)  # type: ignore[operator]
    small = pruned(wrapped, example).pruned
    assert type(small) is Net and small.a.out_channels < 16
    spa.save(wrap(small), tmp_path / "small.pt")  # type: ignore[operator]
    again = spa.load(tmp_path / "small.pt", Net()).eval()
    assert torch.equal(again(example), small(example))
    with pytest.raises(spa.PlanError, match="no group"):
        pruned(wrapped, example, ignore=[net.a])


def test_bfloat16_goes_there_and_back() -> None:
    torch.manual_seed(0)
    net, example = Net().eval().bfloat16(), torch.randn(2, 3, 8, 8).bfloat16()
    net.norm.float()  # as mixed precision keeps them
    before = {key: value.clone() for key, value in net.state_dict().items()}
    result = pruned(net, example)
    small = result.pruned
    assert type(small) is Net and small.a.out_channels < 16
    assert {key: value.dtype for key, value in small.state_dict().items()} == {k: v.dtype for k, v in before.items()}
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    kept = list(result.plan.kept["a.weight[0]"])
    assert torch.equal(small.a.weight, net.a.weight[kept])
    assert any("bfloat16" in note for note in result.report.notes)
