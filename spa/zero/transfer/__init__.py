"""Transfer functions of known values, one family of operators per file.

A transfer function (the term of abstract interpretation: Cousot and Cousot, POPL 1977) takes a node as a
:class:`spa.zero.facts.Site` and returns what is known of each of its outputs, or None if nothing is. That must hold for
every finite input of the network; where a function cannot tell, it returns less.
"""

from __future__ import annotations

from spa.zero.transfer import elements, layout, normalisations, products, recurrent, reductions  # register themselves
from spa.zero.transfer.registry import TRANSFERS

__all__ = ["TRANSFERS", "elements", "layout", "normalisations", "products", "recurrent", "reductions"]
