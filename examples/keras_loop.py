"""A Keras model pruned in steps, with `fit` between them.

    python examples/keras_loop.py [--ratio 0.6] [--steps 3] [--epochs 15]

A residual network on scikit-learn's digits. `spa.prune(...).pruned` is an ordinary Keras model of the same layers,
narrower: `compile` and `fit` train it, and it can be pruned again. Prints MACs and accuracy after each step, and of
the same budget in one step. `torch_loop.py` and `jax_loop.py` do the same in PyTorch and flax.
Needs Keras, TensorFlow and scikit-learn; in a clone, `pip install -e '.[tensorflow]' scikit-learn`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import layers
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import spa


def conv_norm(x: Any, width: int, size: int, stride: int, names: tuple[str, str]) -> Any:
    """Apply a convolution and its BatchNorm; padded alike on both sides, as PyTorch does."""
    if size > 1:
        x = layers.ZeroPadding2D(size // 2)(x)
    x = layers.Conv2D(width, size, stride, use_bias=False, kernel_initializer="he_uniform", name=names[0])(x)
    return layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=names[1])(x)


def residual(x: Any, width: int, stride: int, name: str) -> Any:
    """Apply two convolutions, and a shortcut around them."""
    y = layers.ReLU()(conv_norm(x, width, 3, stride, (f"{name}_conv1", f"{name}_bn1")))
    y = conv_norm(y, width, 3, 1, (f"{name}_conv2", f"{name}_bn2"))
    if stride != 1 or x.shape[-1] != width:
        x = conv_norm(x, width, 1, stride, (f"{name}_shortcut_0", f"{name}_shortcut_1"))
    return layers.ReLU()(layers.Add()([x, y]))


def build(seed: int) -> keras.Model:
    """Build an untrained network: a stem, and blocks of 32, 32, 64, 64 and 128 channels."""
    keras.utils.set_random_seed(seed)
    image = keras.Input((8, 8, 1), name="x")
    x = layers.ReLU()(conv_norm(image, 32, 3, 1, ("conv1", "bn1")))
    for i, (width, stride) in enumerate(((32, 1), (32, 1), (64, 2), (64, 1), (128, 2))):
        x = residual(x, width, stride, f"blocks_{i}")
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, layers.Dense(10, kernel_initializer="he_uniform", name="fc")(x))


def digits() -> tuple[np.ndarray, ...]:
    """Load images [n 8 8 1] for training and for testing, and their labels."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 8 - 1).astype(np.float32).reshape(-1, 8, 8, 1)
    return tuple(train_test_split(images, labels, test_size=360, random_state=0, stratify=labels))


def train(net: keras.Model, x: np.ndarray, y: np.ndarray, epochs: int, rate: float, seed: int = 0) -> keras.Model:
    """Train as the user does."""
    keras.utils.set_random_seed(seed)
    schedule = keras.optimizers.schedules.CosineDecay(rate, epochs * -(-len(x) // 64))
    optimiser = keras.optimizers.AdamW(schedule, weight_decay=0.01, epsilon=1e-8)
    net.compile(optimiser, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    net.fit(x, y, batch_size=64, epochs=epochs, verbose=0)
    return net


def accuracy(net: keras.Model, x: np.ndarray, y: np.ndarray) -> float:
    """Return top-1, in percent."""
    return 100 * float((net.predict(x, verbose=0).argmax(1) == y).mean())


def prune(net: keras.Model, x: np.ndarray, ratio: float) -> spa.Result:
    """Remove a fraction of the MACs."""
    return spa.prune(net, ratio=ratio, round_to=1, data=x[:256])


def in_steps(
    net: keras.Model, x: np.ndarray, y: np.ndarray, ratio: float, steps: int, epochs: int
) -> Iterator[tuple[spa.Result, keras.Model]]:
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
