"""Loops of JAX are pruned inside, and parameters that are read at several places stay one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("jax2onnx", reason="needs  pip install 'spa-onnx[jax]'")
pytest.importorskip("flax", reason="needs  pip install 'spa-onnx[jax]'")

import jax
import jax.numpy as jnp
from flax import nnx

import spa
from spa.coupling.analysis import couple
from spa.importers.jax import convert
from spa.model.graph import Graph
from spa.model.io import load
from spa.model.simplify import simplified
from spa.running.runtime import load_session
from tests.oracle import check, distance

pytestmark = pytest.mark.slow  # JAX compiles
Parameters = dict[str, Any]


def parameters(**shapes: tuple[int, ...]) -> Parameters:
    rng = np.random.default_rng(0)
    return {n: jnp.asarray(rng.standard_normal(s) / np.sqrt(s[0]), jnp.float32) for n, s in shapes.items()}


def repeated(p: Parameters, x: Any) -> Any:
    """Four steps of a `while_loop`."""
    start = (0, x @ p["w"])
    return jax.lax.while_loop(lambda c: c[0] < 4, lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["v"])), start)[1] @ p["u"]


def scanned(p: Parameters, x: Any) -> Any:
    """A recurrent cell along time by `scan`; its first state is of the size that its weights have."""

    def step(h: Any, xt: Any) -> tuple[Any, Any]:
        h = jnp.tanh(xt @ p["e"] + h @ p["v"])
        return h, h

    rows = jax.nn.relu(x @ p["w"])
    first = jnp.zeros((x.shape[0], p["v"].shape[0]))
    _, states = jax.lax.scan(step, first, jnp.swapaxes(rows, 0, 1))
    return jnp.swapaxes(states, 0, 1) @ p["u"]


REPEATED = (repeated, parameters(w=(5, 11), v=(11, 11), u=(11, 3)), (2, 5), [11])
SCANNED = (scanned, parameters(w=(5, 7), e=(7, 11), v=(11, 11), u=(11, 3)), (2, 6, 5), [7, 11])


@pytest.mark.parametrize(
    ("source", "p", "shape", "sizes"), [REPEATED, SCANNED], ids=lambda value: getattr(value, "__name__", None)
)
def test_states_of_loops_are_pruned_and_the_parameters_come_back(
    source: Any, p: Parameters, shape: tuple[int, ...], sizes: list[int]
) -> None:
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    flat = simplified(load(convert(source, x, params=p).model)).model
    assert any(n.op_type == "LoopEnter" for n in flat.graph.node)
    assert sorted(g.size for g in couple(Graph(flat)).free) == sizes
    check(flat)
    result = spa.prune(source, ratio=0.3, criterion="l2", round_to=1, example_inputs=x, convert_options={"params": p})
    small = result.pruned
    width = small["v"].shape[0]
    assert width < 11 and small["v"].shape == (width, width) and small["u"].shape == (width, 3)
    session = load_session(result.model)
    (expected,) = session.run(None, {session.get_inputs()[0].name: x})
    assert distance(source(small, x), expected) < 1e-5


class Slopes(nnx.Module):
    """One set of slopes and one head, each read at two places."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.a, self.b = nnx.Conv(3, 16, (3, 3), rngs=rngs), nnx.Conv(16, 16, (3, 3), rngs=rngs)
        self.h = nnx.Conv(16, 5, (1, 1), rngs=rngs)
        self.s = nnx.Param(jnp.linspace(0.1, 0.9, 16))

    def act(self, x: Any) -> Any:
        return jnp.where(x > 0, x, x * self.s[...])

    def __call__(self, x: Any) -> tuple[Any, Any]:
        y = self.act(self.a(x))
        return self.h(y), self.h(self.act(self.b(y)))


def test_parameters_that_are_read_at_two_places_are_cut_once() -> None:
    x = np.random.default_rng(0).standard_normal((1, 8, 8, 3)).astype(np.float32)
    result = spa.prune(Slopes(nnx.Rngs(0)), ratio=0.4, criterion="l2", round_to=1, example_inputs=x)
    small = result.pruned
    assert isinstance(small, Slopes)
    assert small.s.shape[0] == small.h.kernel.shape[2] < 16
    session = load_session(result.model)
    for mine, theirs in zip(small(x), session.run(None, {session.get_inputs()[0].name: x}), strict=True):
        assert distance(mine, theirs) < 1e-5
