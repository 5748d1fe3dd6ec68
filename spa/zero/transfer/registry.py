"""The table of transfer functions, by operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from spa.zero.facts import Site
from spa.zero.known import Known

KnownOutputs = Sequence[Known | None] | None
TRANSFERS: dict[str, Callable[[Site], KnownOutputs]] = {}


def transfer(*keys: str) -> Callable[[Callable[[Site], KnownOutputs]], Callable[[Site], KnownOutputs]]:
    """Register a transfer function.

    Args:
        keys: the operators that it serves: ``domain::Op``, or the bare name of a standard one.
    """

    def register(function: Callable[[Site], KnownOutputs]) -> Callable[[Site], KnownOutputs]:
        for key in keys:
            TRANSFERS[key] = function
        return function

    return register
