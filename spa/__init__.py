"""SPA: structured pruning of any trained network, on its ONNX graph.

>>> import spa
>>> len([name for name in spa.__all__ if not name.startswith("_")])
15
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from spa._version import __version__
from spa.errors import InvariantError, ModelError, PlanError, SpaError, UnsupportedError

if TYPE_CHECKING:
    from spa.api import Result, analyze, prune
    from spa.bench import bench
    from spa.coupling import Analysis
    from spa.exporting import export
    from spa.frameworks import convert
    from spa.plan import Plan
    from spa.rules import rule
    from spa.verify import verify

# Imported on first use, so that `import spa` and `spa --help` stay quick.
_HOMES = {
    "Analysis": "spa.coupling",
    "Plan": "spa.plan",
    "Result": "spa.api",
    "analyze": "spa.api",
    "bench": "spa.bench",
    "convert": "spa.frameworks",
    "export": "spa.exporting",
    "prune": "spa.api",
    "rule": "spa.rules",
    "verify": "spa.verify",
}

__all__ = [
    "Analysis",
    "InvariantError",
    "ModelError",
    "Plan",
    "PlanError",
    "Result",
    "SpaError",
    "UnsupportedError",
    "__version__",
    "analyze",
    "bench",
    "convert",
    "export",
    "prune",
    "rule",
    "verify",
]


class _Package(ModuleType):
    """The package, where ``spa.verify`` stays the function though importing a module of that name would replace it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and name in _HOMES):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'spa' has no attribute {name!r}")
