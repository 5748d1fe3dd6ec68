"""Inputs for a model that nobody has described: seeded, of the right type, and likely to run.

What an input may hold is read from the graph where the graph says it (ids that index an embedding stay below
its rows) and from the input's name where it does not (masks, positions, lengths). Sizes of dynamic axes are
guessed from their names, then from their positions; where onnxruntime refuses a guess, a short list of others is
tried.
"""

from __future__ import annotations

import ast
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from spa.errors import ModelError, PlanError, UnsupportedError
from spa.running.ranges import input_ranges
from spa.running.runtime import Model, TensorSpec, input_specs, load_graph, run

__all__ = [
    "Recipe",
    "first_run",
    "make_feeds",
    "resolve_sizes",
    "working_feeds",
]


@dataclass(frozen=True)
class Guess:
    """Sizes for dynamic axes by their kind, and the bound of integers about which nothing is known."""

    batch: int = 2
    sequence: int = 8
    image: int = 64
    integers: int = 8


# Tried in this order. Why each: the default; exporters that fixed a batch of one inside the graph; the image
# size that most classifiers were trained for; powers of two for detectors and U-Nets; audio models with a
# long receptive field; graphs in which axes of different kinds must agree, which size one satisfies by
# broadcasting.
_GUESSES = (
    Guess(),
    Guess(batch=1),
    Guess(batch=1, sequence=16, image=224, integers=2),
    Guess(batch=2, sequence=32, image=32, integers=2),
    Guess(batch=1, sequence=64, image=512, integers=1),
    Guess(batch=1, sequence=2048, image=640, integers=1),
    Guess(batch=1, sequence=1, image=32, integers=1),
)


@dataclass(frozen=True)
class Recipe:
    """The way to make the inputs of one model: everything but the seed.

    Attributes:
        specs: the inputs.
        sizes: the size of every dynamic axis, by ``input[axis]``.
        ranges: exclusive upper bounds of inputs, by name.
        guess: where the sizes came from, and the bound of integers about which nothing is known.
    """

    specs: tuple[TensorSpec, ...]
    sizes: Mapping[str, int]
    ranges: Mapping[str, int]
    guess: Guess

    def feeds(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Make the inputs of one seed.

        Args:
            seed: the same seed gives the same arrays.

        Returns:
            One array per input.

        Raises:
            UnsupportedError: an input is a string, a sequence or of a type that numpy lacks.
        """
        shapes = {
            spec.name: tuple(
                dim if isinstance(dim, int) else self.sizes[f"{spec.name}[{axis}]"]
                for axis, dim in enumerate(spec.shape)
            )
            for spec in self.specs
        }
        length = min((_length(s, shapes[s.name]) for s in self.specs if len(s.shape) >= 2), default=1)
        feeds = {}
        for spec in self.specs:
            name, shape = spec.name, shapes[spec.name]
            if spec.dtype is None:
                raise UnsupportedError(
                    f"Input '{name}': no values can be made up for type {spec.type}. Give feeds of your own."
                )
            # crc32 rather than hash(), which differs from one process to the next.
            rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
            values = _draw(name, spec.dtype, shape, rng, self.ranges.get(name), length, self.guess)
            feeds[name] = np.ascontiguousarray(values).reshape(shape).astype(spec.dtype)
        return feeds

    @property
    def batch(self) -> int:
        """Samples per run: the size of the axis called batch, else of the first axis of all."""
        for spec in self.specs:
            for axis, dim in enumerate(spec.shape):
                if isinstance(dim, str) and _kind(spec, axis, dim) == "batch":
                    return self.sizes[f"{spec.name}[{axis}]"]
        first = next((spec for spec in self.specs if len(spec.shape) >= 2), None)
        if first is None:
            return 1
        dim = first.shape[0]
        return dim if isinstance(dim, int) else self.sizes[f"{first.name}[0]"]


_BATCH = re.compile(r"batch|(^|_)(n|b|bs|bsz)($|_)|^unk__", re.IGNORECASE)
_IMAGE = re.compile(r"height|width|image|pixel|(^|_)[hw]($|_)", re.IGNORECASE)
_SEQUENCE = re.compile(r"seq|len|time|token|frame|past|cache|steps|(^|_)[tsl]($|_)", re.IGNORECASE)
_MASK = re.compile(r"mask", re.IGNORECASE)
_POSITION = re.compile(r"position", re.IGNORECASE)
_SEGMENT = re.compile(r"token_?type|segment", re.IGNORECASE)
_LENGTH = re.compile(r"len(gth)?s?($|_)", re.IGNORECASE)


def make_feeds(
    session_or_model_path: ort.InferenceSession | Model,
    *,
    seed: int = 0,
    batch: int | None = None,
    sizes: Mapping[str, int] | None = None,
    ranges: Mapping[str, int] | None = None,
) -> dict[str, np.ndarray]:
    """Make seeded inputs for a model, without running it.

    Floats are standard normal. An integer stays below the rows of the embedding that it indexes. By name: a
    mask is 1 on a prefix of each row and 0 after it, positions count up, segments are 0 or 1, lengths are the
    sequence's.

    Args:
        session_or_model_path: a session, a path, the bytes of a file, or a parsed model.
        seed: the same seed gives the same arrays; an input's values depend on its name, not on its position.
        batch: the size of dynamic batch axes (2 if not given).
        sizes: sizes of dynamic axes, by the axis' name (the same everywhere) or by ``input[axis]``.
        ranges: exclusive upper bounds of inputs, by name; taken from the graph if a model is given instead of
            a session.

    Returns:
        One array per input; a dynamic axis that has one name has one size everywhere.

    Raises:
        UnsupportedError: an input is a string, a sequence or of a type that numpy lacks.
        PlanError: ``sizes`` names no dynamic axis, or a size is not positive.
        ModelError: the model cannot be read.
    """
    specs, known = _describe(session_or_model_path, ranges)
    guess = _GUESSES[0] if batch is None else replace(_GUESSES[0], batch=batch)
    return Recipe(specs, resolve_sizes(specs, guess, sizes), known, guess).feeds(seed)


def working_feeds(
    session: ort.InferenceSession,
    *,
    seed: int = 0,
    batch: int | None = None,
    sizes: Mapping[str, int] | None = None,
    ranges: Mapping[str, int] | None = None,
    name: str = "the model",
) -> dict[str, np.ndarray]:
    """Make seeded inputs on which a session runs, trying other sizes where the first guess is refused.

    Args:
        session: from ``spa.running.runtime.load_session``.
        seed: as for ``make_feeds``.
        batch: as for ``make_feeds``; if given, it is kept in every attempt.
        sizes: as for ``make_feeds``; kept in every attempt.
        ranges: exclusive upper bounds of inputs, from ``input_ranges``.
        name: what messages call the model.

    Returns:
        One array per input.

    Raises:
        UnsupportedError: an input is a string, a sequence or of a type that numpy lacks.
        PlanError: ``sizes`` names no dynamic axis, or a size is not positive.
        ModelError: no attempt ran; the message quotes onnxruntime's reason for refusing the first.
    """
    recipe, _ = first_run(session, seed=seed, batch=batch, sizes=sizes, ranges=ranges, name=name)
    return recipe.feeds(seed)


def first_run(
    session: ort.InferenceSession,
    *,
    seed: int = 0,
    batch: int | None = None,
    sizes: Mapping[str, int] | None = None,
    ranges: Mapping[str, int] | None = None,
    name: str = "the model",
    specs: Sequence[TensorSpec] | None = None,
) -> tuple[Recipe, list[Any]]:
    """Find the recipe for inputs on which a session runs, as ``working_feeds`` does.

    Args:
        session: from ``spa.running.runtime.load_session``.
        seed: as for ``make_feeds``.
        batch: as for ``working_feeds``.
        sizes: as for ``working_feeds``.
        ranges: exclusive upper bounds of inputs, from ``input_ranges``.
        name: what messages call the model.
        specs: the inputs to make, where they are narrower than the session's own (a second model must take
            them too).

    Returns:
        The recipe, for more seeds, and the outputs of the run that proved it, in order.

    Raises:
        UnsupportedError: as ``working_feeds``.
        PlanError: as ``working_feeds``.
        ModelError: as ``working_feeds``.
    """
    specs = tuple(input_specs(session) if specs is None else specs)
    first: ModelError | None = None
    tried: list[str] = []
    for guess, resolved in _attempts(specs, batch, sizes):
        recipe = Recipe(specs, resolved, ranges or {}, guess)
        feeds = recipe.feeds(seed)
        try:
            return recipe, run(session, feeds, name=name)
        except ModelError as error:
            first = first or error
            tried.append(_say_sizes(feeds))
    more = f"; and {len(tried) - 3} more" if len(tried) > 3 else ""
    raise ModelError(f"{first} (inputs tried: {'; '.join(tried[:3])}{more}). {_remedy(specs)}") from first


def resolve_sizes(
    specs: Iterable[TensorSpec], guess: Guess | None = None, sizes: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Choose a size for every dynamic axis.

    Args:
        specs: the inputs.
        guess: sizes by kind.
        sizes: sizes to keep, by the axis' name or by ``input[axis]``.

    Returns:
        Sizes by ``input[axis]``, for every dynamic axis of every input.

    Raises:
        PlanError: ``sizes`` names no dynamic axis, or a size is not positive.
    """
    guess = guess or _GUESSES[0]
    sizes = dict(sizes or {})
    dynamic = [(spec, axis, dim) for spec in specs for axis, dim in enumerate(spec.shape) if not isinstance(dim, int)]
    _check_sizes(sizes, dynamic)
    # Plain names first: an expression such as `past + sequence` is computed from them.
    values = {name: size for name, size in sizes.items() if "[" not in name}
    for spec, axis, dim in dynamic:
        if dim and dim.isidentifier() and not _is_total(dim):
            values.setdefault(dim, _size_of(spec, axis, dim, guess))
    resolved = {}
    for spec, axis, dim in dynamic:
        if dim and dim not in values:
            size = _total(values) if _is_total(dim) else _evaluate(dim, values)
            values[dim] = _size_of(spec, axis, dim, guess) if size is None else max(size, 1)
        key = f"{spec.name}[{axis}]"
        resolved[key] = sizes.get(key) or (values[dim] if dim else _size_of(spec, axis, dim, guess))
    return resolved


# -- sizes ---------------------------------------------------------------------------------------------------


def _attempts(
    specs: Sequence[TensorSpec], batch: int | None, sizes: Mapping[str, int] | None
) -> Iterator[tuple[Guess, dict[str, int]]]:
    seen: set[tuple[object, ...]] = set()
    free_integers = any(spec.dtype is not None and spec.dtype.kind in "iu" for spec in specs)
    for guess in _GUESSES:
        if batch is not None:
            guess = replace(guess, batch=batch)
        resolved = resolve_sizes(specs, guess, sizes)
        key = (*sorted(resolved.items()), guess.integers if free_integers else 0)
        if key not in seen:
            seen.add(key)
            yield guess, resolved


def _size_of(spec: TensorSpec, axis: int, dim: str | None, guess: Guess) -> int:
    kind = _kind(spec, axis, dim)
    return 3 if kind == "channels" else int(getattr(guess, kind))


def _kind(spec: TensorSpec, axis: int, dim: str | None) -> str:
    """Tell what one dynamic axis counts, by its name, else by its position."""
    # tf2onnx calls every unknown axis unk__123; behind the first, its position says more.
    if dim and not (dim.startswith("unk__") and axis > 0):
        # "Sequence" before "batch": `n_tokens` counts tokens.
        for pattern, kind in ((_SEQUENCE, "sequence"), (_IMAGE, "image"), (_BATCH, "batch")):
            if pattern.search(dim):
                return kind
    rank = len(spec.shape)
    if axis == 0:
        return "batch"
    if rank >= 4:
        # Channels-last images leave the last axis static; channels-first ones the second.
        channels_last = isinstance(spec.shape[-1], int) and not isinstance(spec.shape[1], int)
        return "image" if axis >= 2 or channels_last else "channels"
    return "image" if rank == 3 and axis == 2 else "sequence"


def _is_total(dim: str) -> bool:
    return dim in ("total_sequence_length", "total_seq_len", "total_length")


def _total(values: Mapping[str, int]) -> int | None:
    """Add up what exporters of decoders call total, the cached tokens and the new ones; None without either."""
    parts = [size for name, size in values.items() if re.fullmatch(r"(past_)?seq(uence)?_len(gth)?", name)]
    return sum(parts) if parts else None


def _check_sizes(sizes: Mapping[str, int], dynamic: Sequence[tuple[TensorSpec, int, str | None]]) -> None:
    named = {name for *_, dim in dynamic if dim for name in (dim, *_names(dim))}
    known = named | {f"{spec.name}[{axis}]" for spec, axis, _ in dynamic}
    for name, size in sizes.items():
        if name not in known:
            listed = ", ".join(sorted(named | {f"{s.name}[{i}]" for s, i, dim in dynamic if not dim}))
            raise PlanError(f"sizes: '{name}' is not a dynamic axis. Choose from: {listed or 'none'}.")
        if size < 1:
            raise PlanError(f"sizes: '{name}' is {size}. Give at least 1.")


def _names(expression: str) -> list[str]:
    return re.findall(r"[A-Za-z_]\w*", expression)


def _evaluate(expression: str, values: Mapping[str, int]) -> int | None:
    """Compute the size of an axis that is called, say, ``past + sequence`` or ``2*s0``; None if that fails."""
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body, values)
    except (SyntaxError, ValueError, KeyError, ZeroDivisionError):
        return None


def _value(node: ast.expr, values: Mapping[str, int]) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.Name):
        return values[node.id]
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, values), _value(node.right, values)
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        if isinstance(node.op, ast.Mult):
            return left * right
        if isinstance(node.op, ast.Div | ast.FloorDiv):
            return left // right
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        arguments = [_value(argument, values) for argument in node.args]
        if node.func.id.lower() in ("min", "max", "floor"):
            return min(arguments) if node.func.id.lower() == "min" else max(arguments)
    raise ValueError(ast.dump(node))


# -- values --------------------------------------------------------------------------------------------------


def _describe(
    source: ort.InferenceSession | Model, ranges: Mapping[str, int] | None
) -> tuple[tuple[TensorSpec, ...], Mapping[str, int]]:
    if isinstance(source, str | os.PathLike | bytes | onnx.ModelProto):
        graph = load_graph(source)
        return input_specs(graph), input_ranges(graph) if ranges is None else ranges
    return input_specs(source), ranges or {}


def _length(spec: TensorSpec, shape: tuple[int, ...]) -> int:
    """Return the most that an input with lengths may state, going by one other input."""
    named = [
        size for dim, size in zip(spec.shape, shape, strict=True) if isinstance(dim, str) and _SEQUENCE.search(dim)
    ]
    return min(named or shape[:2])


def _draw(
    name: str,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    rng: np.random.Generator,
    bound: int | None,
    length: int,
    guess: Guess,
) -> np.ndarray:
    """Draw the values of one input, before the conversion to its type."""
    if _MASK.search(name):
        return _prefix_mask(shape, rng)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape)
    if dtype.kind not in "iu" and bound is None:
        return rng.standard_normal(shape)
    # From here on integers, and ids that are fed as floats and cast, as Keras does.
    if _POSITION.search(name) and shape:
        return np.broadcast_to(np.arange(shape[-1]) % (bound or shape[-1]), shape)
    if _SEGMENT.search(name):
        return rng.integers(0, min(bound or 2, 2), shape)
    if bound is not None:
        return rng.integers(0, bound, shape)
    if _LENGTH.search(name):
        return np.full(shape, length)
    if dtype.itemsize == 1:  # Images, or quantised activations: the whole range is valid.
        info = np.iinfo(dtype)
        return rng.integers(info.min, info.max + 1, shape)
    return rng.integers(0, guess.integers, shape)


def _prefix_mask(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Set ones on at least the first half of each row: softmax over a row with no valid position is NaN."""
    if not shape:
        return np.ones(())
    size = shape[-1]
    valid = rng.integers((size + 1) // 2, size + 1, (*shape[:-1], 1))
    return (np.arange(size) < np.maximum(valid, 1)).astype(np.int64)


def _say_sizes(feeds: Mapping[str, np.ndarray]) -> str:
    return ", ".join(f"{name}{list(array.shape)}" for name, array in feeds.items())


def _remedy(specs: Iterable[TensorSpec]) -> str:
    names = [
        str(dim or f"{spec.name}[{axis}]")
        for spec in specs
        for axis, dim in enumerate(spec.shape)
        if not isinstance(dim, int)
    ]
    if names:
        return f"Give the sizes of its dynamic axes: {', '.join(dict.fromkeys(names))}."
    return "Its inputs have fixed sizes, so the model itself, or the values it needs, are the cause."
