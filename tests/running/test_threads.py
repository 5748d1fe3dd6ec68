"""The number of threads of linear algebra, of which numpy and scipy each have a pool."""

from __future__ import annotations

import os
import subprocess
import sys

import scipy.linalg.lapack  # noqa: F401 # whose pool a limit can then find
from threadpoolctl import threadpool_info, threadpool_limits

from spa.running.threads import allowed_threads, bounded_threads, exact_threads


def threads() -> set[int]:
    return {p["num_threads"] for p in threadpool_info() if p["user_api"] == "blas"}


def test_a_bound_holds_for_what_is_loaded_while_it_does() -> None:
    code = (
        "from spa.running.threads import bounded_threads\n"
        "from threadpoolctl import threadpool_info\n"
        "with bounded_threads(1):\n"
        "    import scipy.linalg.lapack\n"
        "    print({p['num_threads'] for p in threadpool_info() if p['user_api'] == 'blas'})"
    )
    command = [sys.executable, "-c", code]
    many = os.environ | {"OPENBLAS_NUM_THREADS": "3", "OMP_NUM_THREADS": "3"}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=many)
    assert result.stdout.strip() == "{1}"


def test_a_bound_only_lowers_and_an_exact_number_raises_too() -> None:
    with threadpool_limits(2, "blas"):
        assert (allowed_threads(1), allowed_threads(5)) == (1, 2)
        with bounded_threads(5):
            assert threads() == {2}
        with exact_threads(3):
            assert threads() == {3}
        assert threads() == {2}
