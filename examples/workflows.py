"""Three times to prune: before training, after it with fine-tuning, or after it with no training step at all.

    python examples/workflows.py [--epochs 15] [--results FILE]

A small residual network in PyTorch on scikit-learn's digits. Each workflow gives and gets back the user's own module:
`spa.prune(module, example_inputs=...).pruned` is an ordinary module of the same class with narrower layers, which
trains with the same loop. Prints (and writes) top-1 accuracy on the test images by workflow and criterion.
Takes about three minutes on two cores. Needs PyTorch and scikit-learn; in a clone, `pip install -e '.[test]'` has both.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

import spa

Data = tuple[Tensor, Tensor, Tensor, Tensor]
AT_INITIALISATION = ("snip", "grasp", "crop", "random")
AFTER_TRAINING = ("obspa", "l1", "l2", "bn_scale", "fpgm", "lamp", "wanda", "flap", "taylor", "fisher", "random")


class Block(nn.Module):
    """Two convolutions and a shortcut around them."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.shortcut = nn.Conv2d(inner, outer, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n c h w] to [n outer h/stride w/stride]."""
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class Net(nn.Module):
    """A stem and three blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, 1, 1)
        self.blocks = nn.Sequential(Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n 1 8 8] to [n 10]."""
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


def digits() -> Data:
    """Load training images and labels, test images and labels."""
    images, labels = load_digits(return_X_y=True)
    images = (images.astype(np.float32) / 8 - 1).reshape(-1, 1, 8, 8)
    parts = train_test_split(images, labels, test_size=360, random_state=0, stratify=labels)
    x, x_test, y, y_test = (torch.from_numpy(p) for p in parts)
    return x, y, x_test, y_test


def train(net: nn.Module, data: Data, epochs: int, rate: float = 3e-3) -> nn.Module:
    """Train in the user's ordinary loop."""
    x, y, _, _ = data
    optimiser = torch.optim.AdamW(net.parameters(), rate, weight_decay=1e-2)
    steps = epochs * -(-len(x) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=max(steps, 1))
    net.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            loss = F.cross_entropy(net(x[batch]), y[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return net.eval()


def accuracy(net: nn.Module, data: Data) -> float:
    """Return top-1 on the test images, in percent."""
    net.eval()
    with torch.no_grad():
        return float((net(data[2]).argmax(1) == data[3]).float().mean() * 100)


def prune(net: nn.Module, data: Data, criterion: str, ratio: float = 0.5) -> nn.Module:
    """Return the same class with half of its MACs; whatever needs inputs sees 256 training images."""
    inputs = {"x": data[0][:256].numpy(), "label": data[1][:256].numpy()}  # named as forward names them
    result = spa.prune(
        net, ratio=ratio, criterion=criterion, round_to=1, data=inputs, labels="label", example_inputs=data[0][:2]
    )
    return result.pruned


def workflows(data: Data, epochs: int) -> list[tuple[str, str, float]]:
    """Run every workflow; return (workflow, criterion, accuracy) of each."""
    rows = []
    torch.manual_seed(0)
    for criterion in AT_INITIALISATION:
        torch.manual_seed(1)
        small = prune(Net(), data, criterion)
        rows.append(("prune, train", criterion, accuracy(train(small, data, epochs), data)))
    torch.manual_seed(1)
    dense = train(Net(), data, epochs)
    rows.append(("train", "", accuracy(dense, data)))
    for criterion in AFTER_TRAINING:
        small = prune(dense, data, criterion)
        rows.append(("train, prune", criterion, accuracy(small, data)))
        tuned = train(small, data, max(epochs // 3, 1), 1e-3)
        rows.append(("train, prune, fine-tune", criterion, accuracy(tuned, data)))
    steps = dense
    for _ in range(3):  # each removes the same share of what is left, half in all
        steps = train(prune(steps, data, "l2", 1 - 0.5 ** (1 / 3)), data, max(epochs // 9, 1), 1e-3)
    rows.append(("train, three times: prune, fine-tune", "l2", accuracy(steps, data)))
    return rows


def table(rows: list[tuple[str, str, float]], epochs: int) -> str:
    """Write the table in Markdown."""
    lines = [
        "# When to prune",
        "",
        f"Top-1 on 360 test digits; half of the MACs removed; {epochs} epochs of training, a third of that for "
        "fine-tuning. Written by `examples/workflows.py`.",
        "",
        "| workflow | criterion | top-1 |",
        "| --- | --- | ---: |",
    ]
    return "\n".join([*lines, *(f"| {w} | {c} | {a:.1f} |" for w, c, a in rows), ""])


def main() -> None:
    """Run all workflows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(2)
    text = table(workflows(digits(), options.epochs), options.epochs)
    print(text)
    if options.results:
        options.results.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
