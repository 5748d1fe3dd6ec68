"""The grammar of the coupling notation: one line of text to a :class:`Pattern`.

The grammar is written down in :mod:`spa.algebra.notation`. A line is parsed where its rule is registered; whatever has
no meaning there raises ValueError, with the line and a caret under the piece.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NoReturn

DOTS = "..."
ANY = "_"  # an operand whose name differs between the operators that share a line

Factor = str | int
Term = tuple[Factor, ...]


@dataclass(frozen=True)
class Axis:
    """One axis of a pattern: a sum of products of letters and numbers, or a star (``...`` is the star ``"..."``).

    Attributes:
        terms: the sum's products; none for a star.
        star: the star's name, or None.
        crosses: whether statistics are taken over the whole axis.
        reads: whether the operand reads the axis by itself.
        crossing: the letters within a product over which statistics are taken.
    """

    terms: tuple[Term, ...] = ()
    star: str | None = None
    crosses: bool = False
    reads: bool = False
    crossing: frozenset[str] = frozenset()

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The letters of the axis, or the name of its star with an asterisk before it; repetitions included."""
        if self.star is not None:
            return ("*" + self.star,)
        return tuple(f for term in self.terms for f in term if isinstance(f, str))

    @property
    def letter(self) -> str | None:
        """The letter that is the whole axis, or None."""
        if len(self.terms) == 1 and len(self.terms[0]) == 1 and isinstance(self.terms[0][0], str):
            return self.terms[0][0]
        return None


@dataclass(frozen=True)
class Operand:
    """One operand of a pattern.

    Attributes:
        name: the formal name, or ``_``.
        axes: the axes; None for an operand that carries no channels.
        optional: whether a node may lack it.
        repeats: whether all further operands are like it.
    """

    name: str
    axes: tuple[Axis, ...] | None
    optional: bool = False
    repeats: bool = False


@dataclass(frozen=True)
class Attribute:
    """An attribute that is the size of an axis: ``group = g else 1``."""

    name: str
    axis: Axis
    default: int | None = None


@dataclass(frozen=True)
class Pattern:
    """A parsed line of notation.

    Attributes:
        text: the line.
        inputs: the operands.
        outputs: the results.
        attributes: the attributes that are sizes.
        frozen: (letters and stars, predicate) of each ``frozen`` clause.
        macs: products of letters, stars and numbers that are summed up to multiply-accumulates.
        contracted: the letters and stars on the left only, in two operands that do not read them by themselves.
        opaque: the letters and stars that stand in one operand, or in outputs, alone.
        marked: the letters and stars that carry ``~`` or ``!`` somewhere.
    """

    text: str
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    attributes: tuple[Attribute, ...] = ()
    frozen: tuple[tuple[tuple[str, ...], str], ...] = ()
    macs: tuple[Term, ...] = ()
    contracted: tuple[str, ...] = ()
    opaque: frozenset[str] = frozenset()
    marked: frozenset[str] = frozenset()


@cache
def parse(text: str) -> Pattern:
    """Parse one line of notation.

    Raises:
        ValueError: the line is not in the notation; the message points at the piece.

    >>> parse("A[m k], B[k n] -> Y[m n]").contracted
    ('k',)
    >>> parse("A[m k], B[k n] -> Y[m ~n]")
    Traceback (most recent call last):
    ...
    ValueError: cannot read the notation: a mark has no meaning in an output
      A[m k], B[k n] -> Y[m ~n]
                            ^
    """
    return _Parser(text).line()


def letters_of(operands: Iterable[Operand]) -> Iterator[str]:
    """Yield the letters and stars of operands, in order, repetitions included."""
    for operand in operands:
        for axis in operand.axes or ():
            yield from axis.names


_TOKEN = re.compile(r"->|\.\.\.|\w+|[\[\](),+~!?*=;:]")
_NAME = re.compile(r"[A-Za-z_]\w*")


class _Parser:
    """A recursive descent over the tokens of a line, each with its column."""

    def __init__(self, text: str) -> None:
        self.text = text
        head, clauses = text, ""
        if ";" in text:
            head, clauses = text[: text.index(";")], text[text.index(";") :]
        self.clauses = clauses
        self.start(head, 0)

    def start(self, text: str, offset: int) -> None:
        """Read the tokens of one part of the line."""
        self.tokens: list[tuple[str, int]] = []
        self.at, self.end = 0, offset + len(text.rstrip())
        position = 0
        while position < len(text):
            if text[position].isspace():
                position += 1
                continue
            match = _TOKEN.match(text, position)
            if match is None:
                self.fail(f"{text[position]!r} has no meaning", offset + position)
            self.tokens.append((match[0], offset + position))
            position = match.end()

    def fail(self, fault: str, column: int | None = None) -> NoReturn:
        """Raise ValueError, pointing at a column (by default at the next token)."""
        column = self.column if column is None else column
        raise ValueError(f"cannot read the notation: {fault}\n  {self.text}\n  {' ' * column}^")

    @property
    def column(self) -> int:
        return self.tokens[self.at][1] if self.at < len(self.tokens) else self.end

    @property
    def next(self) -> str:
        return self.tokens[self.at][0] if self.at < len(self.tokens) else ""

    def take(self, token: str) -> bool:
        """Pass the next token if it is this one, and return whether it was."""
        if self.next != token:
            return False
        self.at += 1
        return True

    def expect(self, token: str, where: str) -> None:
        if not self.take(token):
            self.fail(f"{token!r} is missing {where}")

    def name(self, role: str) -> str:
        if not _NAME.fullmatch(self.next):
            self.fail(
                f"{role} is missing" if not self.next or not self.next[0].isalnum() else "a name begins with a letter"
            )
        self.at += 1
        return self.tokens[self.at - 1][0]

    # -- operands ------------------------------------------------------------------------------------------------

    def line(self) -> Pattern:
        """Parse the whole line."""
        if all(token != "->" for token, _ in self.tokens):
            self.fail("there is no '->'", self.end)
        inputs = self.operands(output=False) if self.next != "->" else ()
        self.expect("->", "between operands and outputs")
        outputs = self.operands(output=True)
        if self.next:
            self.fail(f"{self.next!r} has no meaning here")
        self.check_names(inputs, outputs)
        known = set(letters_of([*inputs, *outputs]))
        attributes, frozen, macs = self.read_clauses(known)
        contracted, opaque, marked = _roles(inputs, outputs)
        return Pattern(
            text=self.text,
            inputs=inputs,
            outputs=outputs,
            attributes=attributes,
            frozen=frozen,
            macs=macs,
            contracted=contracted,
            opaque=opaque,
            marked=marked,
        )

    def operands(self, output: bool) -> tuple[Operand, ...]:
        found: list[Operand] = []
        while True:
            column = self.column
            operand = self.operand(output)
            if operand.name != ANY and any(o.name == operand.name for o in found):
                self.fail(f"there are two operands {operand.name!r}", column)
            if found and found[-1].repeats:
                self.fail("an operand after one that repeats is never reached", column)
            found.append(operand)
            if not self.take(","):
                return tuple(found)

    def operand(self, output: bool) -> Operand:
        name = self.name("an operand")
        column = self.column
        optional, repeats = self.take("?"), self.take("*")
        if output and (optional or repeats):
            self.fail("every output may be missing, and none repeats: it takes no '?' and no '*'", column)
        if optional and repeats:
            self.fail("an operand that repeats may be missing anyway", column)
        axes = None
        if self.take("["):
            axes = self.axes(output)
            self.expect("]", "at the end of the axes")
        return Operand(name, axes, optional, repeats)

    # -- axes ----------------------------------------------------------------------------------------------------

    def axes(self, output: bool) -> tuple[Axis, ...]:
        found: list[Axis] = []
        while self.next not in ("]", ""):
            column = self.column
            axis = self.axis()
            if output and (axis.crosses or axis.reads or axis.crossing):
                self.fail("a mark has no meaning in an output", column)
            if axis.star is not None and any(a.star is not None for a in found):
                self.fail("an operand has one '*' or '...' at most", column)
            found.append(axis)
        return tuple(found)

    def axis(self) -> Axis:
        column = self.column
        crosses = self.take("~")
        if self.take(DOTS):
            star: str | None = DOTS
        else:
            star = self.name("the name of a star") if self.take("*") else None
        if star is not None:
            if self.next == "!":
                self.fail("'!' reads one axis, and a star is any number of them")
            return Axis((), star, crosses)
        crossing: set[str] = set()
        terms = [self.term(crossing)]
        while self.take("+"):
            terms.append(self.term(crossing))
        reads = self.take("!")
        axis = Axis(tuple(terms), None, crosses, reads, frozenset(crossing))
        if (crosses or reads) and not axis.names:
            self.fail("a mark has no meaning on a number", column)
        return axis

    def term(self, crossing: set[str]) -> Term:
        column = self.column
        if not self.take("("):
            return (self.factor(),)
        factors: list[Factor] = []
        while not self.take(")"):
            crosses = self.take("~")
            if not self.next or self.next in ("]", "[", ",", "->", "("):
                self.fail("')' is missing", column)
            factors.append(self.factor())
            if crosses and isinstance(factors[-1], str):
                crossing.add(factors[-1])
            elif crosses:
                self.fail("a mark has no meaning on a number", self.tokens[self.at - 1][1])
        if not factors:
            self.fail("a product has one factor at least", column)
        return tuple(factors)

    def factor(self) -> Factor:
        if self.next.isdecimal():
            if int(self.next) == 0:
                self.fail("an axis has one index at least")
            self.at += 1
            return int(self.tokens[self.at - 1][0])
        if self.next == ANY:
            self.fail("'_' names operands; an axis takes a letter")
        return self.name("a letter or a number")

    # -- clauses -------------------------------------------------------------------------------------------------

    def read_clauses(
        self, known: set[str]
    ) -> tuple[tuple[Attribute, ...], tuple[tuple[tuple[str, ...], str], ...], tuple[Term, ...]]:
        attributes: list[Attribute] = []
        frozen: list[tuple[tuple[str, ...], str]] = []
        macs: tuple[Term, ...] = ()
        offset = len(self.text) - len(self.clauses)
        for clause in self.clauses.split(";")[1:]:
            offset += 1
            words, colon, reason = clause.partition(":")
            self.start(words, offset)
            begin = self.column
            if self.take("frozen"):
                names = self.products(known)[0]
                if not colon or not reason.strip():
                    self.fail("': ' and a reason are missing, a verb first", self.end)
                frozen.append((tuple(str(n) for n in names), reason.strip()))
            elif colon:
                self.fail("a reason belongs to 'frozen'", offset + len(words))
            elif self.take("macs"):
                self.expect("=", "after 'macs'")
                if macs:
                    self.fail("there are two clauses 'macs'", begin)
                macs = self.products(known)
            else:
                attributes.append(self.attribute(known))
                if [a.name for a in attributes].count(attributes[-1].name) > 1:
                    self.fail(f"there are two clauses {attributes[-1].name!r}", begin)
            if self.next:
                self.fail(f"{self.next!r} has no meaning here")
            offset += len(clause)
        return tuple(attributes), tuple(frozen), macs

    def attribute(self, known: set[str]) -> Attribute:
        name = self.name("a clause: an attribute, 'frozen' or 'macs',")
        self.expect("=", f"after {name!r}")
        column = self.column
        axis = self.axis()
        if axis.star or axis.crosses or axis.reads or axis.crossing:
            self.fail("an attribute is the size of letters, without marks", column)
        for letter in axis.names:
            self.check_known(letter, known, column)
        default = None
        if self.take("else"):
            factor = self.factor()
            if not isinstance(factor, int):
                self.fail("a number is missing after 'else'", self.tokens[self.at - 1][1])
            default = factor
        return Attribute(name, axis, default)

    def products(self, known: set[str]) -> tuple[Term, ...]:
        """Parse a sum of products of letters, numbers and stars, which bear an asterisk."""
        terms: list[Term] = []
        while True:
            factors: list[Factor] = []
            while self.next not in ("", "+"):
                column = self.column
                factor = "*" + self.name("the name of a star") if self.take("*") else self.factor()
                if isinstance(factor, str):
                    self.check_known(factor, known, column)
                factors.append(factor)
            if not factors:
                self.fail("a letter, a star or a number is missing")
            terms.append(tuple(factors))
            if not self.take("+"):
                return tuple(terms)

    # -- names ---------------------------------------------------------------------------------------------------

    def check_known(self, letter: str, known: set[str], column: int) -> None:
        if letter not in known:
            self.fail(f"{letter!r} stands in no operand", column)

    def check_names(self, inputs: tuple[Operand, ...], outputs: tuple[Operand, ...]) -> None:
        left, right = set(letters_of(inputs)), set(letters_of(outputs))
        both = {n for n in left | right if n.startswith("*") and n[1:] in left | right}
        if both:
            self.fail(f"{sorted(both)[0][1:]!r} is a letter and a star", self.text.index(sorted(both)[0]))
        if ("*" + DOTS in left) != ("*" + DOTS in right):
            self.fail(
                "'...' passes axes from operands to outputs; write '*s' for axes that do not", self.text.index(DOTS)
            )


def _roles(
    inputs: tuple[Operand, ...], outputs: tuple[Operand, ...]
) -> tuple[tuple[str, ...], frozenset[str], frozenset[str]]:
    """Return the letters and stars that are contracted, those that are opaque, and those that are marked."""
    operands_of: dict[str, set[int]] = {}
    joint: dict[str, set[int]] = {}
    marked: set[str] = set()
    for position, operand in enumerate(inputs):
        for axis in operand.axes or ():
            for name in axis.names:
                operands_of.setdefault(name, set()).add(position)
                if not axis.reads:
                    joint.setdefault(name, set()).add(position)
            marked |= set(axis.names) if axis.crosses or axis.reads else axis.crossing
    produced = set(letters_of(outputs))
    contracted = tuple(n for n in operands_of if n not in produced and len(joint.get(n, ())) > 1)
    alone = {n for n, where in operands_of.items() if n not in produced and len(where) == 1}
    return contracted, frozenset((alone - marked) | (produced - operands_of.keys())), frozenset(marked)
