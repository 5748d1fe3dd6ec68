"""Loops of Keras and TensorFlow are pruned inside, and a layer that is used at several places stays one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="tensorflow is not installed: pip install 'spa-onnx[tensorflow]'")
keras = pytest.importorskip("keras")
pytest.importorskip("tf2onnx", reason="tf2onnx is not installed: pip install 'spa-onnx[tensorflow]'")

import spa  # noqa: E402
from spa.coupling.analysis import couple  # noqa: E402
from spa.importers.tensorflow import convert  # noqa: E402
from spa.model.graph import Graph  # noqa: E402
from spa.model.io import load  # noqa: E402
from spa.model.simplify import simplified  # noqa: E402
from spa.running.runtime import load_session  # noqa: E402
from tests.oracle import check, distance  # noqa: E402

# TensorFlow 2.21 and tf2onnx 1.17 call what numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning")


class MinimalCell(keras.layers.Layer):  # type: ignore[misc, name-defined]
    """A minimal gated unit, for which ONNX has no operator."""

    def __init__(self, units: int, **options: Any) -> None:
        super().__init__(**options)
        self.units = self.state_size = units

    def build(self, shape: tuple[int, ...]) -> None:
        self.w = self.add_weight(shape=(shape[-1], 2 * self.units), name="w")
        self.u = self.add_weight(shape=(self.units, self.units), name="u")
        self.v = self.add_weight(shape=(self.units, self.units), name="v")
        self.built = True

    def call(self, x: Any, states: list[Any]) -> tuple[Any, list[Any]]:
        (h,), ops = states, keras.ops
        forget, new = ops.split(ops.matmul(x, self.w), 2, -1)
        forget = ops.sigmoid(forget + ops.matmul(h, self.u))
        h = (1 - forget) * h + forget * ops.tanh(new + ops.matmul(forget * h, self.v))
        return h, [h]


def test_a_cell_of_the_users_own_is_pruned_inside_its_loop() -> None:
    keras.utils.set_random_seed(0)
    x = keras.Input((7, 5))
    rows = keras.layers.RNN(MinimalCell(11), return_sequences=True)(keras.layers.Dense(13, "relu")(x))
    flat = simplified(load(convert(keras.Model(x, keras.layers.Dense(3)(rows))).model)).model
    assert any(n.op_type == "LoopEnter" for n in flat.graph.node)
    assert sorted(g.size for g in couple(Graph(flat)).free) == [11, 13]
    check(flat)


def test_a_while_loop_is_pruned_inside() -> None:
    draw = np.random.default_rng(0).standard_normal
    w, v, u = (tf.Variable((draw(s) / np.sqrt(s[0])).astype(np.float32)) for s in ((5, 11), (11, 11), (11, 3)))

    @tf.function
    def repeated(x: Any) -> Any:
        return tf.while_loop(lambda t, h: t < 4, lambda t, h: (t + 1, tf.tanh(h @ v)), (0, x @ w))[1] @ u

    flat = simplified(load(convert(repeated, np.ones((2, 5), np.float32)).model)).model
    assert any(n.op_type == "LoopEnter" for n in flat.graph.node)
    assert [g.size for g in couple(Graph(flat)).free] == [11]
    check(flat)


def test_a_layer_that_is_used_at_two_places_is_cut_once() -> None:
    keras.utils.set_random_seed(0)
    layers = keras.layers
    act, x = layers.PReLU(shared_axes=[1, 2]), keras.Input((8, 8, 3))
    first = act(layers.Conv2D(16, 3, padding="same")(x))
    model = keras.Model(x, layers.Conv2D(3, 1)(act(layers.Conv2D(16, 3, padding="same")(first))))
    act.set_weights([np.random.default_rng(0).random((1, 1, 16))])
    result = spa.prune(model, ratio=0.4, criterion="l2", round_to=1)
    (slopes,) = (t for t in result.model.graph.initializer if "alpha" in t.name)
    small = result.pruned
    assert max(slopes.dims) < 16 and small.count_params() < model.count_params()
    session = load_session(result.model)
    given = np.random.default_rng(1).standard_normal((2, 8, 8, 3)).astype(np.float32)
    (expected,) = session.run(None, {session.get_inputs()[0].name: given})
    assert distance(small(given), expected) < 1e-5
