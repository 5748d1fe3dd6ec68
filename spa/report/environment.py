"""The environment of a run: versions and machine, for those who want to repeat it."""

from __future__ import annotations

import platform

from spa._version import __version__
from spa.running.processor import cpu_name

PACKAGES = ("onnx", "onnxruntime", "numpy")


def environment() -> dict[str, str]:
    """Return the versions of what decides results, the platform and the processor.

    >>> sorted(environment())[-1]
    'spa'
    """
    from importlib.metadata import version  # slow to import

    return {
        "spa": __version__,
        **{name: version(name) for name in PACKAGES},
        "Python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "processor": cpu_name(),
    }
