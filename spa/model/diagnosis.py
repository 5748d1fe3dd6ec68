"""Telling a malformed model from a bug of ours, where something went wrong that nobody foresaw."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import onnx
from google.protobuf.message import EncodeError
from onnx import TensorProto
from onnx.shape_inference import InferenceError

from spa.errors import InvariantError, ModelError, SpaError, printable
from spa.model.graph import stored_tensors
from spa.model.io import Source


@contextmanager
def diagnosed(source: Source) -> Iterator[None]:
    """Turn what nobody foresaw into a refusal of the model, where onnx.checker objects to it; else let it through.

    Whatever reads a graph trusts its attributes and names. To check them all beforehand would take longer than reading
    small networks, and would refuse what onnxruntime runs all the same.

    Raises:
        ModelError: carries the checker's objection.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, SpaError) and not isinstance(error, InvariantError):
            raise
        reason = _objection(source)
        if reason is None:
            raise
        raise ModelError(f"the model is malformed: {reason.rstrip('.')}. Correct it, or export it again.") from error


def _objection(source: Source) -> str | None:
    """Return what onnx.checker finds wrong in a model, or None; in its structure alone where weights lie outside."""
    model = source.model
    outside = any(t.data_location == TensorProto.EXTERNAL for t in stored_tensors(model))
    if outside and source.path is None:
        return None
    try:
        if outside:
            onnx.checker.check_model(str(source.path))
        else:
            onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, InferenceError, TypeError) as error:
        return printable(str(error).strip().splitlines()[0])
    except UnicodeDecodeError:  # of the checker's own message
        return "a name in it is not text in UTF-8"
    except (EncodeError, ValueError, RuntimeError):  # too large for a message, say
        return None
    return None
