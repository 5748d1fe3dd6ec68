"""A bound on the threads of linear algebra."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def bounded_threads(most: int) -> Iterator[None]:
    """Let numpy use at most some number of threads, or as many as before where these are fewer."""
    from threadpoolctl import ThreadpoolController

    pools = ThreadpoolController()
    limit = min([most, *(p["num_threads"] for p in pools.info() if p["user_api"] == "blas")])
    with pools.limit(limits=limit, user_api="blas"):
        yield
