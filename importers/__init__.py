"""Framework models to ONNX; installed as ``spa.importers``. One framework per file, imported only in its own file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from onnx import ModelProto


@dataclass(frozen=True)
class Imported:
    """A framework's model as ONNX.

    Attributes:
        model: the network; BatchNormalization is kept where the framework's model has it.
        kind: what was given: ``torch``, ``keras``, ``tensorflow``, ``tflite`` or ``jax``.
        exporter: what made the ONNX model: a call, or the name of a package.
        names: the framework's own parameter names (state_dict keys, variable paths, pytree paths) by initializer.
        error: the largest difference to the framework's own output on the example inputs, over that output's largest
            magnitude.
        notes: what the user should know.
        aliases: further names of the framework's for tied parameters, and for each the name that ``names`` has for it.
    """

    model: ModelProto
    kind: str
    exporter: str
    names: Mapping[str, str]
    error: float
    notes: tuple[str, ...] = field(default=())
    aliases: Mapping[str, str] = field(default_factory=dict)
