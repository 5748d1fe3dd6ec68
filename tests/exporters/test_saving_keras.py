"""Pruned Keras models in a file and again from it, without tracing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tensorflow", reason="needs  pip install 'spa-onnx[tensorflow]'")

import keras

import spa
from spa.errors import ModelError, SpaError, UnreadableError, UnsupportedError
from tests import keras_networks

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


@pytest.mark.parametrize("name", ["residual", "separable", "gated", "transformer", "grouped"])
def test_a_fresh_model_gets_the_widths_and_keeps_its_own_values(tmp_path: Path, name: str) -> None:
    """Scores by weights alone change no value that stays: dense ones at the kept indices are the pruned ones."""
    dense = keras_networks.random(name)
    request = {"ratio": 0.3, "of": "params", "criterion": "l2", "round_to": 1}
    small = spa.prune(dense, **request).pruned
    if name == "residual":  # once more: what is kept is counted from the fresh model
        small = spa.prune(small, **request).pruned
    spa.save(small, tmp_path / "small.keras")
    loaded = spa.load(tmp_path / "small.keras")
    fresh = keras.models.clone_model(dense)
    fresh.set_weights(dense.get_weights())
    for given in (small, tmp_path / "small.keras", loaded):
        again = spa.narrow(fresh, given)
        assert type(again) is type(dense) and again.count_params() == small.count_params() < fresh.count_params()
        numbers = [[v for v in m.variables if v.dtype == "float32"] for m in (again, small)]  # no generators' states
        for value, wanted in zip(*numbers, strict=True):
            assert value.shape == wanted.shape
            # Queries of the pruned one make up for the scale of attention, which follows the size of a head.
            assert "/query/" in value.path or np.array_equal(value, wanted), value.path
    assert [v.shape for v in fresh.variables] == [v.shape for v in dense.variables]


def test_biases_that_reconstruction_made_begin_with_zeros() -> None:
    image = keras.Input((9, 9, 3))
    x = keras.layers.Conv2D(24, 3, activation="relu")(image)
    x = keras.layers.SeparableConv2D(16, 3, use_bias=False)(x)
    dense = keras.Model(image, keras.layers.Conv2D(5, 3, use_bias=False)(x))
    request = {"ratio": 0.3, "of": "params", "criterion": "flap", "samples": 16, "round_to": 1}
    small = spa.prune(spa.prune(dense, **request).pruned, **request).pruned
    assert len(small.variables) > len(dense.variables)
    again = spa.narrow(dense, small)
    assert [v.shape for v in again.variables] == [v.shape for v in small.variables]
    made = [v for v in again.variables if v.path.endswith("bias")][1:]  # all but the first layer's own
    assert made and not any(np.any(v) for v in made)


def test_what_is_no_record_of_the_same_model_narrows_nothing(tmp_path: Path) -> None:
    def plain(*units: int) -> keras.Model:
        return keras.Sequential([keras.Input((7,)), *(keras.layers.Dense(n) for n in units)])

    small = spa.prune(plain(24, 5), ratio=0.4, of="params", criterion="l2", round_to=1).pruned
    assert (
        spa.narrow(plain(24, 5), small).layers[0].units == small.layers[0].units < 24
    )  # whose layers have other names
    with pytest.raises(ModelError, match="the model has 2 variables, the pruned one had 4"):
        spa.narrow(plain(24), small)
    with pytest.raises(ModelError, match=r"kernel' has shape \[7, 30\], '[^']*/kernel' had \[7, 24\]"):
        spa.narrow(plain(30, 5), small)
    with pytest.raises(UnsupportedError, match="carries no record of a pruning"):
        spa.narrow(plain(24, 5), plain(24, 5))
    spa.save(plain(24, 5), tmp_path / "plain.keras")
    with pytest.raises(UnsupportedError, match=r"plain\.keras' has no record of a pruning"):
        spa.narrow(plain(24, 5), tmp_path / "plain.keras")
    (tmp_path / "text.keras").write_text("hello")
    with pytest.raises(ModelError, match=r"is no file of spa\.save"):
        spa.narrow(plain(24, 5), tmp_path / "text.keras")
    small.spa_narrowing = "[{}]"
    with pytest.raises(ModelError, match="the record of the pruning cannot be read"):
        spa.narrow(plain(24, 5), small)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpaError, match=r"Keras wants the suffix \.keras"):
        spa.save(network(), tmp_path / "small.h5")
    with pytest.raises(UnreadableError):
        spa.load(tmp_path / "none.keras")
