"""The widths that layers of Keras keep in their configuration, which follow from their pruned variables."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from spa.exporters.tensorflow import Pruned

Config = dict[str, Any]


class Widths:
    """A layer's new sizes, from the shapes of its pruned variables."""

    def __init__(self, layer: Any, pruned: Pruned) -> None:
        self.layer, self.pruned = layer, pruned

    def variable(self, suffix: str) -> Any:
        """Return the variable whose path ends so."""
        return next(v for v in self.layer.variables if v.path.endswith(f"/{suffix}"))

    def shape(self, suffix: str) -> tuple[int, ...]:
        """Return the pruned shape of the variable whose path ends so."""
        return self.pruned.arrays[id(self.variable(suffix))].shape

    def bias(self, config: Config) -> None:
        """Give the layer a bias if the reconstruction did."""
        config["use_bias"] |= any(id(v) in self.pruned.biases for v in self.layer.variables)


def _dense(config: Config, widths: Widths) -> None:
    config["units"] = widths.shape("kernel")[-1]


def _conv(config: Config, widths: Widths) -> None:
    config["filters"] = widths.shape("kernel")[-1]
    config["groups"] = widths.pruned.groups.get(id(widths.variable("kernel")), config["groups"])
    widths.bias(config)


def _transposed_conv(config: Config, widths: Widths) -> None:
    config["filters"] = widths.shape("kernel")[-2]


def _depthwise(config: Config, widths: Widths) -> None:
    config["depth_multiplier"] = widths.shape("kernel")[-1]
    widths.bias(config)


def _separable(config: Config, widths: Widths) -> None:
    config["filters"] = widths.shape("pointwise_kernel")[-1]
    config["depth_multiplier"] = widths.shape("depthwise_kernel")[-1]
    widths.bias(config)


def _recurrent(config: Config, widths: Widths) -> None:
    config["units"] = widths.shape("recurrent_kernel")[0]
    widths.bias(config)


def _embedding(config: Config, widths: Widths) -> None:
    config["output_dim"] = widths.shape("embeddings")[1]


def _layer_scale(config: Config, widths: Widths) -> None:
    config["projection_dim"] = widths.pruned.arrays[id(widths.layer.gamma)].size  # its variable has no name


def _group_normalisation(config: Config, widths: Widths) -> None:
    scale = next(iter(widths.layer.variables), None)
    if scale is not None:
        size = scale.shape[0] // widths.layer.groups
        config["groups"] = np.unique(widths.pruned.kept[id(scale)][0] // size).size


def _einsum_dense(config: Config, widths: Widths) -> None:
    left, output = config["equation"].replace(" ", "").split("->")
    sizes = dict(zip(left.split(",")[1].replace(".", ""), widths.shape("kernel"), strict=True))
    letters, shape = output.replace(".", ""), list(config["output_shape"])
    for i, letter in enumerate(reversed(letters[-len(shape) :]), start=1):
        if letter in sizes and shape[-i] is not None:
            shape[-i] = sizes[letter]
    config["output_shape"] = shape


def _attention(config: Config, widths: Widths) -> None:
    config["num_heads"], config["key_dim"] = widths.shape("query/kernel")[1:]
    config["value_dim"] = widths.shape("value/kernel")[2]
    width = widths.shape("attention_output/kernel")[-1]
    if config["output_shape"] is not None or width != widths.shape("query/kernel")[0]:
        config["output_shape"] = width  # by default it is the query's


def _grouped_attention(config: Config, widths: Widths) -> None:
    config["num_query_heads"], config["head_dim"] = widths.shape("query/kernel")[1:]
    config["num_key_value_heads"] = widths.shape("key/kernel")[1]


# Where a layer's widths stand in its configuration. Layers that are not here take them from their input.
WIDTHS: dict[str, Callable[[Config, Widths], None]] = {
    "Dense": _dense,
    "EinsumDense": _einsum_dense,
    "Embedding": _embedding,
    "GroupNormalization": _group_normalisation,
    "MultiHeadAttention": _attention,
    "GroupedQueryAttention": _grouped_attention,
    "LayerScale": _layer_scale,
    **dict.fromkeys(("Conv1D", "Conv2D", "Conv3D"), _conv),
    **dict.fromkeys(("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"), _transposed_conv),
    **dict.fromkeys(("DepthwiseConv1D", "DepthwiseConv2D"), _depthwise),
    **dict.fromkeys(("SeparableConv1D", "SeparableConv2D"), _separable),
    **dict.fromkeys(("LSTM", "GRU", "SimpleRNN", "LSTMCell", "GRUCell", "SimpleRNNCell"), _recurrent),
}
