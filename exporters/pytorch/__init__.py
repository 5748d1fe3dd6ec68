"""Pruned networks in PyTorch: as the user's own module, or as the graph itself; installed with ``spa-onnx[torch]``."""

from __future__ import annotations

from spa.exporters.pytorch.module import OnnxModule, graph_module
from spa.exporters.pytorch.operators import operator

__all__ = ["OnnxModule", "graph_module", "operator"]
