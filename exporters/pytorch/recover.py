"""A short training after pruning: the pruned network learns the dense one's outputs. No labels are needed.

G. Hinton et al., Distilling the knowledge in a neural network (arXiv 1503.02531), in the limit of high temperature
(section 2.1): squared differences of logits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, numpy_helper
from torch import Tensor, nn

from spa.errors import PlanError
from spa.exporters.pytorch.module import OnnxModule, unshared
from spa.exporters.pytorch.operators import tensor
from spa.frameworks.torch import array
from spa.model.graph import Graph
from spa.model.normalise import normalise
from spa.model.traits import FLOATS

Feeds = Mapping[str, np.ndarray]
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Recovery:
    """The effect of training, on batches that it did not see.

    Attributes:
        before: mean squared difference to the dense outputs over their variance.
        after: the same, of the weights that were kept.
        epoch: after which epoch these were, 0 if none was better than what was given.
    """

    before: float
    after: float
    epoch: int


def recover(
    student: OnnxModule,
    teacher: OnnxModule,
    batches: Sequence[Feeds],
    epochs: int = 20,
    lr: float = 1e-4,
    held_out: float = 0.2,
    seed: int = 0,
    progress: Progress = lambda stage, share: None,
) -> Recovery:
    """Train a pruned network to give what the dense one gives; the best weights seen stay in it.

    AdamW whose rate falls as a cosine. BatchNormalizations keep their running statistics and dropout is off. The loss
    is the distortion that is reported: squared differences of the float outputs over the dense outputs' variance. What
    is best is decided on batches that are left out of training, and the weights given are a candidate. Both modules are
    left in evaluation mode.

    Args:
        student: the pruned network; its parameters change in place.
        teacher: the dense network.
        batches: inputs by name; two or more.
        epochs: passes over the batches.
        lr: the highest rate.
        held_out: the share of the batches that decide.
        seed: of the batches' order.
        progress: called with the stage and the share of it that is done.

    Raises:
        PlanError: too few batches, or no float output to learn from.
    """
    if len(batches) < 2:
        raise PlanError(f"recovery was given {len(batches)} batches: one to learn from, one to decide. Give 2 or more.")
    device = next(student.parameters()).device
    feeds = [{n: tensor(np.asarray(v)).to(device) for n, v in batch.items()} for batch in batches]
    student.eval()
    targets = _targets(teacher.eval(), feeds)
    scales = _variances(targets)
    cut = len(batches) - min(max(1, round(held_out * len(batches))), len(batches) - 1)

    def loss(i: int) -> Tensor:
        return _distortion(_floats(student(**feeds[i])), targets[i], scales)

    def judged() -> float:
        with torch.no_grad():
            return float(np.mean([loss(i).item() for i in range(cut, len(batches))]))

    before = best = judged()
    best_weights, best_epoch = copy.deepcopy(student.state_dict()), 0
    for epoch in _trained(student, loss, cut, epochs, lr, seed):
        error = judged()
        if error < best:
            best, best_epoch, best_weights = error, epoch, copy.deepcopy(student.state_dict())
        progress("recover", epoch / epochs)
    student.load_state_dict(best_weights)
    return Recovery(before, best, best_epoch)


def _trained(
    student: nn.Module, loss: Callable[[int], Tensor], batches: int, epochs: int, lr: float, seed: int
) -> Iterator[int]:
    """Train on the first batches, shuffled anew in each epoch; yield the number of each epoch when it is over."""
    optimiser = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(epochs * batches, 1))
    order = torch.Generator().manual_seed(seed)
    for epoch in range(1, epochs + 1):
        for i in torch.randperm(batches, generator=order).tolist():
            optimiser.zero_grad()
            loss(i).backward()
            optimiser.step()
            schedule.step()
        yield epoch


def _floats(outputs: Any) -> list[Tensor]:
    listed = outputs if isinstance(outputs, tuple) else (outputs,)
    return [v for v in listed if isinstance(v, Tensor) and v.is_floating_point()]


def _targets(teacher: nn.Module, feeds: Sequence[Mapping[str, Tensor]]) -> list[list[Tensor]]:
    with torch.no_grad():
        targets = [_floats(teacher(**batch)) for batch in feeds]
    if not targets[0]:
        raise PlanError("the network has no float output to learn from. Leave recovery out.")
    return targets


def _variances(targets: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return each output's mean squared distance from its mean over the samples."""
    scales = []
    for outputs in zip(*targets, strict=True):
        rows = torch.cat([o.double().flatten(1) if o.ndim else o.double().reshape(1, 1) for o in outputs])
        scales.append((rows - rows.mean(0)).square().mean().clamp(min=1e-12))
    return scales


def _distortion(outputs: Sequence[Tensor], targets: Sequence[Tensor], scales: Sequence[Tensor]) -> Tensor:
    shares = [(o - t).square().mean() / s.to(o.dtype) for o, t, s in zip(outputs, targets, scales, strict=True)]
    return torch.stack(shares).mean()


def store(module: OnnxModule, model: ModelProto) -> ModelProto:
    """Store a module's weights, as they are now, in the ONNX model that it was made from.

    Args:
        module: from :func:`spa.exporters.pytorch.graph_module`.
        model: what it was given; not changed.

    Returns:
        A copy. Vectors that were merged because they were equal are apart in it.
    """
    stored = ModelProto()
    stored.CopyFrom(unshared(normalise(model, own=False)))
    graph = Graph(stored)
    values = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    for name, key in module.keys.items():
        old = graph.constants[name]
        if old.data_type in FLOATS:
            new = numpy_helper.from_array(np.ascontiguousarray(array(values[key])), old.name)
            old.CopyFrom(new)
    return stored
