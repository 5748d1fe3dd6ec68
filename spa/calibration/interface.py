"""The inputs of a model as data must fit them, and the axis of each along which samples lie."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx

from spa.errors import PlanError
from spa.model.sizes import batch_axes
from spa.running.feeds import open_input
from spa.running.runtime import TensorSpec, input_specs

__all__ = ["Interface", "interface_of", "names_text", "shape_text"]


@dataclass(frozen=True)
class Interface:
    """The inputs of a model.

    Attributes:
        specs: the inputs, in order.
        axes: by input the axis along which samples lie; None for an input that all samples share.
        classes: the first output and its number of classes, where it declares one row of scores per sample.
    """

    specs: tuple[TensorSpec, ...]
    axes: Mapping[str, int | None]
    classes: tuple[str, int] | None = None

    @property
    def names(self) -> list[str]:
        """The inputs' names."""
        return [spec.name for spec in self.specs]

    @property
    def batched(self) -> list[TensorSpec]:
        """The inputs that have an axis for samples; none where each run takes one sample."""
        return [spec for spec in self.specs if self.axes[spec.name] is not None]

    @property
    def batch(self) -> int | None:
        """The number of samples that the model takes at once, where it fixes that."""
        sizes = (spec.shape[self.axes[spec.name] or 0] for spec in self.batched)
        return next((size for size in sizes if isinstance(size, int)), None)


def interface_of(model: onnx.ModelProto) -> Interface:
    """Return the inputs of a model.

    Raises:
        PlanError: it has none, one that arrays cannot hold, or none with axes.
    """
    specs = input_specs(model)
    if not specs:
        raise PlanError("The model: it has no inputs. Calibrate a model that takes some.")
    for spec in specs:
        if spec.dtype is None:
            raise PlanError(
                f"Input '{spec.name}': arrays cannot hold its type {spec.type}. Export the model without it."
            )
    axes = batch_axes([open_input(spec) for spec in specs])
    if not any(spec.shape for spec in specs):
        raise PlanError(
            f"Input '{specs[0].name}': it declares no axes, so it has none for samples. "
            "Make it a constant, or export the model with the input's shape."
        )
    return Interface(specs, axes, _classes(model))


def _classes(model: onnx.ModelProto) -> tuple[str, int] | None:
    """Return the first output and its number of classes, where its shape is (samples, classes)."""
    for output in model.graph.output[:1]:
        dims = output.type.tensor_type.shape.dim
        if len(dims) == 2 and dims[1].dim_value > 0:
            return output.name, dims[1].dim_value
    return None


def names_text(names: Iterable[object]) -> str:
    """Return names in quotes, for a message."""
    return ", ".join(f"'{name}'" for name in names) or "nothing"


def shape_text(shape: Iterable[int | str | None]) -> str:
    """Return a shape in brackets, for a message."""
    return f"[{', '.join('?' if dim is None else str(dim) for dim in shape)}]"
