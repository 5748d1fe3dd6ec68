"""The coupling notation: what an operator does to its axes, in one line.

    Conv   X[n (g i) *s], W[(g o) i *k], B?[(g o)] -> Y[n (g o) *t]; group = g else 1; macs = n g o i *t *k

Operands stand left of the arrow, outputs right of it, by their formal names. A letter is one dimension; the same letter
in two places says that they are the same dimension.

    line      operands -> operands {; clause}            operands: one or more, with commas; the left side may be empty
    operand   NAME  NAME?  NAME*                         "?" may be missing; "*" stands for all further operands, too
              followed by [axes] or nothing              nothing: it carries no channels, and freezes; [] is a scalar
    NAME      a formal name, or _                        "_": a name that differs between the operators of the line
    axes      axis axis ...
    axis      letter  NUMBER                             a dimension; a fixed size, frozen
              (h d)  (3 h d)                             a product of letters and numbers, row by row
              (h d)+(h d)  pad+c                         a sum: one run of indices after the other
              *s                                         any number of axes, the same in each operand; at most one
              ...                                        leading axes that broadcast, as in numpy; at most one
    marks     ~c  ~(h d)  (h ~d)  ~*s  ~...              statistics are taken over it, so that removal changes them
              c!  (h d)!                                 this operand reads it by itself: a removed index acts as a zero
    clause    group = g   group = g else 1               an attribute is the size of letters; or, if missing, 1
              macs = m k n + m n                         multiply-accumulates: products of letters, stars and numbers
              frozen s *t: looks them up                 dimensions that stay whole, and why: a verb first, the operator
                                                         is its subject

What the letters say:

- On the left only, in two operands that do not mark it ``!``: it is *contracted*. The operand with weights reads it.
- In one operand or in outputs alone, without a mark: it is *opaque*, and frozen. So is a contracted letter whose other
  operand the node lacks, and one that passes only to outputs that the node does not produce.
- Marks belong to operands; in outputs, on numbers, and ``!`` on stars they are refused.

Whatever else a line holds is refused where it is registered, with a caret under the piece; a node whose shapes do not
fit its line is a barrier.

>>> from spa.algebra.notation import output_shapes, parse
>>> parse("A[m k], B[k n] -> Y[m n]").contracted
('k',)
>>> sorted(parse("X[n (g i) *s], W[(g o) i *k] -> Y[n (g o) *t]").opaque)
['*k', '*s', '*t']
>>> output_shapes("A[... m k], B[... k n] -> Y[... m n]", [(2, 1, 5, 7), (3, 7, 4)])
[(2, 3, 5, 4)]
>>> output_shapes("qkv[s (h d)+(h d)+(h d)], o[(h d) c] -> Y[s c]; heads = h", [(5, 18), (6, 4)], {"heads": 2})
[(5, 4)]
>>> parse("X[n c *s] -> Y[n c *s *t]")
Traceback (most recent call last):
...
ValueError: cannot read the notation: an operand has one '*' or '...' at most
  X[n c *s] -> Y[n c *s *t]
                        ^
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

from spa.algebra.axes import Axes, Expr, concat, leaves, product
from spa.algebra.grammar import ANY, DOTS, Axis, Operand, Pattern, Term, letters_of, parse
from spa.algebra.op import Barrier, Op, Read

__all__ = ["apply", "output_shapes", "parse", "rule_of"]

Shape = tuple[int, ...]


def apply(op: Op, text: str, sizes: Mapping[str, int] | None = None) -> dict[str, Expr]:
    """State the law of a line of notation about a node.

    Args:
        op: the node.
        text: the line.
        sizes: sizes of letters that neither shapes nor attributes tell, and that the caller says more about.

    Returns:
        Each letter's dimension.

    Raises:
        Barrier: the node's shapes do not fit the line.
    """
    binder = _Binder(op, parse(text), sizes or {})
    binder.bind_inputs()
    binder.set_outputs()
    binder.reads_and_marks()
    binder.clauses()
    return binder.letters


class _Sizes:
    """The size of every letter of a pattern, and the shape of every star, on one node."""

    def __init__(
        self,
        pattern: Pattern,
        operand_shapes: Sequence[tuple[Operand, Shape]],
        attributes: Mapping[str, Any],
        known_sizes: Mapping[str, int],
    ) -> None:
        self.pattern, self.sizes, self.stars = pattern, dict(known_sizes), dict[str, Shape]()
        self.equations: list[tuple[Axis, int]] = []
        for operand, shape in operand_shapes:
            self._equate(operand, shape)
        for attribute in pattern.attributes:
            value = attributes.get(attribute.name, attribute.default)
            if isinstance(value, int):
                self.equations.append((attribute.axis, value))
        for _ in range(len(self.equations) + 1):
            learnt = [self._step(axis, size) for axis, size in self.equations]
            if not any(learnt):
                break

    def _misfit(self) -> Barrier:
        return Barrier(f"its shapes do not fit its rule's line {self.pattern.text!r}")

    def _equate(self, operand: Operand, shape: Shape) -> None:
        axes = operand.axes or ()
        at = _star_at(axes)
        if at is None:
            if len(axes) != len(shape):
                raise Barrier(f"{operand.name} has {len(shape)} axes, expected {len(axes)}")
            self.equations += zip(axes, shape, strict=True)
            return
        if len(shape) < len(axes) - 1:
            raise Barrier(f"{operand.name} has {len(shape)} axes, expected at least {len(axes) - 1}")
        front, middle, back = _cut(axes, shape)
        self.equations += zip([*axes[:at], *axes[at + 1 :]], [*front, *back], strict=True)
        star = axes[at].star or ""
        if star == DOTS:
            self.stars[star] = _stretched(self.stars.get(star, ()), middle)
        elif self.stars.setdefault(star, middle) != middle:
            raise self._misfit()

    def _step(self, axis: Axis, size: int) -> bool:
        """Learn the one unknown letter of an axis, where all its other letters are known; return whether it did."""
        name = _unknown(axis, self.sizes)
        if name is None:
            return False
        linear = constant = 0
        for term in axis.terms:
            value = self._product(f for f in term if f != name)
            if name in term:
                linear += value
            else:
                constant += value
        if linear == 0 or size < constant or (size - constant) % linear:
            raise self._misfit()
        self.sizes[name] = (size - constant) // linear
        return True

    def _product(self, factors: Iterator[str | int] | Term) -> int:
        return prod(f if isinstance(f, int) else self.sizes[f] for f in factors)

    def known(self, axis: Axis) -> bool:
        """Return whether the sizes of all letters of an axis are known."""
        return all(name in self.sizes for name in axis.names)

    def size(self, axis: Axis) -> int:
        """Return the size of an axis whose letters are known."""
        return sum(self._product(term) for term in axis.terms)

    def check(self) -> None:
        """Raise Barrier where a size is open, or contradicts the shapes."""
        if not all(self.known(axis) for axis, _ in self.equations):
            raise Barrier(f"its shapes leave sizes open in {self.pattern.text!r}")
        self.check_known()

    def check_known(self) -> None:
        """Raise Barrier where a size that is known contradicts the shapes."""
        if any(self.known(axis) and self.size(axis) != size for axis, size in self.equations):
            raise self._misfit()


class _Binder:
    """Binds the letters and stars of a pattern to the dimensions of one node, and states what follows."""

    def __init__(self, op: Op, pattern: Pattern, sizes: Mapping[str, int]) -> None:
        self.op, self.pattern = op, pattern
        self.inputs = [(p, o) for p, o in _positions(pattern.inputs, len(op.inputs)) if self._is_given(p, o)]
        self.outputs = [
            (position, operand)
            for position, operand in enumerate(pattern.outputs)
            if position < len(op.outputs) and op.node.outputs[position] and op.out_shapes[position] is not None
        ]
        operand_shapes = [(o, op.shapes[p] or ()) for p, o in self.inputs if o.axes is not None]
        operand_shapes += [(o, op.out_shapes[p] or ()) for p, o in self.outputs if o.axes is not None]
        self.solved = _Sizes(pattern, operand_shapes, op.node.attributes, sizes)
        self.solved.check()
        self.letters: dict[str, Expr] = {}
        self.stars: dict[str, Axes] = {}
        self.leading: list[Axes] = []
        self.lost = pattern.opaque | (self._lost() - sizes.keys())

    def _is_given(self, position: int, operand: Operand) -> bool:
        if self.op.has(position):
            return True
        if not operand.optional and not operand.repeats:
            raise Barrier(f"operand {position if operand.name == ANY else operand.name} is missing")
        return False

    def _lost(self) -> set[str]:
        """Return letters that the line contracts or passes on, but this node does not: it lacks operands or outputs."""
        operands = [set(letters_of([operand])) for _, operand in self.inputs]
        passed = set(letters_of(operand for _, operand in self.outputs))
        lost = set()
        for name in set().union(*operands) - self.pattern.marked - {"*" + DOTS}:
            if name in self.pattern.contracted:
                if sum(name in names for names in operands) < 2:
                    lost.add(name)
            elif name not in passed:
                lost.add(name)
        return lost

    # -- dimensions ----------------------------------------------------------------------------------------------

    def bind_inputs(self) -> None:
        """State that the operands' axes are the pattern's."""
        for position, operand in self.inputs:
            if operand.axes is None:
                continue
            at = _star_at(operand.axes)
            front, middle, back = _cut(operand.axes, self.op.axes(position))
            for axis, expr in zip(operand.axes[:at], front, strict=True):
                self._bind(axis, expr)
            if at is not None:
                self._bind_star(operand.axes[at].star or "", tuple(middle))
                for axis, expr in zip(operand.axes[at + 1 :], back, strict=True):
                    self._bind(axis, expr)

    def _bind(self, axis: Axis, expr: Expr) -> None:
        letter = axis.letter
        # An axis of single indices (1+1) has no dimension that could bear a mark, so its letter gets one of its own.
        bare = next(leaves(self.op.space.resolve(expr)), None) is None
        if letter is None or letter in self.letters or bare:
            self.op.unify(expr, self._expr(axis))
            return
        self.letters[letter] = expr
        if letter in self.lost:
            self.op.freeze(expr, "does not pass it on")

    def _bind_star(self, star: str, axes: Axes) -> None:
        if star == DOTS:
            self.leading.append(axes)
        elif star in self.stars:
            for a, b in zip(axes, self.stars[star], strict=True):
                self.op.unify(a, b)
        else:
            self.stars[star] = axes
            if "*" + star in self.lost:
                for expr in axes:
                    self.op.freeze(expr, "uses it as a spatial axis")

    def _expr(self, axis: Axis) -> Expr:
        return concat(*(product(*(self._factor(f) for f in term)) for term in axis.terms))

    def _factor(self, factor: str | int) -> Expr:
        if isinstance(factor, int):
            return self.op.opaque(factor, "fixes its size")
        if factor not in self.letters:
            new = self.letters[factor] = self.op.dim(self.solved.sizes[factor])
            if factor in self.lost:
                operand = any(factor in letters_of([o]) for _, o in self.inputs)
                self.op.freeze(new, "does not pass it on" if operand else "computes it")
        return self.letters[factor]

    def set_outputs(self) -> None:
        """State the outputs' axes."""
        if self.leading:
            self.stars[DOTS] = tuple(self.op.stretch(self.leading))
        for position, operand in self.outputs:
            axes: list[Expr] = []
            for axis in operand.axes or ():
                if axis.star is None:
                    axes.append(self._expr(axis))
                    continue
                if axis.star not in self.stars:
                    self.stars[axis.star] = tuple(self.op.opaque(n) for n in self.solved.stars[axis.star])
                axes += self.stars[axis.star]
            if operand.axes is not None:
                self.op.set(position, axes)

    # -- reads, marks, clauses -----------------------------------------------------------------------------------

    def reads_and_marks(self) -> None:
        """State what is contracted, read by one operand, or crossed."""
        contracted: dict[str, list[tuple[int, int]]] = {}
        for position, operand in self.inputs:
            if operand.axes is None:
                continue
            for axis, at, name in _numbered(operand.axes, len(self.op.axes(position))):
                if axis.crosses:
                    self.op.cross(self.op.axes(position)[at])
                for letter in axis.crossing:
                    self.op.cross(self.letters[letter])
                if axis.reads:
                    self.op.contract((position, at))
                    continue
                for letter in dict.fromkeys(axis.names) if axis.star is None else (axis.names[0],):
                    if letter in self.pattern.contracted and letter not in self.lost:
                        contracted.setdefault(name or letter, []).append((position, at))
        for positions in contracted.values():
            self._contract(positions)

    def _contract(self, positions: Sequence[tuple[int, int]]) -> None:
        """State a contraction of (operand, axis) positions, of whose products perhaps one factor is contracted."""
        reader = next((p for p in positions if self.op.constant[p[0]]), positions[0])
        expr = self.op.axes(reader[0])[reader[1]]
        self.op.reads.append(Read(expr, reader[0], reader[1], tuple(p for p in positions if p != reader)))

    def clauses(self) -> None:
        """State attributes, frozen dimensions and multiply-accumulates."""
        for attribute in self.pattern.attributes:
            if attribute.name in self.op.node.attributes:
                self.op.tie_attribute(attribute.name, self._expr(attribute.axis))
        for names, reason in self.pattern.frozen:
            for name in names:
                for expr in self._named(name) or ():
                    self.op.freeze(expr, reason)
        for term in self.pattern.macs:
            factors = [self._named(f) if isinstance(f, str) else (self.op.dim(f),) for f in term]
            if all(f is not None for f in factors):
                self.op.count_macs(*(expr for f in factors for expr in f or ()))

    def _named(self, name: str) -> Axes | None:
        """Return the dimensions of a letter or star; None where the node has none of them."""
        if name.startswith("*"):
            return self.stars.get(name[1:])
        return (self.letters[name],) if name in self.letters else None


# -- patterns and shapes --------------------------------------------------------------------------------------------


def _positions(operands: Sequence[Operand], count: int) -> Iterator[tuple[int, Operand]]:
    """Yield the operands by position; the last one again for all further operands, where it repeats."""
    yield from enumerate(operands)
    if operands and operands[-1].repeats:
        for position in range(len(operands), count):
            yield position, operands[-1]


def _star_at(axes: Sequence[Axis]) -> int | None:
    return next((i for i, a in enumerate(axes) if a.star is not None), None)


def _cut(axes: Sequence[Axis], row: Sequence[Any]) -> tuple[Any, Any, Any]:
    """Split a row of sizes or dimensions into those before the star, of the star, and after it."""
    at = _star_at(axes)
    if at is None:
        return row, row[:0], row[:0]
    end = len(row) - (len(axes) - at - 1)
    return row[:at], row[at:end], row[end:]


def _numbered(axes: Sequence[Axis], rank: int) -> Iterator[tuple[Axis, int, str]]:
    """Yield the axes of an operand of a rank with their numbers; those of a star one by one, by names of their own."""
    extra = rank - len(axes)
    at = 0
    for axis in axes:
        for i in range(1 if axis.star is None else extra + 1):
            yield axis, at, "" if axis.star is None else f"*{axis.star}{i}"
            at += 1


def _stretched(a: Shape, b: Shape) -> Shape:
    """Return the shape that two shapes broadcast to; where they do not, the first's sizes."""
    rank = max(len(a), len(b))
    a, b = (1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b
    return tuple(n if m == 1 else m for m, n in zip(a, b, strict=True))


def _unknown(axis: Axis, known: Mapping[str, int] | set[str]) -> str | None:
    """Return the one letter of an axis that is not known, if its size follows: it is in no product twice."""
    names = {n for n in axis.names if n not in known} if axis.star is None else set()
    if len(names) != 1:
        return None
    (name,) = names
    return name if all(term.count(name) <= 1 for term in axis.terms) else None


def _check_sizes(pattern: Pattern) -> None:
    """Raise ValueError where not even all shapes and attributes together tell the size of a letter."""
    axes = [a for o in (*pattern.inputs, *pattern.outputs) for a in o.axes or ()]
    axes += [a.axis for a in pattern.attributes]
    known: set[str] = set()
    while learnt := {name for axis in axes if (name := _unknown(axis, known)) is not None} - known:
        known |= learnt
    open_sizes = sorted({n for axis in axes if axis.star is None for n in axis.names} - known)
    if open_sizes:
        column = min(pattern.text.find(n) for n in open_sizes)
        raise ValueError(
            f"cannot read the notation: nothing tells the sizes of {', '.join(map(repr, open_sizes))}; "
            f"name an attribute, as in '; group = {open_sizes[0]}'\n  {pattern.text}\n  {' ' * column}^"
        )


# -- rules ----------------------------------------------------------------------------------------------------------


def rule_of(
    text: str,
    sizes: Callable[[Op], Mapping[str, int]] | None = None,
    doc: str | None = None,
    parse_now: bool = True,
) -> Callable[[Op], None]:
    """Make a rule that states one line of notation.

    Args:
        text: the line.
        sizes: computes sizes that neither shapes nor attributes tell from the node.
        doc: the rule's docstring.
        parse_now: whether the line is parsed here, so that it is refused here, and not when the rule is first used.

    Raises:
        ValueError: the line is not in the notation, or leaves sizes open.
    """
    if parse_now:
        pattern = parse(text)
        if sizes is None:
            _check_sizes(pattern)

    def law(op: Op) -> None:
        apply(op, text, sizes(op) if sizes else None)

    law.notation = text  # type: ignore[attr-defined] # read where an operator has no schema to infer shapes from
    law.__doc__ = doc
    return law


def output_shapes(
    text: str, shapes: Sequence[Shape | None], attributes: Mapping[str, Any] | None = None
) -> list[Shape | None]:
    """Compute the shapes of a line's outputs, as far as its inputs and attributes tell them.

    Inputs that contradict the line tell nothing.

    >>> output_shapes("X[n c *s], S[c] -> Y[n c *s], Z[c]", [(2, 3, 5), (3,)])
    [(2, 3, 5), (3,)]
    """
    pattern = parse(text)
    operand_shapes = [
        (operand, shape)
        for position, operand in _positions(pattern.inputs, len(shapes))
        if operand.axes is not None and position < len(shapes) and (shape := shapes[position]) is not None
    ]
    try:
        solved = _Sizes(pattern, operand_shapes, attributes or {}, {})
        solved.check_known()
    except Barrier:
        return [None] * len(pattern.outputs)
    return [_shape_of(operand.axes or (), solved) for operand in pattern.outputs]


def _shape_of(axes: Sequence[Axis], solved: _Sizes) -> Shape | None:
    result: list[int] = []
    for axis in axes:
        if axis.star is not None:
            if axis.star not in solved.stars:
                return None
            result += solved.stars[axis.star]
        elif solved.known(axis):
            result.append(solved.size(axis))
        else:
            return None
    return tuple(result)
