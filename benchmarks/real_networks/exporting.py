"""Networks that packages hold as PyTorch weights only, exported once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from real_networks.base import Missing, Place


def exported(
    place: Place,
    name: str,
    build: Callable[[Any], tuple[Any, Any]],
    inputs: Sequence[str],
    outputs: Sequence[str],
    more_axes: Sequence[str] = (),
) -> Path:
    """Return an exported network's file, which is made unless it exists.

    Args:
        place: where things lie.
        name: the file's name without its ending.
        build: returns the module and example inputs, given PyTorch.
        inputs: their names.
        outputs: their names.
        more_axes: the names of open axes after the first, which counts samples.
    """
    path = place.exported / f"{name}.onnx"
    if path.exists():
        return path
    try:
        import torch
    except ImportError as error:
        raise Missing(f"the package torch, which exports {name}") from error
    net, example = build(torch)
    axes = {axis: dict(enumerate(["batch", *more_axes])) for axis in (*inputs, *outputs)}
    path.parent.mkdir(parents=True, exist_ok=True)
    names = {"input_names": list(inputs), "output_names": list(outputs)}
    torch.onnx.export(net.eval(), example, str(path), dynamic_axes=axes, dynamo=False, **names)
    return path
