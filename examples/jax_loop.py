"""A flax model pruned in steps, with its own training loop between them.

    python examples/jax_loop.py [--ratio 0.6] [--steps 3] [--epochs 15]

A residual network (flax nnx) on scikit-learn's digits. `spa.prune(...).pruned` is an ordinary module of the same class
with narrower layers: the same loop and optimiser train it, and it can be pruned again. Prints MACs and accuracy after
each step, and of the same budget in one step. `torch_loop.py` and `keras_loop.py` do the same in PyTorch and Keras.
Needs JAX, flax and scikit-learn; in a clone, `pip install -e '.[jax]' scikit-learn`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import jax
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import spa

START = nnx.initializers.he_uniform()


def conv(inner: int, outer: int, size: int, stride: int, rngs: nnx.Rngs) -> nnx.Conv:
    """Make a convolution, padded alike on both sides, as PyTorch does."""
    kernel = (size, size)
    return nnx.Conv(inner, outer, kernel, stride, padding=size // 2, use_bias=False, kernel_init=START, rngs=rngs)


def norm(width: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    """Make a BatchNorm that forgets as fast as PyTorch's."""
    return nnx.BatchNorm(width, momentum=0.9, rngs=rngs)


class Residual(nnx.Module):
    """Two convolutions, and a shortcut around them."""

    def __init__(self, inner: int, outer: int, stride: int, rngs: nnx.Rngs) -> None:
        self.conv1, self.bn1 = conv(inner, outer, 3, stride, rngs), norm(outer, rngs)
        self.conv2, self.bn2 = conv(outer, outer, 3, 1, rngs), norm(outer, rngs)
        same = stride == 1 and inner == outer
        self.shortcut = nnx.Sequential(*(() if same else (conv(inner, outer, 1, stride, rngs), norm(outer, rngs))))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [n h w c] to [n h/stride w/stride outer]."""
        y = self.bn2(self.conv2(nnx.relu(self.bn1(self.conv1(x)))))
        return nnx.relu(y + self.shortcut(x))


class ResNet(nnx.Module):
    """A stem, and blocks of 32, 32, 64, 64 and 128 channels."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv1, self.bn1 = conv(1, 32, 3, 1, rngs), norm(32, rngs)
        sizes = ((32, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2))
        self.blocks = nnx.Sequential(*(Residual(*size, rngs) for size in sizes))
        self.fc = nnx.Linear(128, 10, kernel_init=START, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [n 8 8 1] to [n 10]."""
        return self.fc(self.blocks(nnx.relu(self.bn1(self.conv1(x)))).mean((1, 2)))


def digits() -> tuple[np.ndarray, ...]:
    """Load images [n 8 8 1] for training and for testing, and their labels."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 8 - 1).astype(np.float32).reshape(-1, 8, 8, 1)
    return tuple(train_test_split(images, labels, test_size=360, random_state=0, stratify=labels))


def build(seed: int) -> ResNet:
    """Build an untrained network."""
    return ResNet(nnx.Rngs(seed))


@nnx.jit
def step(net: nnx.Module, optimiser: nnx.Optimizer, x: jax.Array, y: jax.Array) -> None:
    """Take one step of the optimiser."""

    def loss(net: nnx.Module) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(net(x), y).mean()

    optimiser.update(net, nnx.grad(loss)(net))


def train(net: nnx.Module, x: np.ndarray, y: np.ndarray, epochs: int, rate: float, seed: int = 0) -> nnx.Module:
    """Train in the user's ordinary loop."""
    rng = np.random.default_rng(seed)
    schedule = optax.cosine_decay_schedule(rate, epochs * -(-len(x) // 64))
    optimiser = nnx.Optimizer(net, optax.adamw(schedule, weight_decay=0.01), wrt=nnx.Param)
    net.train()
    for _ in range(epochs):
        order = rng.permutation(len(x))
        for start in range(0, len(x), 64):
            batch = order[start : start + 64]
            step(net, optimiser, x[batch], y[batch])
    net.eval()
    return net


def accuracy(net: nnx.Module, x: np.ndarray, y: np.ndarray) -> float:
    """Return top-1, in percent."""
    net.eval()
    return 100 * float((nnx.jit(lambda net, x: net(x))(net, x).argmax(1) == y).mean())


def prune(net: nnx.Module, x: np.ndarray, ratio: float) -> spa.Result:
    """Remove a fraction of the MACs."""
    return spa.prune(net, ratio=ratio, round_to=1, data=x[:256], example_inputs=x[:2])


def in_steps(
    net: nnx.Module, x: np.ndarray, y: np.ndarray, ratio: float, steps: int, epochs: int
) -> Iterator[tuple[spa.Result, nnx.Module]]:
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
