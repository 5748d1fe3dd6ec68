"""The inputs of a request: read from the user's data, or made up.

:mod:`spa.calibration` knows how to read and to make; here the request says what, and notes tell what was done.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spa.coupling.analysis import Analysis
from spa.request import Request

if TYPE_CHECKING:
    from spa.calibration.data import Calibration


def inputs_of(analysis: Analysis, request: Request) -> Calibration:
    """Return the inputs of a request.

    Args:
        analysis: the dense model.
        request: says which to read, or what to make up.

    Raises:
        PlanError: options contradict each other.
        ModelError: the model does not run on them, or the data does not fit it.
    """
    # Both import onnxruntime, which a pruning by weights does not need.
    from spa.inputs import given, made_up

    return made_up.make(analysis, request) if request.inputs.data is None else given.read(analysis, request)
