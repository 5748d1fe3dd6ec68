"""A bound on the threads of linear algebra."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any


@contextmanager
def bounded_threads(most: int) -> Iterator[None]:
    """Let numpy and scipy use at most some number of threads, or as many as before where these are fewer."""
    pools = _pools()
    with pools.limit(limits=min(most, _allowed(pools)), user_api="blas"):
        yield


@contextmanager
def exact_threads(number: int) -> Iterator[None]:
    """Let numpy and scipy use so many threads, though the process may have begun with fewer.

    A worker does: how sums are divided among threads shows in the last bits, and they must be the caller's.
    """
    with _pools().limit(limits=number, user_api="blas"):
        yield


def allowed_threads(most: int) -> int:
    """Return how many threads :func:`bounded_threads` would allow."""
    return min(most, _allowed(_pools()))


def _pools() -> Any:
    """Return the pools of threads. scipy has one of its own, which only limits that find it loaded can bound."""
    from threadpoolctl import ThreadpoolController

    import_module("scipy.linalg.lapack")
    return ThreadpoolController()


def _allowed(pools: Any) -> int:
    return min((p["num_threads"] for p in pools.info() if p["user_api"] == "blas"), default=1)
