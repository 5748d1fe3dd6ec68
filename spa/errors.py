"""Errors, in four classes.

Every message has one grammar: the object, the fact, the remedy, as in
``Conv 'layer1.0': W has 3 axes, expected 4. Check the exporter.``
"""

from __future__ import annotations

__all__ = ["InvariantError", "ModelError", "OutOfReachError", "PlanError", "SpaError", "UnsupportedError"]


class SpaError(Exception):
    """Any refusal of this package; `exit_code` is what the command line returns for it."""

    exit_code: int = 1


class PlanError(SpaError):
    """An impossible request: an unreachable ratio, nothing to prune, an option that fits nothing."""

    exit_code = 3


class OutOfReachError(PlanError):
    """More is asked for than can be removed."""


class ModelError(SpaError):
    """Malformed input: not a model, a broken one, or one that onnxruntime cannot run."""

    exit_code = 4


class UnsupportedError(SpaError):
    """Valid input that this package does not cover."""

    exit_code = 5


class InvariantError(SpaError):
    """A bug of ours: something that must hold does not. The message asks the reader to report it."""

    exit_code = 70

    def __init__(self, message: str) -> None:
        super().__init__(f"{message} This is a bug in spa; please report it with the model or its architecture.")
