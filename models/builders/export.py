"""From a torch module to an ONNX model, the two ways in which PyTorch writes one."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import onnx
import torch
from torch import Tensor, nn

@dataclass
class Network:
    """A torch module, one example of its inputs, and how to write it.

    Attributes:
        module: the network.
        inputs: name -> example tensor, in the order of `module.forward`.
        outputs: names of the outputs.
        dynamic: input or output -> {axis: name}, for the axes whose size is left open. By default axis 0 of each
            input is the batch.
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
        """The open axes of inputs (and of outputs, where they are given)."""
        return {name: {0: "batch"} for name in self.inputs} | {k: dict(v) for k, v in self.dynamic.items()}


def randomise(network: Network) -> None:
    """Draw all parameters so that each channel is felt at the outputs.

    Weights keep the variance of what passes; norms get weights in 0.5 .. 1.5 and biases; BatchNorm's
    statistics are measured on the example inputs and then perturbed.
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
    batch_norms = [m for m in network.module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not batch_norms:
        return
    for norm in batch_norms:
        norm.momentum = 1.0
    network.module.train()
    with torch.no_grad():
        network.module(*network.inputs.values())
    for norm in batch_norms:
        norm.running_mean += torch.randn_like(norm.running_mean) * 0.3
        norm.running_var = (norm.running_var + 0.1) * torch.empty_like(norm.running_var).uniform_(0.5, 2.0)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back the exporters' prints, log lines and deprecation warnings."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(
        io.StringIO()
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(disabled)


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
    return program.model_proto
