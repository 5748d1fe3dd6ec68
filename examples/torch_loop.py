"""A PyTorch model pruned in steps, with its own training loop between them.

    python examples/torch_loop.py [--ratio 0.6] [--steps 3] [--epochs 15]

A residual network on scikit-learn's digits. `spa.prune(...).pruned` is an ordinary module of the same class with
narrower layers: the same loop trains it, and it can be pruned again. Prints MACs and accuracy after each step, and of
the same budget in one step. `keras_loop.py` and `jax_loop.py` do the same in Keras and flax.
Needs PyTorch and scikit-learn; in a clone, `pip install -e '.[test]'` has both.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

import spa


class Residual(nn.Module):
    """Two convolutions, and a shortcut around them."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.shortcut = nn.Sequential()
        if stride != 1 or inner != outer:
            self.shortcut = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        """Map [n c h w] to [n outer h/stride w/stride]."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """A stem, and blocks of 32, 32, 64, 64 and 128 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        sizes = ((32, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2))
        self.blocks = nn.Sequential(*(Residual(*size) for size in sizes))
        self.fc = nn.Linear(128, 10)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map [n 1 8 8] to [n 10]."""
        return self.fc(self.blocks(F.relu(self.bn1(self.conv1(x)))).mean((2, 3)))


def digits() -> tuple[np.ndarray, ...]:
    """Load images [n 1 8 8] for training and for testing, and their labels."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 8 - 1).astype(np.float32).reshape(-1, 1, 8, 8)
    return tuple(train_test_split(images, labels, test_size=360, random_state=0, stratify=labels))


def build(seed: int) -> ResNet:
    """Build an untrained network."""
    torch.manual_seed(seed)
    return ResNet().eval()


def train(net: nn.Module, x: np.ndarray, y: np.ndarray, epochs: int, rate: float, seed: int = 0) -> nn.Module:
    """Train in the user's ordinary loop."""
    torch.manual_seed(seed)
    images, labels = torch.from_numpy(x), torch.from_numpy(y)
    optimiser = torch.optim.AdamW(net.parameters(), rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * -(-len(x) // 64))
    net.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            loss = F.cross_entropy(net(images[batch]), labels[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return net.eval()


def accuracy(net: nn.Module, x: np.ndarray, y: np.ndarray) -> float:
    """Return top-1, in percent."""
    with torch.no_grad():
        return 100 * float((net.eval()(torch.from_numpy(x)).argmax(1).numpy() == y).mean())


def prune(net: nn.Module, x: np.ndarray, ratio: float) -> spa.Result:
    """Remove a fraction of the MACs."""
    return spa.prune(net, ratio=ratio, round_to=1, data=x[:256], example_inputs=torch.from_numpy(x[:2]))


def in_steps(
    net: nn.Module, x: np.ndarray, y: np.ndarray, ratio: float, steps: int, epochs: int
) -> Iterator[tuple[spa.Result, nn.Module]]:
    """Prune and train in turns; every step removes the same fraction of what is left."""
    share = 1 - (1 - ratio) ** (1 / steps)
    for _ in range(steps):
        result = prune(net, x, share)
        net = train(result.pruned, x, y, epochs, 1e-3)
        yield result, net


def main() -> None:
    """Train, prune in steps, prune at once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratio", type=float, default=0.6, help="of the MACs, removed in the end")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=15, help="of training; a fifth of them after each step")
    options = parser.parse_args()
    x, x_test, y, y_test = digits()
    net = train(build(0), x, y, options.epochs, 3e-3)
    print(f"trained: {accuracy(net, x_test, y_test):.1f} %")
    once = prune(net, x, options.ratio).report
    tuned = max(options.epochs // 5, 1)
    for step, (result, small) in enumerate(in_steps(net, x, y, options.ratio, options.steps, tuned), start=1):
        left = result.report.after.macs / once.before.macs
        print(f"step {step}: {left:.1%} of the MACs, {accuracy(small, x_test, y_test):.1f} %")
    print(f"in one step: {once.after.macs / once.before.macs:.1%} of the MACs")


if __name__ == "__main__":
    main()
