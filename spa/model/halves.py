"""The marks of two networks side by side in the model that holds them (:mod:`spa.model.alternatives`)."""

from __future__ import annotations

from onnx import ModelProto

SKELETON = "spa.alternatives"  # the key of the metadata that holds interface, condition and what computes it
THEN, ELSE = "@then", "@else"  # endings of names


def is_separated(model: ModelProto) -> bool:
    """Return whether a model is two networks side by side."""
    return any(entry.key == SKELETON for entry in model.metadata_props)
