"""PyTorch: how example inputs call a module, and tensors as arrays. Both doors call the user's module so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


def arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split example inputs into the positional and keyword arguments that a module is called with.

    Args:
        example_inputs: one argument, a tuple or list of positional ones, or a mapping of keyword ones.
    """
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def array(tensor: Tensor) -> np.ndarray:
    """Return a tensor's values as a numpy array, whatever device they are on; bfloat16 is ``ml_dtypes``'."""
    import torch

    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return np.asarray(tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16))
    return np.asarray(tensor.numpy())
