"""From a torch module to an ONNX model, the two ways in which PyTorch writes one."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import onnx
import torch
from torch import Tensor, nn

from models.builders.quiet import quiet


@dataclass
class Network:
    """A torch module, one example of its inputs, and how to write it.

    Attributes:
        module: the network.
        inputs: name -> example tensor, in the order of `module.forward`.
        outputs: names of the outputs.
        dynamic: input or output -> {axis: name}, for the axes whose size is left open. By default axis 0 of
            each input is the batch.
        opset: the opset for the TorchScript exporter.
        keep_fresh: leave parameters as torch initialised them.
        script: additional options of `torch.onnx.export(dynamo=False)`.
        dynamo: additional options of `torch.onnx.export(dynamo=True)`.
    """

    module: nn.Module
    inputs: Mapping[str, Tensor]
    outputs: Sequence[str] = ("output",)
    dynamic: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    opset: int = 17
    keep_fresh: bool = False
    script: Mapping[str, object] = field(default_factory=dict)
    dynamo: Mapping[str, object] = field(default_factory=dict)

    def axes(self) -> dict[str, dict[int, str]]:
        """Return the open axes of inputs (and of outputs, where they are given)."""
        return {name: {0: "batch"} for name in self.inputs} | {k: dict(v) for k, v in self.dynamic.items()}


def randomise(network: Network) -> None:
    """Draw all parameters so that each channel is felt at the outputs.

    Weights keep the variance of what passes; norms get weights in 0.5 .. 1.5 and biases; then see `settle`.
    """
    for module in network.module.modules():
        for name, parameter in module.named_parameters(recurse=False):
            with torch.no_grad():
                if (name == "weight" and parameter.ndim == 1) or "scale" in name:
                    parameter.uniform_(0.5, 1.5)
                elif isinstance(module, nn.Embedding) or "embed" in name or "token" in name:
                    parameter.normal_(0, 0.7)
                elif parameter.ndim == 1:
                    parameter.normal_(0, 0.2)
                else:
                    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
                    fan_in = parameter.transpose(0, 1)[0].numel() if transposed else parameter[0].numel()
                    parameter.normal_(0, (1.5 / fan_in) ** 0.5)
    settle(network)


def settle(network: Network) -> None:
    """Pass noise once; centre convolutions and linear layers, set BatchNorm's statistics; both roughly.

    Otherwise many a ReLU is off for every input, and a wrong slice before or behind it would pass unseen.
    """

    def centre(module: nn.Module, _: object, y: Tensor) -> Tensor:
        channel = y.ndim - 1 if isinstance(module, nn.Linear) else 1
        axes = [axis for axis in range(y.ndim) if axis != channel]
        std, mean = torch.std_mean(y, axes)
        move = torch.empty_like(mean).uniform_(-0.4, 0.4) * std - mean
        module.bias += move
        return y + move.view([-1 if axis == channel else 1 for axis in range(y.ndim)])

    modules = list(network.module.modules())
    norms = [module for module in modules if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    layers = (nn.Linear, nn.modules.conv._ConvNd)
    biased = [module for module in modules if isinstance(module, layers) and module.bias is not None]
    for norm in norms:
        norm.momentum = 1.0
    hooks = [module.register_forward_hook(centre) for module in biased]
    batch = [x.repeat(8, *[1] * (x.ndim - 1)) for x in network.inputs.values()]
    network.module.train()
    with torch.no_grad():
        network.module(*(torch.randn_like(x) if x.is_floating_point() else x for x in batch))
    for handle in hooks:
        handle.remove()
    for norm in norms:
        std = norm.running_var.sqrt() + 1e-3
        norm.running_mean += torch.empty_like(std).uniform_(-0.4, 0.4) * std
        norm.running_var = std**2 * torch.empty_like(std).uniform_(0.5, 2.0)


def torchscript(network: Network) -> onnx.ModelProto:
    """Write by tracing (`dynamo=False`), with BatchNorm kept and nothing folded."""
    file = io.BytesIO()
    network.module.eval()
    # PRESERVE keeps the mode that the module is in: evaluation, without fusing BatchNorm into convolutions.
    options = {
        "training": torch.onnx.TrainingMode.PRESERVE,
        "do_constant_folding": False,
        "opset_version": network.opset,
    }
    with quiet():
        torch.onnx.export(
            network.module,
            tuple(network.inputs.values()),
            file,
            dynamo=False,
            input_names=list(network.inputs),
            output_names=list(network.outputs),
            dynamic_axes={**network.axes(), **{name: {0: "batch"} for name in network.outputs}},
            **{**options, **network.script},
        )
    return onnx.load_from_string(file.getvalue())


def dynamo(network: Network) -> onnx.ModelProto:
    """Write through `torch.export` (`dynamo=True`), in opset 20 unless told otherwise."""
    network.module.eval()
    sizes = {name for axes in network.axes().values() for name in axes.values()}
    dims = {name: torch.export.Dim(name, min=2, max=512) for name in sorted(sizes)}
    axes = network.axes()
    shapes = tuple({axis: dims[d] for axis, d in axes[name].items()} for name in network.inputs)
    options = {"opset_version": 20, **network.dynamo}
    with quiet():
        program = torch.onnx.export(
            network.module,
            tuple(network.inputs.values()),
            dynamo=True,
            input_names=list(network.inputs),
            output_names=list(network.outputs),
            dynamic_shapes=shapes,
            verbose=False,
            **options,
        )
    model = program.model_proto
    # The exported program's signature as text; its order differs from run to run.
    del model.graph.metadata_props[:]
    return model
