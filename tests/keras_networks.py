"""Small Keras networks for tests of the importer and the exporter: random weights, random statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def residual() -> Any:
    import keras
    from keras import layers

    image = keras.Input((16, 16, 3), name="image")
    x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(13, 3, padding="same", use_bias=False)(image)))
    y = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(23, 3, padding="same", use_bias=False)(x)))
    y = layers.BatchNormalization()(layers.Conv2D(13, 3, padding="same", use_bias=False)(y))
    x = layers.ReLU()(layers.Add()([x, y]))
    return keras.Model(image, layers.Dense(10, name="logits")(layers.GlobalAveragePooling2D()(x)))


def separable() -> Any:
    import keras
    from keras import layers

    image = keras.Input((16, 16, 3))
    x = layers.BatchNormalization()(layers.Conv2D(12, 3, strides=2, padding="same", use_bias=False)(image))
    x = layers.DepthwiseConv2D(3, padding="same", use_bias=False)(layers.ReLU(6.0)(x))
    x = layers.ReLU(6.0)(layers.BatchNormalization(scale=False)(x))
    x = layers.Activation("hard_swish")(layers.Conv2D(22, 1)(x))
    x = layers.SeparableConv2D(17, 3, padding="same", use_bias=False)(x)
    return keras.Model(image, layers.Dense(10, activation="softmax")(layers.Flatten()(x)))


def perceptron() -> Any:
    import keras
    from keras import layers

    hidden = [layers.Dense(64, activation="gelu"), layers.BatchNormalization(), layers.Dropout(0.5), layers.Dense(48)]
    norm = [layers.LayerNormalization(), layers.Activation("relu")]
    return keras.Sequential([keras.Input((20,)), *hidden, *norm, layers.Dense(31), layers.Dense(10)])


def recurrent() -> Any:
    import keras
    from keras import layers

    cells = [layers.Bidirectional(layers.LSTM(11, return_sequences=True)), layers.LSTM(14)]
    return keras.Sequential([keras.Input((None, 7)), *cells, layers.Dense(16, activation="relu"), layers.Dense(5)])


def gated() -> Any:
    import keras
    from keras import layers

    first = layers.GRU(11, return_sequences=True, dropout=0.3, recurrent_dropout=0.2)
    cells = [layers.Bidirectional(first), layers.GRU(14, return_sequences=True, reset_after=False)]
    last = [layers.GRU(9, use_bias=False, go_backwards=True), layers.Dense(16, activation="relu"), layers.Dense(5)]
    return keras.Sequential([keras.Input((None, 7)), *cells, *last])


def transformer() -> Any:
    import keras
    from keras import layers

    ids = keras.Input((12,), dtype="int32", name="ids")
    x = layers.Embedding(50, 32)(ids)
    x = layers.LayerNormalization()(layers.Add()([x, layers.MultiHeadAttention(4, 8)(x, x)]))
    y = layers.Dense(32)(layers.Dense(64, activation="gelu")(x))
    x = layers.LayerNormalization()(layers.Add()([x, y]))
    return keras.Model(ids, layers.Dense(7)(layers.GlobalAveragePooling1D()(x)))


def grouped() -> Any:
    import keras
    from keras import layers

    image = keras.Input((8, 8, 8))
    x = layers.ReLU()(layers.Conv2D(16, 3, groups=4, padding="same")(image))
    x = layers.PReLU(shared_axes=[1, 2])(layers.Conv2D(24, 3, groups=2, padding="same")(x))
    x = layers.GroupNormalization(4)(layers.Conv2D(16, 1)(x))
    return keras.Model(image, layers.Dense(3)(layers.Flatten()(x)))


def reshaped() -> Any:
    import keras
    from keras import layers

    noise = keras.Input((20,))
    x = layers.Reshape((4, 4, 14))(layers.Dense(4 * 4 * 14, activation="relu")(noise))
    x = layers.BatchNormalization()(layers.Conv2DTranspose(12, 3, strides=2, padding="same")(x))
    x = layers.GlobalMaxPooling1D()(layers.Conv1D(10, 3)(layers.Reshape((64, 12))(x)))
    x = layers.Flatten()(layers.Conv2D(6, 1)(layers.Reshape((1, 1, 10))(x)))
    return keras.Model(noise, layers.Dense(2)(x))


def nested() -> Any:
    import keras
    from keras import layers

    body = keras.Sequential([keras.Input((8, 8, 12)), layers.Conv2D(10, 3), layers.BatchNormalization()], name="body")
    entry = keras.Input((6, 6, 10))
    inner = keras.Model(entry, layers.Conv2D(9, 3)(layers.LeakyReLU()(entry)), name="inner")
    image = keras.Input((8, 8, 3))
    x = inner(body(layers.Conv2D(12, 1)(image)))
    return keras.Model(image, layers.Dense(2)(layers.GlobalAveragePooling2D()(x * 2.0 + 1.0)))


def siamese() -> Any:
    import keras
    from keras import layers

    left, right = keras.Input((16,), name="left"), keras.Input((16,), name="right")
    first, second = layers.Dense(24, activation="relu"), layers.Dense(12)
    x = layers.Subtract()([second(first(left)), second(first(right))])
    return keras.Model({"left": left, "right": right}, {"y": layers.Dense(1)(x), "z": layers.Dense(2)(x)})


NETWORKS: dict[str, Callable[[], Any]] = {
    build.__name__: build
    for build in (residual, separable, perceptron, recurrent, gated, transformer, grouped, reshaped, nested, siamese)
}


def random(name: str, seed: int = 0) -> Any:
    """A network by name, with random values in all of its variables."""
    import keras

    keras.utils.clear_session()  # layers are numbered anew
    model = NETWORKS[name]()
    rng = np.random.default_rng(seed)
    for variable in model.variables:
        if variable.dtype == "float32":
            value = 0.3 * rng.standard_normal(variable.shape)
            positive = variable.name in ("moving_variance", "gamma")
            variable.assign(np.abs(value) + 0.5 if positive else value)
    return model
