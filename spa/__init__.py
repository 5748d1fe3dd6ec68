"""SPA: structured pruning of any trained network, on its ONNX graph."""

from spa._version import __version__

__all__ = ["__version__"]
