"""SPA: structured pruning of any trained network, on its ONNX graph.

>>> import spa
>>> len([name for name in spa.__all__ if not name.startswith("_")])
28
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from spa._version import __version__
from spa.errors import (
    InvariantError,
    ModelError,
    PlanError,
    SpaError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from spa.api import Result, analyze, prove, prune
    from spa.coupling.analysis import Analysis
    from spa.coupling.plan import Plan
    from spa.criteria import criterion
    from spa.doors import convert, load, narrow, save
    from spa.exporting import export
    from spa.request import Request
    from spa.rules import rule
    from spa.running.bench import bench
    from spa.running.verify import verify
    from spa.sensing import sensitivity
    from spa.steps import apply, plan, repair, score
    from spa.surgery.proof import Proof
    from spa.sweeping import sweep

# Imported on first use, so that `import spa` and `spa --help` stay quick.
_HOMES = {
    "Analysis": "spa.coupling.analysis",
    "Plan": "spa.coupling.plan",
    "Proof": "spa.surgery.proof",
    "Request": "spa.request",
    "Result": "spa.api",
    "analyze": "spa.api",
    "apply": "spa.steps",
    "bench": "spa.running.bench",
    "convert": "spa.doors",
    "criterion": "spa.steps",  # behind which obspa and zero are registered, so that no other can take their names
    "export": "spa.exporting",
    "load": "spa.doors",
    "narrow": "spa.doors",
    "plan": "spa.steps",
    "prove": "spa.api",
    "prune": "spa.api",
    "repair": "spa.steps",
    "rule": "spa.rules",
    "save": "spa.doors",
    "score": "spa.steps",
    "sensitivity": "spa.sensing",
    "sweep": "spa.sweeping",
    "verify": "spa.running.verify",
}

__all__ = [
    "Analysis",
    "InvariantError",
    "ModelError",
    "Plan",
    "PlanError",
    "Proof",
    "Request",
    "Result",
    "SpaError",
    "UnsupportedError",
    "__version__",
    "analyze",
    "apply",
    "bench",
    "convert",
    "criterion",
    "export",
    "load",
    "narrow",
    "plan",
    "prove",
    "prune",
    "repair",
    "rule",
    "save",
    "score",
    "sensitivity",
    "sweep",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'spa' has no attribute {name!r}")
