"""Sizes of open axes, chosen in one place: for the walks of the analysis and for whatever is run.

An open axis has a name, which may be computed from others (``past + 1``), or none. What it counts is told by its name,
then by its place among the axes; :mod:`spa.model.extents` reads from the graph how long it must be for a network to see
something.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from spa.errors import OptionError, SizeError, suggestion

__all__ = [
    "FALLBACKS",
    "Guess",
    "OpenInput",
    "axis_name",
    "batch_axes",
    "free_axes",
    "is_state",
    "kind_of_axis",
    "open_keys",
    "resolve",
    "widened",
]


@dataclass(frozen=True)
class OpenInput:
    """An input of a model, as far as its sizes go.

    Attributes:
        name: its name.
        shape: one entry per axis: a size, the name of an open axis, or None for an open axis without a name.
        integers: whether it holds integers, as ids are.
    """

    name: str
    shape: tuple[int | str | None, ...]
    integers: bool = False


@dataclass(frozen=True)
class Guess:
    """Sizes for open axes by what they count, and the bound of integers about which nothing is known.

    Attributes:
        batch: samples.
        sequence: tokens.
        series: steps of floats: sound, spectra, features.
        past: steps that a cache holds.
        image: rows and columns.
        columns: columns, where they are not as many as the rows: lines of text.
        integers: the exclusive bound of integers about which nothing is known.
        halves: by ending of the input's name other series and images, where two networks lie in one model.
    """

    batch: int = 2
    sequence: int = 128
    series: int = 128
    past: int = 16
    image: int = 224
    columns: int | None = None
    integers: int = 8
    halves: tuple[tuple[str, Guess], ...] = ()

    def of(self, name: str) -> Guess:
        """Return what holds for an input: series and images of its network."""
        other = next((guess for ending, guess in self.halves if name.endswith(ending)), self)
        return replace(self, series=other.series, image=other.image, columns=other.columns)


def axis_name(dim: str) -> str | None:
    """Return the name of an open axis; None for a sign that stands for any size, such as ``?``."""
    return dim if re.search(r"\w", dim) else None


def _alike(batch: int, steps: int, image: int, integers: int = 8) -> Guess:
    return Guess(batch=batch, sequence=steps, series=steps, past=steps, image=image, integers=integers)


# Tried in this order where the realistic sizes are refused. Why each: lines of text, which recognisers take at one
# height alone; tables of positions that end early; image sizes that most classifiers were trained for; powers of two
# for detectors and U-Nets; exporters that fixed a batch of one inside the graph; audio models with a long receptive
# field; graphs in which axes of different kinds must agree, which size one satisfies by broadcasting.
FALLBACKS = (
    Guess(image=48, columns=320),
    Guess(image=32, columns=256),
    _alike(2, 64, 256),
    _alike(2, 16, 64),
    _alike(2, 8, 64),
    _alike(1, 8, 64),
    _alike(1, 16, 224, 2),
    _alike(2, 32, 32, 2),
    _alike(1, 64, 512, 1),
    _alike(2, 7, 640),
    _alike(1, 2048, 640, 1),
    _alike(1, 512, 512),
    _alike(1, 1, 32, 1),
)

_BATCH = re.compile(r"batch|(^|_)(n|b|bs|bsz)($|_)|^unk__", re.IGNORECASE)
_IMAGE = re.compile(r"height|width|image|pixel|(^|_)[hw]($|_)", re.IGNORECASE)
_PAST = re.compile(r"past|cache", re.IGNORECASE)
_SEQUENCE = re.compile(r"seq|len|time|token|frame|sample|steps|(^|_)[tsl]($|_)", re.IGNORECASE)
_STATE = re.compile(r"state|hidden|cell|(^|_)[hc]n?_?[0-9]*($|_)", re.IGNORECASE)
_TOTAL = ("total_sequence_length", "total_seq_len", "total_length")
# What exporters call the axis that spans a cache and the new steps, where its name is no expression of theirs.
_WHOLE = re.compile(r"total|_plus_|(^|_)(kv|key|all|full|whole)(_|$)", re.IGNORECASE)
_MASK = re.compile(r"mask", re.IGNORECASE)
# Heights of text lines and bands of spectra: an image of one such side is this many times as long.
_LINE_HEIGHT, _LINE_RATIO = 96, 6


def kind_of_axis(of: OpenInput, axis: int) -> str:
    """Tell what an open axis counts: ``batch``, ``sequence``, ``series``, ``past``, ``image`` or ``channels``."""
    dim, rank = of.shape[axis], len(of.shape)
    # tf2onnx calls every unknown axis unk__123; behind the first, its position says more.
    if isinstance(dim, str) and dim and not (dim.startswith("unk__") and axis > 0):
        # Sequences before batches: `n_tokens` counts tokens.
        for pattern, kind in ((_PAST, "past"), (_SEQUENCE, "sequence"), (_IMAGE, "image"), (_BATCH, "batch")):
            if pattern.search(dim):
                return _series_or(kind, of)
    if axis == 0 or (axis == 1 and is_state(of)):
        return "batch"
    if _PAST.search(of.name) and not of.integers:
        return "past"
    if rank >= 4:
        # Channels-last images leave the last axis static; channels-first ones the second.
        channels_last = isinstance(of.shape[-1], int) and not isinstance(of.shape[1], int)
        return "image" if axis >= 2 or channels_last else "channels"
    picture = rank == 3 and not of.integers and 3 in (of.shape[0], of.shape[2])
    return "image" if picture else _series_or("sequence", of)


def _series_or(kind: str, of: OpenInput) -> str:
    """Return ``series`` for a sequence of floats, unless it is one of rows as long as a network's window."""
    rows = len(of.shape) == 2 and isinstance(of.shape[1], int)
    return "series" if kind == "sequence" and not of.integers and not rows else kind


def is_state(of: OpenInput) -> bool:
    """Tell whether an input is a recurrent network's state, of shape (layers, batch, features)."""
    return len(of.shape) == 3 and isinstance(of.shape[0], int) and _STATE.search(of.name) is not None


def batch_axes(inputs: Sequence[OpenInput]) -> dict[str, int | None]:
    """Return the axis of each input along which samples lie; None for one that all samples share.

    1. An open axis that counts samples is one; so is any axis of that name.
    2. Where no input has such an axis, the first axis of the first input that has axes is one, if its size is fixed;
       that of a state is its second.
    3. An input without an axis of that size, or where others have an open one and it has none, is shared.
    4. Where the first axis is open and counts something else, no input has one: each run takes one sample.
    """
    axes: dict[str, int | None] = {}
    for each in inputs:
        open_axes = [a for a, dim in enumerate(each.shape) if not isinstance(dim, int)]
        axes[each.name] = next((a for a in open_axes if kind_of_axis(each, a) == "batch"), None)
    names = {each.shape[a] for each in inputs if (a := axes[each.name]) is not None and each.shape[a]}
    for each in inputs:
        if axes[each.name] is None:
            axes[each.name] = next((a for a, dim in enumerate(each.shape) if dim and dim in names), None)
    if any(axis is not None for axis in axes.values()):
        return axes
    ranked = [each for each in inputs if each.shape]
    first = next((each for each in ranked if not is_state(each)), ranked[0] if ranked else None)
    for each in ranked:
        if first is not None and isinstance(first.shape[int(is_state(first))], int):
            axis = int(is_state(each))
            axes[each.name] = axis if each.shape[axis] == first.shape[int(is_state(first))] else None
    return axes


def resolve(inputs: Sequence[OpenInput], guess: Guess, sizes: Mapping[str, int] | None = None) -> dict[str, int]:
    """Choose a size for every open axis.

    Args:
        inputs: the inputs.
        guess: sizes by what an axis counts.
        sizes: sizes to keep, by the axis' name or by ``input[axis]``.

    Returns:
        Sizes by ``input[axis]``, for every open axis of every input; one name has one size everywhere, and an axis
        whose name is computed from others has the size that follows from theirs.

    Raises:
        SizeError: ``sizes`` names no open axis.
        OptionError: a size is not positive.
    """
    return _solve(inputs, guess, sizes)[0]


def free_axes(
    inputs: Sequence[OpenInput], guess: Guess, sizes: Mapping[str, int] | None = None
) -> dict[str, tuple[str, int]]:
    """Return by name, or by ``input[axis]``, what open axes count and their sizes, without those that are computed."""
    return _solve(inputs, guess, sizes)[1]


def widened(
    inputs: Sequence[OpenInput],
    guess: Guess,
    sizes: Mapping[str, int] | None = None,
    *,
    factors: Mapping[str, float],
) -> dict[str, int]:
    """Return sizes far from those of :func:`resolve`, for some of the axes.

    What follows an input must differ between the two: also the greater of a batch and a width, say.

    Args:
        inputs: the inputs.
        guess: the sizes to get away from.
        sizes: as for :func:`resolve`.
        factors: by how much axes grow, or shrink below 1, by the names of :func:`free_axes`; series and caches grow by
            four times as much where that is more than 2, above most hops. A batch becomes a size above most widths,
            then a prime.
    """
    grown = {}
    for name, (kind, size) in free_axes(inputs, guess, sizes).items():
        factor = factors.get(name, 1)
        if name not in factors:
            grown[name] = size
        elif kind == "batch":
            grown[name] = 1031 if factor > 2 else 512
        else:
            times = 4 * factor if factor > 2 and kind in ("series", "past") else factor
            grown[name] = max(1, int(size * times))
    return resolve(inputs, guess, grown)


def _solve(
    inputs: Sequence[OpenInput], guess: Guess, sizes: Mapping[str, int] | None
) -> tuple[dict[str, int], dict[str, tuple[str, int]]]:
    """Return all sizes by ``input[axis]``, and by name or place the kinds and sizes of those that are not computed."""
    sizes = dict(sizes or {})
    axes = [(each, axis, dim) for each in inputs for axis, dim in enumerate(each.shape) if not isinstance(dim, int)]
    declared = {dim for *_, dim in axes if dim}
    wholes = _wholes(axes)
    plain = {dim for dim in declared - wholes.keys() if not _is_computed(dim, declared)}
    _check(sizes, axes, plain)
    values = {name: size for name, size in sizes.items() if "[" not in name}
    free: dict[str, tuple[str, int]] = {}

    def choose(name: str, of: OpenInput, axis: int) -> None:
        size = values.setdefault(name, sizes.get(f"{of.name}[{axis}]") or _size(of, axis, guess))
        free.setdefault(name, (kind_of_axis(of, axis), size))

    for each, axis, dim in axes:  # names before expressions, which are computed from them
        if dim in plain:
            choose(str(dim), each, axis)
    resolved = {}
    for each, axis, dim in sorted(axes, key=lambda item: (item[2] or _key(item[0], item[1])) in wholes):
        key = _key(each, axis)
        if (dim or key) in wholes:
            size = sizes.get(key) or values.get(dim or key) or _spanned(free) or _size(each, axis, guess)
            resolved[key] = values[dim or key] = size
        elif not dim:
            resolved[key] = sizes.get(key) or _size(each, axis, guess)
            free[key] = (kind_of_axis(each, axis), resolved[key])
        else:
            if dim not in values:
                for name in _names(dim) if dim not in _TOTAL else ():
                    choose(name, replace(each, shape=(*each.shape[:axis], name, *each.shape[axis + 1 :])), axis)
                computed = _total(values) if dim in _TOTAL else _evaluated(dim, values)
                values[dim] = _size(each, axis, guess) if computed is None else max(computed, 1)
            resolved[key] = sizes.get(key) or values[dim]
    return resolved, free


def _key(of: OpenInput, axis: int) -> str:
    return f"{of.name}[{axis}]"


def _wholes(axes: Sequence[tuple[OpenInput, int, str | None]]) -> dict[str, None]:
    """Return the axes, by name or ``input[axis]``, that span a cache and the new steps, in models that have a cache.

    Their names say so; or they are the last axis of a mask, of another name than the steps have elsewhere.
    """
    kinds = {_key(each, axis): kind_of_axis(each, axis) for each, axis, _ in axes}
    if "past" not in kinds.values():
        return {}
    elsewhere = {dim for each, _, dim in axes if dim and not _MASK.search(each.name)}
    found: dict[str, None] = {}
    for each, axis, dim in axes:
        last = _MASK.search(each.name) is not None and axis == len(each.shape) - 1 and dim not in elsewhere
        called = dim is not None and _WHOLE.search(dim) is not None
        computed = dim is not None and _is_computed(dim, elsewhere) and dim not in _TOTAL
        if (last or called) and not computed and kinds[_key(each, axis)] != "batch":
            found[dim or _key(each, axis)] = None
    return found


def _spanned(free: Mapping[str, tuple[str, int]]) -> int | None:
    """Return the size of a cache and the new steps together; None where one of them is not open."""
    past = next((size for kind, size in free.values() if kind == "past"), None)
    steps = next((size for kind, size in free.values() if kind in ("sequence", "series")), None)
    return None if past is None or steps is None else past + steps


def _size(of: OpenInput, axis: int, guess: Guess) -> int:
    kind, guess = kind_of_axis(of, axis), guess.of(of.name)
    if kind == "channels":
        return 3
    if kind == "image":
        spatial = [d for a, d in enumerate(of.shape) if a not in (0, axis) and isinstance(d, int) and d > 4]
        side = min(spatial, default=0) if len(of.shape) == 4 else 0
        if 0 < side <= _LINE_HEIGHT:
            return max(guess.image, -(-_LINE_RATIO * side // 32) * 32)
        if side:
            return side
        last = 2 if isinstance(of.shape[-1], int) else len(of.shape) - 1
        return guess.columns if guess.columns and axis == last else guess.image
    return int(getattr(guess, kind))


# -- names -------------------------------------------------------------------------------------------------------


def _is_computed(dim: str, declared: set[str]) -> bool:
    """Tell whether a name is an expression; ``a.0`` and ``batch-size`` are names, unless their parts are declared."""
    if dim in _TOTAL:
        return True
    try:
        tree = ast.parse(dim.strip(), mode="eval").body
    except SyntaxError:
        return False
    if isinstance(tree, ast.Name | ast.Attribute):
        return False
    parts = set(_names(dim))
    return bool(parts & declared) or any(sign in dim for sign in "+*/ ")


def _names(expression: str) -> list[str]:
    words = re.findall(r"[A-Za-z_]\w*", expression)
    return [word for word in words if word.lower() not in ("min", "max", "floor", "ceiling")]


def _check(sizes: Mapping[str, int], axes: Sequence[tuple[OpenInput, int, str | None]], plain: set[str]) -> None:
    """Refuse sizes of axes that there are not."""
    named = {n for *_, dim in axes if dim for n in (dim, *(() if dim in plain else _names(dim)))}
    places = {f"{each.name}[{axis}]" for each, axis, _ in axes}
    for name, size in sizes.items():
        if name not in named | places:
            listed = sorted(named | {f"{each.name}[{axis}]" for each, axis, dim in axes if not dim})
            near = suggestion(name, (*listed, *places))
            raise SizeError(f"sizes: '{name}' is not a dynamic axis.{near} Choose from: {', '.join(listed) or 'none'}.")
        if size < 1:
            raise OptionError(f"sizes: '{name}' is {size}. Give at least 1.")


def _total(values: Mapping[str, int]) -> int | None:
    """Add up what exporters of decoders call total, the cached tokens and the new ones; None without either."""
    parts = [size for name, size in values.items() if re.fullmatch(r"(past_)?seq(uence)?_len(gth)?", name)]
    return sum(parts) if parts else None


def _evaluated(expression: str, values: Mapping[str, int]) -> int | None:
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


def open_keys(inputs: Iterable[OpenInput]) -> list[str]:
    """List the open axes for a reader: by name, or as ``input[axis]``."""
    keys = [
        str(dim or f"{each.name}[{axis}]")
        for each in inputs
        for axis, dim in enumerate(each.shape)
        if not isinstance(dim, int)
    ]
    return list(dict.fromkeys(keys))
