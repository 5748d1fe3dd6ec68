"""Inputs that follow one another: windows of sound, and the states that networks carry from one run to the next.

A state that is drawn at random is one that no sound leads to. States are therefore what the network itself makes of
the windows before, from zeros on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnxruntime as ort
from onnx import ModelProto

from spa.calibration.sound import sounds
from spa.model.sizes import is_state, kind_of_axis
from spa.model.traits import FLOAT_NAMES
from spa.running.feeds import Recipe, open_input
from spa.running.runtime import TensorSpec, run

STEPS = 16  # runs until states begin at zero again
LONG_KERNEL = 64  # samples; filters of images and features are shorter
_COPIES = frozenset(
    "Pad Unsqueeze Squeeze Reshape Flatten Cast Slice Concat Transpose Identity Sub Div Mul Add".split()  # and scales
)

Feeds = dict[str, np.ndarray]


def sound_inputs(model: ModelProto, recipe: Recipe) -> list[str]:
    """Return the inputs that hold sound: series of one channel that long filters read."""
    floats = [s.name for s in recipe.specs if s.element in FLOAT_NAMES and len(s.shape) in (2, 3)]
    heard = _heard(model, floats)
    shapes = {s.name: recipe.shape(s) for s in recipe.specs}
    return [n for n in floats if n in heard and (len(shapes[n]) == 2 or shapes[n][1] == 1)]


def _heard(model: ModelProto, names: Iterable[str]) -> set[str]:
    """Return the inputs that come to a convolution from one channel by a long kernel."""
    kernels = {t.name: tuple(t.dims) for t in model.graph.initializer}
    for node in model.graph.node:
        for attribute in node.attribute if node.op_type == "Constant" else ():
            if attribute.name == "value":
                kernels[node.output[0]] = tuple(attribute.t.dims)
    origin = {name: name for name in names}
    heard = set()
    for node in model.graph.node:
        source = next((origin[name] for name in node.input if name in origin), None)
        if source is None:
            continue
        if node.op_type in _COPIES:
            origin[node.output[0]] = source
        kernel = kernels.get(node.input[1], ()) if node.op_type == "Conv" else ()
        if len(kernel) > 2 and kernel[1] == 1 and max(kernel[2:]) == np.prod(kernel[2:]) >= LONG_KERNEL:
            heard.add(source)
    return heard


def state_pairs(session: ort.InferenceSession, recipe: Recipe) -> list[tuple[str, str]]:
    """Return the inputs that hold states, each with the output that is its next value.

    They pair in order, the last outputs with three axes, for exporters list both so; none pair where an output cannot
    have a state's shape, or where the network gives nothing else.
    """
    states = [s for s in recipe.specs if s.element in FLOAT_NAMES and is_state(open_input(s))]
    outputs = session.get_outputs()
    last = [o for o in outputs if len(o.shape) == 3][-len(states) :] if states else []
    if len(last) < len(states) or len(outputs) == len(states):
        return []
    pairs = list(zip(states, last, strict=True))
    return [(s.name, o.name) for s, o in pairs] if all(_may_equal(recipe.shape(s), o.shape) for s, o in pairs) else []


def _may_equal(shape: Sequence[int], declared: Sequence[int | str | None]) -> bool:
    """Return whether an array of a declared shape, of which parts are open, may have a shape."""
    return all(not isinstance(d, int) or d < 1 or d == size for size, d in zip(shape, declared, strict=True))


def fill_streams(
    batches: Sequence[Feeds],
    recipe: Recipe,
    session: ort.InferenceSession,
    heard: Sequence[str],
    rng: np.random.Generator,
) -> None:
    """Replace sound by windows that follow one another from batch to batch, and states by what comes of them.

    Args:
        batches: the inputs, changed in place.
        recipe: how they were made.
        session: of the model.
        heard: the inputs that hold sound.
        rng: the source of randomness.
    """
    pairs = state_pairs(session, recipe)
    specs = {s.name: s for s in recipe.specs}
    names = [o.name for o in session.get_outputs()]
    for start in range(0, len(batches) if heard or pairs else 0, STEPS):
        stream = batches[start : start + STEPS]
        for name in heard:
            _fill_sound(stream, specs[name], rng)
        state: Feeds = {}
        for feeds in stream:
            for name, _ in pairs:
                like = feeds[name]
                known = name in state and state[name].shape == like.shape  # the last batch may be smaller
                feeds[name] = state[name].astype(like.dtype) if known else np.zeros_like(like)
            if pairs:
                made = dict(zip(names, run(session, feeds), strict=True))
                state = {name: made[output] for name, output in pairs}


def _fill_sound(stream: Sequence[Feeds], spec: TensorSpec, rng: np.random.Generator) -> None:
    """Cut each row's sound into a window for each batch; rows that are steps of one sound follow one another, too."""
    shapes = [feeds[spec.name].shape for feeds in stream]
    rows, window = shapes[0][0], shapes[0][-1]
    if not isinstance(spec.shape[0], int) and kind_of_axis(open_input(spec), 0) != "batch":
        cut = sounds(1, len(stream) * rows * window, rng).reshape(len(stream), rows, window)
    else:
        cut = sounds(rows, len(stream) * window, rng).reshape(rows, len(stream), window).swapaxes(0, 1)
    for feeds, shape, windows in zip(stream, shapes, cut, strict=True):
        feeds[spec.name] = np.ascontiguousarray(windows[: shape[0]].reshape(shape), dtype=feeds[spec.name].dtype)
