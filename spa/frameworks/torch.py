"""PyTorch: how example inputs call a module, and tensors as arrays. Both doors call the user's module so."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    from torch import Tensor, nn

WRAPPERS = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}


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


def unwrapped(module: Any) -> Any:
    """Return the module inside wrappers that compute the same: of ``torch.compile`` and of data parallelism.

    Args:
        module: any object; what is no such wrapper is returned as it is.
    """
    while (attribute := WRAPPERS.get(type(module).__name__)) and type(module).__module__.startswith("torch."):
        module = getattr(module, attribute)
    return module


def copied(module: nn.Module) -> nn.Module:
    """Return a copy of a module, without the tensors that it keeps of earlier runs in evaluation mode.

    Those were computed from parameters, are no leaves of PyTorch's graph, which ``deepcopy`` refuses, and would not
    follow the copy's parameters. Classes that keep such tensors drop them when they are trained.
    """
    from torch.utils import _pytree as pytree

    kept = (leaf for part in module.modules() for leaf in pytree.tree_leaves(vars(part)))
    computed = [leaf for leaf in kept if getattr(leaf, "grad_fn", None) is not None]
    copy_of = copy.deepcopy(module, {id(t): t.detach() for t in computed})
    modes = [(m, m.training) for m in copy_of.modules()]
    copy_of.train()
    for part, mode in modes:
        part.training = mode
    return copy_of


def in_single(module: Any, example_inputs: Any) -> tuple[Any, Any] | None:
    """Return a copy of a module with bfloat16 weights in single precision, and its inputs; None for any other module.

    onnxruntime has few operators in bfloat16, of which every number is one of single precision.
    """
    import torch
    from torch.utils import _pytree as pytree

    if not isinstance(module, torch.nn.Module) or isinstance(module, torch.jit.ScriptModule):
        return None
    if all(p.dtype != torch.bfloat16 for p in module.parameters()):
        return None

    def single(value: Any) -> Any:
        return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return copied(module).float(), pytree.tree_map(single, example_inputs)


def give_types(module: Any, original: Any) -> None:
    """Give floating-point parameters and buffers the types that they have in another module of the class.

    Parameters that the other lacks take the type of most of its own.
    """
    import torch

    pairs = (*original.named_parameters(remove_duplicate=False), *original.named_buffers(remove_duplicate=False))
    types = {key: value.dtype for key, value in pairs}
    usual = Counter(dtype for dtype in types.values() if dtype.is_floating_point).most_common(1)[0][0]
    with torch.no_grad():
        for key, value in (*module.named_parameters(), *module.named_buffers()):
            if value.is_floating_point():
                value.data = value.data.to(types.get(key, usual))
