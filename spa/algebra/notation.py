"""The coupling notation: an operator's law in one line.

    Conv   X[n (g i) *s], W[(g o) i *k], B?[(g o)] -> Y[n (g o) *t]

A letter is one dimension; the same letter in two places says that they are the same. ``(g i)`` is a product,
``(h d)+(h d)`` a sum, a number a fixed factor, ``*s`` any number of axes, ``?`` an optional operand, ``...`` leading
axes that pass through, ``~c`` a dimension over which statistics are taken, ``c!`` a dimension that this operand
reads (a recurrence). A letter on the left only, in two operands, is contracted. A letter that stands once is
opaque: frozen. A bare operand (``shape`` without brackets) carries no axes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import prod

from spa.algebra.axes import Axes, Expr, concat, product
from spa.algebra.op import Barrier, Op, Read


@dataclass(frozen=True)
class Axis:
    """One axis of a pattern: a sum of products of letters and numbers, or a star."""

    terms: tuple[tuple[str | int, ...], ...] = ()
    star: str | None = None
    crosses: bool = False
    reads: bool = False


@dataclass(frozen=True)
class Operand:
    """One operand of a pattern."""

    name: str
    axes: tuple[Axis, ...] | None
    optional: bool = False


@dataclass(frozen=True)
class Pattern:
    """A parsed line of notation."""

    text: str
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    contracted: tuple[str, ...] = field(default=())
    opaque: frozenset[str] = field(default=frozenset())


_OPERAND = re.compile(r"\s*(?P<name>\w+)(?P<optional>\?)?\s*(?:\[(?P<axes>[^\]]*)\])?\s*(?:,|$)")
_TERM = r"(?:\([^()]*\)|\w+)"
_AXIS = re.compile(
    rf"\s*(?P<cross>~)?(?:\*(?P<star>\w+)|(?P<dots>\.\.\.)|(?P<sum>{_TERM}(?:\+{_TERM})*))(?P<read>!)?\s*"
)


def _axes(text: str) -> tuple[Axis, ...]:
    axes, position = [], 0
    text = text.strip()
    while position < len(text):
        match = _AXIS.match(text, position)
        if match is None:
            raise ValueError(f"cannot read {text[position:]!r} in the axes {text!r}")
        position = match.end()
        crosses, reads = bool(match["cross"]), bool(match["read"])
        if match["star"] or match["dots"]:
            axes.append(Axis((), match["star"] or "...", crosses, reads))
            continue
        terms = tuple(
            tuple(int(f) if f.isdigit() else f for f in term.strip("()").split()) for term in match["sum"].split("+")
        )
        axes.append(Axis(terms, None, crosses, reads))
    return tuple(axes)


def _operands(text: str) -> tuple[Operand, ...]:
    operands, position = [], 0
    while position < len(text.rstrip()):
        match = _OPERAND.match(text, position)
        if match is None:
            raise ValueError(f"cannot read the operand {text[position:]!r}")
        axes = None if match["axes"] is None else _axes(match["axes"])
        operands.append(Operand(match["name"], axes, bool(match["optional"])))
        position = match.end()
    return tuple(operands)


def _letters(operand: Operand) -> list[str]:
    found = []
    for axis in operand.axes or ():
        found += [f for term in axis.terms for f in term if isinstance(f, str)]
        if axis.star:
            found.append("*" + axis.star)
    return found


@cache
def parse(text: str) -> Pattern:
    """Parse one line of notation.

    Raises:
        ValueError: the line is not in the notation.

    >>> parse("A[m k], B[k n] -> Y[m n]").contracted
    ('k',)
    """
    left, arrow, right = text.partition("->")
    if not arrow:
        raise ValueError(f"no '->' in {text!r}")
    inputs, outputs = _operands(left), _operands(right)
    produced = {letter for o in outputs for letter in _letters(o)}
    operands_of: dict[str, set[int]] = {}
    count: dict[str, int] = {}
    for position, operand in enumerate(inputs):
        for letter in _letters(operand):
            operands_of.setdefault(letter, set()).add(position)
            count[letter] = count.get(letter, 0) + 1
    for operand in outputs:
        for letter in _letters(operand):
            count[letter] = count.get(letter, 0) + 1
    contracted = [k for k, ps in operands_of.items() if k not in produced and len(ps) > 1 and not k.startswith("*")]
    opaque = frozenset(k for k, n in count.items() if n == 1)
    return Pattern(text, inputs, outputs, tuple(contracted), opaque)


def apply(op: Op, text: str, sizes: Mapping[str, int] | None = None) -> dict[str, Expr]:
    """State the law of a line of notation about a node.

    Args:
        op: the node.
        text: the line.
        sizes: sizes of letters that the shapes alone do not tell (``group = g``).

    Returns:
        Each letter's dimension.

    Raises:
        Barrier: the node's shapes do not fit the line.
    """
    pattern = parse(text)
    bound = _Binder(op, pattern, dict(sizes or {}))
    for position, operand in enumerate(pattern.inputs):
        if not op.has(position) and not operand.optional:
            raise Barrier(f"operand {operand.name} is missing")
        if operand.axes is None or not op.has(position):
            continue
        for have, want in zip(op.axes(position), bound.expand(operand, position), strict=True):
            op.unify(have, want)
    for position, operand in enumerate(pattern.outputs):
        if operand.axes is not None and position < len(op.outputs) and op.node.outputs[position]:
            op.set(position, bound.expand_output(operand, position))
    bound.reads_and_marks()
    return bound.letters


class _Binder:
    """Finds the size of every letter of a pattern on one node, and the expression of every axis."""

    def __init__(self, op: Op, pattern: Pattern, sizes: dict[str, int]) -> None:
        self.op, self.pattern, self.sizes = op, pattern, sizes
        self.stars: dict[str, list[Expr]] = {}
        self.star_shapes: dict[str, tuple[int, ...]] = {}
        self.letters: dict[str, Expr] = {}
        self._solve()
        for name, size in self.sizes.items():
            self.letters[name] = op.dim(size)
            if name in pattern.opaque:
                op.freeze(self.letters[name], "not traced through")
        for star, shape in self.star_shapes.items():
            self.stars[star] = [op.dim(n) for n in shape]
            if "*" + star in pattern.opaque:
                for expr in self.stars[star]:
                    op.freeze(expr, "spatial axis of")

    def _places(self) -> list[tuple[Operand, tuple[int, ...]]]:
        places = []
        for operands, shapes in (
            (self.pattern.inputs, self.op.shapes),
            (self.pattern.outputs, self.op.out_shapes),
        ):
            for operand, shape in zip(operands, shapes, strict=False):
                if operand.axes is not None and shape is not None:
                    places.append((operand, shape))
        return places

    def _solve(self) -> None:
        places = self._places()
        equations: list[tuple[Axis, int]] = []
        for operand, shape in places:
            equations += self._equations(operand, shape)
        for _ in range(len(equations) + 1):
            learnt = [self._step(axis, size) for axis, size in equations]
            if not any(learnt):
                break
        for axis, size in equations:
            if self._evaluate(axis) != size:
                raise Barrier(f"its shapes do not fit {self.pattern.text!r}")

    def _equations(self, operand: Operand, shape: tuple[int, ...]) -> list[tuple[Axis, int]]:
        axes = operand.axes or ()
        star = next((i for i, a in enumerate(axes) if a.star), None)
        if star is None:
            if len(axes) != len(shape):
                raise Barrier(f"{operand.name} has {len(shape)} axes, expected {len(axes)}")
            return list(zip(axes, shape, strict=True))
        tail = len(axes) - star - 1
        if len(shape) < star + tail:
            raise Barrier(f"{operand.name} has {len(shape)} axes, expected at least {star + tail}")
        name = axes[star].star or ""
        self.star_shapes.setdefault(name, shape[star : len(shape) - tail])
        return [
            *zip(axes[:star], shape[:star], strict=True),
            *zip(axes[star + 1 :], shape[len(shape) - tail :], strict=True),
        ]

    def _step(self, axis: Axis, size: int) -> bool:
        """Learn the one unknown letter of an axis, where all its other letters are known."""
        unknown = {f for term in axis.terms for f in term if isinstance(f, str) and f not in self.sizes}
        if len(unknown) != 1:
            return False
        (name,) = unknown
        linear = constant = 0
        for term in axis.terms:
            value = prod(f if isinstance(f, int) else self.sizes[f] for f in term if f != name)
            if name in term:
                linear += value
            else:
                constant += value
        if linear == 0 or (size - constant) % linear:
            raise Barrier(f"its shapes do not fit {self.pattern.text!r}")
        self.sizes[name] = (size - constant) // linear
        return True

    def _evaluate(self, axis: Axis) -> int:
        total = 0
        for term in axis.terms:
            if any(isinstance(f, str) and f not in self.sizes for f in term):
                raise Barrier(f"its shapes leave sizes open in {self.pattern.text!r}")
            total += prod(f if isinstance(f, int) else self.sizes[f] for f in term)
        return total

    def _expr(self, axis: Axis) -> Expr:
        return concat(*(product(*(self._factor(f) for f in term)) for term in axis.terms))

    def _factor(self, factor: str | int) -> Expr:
        if isinstance(factor, str):
            return self.letters[factor]
        return self.op.dim(factor, f"fixed by {self.op.node.label}")

    def expand(self, operand: Operand, position: int) -> Axes:
        axes: list[Expr] = []
        for axis in operand.axes or ():
            axes += self.stars[axis.star] if axis.star else [self._expr(axis)]
        return tuple(axes)

    def expand_output(self, operand: Operand, position: int) -> Axes:
        if self.op.out_shapes[position] is None:
            raise Barrier("its output has no known shape")
        return self.expand(operand, position)

    def reads_and_marks(self) -> None:
        rank_of = {i: len(s) for i, s in enumerate(self.op.shapes) if s is not None}
        places: dict[str, list[tuple[int, int]]] = {}
        for position, operand in enumerate(self.pattern.inputs):
            if operand.axes is None or position not in rank_of:
                continue
            extra = rank_of[position] - len(operand.axes)
            seen_star = False
            for index, axis in enumerate(operand.axes):
                at = index + (extra if seen_star else 0)
                seen_star = seen_star or axis.star is not None
                if axis.crosses:
                    self.op.cross(self._expr(axis))
                if axis.reads:
                    self.op.contract((position, at))
                for name in {f for term in axis.terms for f in term if f in self.pattern.contracted}:
                    places.setdefault(str(name), []).append((position, at))
        for found in places.values():
            if len({p for p, _ in found}) > 1:
                self._contract(found)

    def _contract(self, places: list[tuple[int, int]]) -> None:
        reader = next((p for p in places if self.op.constant[p[0]]), places[0])
        expr = self.op.axes(reader[0])[reader[1]]
        others = tuple(p for p in places if p != reader)
        self.op.reads.append(Read(expr, reader[0], reader[1], others))


def rule_of(text: str, sizes: Callable[[Op], Mapping[str, int]] | None = None) -> Callable[[Op], None]:
    """A rule that states one line of notation."""
    parse(text)

    def law(op: Op) -> None:
        apply(op, text, sizes(op) if sizes else None)

    law.notation = text  # type: ignore[attr-defined] # read where an operator has no schema to infer shapes from
    return law


def output_shapes(text: str, shapes: Sequence[tuple[int, ...] | None]) -> list[tuple[int, ...] | None]:
    """The shapes of a line's outputs, as far as its inputs tell them.

    >>> output_shapes("X[n c *s], S[c] -> Y[n c *s], Z[c]", [(2, 3, 5), (3,)])
    [(2, 3, 5), (3,)]
    """
    pattern = parse(text)
    sizes: dict[str, int] = {}
    stars: dict[str, tuple[int, ...]] = {}
    for operand, shape in zip(pattern.inputs, shapes, strict=False):
        axes = operand.axes or ()
        if operand.axes is None or shape is None:
            continue
        star = next((i for i, a in enumerate(axes) if a.star), len(axes))
        tail = max(len(axes) - star - 1, 0)
        if star < len(axes):
            stars[axes[star].star or ""] = shape[star : len(shape) - tail]
        places = [*zip(axes[:star], shape, strict=False)]
        places += zip(axes[len(axes) - tail :], shape[len(shape) - tail :], strict=False) if tail else []
        for axis, size in places:
            if len(axis.terms) == 1 and len(axis.terms[0]) == 1 and isinstance(axis.terms[0][0], str):
                sizes[axis.terms[0][0]] = size
    return [_shape_of(operand.axes or (), sizes, stars) for operand in pattern.outputs]


def _shape_of(
    axes: Sequence[Axis], sizes: Mapping[str, int], stars: Mapping[str, tuple[int, ...]]
) -> tuple[int, ...] | None:
    result: list[int] = []
    for axis in axes:
        if axis.star:
            if axis.star not in stars:
                return None
            result += stars[axis.star]
            continue
        if any(isinstance(f, str) and f not in sizes for term in axis.terms for f in term):
            return None
        result.append(sum(prod(f if isinstance(f, int) else sizes[f] for f in t) for t in axis.terms))
    return tuple(result)
