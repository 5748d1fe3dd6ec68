"""Derivatives of a loss by torch, for the criteria of :mod:`spa.criteria.gradient`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from spa.criteria.registry import GRADIENTS, HESSIAN_GRADIENTS, SQUARED_GRADIENTS
from spa.errors import PlanError
from spa.extras import extra

if TYPE_CHECKING:
    import torch

Array = np.ndarray


def from_autograd(
    module: torch.nn.Module,
    batches: Iterable[Any],
    labels: Iterable[Any] | None = None,
    loss: Callable[..., torch.Tensor] | None = None,
    need: str = GRADIENTS,
    names: Mapping[str, str] | None = None,
) -> dict[str, Array]:
    """Differentiate a module's mean loss with respect to its parameters.

    Args:
        module: a network whose named parameters are the model's initializers; it is run in evaluation mode and left
            as it was.
        batches: inputs, each a tensor or a tuple of tensors, on the module's device. Batches count as much as they
            have samples.
        labels: one tensor for each batch.
        loss: of outputs, and of labels where there are any; the mean over the batch's samples. Cross-entropy by
            default.
        need: ``gradients``, the gradient g; ``hessian_gradients``, the Hessian times g, by double backward; or
            ``squared_gradients``, the mean over batches of squared gradients (give batches of one sample for Fisher's).
        names: the module's name of each parameter by initializer, where they differ.

    Returns:
        By initializer an array of the parameter's shape.

    Raises:
        PlanError: there are no batches, or the loss depends on no parameter.
        UnsupportedError: torch is not installed.
    """
    with extra("torch"):
        import torch
    value_of: Callable[..., torch.Tensor] = loss or torch.nn.functional.cross_entropy
    parameters = dict(module.named_parameters())
    pairs = _pairs(batches, labels)
    weights = [len(x[0]) / sum(len(x[0]) for x, _ in pairs) for x, _ in pairs]

    def gradient(inputs: tuple[Any, ...], label: Any, graph: bool = False) -> list[torch.Tensor]:
        outputs = module(*inputs)
        value = value_of(outputs) if label is None else value_of(outputs, label)
        if not value.requires_grad:
            raise PlanError("the loss depends on no parameter. Compute it from the module's outputs.")
        found = torch.autograd.grad(value, list(parameters.values()), create_graph=graph, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters.values(), found, strict=True)]

    def mean(found: Iterator[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
        total = [torch.zeros_like(p) for p in parameters.values()]
        for weight, each in zip(weights, found, strict=True):
            total = [t + weight * e.detach() for t, e in zip(total, each, strict=True)]
        return total

    with _evaluating(module):
        if need == SQUARED_GRADIENTS:
            result = mean([g.detach() ** 2 for g in gradient(*pair)] for pair in pairs)
        else:
            result = mean(gradient(*pair) for pair in pairs)
        if need == HESSIAN_GRADIENTS:
            result = mean(_curvature(gradient(*pair, graph=True), parameters, result) for pair in pairs)
    arrays = {n: t.cpu().double().numpy() for n, t in zip(parameters, result, strict=True)}
    return arrays | {initializer: arrays[n] for initializer, n in (names or {}).items() if n in arrays}


def _curvature(
    gradient: Sequence[torch.Tensor], parameters: Mapping[str, torch.Tensor], along: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Multiply the Hessian with a vector: take the gradient of the gradient's product with it."""
    import torch

    product = torch.stack([(g * v).sum() for g, v in zip(gradient, along, strict=True)]).sum()
    if not product.requires_grad:  # the loss is linear
        return [torch.zeros_like(p) for p in parameters.values()]
    found = torch.autograd.grad(product, list(parameters.values()), allow_unused=True)
    return [torch.zeros_like(p) if h is None else h for p, h in zip(parameters.values(), found, strict=True)]


def _pairs(batches: Iterable[Any], labels: Iterable[Any] | None) -> list[tuple[tuple[Any, ...], Any]]:
    """Pair each batch's inputs with its labels."""
    inputs = [tuple(b) if isinstance(b, tuple | list) else (b,) for b in batches]
    wanted = [None] * len(inputs) if labels is None else list(labels)
    if not inputs or len(wanted) != len(inputs):
        raise PlanError(f"there are {len(inputs)} batches of inputs and {len(wanted)} of labels. Give one for each.")
    return list(zip(inputs, wanted, strict=True))


@contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Put the module into evaluation mode, with gradients of all parameters, for a while."""
    import torch

    modes = {m: m.training for m in module.modules()}
    wanted = {p: p.requires_grad for p in module.parameters()}
    module.eval()
    for parameter in wanted:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for each, mode in modes.items():
            each.training = mode
        for parameter, before in wanted.items():
            parameter.requires_grad_(before)
