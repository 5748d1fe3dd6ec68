"""Pruned networks in PyTorch; installed with ``pip install 'spa-onnx[torch]'``.

- :func:`to_torch`: as the user's own class where its code allows (:func:`write_back`), else as the graph.
- :func:`graph_module`: any ONNX graph as a trainable module.
- :func:`save`: a file that ``torch.export.load`` reads without this package.
- :func:`recovered`: a short training by the dense network; :func:`recover`, :func:`store`: the same of modules, and
  their weights back in the ONNX model.
- :func:`operator`: teach the graph one more operator.
"""

from __future__ import annotations

from spa.extras import extra

with extra("torch"):
    import torch  # noqa: F401 -- says early, and once, what is missing

from spa.exporters.pytorch.convert import save, to_torch
from spa.exporters.pytorch.module import OnnxModule, graph_module
from spa.exporters.pytorch.operators import operator
from spa.exporters.pytorch.recover import Recovery, recover, recovered, store
from spa.exporters.pytorch.write_back import write_back

__all__ = [
    "OnnxModule",
    "Recovery",
    "graph_module",
    "operator",
    "recover",
    "recovered",
    "save",
    "store",
    "to_torch",
    "write_back",
]
