"""Build torchvision's sixteen benchmark networks and export each to ONNX with PyTorch's exporters.

    python benchmarks/models16.py --cache DIR [--only resnet50 ...] [--exporters torchscript dynamo]

writes DIR/NAME.EXPORTER.onnx and, beside it, DIR/NAME.EXPORTER.json (seconds, bytes, nodes, versions).
Weights are random, but perturbed so that the output depends on all of them: fresh networks are nearly
blind to wrong slices.

Exporters:
    torchscript   torch.onnx.export(dynamo=False), opset 17, no constant folding
    dynamo        torch.onnx.export(dynamo=True, optimize=False), its default opset: BatchNorm stays
    dynamo-opt    torch.onnx.export(dynamo=True), all defaults: BatchNorm is folded
"""

from __future__ import annotations

import copy
import json
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common

if TYPE_CHECKING:
    import torch
    from torch import nn

NAMES = (
    "resnet50",
    "densenet121",
    "mobilenet_v2",
    "efficientnet_b0",
    "convnext_tiny",
    "googlenet",
    "regnet_y_400mf",
    "mnasnet1_0",
    "resnext50_32x4d",
    "squeezenet1_1",
    "inception_v3",
    "vgg16_bn",
    "vit_b_16",
    "shufflenet_v2_x1_0",
    "swin_t",
    "maxvit_t",
)
EXPORTERS = ("torchscript", "dynamo", "dynamo-opt")
CLASSES = 1000
_AUXILIARY = ("googlenet", "inception_v3")


def cached(cache: Path, name: str, exporter: str) -> Path:
    """Return where an export lies."""
    return cache / f"{name}.{exporter}.onnx"


def side(name: str) -> int:
    """Return the side of the square input image, pixels."""
    return 299 if name == "inception_v3" else 224


def images(name: str, batch: int = 1, seed: int = 1) -> torch.Tensor:
    """Return random images [batch, 3, side, side]."""
    import torch

    return torch.randn(batch, 3, side(name), side(name), generator=torch.Generator().manual_seed(seed))


def build(name: str, seed: int = 0) -> nn.Module:
    """Return the network in eval mode with torchvision's own random initialisation.

    Auxiliary classifiers are left out: they are no part of the network that is exported and run.
    """
    import torch

    torch.set_num_threads(common.THREADS)
    models = torchvision_models()
    torch.manual_seed(seed)
    options: dict[str, Any] = {"aux_logits": False, "init_weights": False} if name in _AUXILIARY else {}
    return models.get_model(name, weights=None, **options).eval()


def torchvision_models() -> Any:
    """Import torchvision's networks.

    Where its compiled operators do not load (installed with `--no-deps` beside a torch of another build), its
    import asks for two of them; declaring them is enough, none of the sixteen networks calls them.
    """
    import torch

    try:
        import torchvision
    except RuntimeError:  # "operator torchvision::nms does not exist"
        for module in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[module]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)
        import torchvision
    return torchvision.models


_libraries: list[Any] = []  # a torch.library.Library takes its definitions along when it is collected


# -- weights that matter ---------------------------------------------------------------------------------


def perturb(model: nn.Module, name: str, seed: int = 0) -> nn.Module:
    """Give every parameter a say in the output, in place.

    1. Biases, normalisation scales and shifts, layer scales, embeddings: drawn anew, away from 0 and 1.
    2. Weights that were initialised to (almost) zero: drawn as usual for a layer of that size.
    3. BatchNorm statistics: measured on random images, then moved a little.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            redraw(key, parameter, generator)
        _calibrate(model, name, generator)
    return model


def redraw(key: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
    """Give one parameter a say in the output, cases 1 and 2 of `perturb`."""
    import torch

    noise = torch.randn(parameter.shape, generator=generator)
    leaf = key.rsplit(".", 1)[-1]
    if leaf == "layer_scale":
        parameter.copy_(0.5 + noise.sigmoid())
    elif leaf.endswith("bias") and parameter.dim() == 1:
        parameter.copy_(0.1 * noise)
    elif parameter.dim() == 1:
        parameter.copy_(1 + 0.2 * noise.clamp(-2, 2))
    elif leaf in ("pos_embedding", "class_token") or "relative_position" in leaf:
        parameter.copy_(0.3 * noise)
    elif parameter.std() * parameter[0].numel() ** 0.5 < 0.1:
        parameter.copy_(noise / parameter[0].numel() ** 0.5)


def _calibrate(model: nn.Module, name: str, generator: torch.Generator) -> None:
    import torch
    from torch import nn

    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
        norm.train()
    if norms:
        model(images(name, batch=4, seed=2))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        mean, var = norm.running_mean, norm.running_var
        assert mean is not None and var is not None  # for mypy: these networks track statistics
        mean.add_(0.1 * var.sqrt() * torch.randn(mean.shape, generator=generator))
        var.mul_(0.8 + 0.4 * torch.rand(var.shape, generator=generator)).add_(1e-4)
    model.eval()


def sensitivity(model: nn.Module, name: str, layers: int = 8) -> float:
    """Return the least relative change of the output when every third input slice of a layer is zeroed.

    `layers` convolutions and linear layers, evenly spread, are tried.
    """
    import torch
    from torch import nn

    x = images(name)
    readers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    changes = []
    with torch.no_grad():
        dense = model(x)
        for reader in readers[:: max(1, len(readers) // layers)]:
            weight = reader.weight
            slices = weight[:, 1::3] if weight.shape[1] > 1 else weight[1::3]  # one alone may read a dead ReLU
            kept = slices.clone()
            slices.zero_()
            changes.append(float((model(x) - dense).abs().max() / dense.abs().max()))
            slices.copy_(kept)
    return min(changes)


# -- export ----------------------------------------------------------------------------------------------


def export(name: str, exporter: str, path: Path) -> dict[str, Any]:
    """Export one network with dynamic batch and return how it went."""
    import torch

    model = perturb(build(name), name)
    facts: dict[str, Any] = {"model": name, "exporter": exporter, "torch": torch.__version__}
    facts["sensitivity"] = sensitivity(model, name)
    partial = path.with_suffix(".partial")
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both exporters announce deprecations and traced constants
        _export(model, images(name, batch=2), exporter, partial)
    facts["seconds"] = round(time.perf_counter() - start, 2)
    facts["bytes"] = partial.stat().st_size
    facts |= _check(model, name, partial)
    partial.replace(path)
    path.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    return facts


def _export(model: nn.Module, x: torch.Tensor, exporter: str, path: Path) -> None:
    import torch

    if exporter == "torchscript":
        # The exporter may rewrite parameters in place, so it gets a copy.
        torch.onnx.export(
            copy.deepcopy(model),
            (x,),
            str(path),
            dynamo=False,
            opset_version=17,
            do_constant_folding=False,
            input_names=["input"],
            output_names=["output"],
            dynamic_axes={"input": {0: "batch"}, "output": {0: "batch"}},
        )
    else:
        shapes = ({0: torch.export.Dim("batch")},)
        torch.onnx.export(
            model,
            (x,),
            str(path),
            dynamo=True,
            optimize=exporter == "dynamo-opt",
            verbose=False,
            external_data=False,
            input_names=["input"],
            output_names=["output"],
            dynamic_shapes=shapes,
        )


def _check(model: nn.Module, name: str, path: Path) -> dict[str, Any]:
    """Compare the export with PyTorch, at a batch size that was not exported."""
    import onnx
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = common.THREADS
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    x = images(name, batch=3, seed=3)
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        expected = model(x)
    graph = onnx.load(path, load_external_data=False)
    return {
        "nodes": len(graph.graph.node),
        "opset": {entry.domain or "ai.onnx": entry.version for entry in graph.opset_import},
        "error": float((torch.from_numpy(got) - expected).abs().max() / expected.abs().max()),
    }


def ensure(cache: Path, names: Sequence[str], exporters: Sequence[str]) -> dict[str, Any]:
    """Export what the cache lacks, in a process each, and return {NAME.EXPORTER: facts or failure}."""
    cache.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {}
    for name in names:
        for exporter in exporters:
            path = cached(cache, name, exporter)
            if path.exists() and path.with_suffix(".json").exists():
                report[path.stem] = json.loads(path.with_suffix(".json").read_text())
                continue
            child = common.python("models16.py", "--cache", str(cache), "--child", name, exporter, timeout=1200)
            report[path.stem] = child.data or {"status": child.status, "reason": child.reason}
            report[path.stem] |= {"process seconds": child.seconds, "peak MB": child.peak_mb}
            print(path.stem, report[path.stem], flush=True)
    return report


def main() -> None:
    """Export, and print a line for each model and exporter."""
    parser = common.arguments(__doc__)
    parser.add_argument("--exporters", nargs="+", default=list(EXPORTERS), choices=EXPORTERS)
    parser.add_argument("--child", nargs=2, metavar=("MODEL", "EXPORTER"), help="export in this process")
    options = parser.parse_args()
    if options.child:
        name, exporter = options.child
        common.answer(export(name, exporter, cached(options.cache, name, exporter)))
        return
    report = ensure(options.cache, options.only or NAMES, options.exporters)
    failed = [key for key, facts in report.items() if "reason" in facts]
    print(f"{len(report) - len(failed)} of {len(report)} exports in {options.cache}; failed: {failed or 'none'}")


if __name__ == "__main__":
    main()
