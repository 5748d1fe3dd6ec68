"""Pruned Keras models in a file and again from it, without tracing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tensorflow", reason="needs  pip install 'spa-onnx[tensorflow]'")

import keras

import spa
from spa.errors import ModelError, SpaError, UnreadableError

pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning")  # of TensorFlow 2.21, which numpy 2 deprecates


class Doubled(keras.layers.Layer):
    """A layer of the user's own."""

    def call(self, x: object) -> object:
        return x + x


def network() -> keras.Model:
    x = keras.Input((7,))
    h = Doubled()(keras.layers.Dense(24, activation="relu")(x))
    return keras.Model(x, keras.layers.Dense(5)(h))


def test_a_pruned_model_comes_back_with_its_widths_and_its_own_classes(tmp_path: Path) -> None:
    small = spa.prune(network(), ratio=0.4, of="params", criterion="l2", round_to=1).pruned
    small.layers[1].bias.assign_add(np.ones(small.layers[1].units))  # trained further
    spa.save(small, tmp_path / "small.keras")
    x = np.random.default_rng(0).standard_normal((3, 7)).astype(np.float32)
    again = spa.load(tmp_path / "small.keras", network())
    assert again.layers[1].units == small.layers[1].units < 24
    assert np.array_equal(again(x), small(x))
    with pytest.raises(ModelError, match="Keras cannot read"):
        spa.load(tmp_path / "small.keras")  # which does not know the layer's class
    plain = keras.Sequential([keras.Input((7,)), keras.layers.Dense(3)])
    spa.save(plain, tmp_path / "plain.keras")
    assert np.array_equal(spa.load(tmp_path / "plain.keras")(x), plain(x))


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpaError, match=r"Keras wants the suffix \.keras"):
        spa.save(network(), tmp_path / "small.h5")
    with pytest.raises(UnreadableError):
        spa.load(tmp_path / "none.keras")
