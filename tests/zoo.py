"""The zoo's models, each built once in a test run, whichever test and whichever worker of pytest-xdist asks first."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import onnx
from onnx import ModelProto

from models.builders import ZOO
from spa.model.io import load

FOLDER = "SPA_TEST_ZOO"  # the environment variable with the run's folder, which tests/conftest.py makes and removes


@cache
def exported(name: str) -> ModelProto:
    """Return a model as its builder made it; not to be changed."""
    path = Path(os.environ[FOLDER], f"{name}.onnx")
    if not path.exists():
        partial = path.with_suffix(f".{os.getpid()}")
        onnx.save(ZOO[name](), partial)
        os.replace(partial, path)  # in one step: another worker may be reading
    return onnx.load(path)


@cache
def built(name: str) -> ModelProto:
    """Return a model as :func:`spa.model.io.load` reads it; not to be changed."""
    return load(exported(name)).model
