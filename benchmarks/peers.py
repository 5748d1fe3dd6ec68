"""Run one peer on one network, in this process, and hand the figures to the parent (`common.answer`).

    python benchmarks/peers.py torch-pruning NAME [--documented-edits] [--save FILE] [--export FILE]
    python benchmarks/peers.py onnxsim FILE [--simplify]

Both remove half of the channels of every group they find, by L2, and leave the classifier's outputs alone.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import common

if TYPE_CHECKING:
    import onnx
    from torch import nn

RATIO = 0.5


class Stopwatch:
    """A stopwatch that collects the seconds between its calls, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Book the time since the last call under this name."""
        now = time.perf_counter()
        self.seconds[name] = round(now - self._last, 4)
        self._last = now


def torch_pruning(name: str, edits: bool, save: Path | None, export: Path | None) -> dict[str, Any]:
    """Prune a torchvision network with Torch-Pruning's MagnitudePruner and run the result once.

    Args:
        name: one of `models16.NAMES`.
        edits: apply the edits by hand that Torch-Pruning's own torchvision script makes for ViT.
        save: where to `torch.save` the pruned module, or None.
        export: where to export it to ONNX (TorchScript exporter), or None.
    """
    watch = Stopwatch()
    import torch
    import torch_pruning as tp

    torch.set_num_threads(common.THREADS)
    watch.lap("import")
    import models16

    model, x = models16.build(name), models16.images(name)
    before = _counts(model)
    options = _options(model, edits)
    watch.lap("build the model")
    pruner = tp.pruner.MagnitudePruner(
        model, x, importance=tp.importance.MagnitudeImportance(p=2), pruning_ratio=RATIO, **options
    )
    watch.lap("graph")
    pruner.step()
    if edits:
        model.hidden_dim = cast(Any, model.conv_proj).out_channels  # torchvision's forward compares with it
    watch.lap("prune")
    after = _counts(model)
    with torch.no_grad():
        shape = list(model(x).shape)
    watch.lap("run once")
    if save:
        torch.save(model, save)
        watch.lap("save")
    if export:
        _export(model, x, export)
        watch.lap("export")
    return {"before": before, "after": after, "output": shape, "seconds": watch.seconds}


def _options(model: nn.Module, edits: bool) -> dict[str, Any]:
    import models16
    from torch import nn

    leaves = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    classifier = [m for m in leaves if getattr(m, "out_features", getattr(m, "out_channels", 0)) == models16.CLASSES]
    if not edits:
        return {"ignored_layers": classifier}
    attention = [m for m in leaves if isinstance(m, nn.modules.linear.NonDynamicallyQuantizableLinear)]
    heads = next(m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention))
    return {"ignored_layers": classifier + attention, "round_to": heads}


def _counts(model: nn.Module) -> dict[str, int]:
    parameters = sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() for b in model.buffers() if b.is_floating_point())
    return {"parameters": parameters, "float buffers": buffers}


def _export(model: nn.Module, x: Any, path: Path) -> None:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter announces its deprecation
        torch.onnx.export(
            model,
            (x,),
            str(path),
            dynamo=False,
            opset_version=17,
            do_constant_folding=False,
            input_names=["input"],
            dynamic_axes={"input": {0: "batch"}},
        )


def onnxsim(path: Path, simplify: bool) -> dict[str, Any]:
    """Prune an ONNX file with onnxsim's structured pruning and run the result once in onnxruntime."""
    watch = Stopwatch()
    import counting
    import onnx
    import onnxsim as peer

    watch.lap("import")
    model = onnx.load(path)
    before = counting.parameters(model)
    watch.lap("load")
    if simplify:
        model, _ = peer.simplify(model, overwrite_input_shapes=_fixed_shapes(model))
        watch.lap("simplify")
    model = peer.apply_structured_pruning(model, sparsity=RATIO)
    watch.lap("prune")
    after = counting.parameters(model)
    shape = _output(model)
    watch.lap("run once")
    return {"before": before, "after": after, "output": shape, "seconds": watch.seconds}


def _fixed_shapes(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Return the inputs' shapes with 1 for what is dynamic; onnxsim folds and prunes most with these."""
    return {
        entry.name: [axis.dim_value or 1 for axis in entry.type.tensor_type.shape.dim] for entry in model.graph.input
    }


def _output(model: onnx.ModelProto) -> list[int]:
    import numpy
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = common.THREADS
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0]
    shape = [side if isinstance(side, int) else 1 for side in entry.shape]
    x = numpy.random.default_rng(0).standard_normal(shape, numpy.float32)
    (y,) = session.run(None, {entry.name: x})
    return list(y.shape)


def main() -> None:
    """Run the peer that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="peer", required=True)
    first = commands.add_parser("torch-pruning")
    first.add_argument("name")
    first.add_argument("--documented-edits", action="store_true")
    first.add_argument("--save", type=Path)
    first.add_argument("--export", type=Path)
    second = commands.add_parser("onnxsim")
    second.add_argument("path", type=Path)
    second.add_argument("--simplify", action="store_true")
    options = parser.parse_args()
    if options.peer == "onnxsim":
        common.answer(onnxsim(options.path, options.simplify))
    else:
        common.answer(torch_pruning(options.name, options.documented_edits, options.save, options.export))


if __name__ == "__main__":
    main()
