"""Torch-Pruning on the published CIFAR-10 networks of `accuracy.py`: ResNets of He et al. without weights in shortcuts.

Torch-Pruning 1.6 takes the shortcut's padding of channels for an element-wise operator; what it then prunes seldom
runs. Here the padding is a module of its own with a pruner of its own, which computes the same.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
import torch_pruning as tp
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

NEAR = 0.02  # of the factor asked for
STEPS = 20
HALVINGS = 8


class Padding(nn.Module):
    """Every other row and column, and channels of zeros around those that are there."""

    weight: Tensor

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.eye(outer)[:, (outer - inner) // 2 :][:, :inner, None, None], False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n inner h w] to [n outer h/2 w/2]."""
        return F.conv2d(x, self.weight, stride=2)


class PaddingPruner(tp.pruner.function.BasePruningFunc):
    """The rules of Torch-Pruning for `Padding`."""

    TARGET_MODULES = Padding

    def prune_out_channels(self, layer: Padding, idxs: Sequence[int]) -> Padding:
        """Drop rows."""
        layer.weight = _without(layer.weight, 0, idxs)
        return layer

    def prune_in_channels(self, layer: Padding, idxs: Sequence[int]) -> Padding:
        """Drop columns."""
        layer.weight = _without(layer.weight, 1, idxs)
        return layer

    def get_out_channels(self, layer: Padding) -> int:
        """Count rows."""
        return layer.weight.shape[0]

    def get_in_channels(self, layer: Padding) -> int:
        """Count columns."""
        return layer.weight.shape[1]


def _without(weight: Tensor, axis: int, gone: Sequence[int]) -> Tensor:
    kept = np.delete(np.arange(weight.shape[axis]), list(gone))
    return weight.index_select(axis, torch.from_numpy(kept))


class Block(nn.Module):
    """Two 3 x 3 convolutions with BatchNorm, and a shortcut around them."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, 1 if inner == outer else 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.shortcut = nn.Identity() if inner == outer else Padding(inner, outer)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n inner h w] to [n outer h/stride w/stride]."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """Three stages of 16, 32 and 64 channels with as many blocks each."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(Block(inner, outer), *(Block(outer, outer) for _ in range(blocks - 1)))
            for inner, outer in ((16, 16), (16, 32), (32, 64))
        )
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n 3 32 32] to [n 10]."""
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def load(path: Path) -> ResNet:
    """Return the network with the weights of an ONNX file, in which they are named as here."""
    weights = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in onnx.load(path).graph.initializer}
    model = ResNet(sum(name.startswith("layer1.") and name.endswith(".conv1.weight") for name in weights)).eval()
    wanted = {name for name in model.state_dict() if not name.endswith("num_batches_tracked")}
    model.load_state_dict({name: weights[name] for name in wanted}, strict=False)
    return model


def logits(model: nn.Module, images: np.ndarray) -> np.ndarray:
    """Return what a network makes of images [n 3 32 32]: [n 10]."""
    with torch.no_grad():
        return model(torch.from_numpy(images)).numpy()


def macs(model: nn.Module) -> int:
    """Return the multiplications of a network's convolutions and linear layers on one image."""
    total = 0

    def count(module: nn.Conv2d | nn.Linear, _: object, output: Tensor) -> None:
        nonlocal total
        total += module.weight.numel() * output[0, 0].numel()

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    logits(model, np.zeros((1, 3, 32, 32), np.float32))
    for hook in hooks:
        hook.remove()
    return total


def pruned(dense: ResNet, ratio: float, streams: bool) -> ResNet:
    """Remove a share of the channels by their group's L1 norm, ranked across the network.

    Args:
        dense: the network; it is not changed.
        ratio: the share.
        streams: whether the channels of the residual streams may go, too.
    """
    model = copy.deepcopy(dense)
    kept: list[nn.Module] = [model.linear]
    if not streams:
        kept += [model.conv1, *(m.conv2 for m in model.modules() if isinstance(m, Block))]
    pruner = tp.pruner.BasePruner(
        model,
        torch.zeros(1, 3, 32, 32),
        importance=tp.importance.GroupMagnitudeImportance(p=1),
        global_pruning=True,
        pruning_ratio=ratio,
        ignored_layers=kept,
        customized_pruners={Padding: PaddingPruner()},
    )
    pruner.step()
    return model


def at_factor(dense: ResNet, factor: float, streams: bool) -> ResNet | None:
    """Search the smallest ratio that divides the MACs by a factor; None where none tried comes within 2 % of it.

    Torch-Pruning leaves a layer whole that would lose every channel, so MACs may grow with the ratio: the first step
    of a coarse ladder that goes far enough is halved on.
    """
    whole = macs(dense)
    for high in np.linspace(0, 1, STEPS, endpoint=False)[1:].tolist():
        if whole / macs(pruned(dense, high, streams)) >= factor:
            break
    low = high - 1 / STEPS
    for _ in range(HALVINGS):
        ratio = (low + high) / 2
        model = pruned(dense, ratio, streams)
        reached = whole / macs(model)
        if abs(reached / factor - 1) <= NEAR:
            return model
        low, high = (ratio, high) if reached < factor else (low, ratio)
    return None
