"""A short training after pruning: the pruned network learns the dense one's outputs. No labels are needed.

G. Hinton et al., Distilling the knowledge in a neural network (arXiv 1503.02531), in the limit of high temperature
(section 2.1): squared differences of logits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from spa.algebra.axes import Axes, Kept
from spa.coupling.analysis import Analysis
from spa.coupling.plan import Plan
from spa.errors import PlanError
from spa.exporters.pytorch.module import OnnxModule, graph_module, unshared
from spa.exporters.pytorch.operators import tensor
from spa.frameworks.torch import array
from spa.model.alternatives import reunited
from spa.model.graph import Graph
from spa.model.normalise import normalise
from spa.model.traits import FLOATS

Feeds = Mapping[str, np.ndarray]
Progress = Callable[[str, float], None]
Cut = Callable[[Tensor], Tensor]  # takes of a dense feature what the pruned network has
Change = Callable[[Mapping[str, Tensor], torch.Generator], dict[str, Tensor]]
ADD = "Add"
HELD_OUT = 0.2  # of the batches, which decide
DRAWS = 4  # of the change of a batch, that tell whether the outputs bear it
BEARABLE = 0.5  # of the variance of the outputs, by which they may change where images are shifted or flipped


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


def recovered(
    analysis: Analysis,
    plan: Plan,
    pruned: ModelProto,
    batches: Sequence[Feeds],
    epochs: int = 20,
    seed: int = 0,
    progress: Progress = lambda stage, share: None,
) -> ModelProto:
    """Train a pruned network towards the dense one, at the outputs and at the residual sums; see :func:`recover`.

    Args:
        analysis: the dense network.
        plan: the kept channels.
        pruned: the pruned network; not changed.
        batches: inputs by name; two or more.
        epochs: passes over the batches.
        seed: of the batches' order and of what is done to images.
        progress: called with the stage and the share of it that is done.

    Returns:
        The pruned network with the best weights seen.

    Raises:
        UnsupportedError: an operator has no counterpart in PyTorch.
        PlanError: too few batches, or no float output to learn from.
    """
    dense, kept = analysis.graph, analysis.kept(plan.masks(analysis))
    models = reunited(pruned), reunited(dense.model)  # loops and branches as they came
    names = _residual_sums(analysis, *(Graph(m, dense.base) for m in models))
    student, teacher = (graph_module(_with_outputs(m, names), dense.base) for m in models)
    cuts = [partial(_kept_part, kept, analysis.axes[n]) for n in names]
    recover(student, teacher, batches, epochs, seed=seed, progress=progress, features=cuts)
    return store(student, pruned)


def _residual_sums(analysis: Analysis, *networks: Graph) -> list[str]:
    """Return the sums of two computed tensors of equal shapes that all networks have."""
    graph, found = analysis.graph, []

    def shape(name: str) -> list[int] | None:
        axes = analysis.axes.get(name)
        return None if axes is None else [e.size for e in axes]

    for node in graph.nodes:
        if node.key != ADD or any(x in graph.constants for x in node.inputs):
            continue
        name = node.outputs[0]
        alike = shape(name) is not None and all(shape(x) == shape(name) for x in node.inputs)
        makers = [network.producer.get(name) for network in networks]
        if alike and all(m is not None and m.key == ADD for m in makers) and name not in graph.outputs:
            found.append(name)
    return found


def _with_outputs(model: ModelProto, names: Sequence[str]) -> ModelProto:
    """Return a copy of a network that gives some of its tensors, too, as its last outputs."""
    more = ModelProto()
    more.CopyFrom(model)
    more.graph.output.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names)
    return more


def _kept_part(kept: Kept, axes: Axes, value: Tensor) -> Tensor:
    """Cut out of a dense tensor what the pruned network has of it."""
    for axis, expr in enumerate(axes):
        if kept.size(expr) != expr.size:
            size = value.shape[axis]
            mask = kept.mask(expr) if size == expr.size else kept.stretched(expr, size)
            if mask is not None:
                value = value.index_select(axis, torch.from_numpy(np.flatnonzero(mask)).to(value.device))
    return value


def recover(
    student: OnnxModule,
    teacher: OnnxModule,
    batches: Sequence[Feeds],
    epochs: int = 20,
    lr: float = 1e-3,
    seed: int = 0,
    progress: Progress = lambda stage, share: None,
    features: Sequence[Cut] = (),
) -> Recovery:
    """Train a pruned network to give what the dense one gives; the best weights seen stay in it.

    AdamW with one cycle of its rate (L. N. Smith and N. Topin, Super-convergence, arXiv 1708.07120).
    BatchNormalizations keep their running statistics and dropout is off. The loss is the distortion that is reported,
    squared differences of the float outputs over the dense outputs' variance, and the same of the features (A. Romero
    et al., FitNets, arXiv 1412.6550). Images are shifted and flipped at random as far as the dense network's outputs
    bear it. What is best is decided by the outputs on batches that are left out of training, and the weights given are
    a candidate. Both modules are left in evaluation mode.

    Args:
        student: the pruned network; its parameters change in place.
        teacher: the dense network.
        batches: inputs by name; two or more. 2,000 samples are worth training on, 500 are learnt by heart.
        epochs: passes over the batches.
        lr: the highest rate.
        seed: of the batches' order and of what is done to images.
        progress: called with the stage and the share of it that is done.
        features: the last outputs of both modules, in order, which shall agree but are no outputs of the network.

    Raises:
        PlanError: too few batches, or no float output to learn from.
    """
    if len(batches) < 2:
        raise PlanError(f"recovery was given {len(batches)} batches: one to learn from, one to decide. Give 2 or more.")
    device = next(student.parameters()).device
    feeds = [{n: tensor(np.asarray(v)).to(device) for n, v in batch.items()} for batch in batches]
    student.eval()
    cut = len(batches) - min(max(1, round(HELD_OUT * len(batches))), len(batches) - 1)
    lessons = _Lessons(teacher.eval(), features, feeds, torch.Generator().manual_seed(seed))

    def judged() -> float:
        with torch.no_grad():
            return float(np.mean([lessons.distortion(student, feed).item() for feed in feeds[cut:]]))

    before = best = judged()
    best_weights, best_epoch = copy.deepcopy(student.state_dict()), 0
    for epoch in _trained(student, lambda i: lessons.loss(student, feeds[i]), cut, epochs, lr, seed):
        error = judged()
        if error < best:
            best, best_epoch, best_weights = error, epoch, copy.deepcopy(student.state_dict())
        progress("recover", epoch / epochs)
    student.load_state_dict(best_weights)
    return Recovery(before, best, best_epoch)


class _Lessons:
    """The dense network's answers, and the differences of a student's.

    Args:
        teacher: the dense network, whose last outputs are the features.
        features: them.
        feeds: all inputs.
        generator: draws what is done to images.
    """

    def __init__(
        self,
        teacher: OnnxModule,
        features: Sequence[Cut],
        feeds: Sequence[Mapping[str, Tensor]],
        generator: torch.Generator,
    ) -> None:
        self.teacher, self.features, self.generator = teacher, features, generator
        with torch.no_grad():
            answers = [self._floats(teacher(**feed))[0] for feed in feeds]
            if not answers[0]:
                raise PlanError("the network has no float output to learn from. Leave recovery out.")
            self.scales = _variances(answers)
            self.changes = [c for c in (_shifted, _flipped) if self._bears(c, feeds[0], answers[0])]

    def loss(self, student: nn.Module, feed: Mapping[str, Tensor]) -> Tensor:
        """Return the distortion of the outputs and the features on inputs that are changed at random."""
        for change in self.changes:
            feed = change(feed, self.generator)
        with torch.no_grad():
            targets, hidden = self._floats(self.teacher(**feed))
        outputs, seen = self._floats(student(**feed))
        result = _distortion(outputs, targets, self.scales)
        kept = [cut(h) for cut, h in zip(self.features, hidden, strict=True)]
        if kept:
            result = result + _distortion(seen, kept, [h.double().var().clamp(min=1e-12) for h in kept])
        return result

    def distortion(self, student: nn.Module, feed: Mapping[str, Tensor]) -> Tensor:
        """Return the distortion of the outputs on inputs as they are."""
        outputs, targets = (self._floats(module(**feed))[0] for module in (student, self.teacher))
        return _distortion(outputs, targets, self.scales)

    def _floats(self, answer: Any) -> tuple[list[Tensor], list[Tensor]]:
        """Return the float outputs of the network, and the features."""
        listed = answer if isinstance(answer, tuple) else (answer,)
        last = len(listed) - len(self.features)
        outputs = [v for v in listed[:last] if isinstance(v, Tensor) and v.is_floating_point()]
        return outputs, list(listed[last:])

    def _bears(self, change: Change, feed: Mapping[str, Tensor], answers: Sequence[Tensor]) -> bool:
        """Return whether the dense outputs stay what they are where images are changed."""
        draws = [change(feed, self.generator) for _ in range(DRAWS)]
        if all(draw[n] is feed[n] for draw in draws for n in feed):
            return False
        errors = [_distortion(self._floats(self.teacher(**draw))[0], answers, self.scales) for draw in draws]
        return bool(torch.stack(errors).mean() < BEARABLE)


def _shifted(feed: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Shift the images of a batch by up to an eighth of their size; what comes in repeats the border."""

    def shifted(images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        most = height // 8, width // 8
        down, right = (int(torch.randint(0, 2 * m + 1, (), generator=generator)) for m in most)
        padded = nn.functional.pad(images, (most[1], most[1], most[0], most[0]), mode="replicate")
        return padded[..., down : down + height, right : right + width]

    return {n: _on_images(v, shifted) for n, v in feed.items()}


def _flipped(feed: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Swap left and right in half of the images of a batch."""

    def flipped(images: Tensor) -> Tensor:
        chosen = torch.rand(len(images), generator=generator) < 0.5
        return torch.where(chosen[:, None, None, None].to(images.device), images.flip(-1), images)

    return {n: _on_images(v, flipped) for n, v in feed.items()}


def _on_images(value: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Change images of 1, 3 or 4 channels, (samples, channels, height, width) or channels last; else nothing."""
    if value.ndim != 4 or not value.is_floating_point():
        return value
    axis = next((a for a in (1, -1) if value.shape[a] in (1, 3, 4)), None)
    return value if axis is None else change(value.movedim(axis, 1)).movedim(1, axis)


def _trained(
    student: nn.Module, loss: Callable[[int], Tensor], batches: int, epochs: int, lr: float, seed: int
) -> Iterator[int]:
    """Train on the first batches, shuffled anew in each epoch; yield the number of each epoch when it is over."""
    optimiser = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=max(epochs * batches, 1) + 1)
    order = torch.Generator().manual_seed(seed)
    for epoch in range(1, epochs + 1):
        for i in torch.randperm(batches, generator=order).tolist():
            optimiser.zero_grad()
            loss(i).backward()
            optimiser.step()
            schedule.step()
        yield epoch


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
