"""The shapes of outputs that a line of notation tells where an operator has no schema."""

from __future__ import annotations

import pytest

from spa.algebra.notation import output_shapes

Shape = tuple[int, ...]

TOLD: dict[str, tuple[list[Shape | None], list[Shape | None]]] = {
    "X[n c], W[o c] -> Y[n o]": ([(2, 3), (5, 3)], [(2, 5)]),
    "X[n *s c] -> Y[c *s n]": ([(2, 3, 5, 7)], [(7, 3, 5, 2)]),
    "X[n *s c d] -> Y[d c n *s]": ([(2, 3, 5, 7)], [(7, 5, 2, 3)]),
    "X[*s c] -> Y[c *s]": ([(2, 3, 5)], [(5, 2, 3)]),
    "X[n *s], Z[m *t] -> Y[n *t m], V[*s n]": ([(2, 3), (5, 7, 11)], [(2, 7, 11, 5), (3, 2)]),
    "X[a b] -> Y[(a b)], Z[a+b], V[(a 2) 7]": ([(3, 5)], [(15,), (8,), (6, 7)]),
    "X[(g i)] -> Y[g], Z[(g i)]": ([(6,)], [None, None]),  # neither factor is told
    "X[n c], W?[o] -> Y[n o], Z[n]": ([(2, 3), None], [None, (2,)]),
    "X[c c] -> Y[c c]": ([(3, 5)], [None]),  # the input contradicts the line
    "X, Z[m] -> Y[m], V[k]": ([(2, 3), (5,)], [(5,), None]),
    "X[n], Z?[n *s] -> Y[n *s]": ([(2,), None], [None]),
}


@pytest.mark.parametrize("line", TOLD)
def test_outputs_have_the_shapes_that_the_inputs_tell(line: str) -> None:
    given, expected = TOLD[line]
    assert output_shapes(line, given) == expected
