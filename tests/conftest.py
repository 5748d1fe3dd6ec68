"""What is not collected: helpers that import a framework that may be missing. And the folder of tests/zoo.py."""

import os
import shutil
import tempfile
from importlib.util import find_spec

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # else each takes all cores, and waits for the others
    os.environ.setdefault("OMP_NUM_THREADS", "1")
collect_ignore = [] if find_spec("jax") and find_spec("equinox") and find_spec("flax") else ["jax_networks.py"]


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # pytest-xdist's workers inherit the folder
        os.environ["SPA_TEST_ZOO"] = tempfile.mkdtemp(prefix="spa-zoo-")


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop("SPA_TEST_ZOO"), ignore_errors=True)
