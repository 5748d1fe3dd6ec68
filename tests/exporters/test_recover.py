"""A short training by the dense network's outputs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import spa
from spa.coupling.analysis import couple
from spa.errors import PlanError
from spa.exporters.pytorch import graph_module, recover, recovered, store
from spa.model.graph import Graph
from spa.model.io import load
from spa.running.runtime import load_session, run

MODULE: Any = sys.modules["spa.exporters.pytorch.recover"]  # the package has a function of this name
MODELS = Path(__file__).parents[2] / "models"


def batches(count: int, size: int = 32) -> list[dict[str, np.ndarray]]:
    with np.load(MODELS / "digits_train.npz") as data:
        images = data["input"][: count * size]
    return [{"input": part} for part in np.split(images, count)]


def test_recovery_lowers_the_distortion_and_stores_what_it_learnt() -> None:
    torch.manual_seed(0)
    dense = load(MODELS / "digits_resnet.onnx").model
    result = spa.prune(dense, ratio=0.7, criterion="l2", round_to=1)
    student, teacher = graph_module(result.model), graph_module(dense)
    statistics = {k: b.clone() for k, b in student.named_buffers()}
    done = recover(student, teacher, batches(6), epochs=4, lr=2e-3)
    assert done.after < 0.5 * done.before
    assert 1 <= done.epoch <= 4
    assert all(torch.equal(b, statistics[k]) for k, b in student.named_buffers())
    with np.load(MODELS / "digits_test.npz") as data:
        x = data["input"][:128]
    wanted, before, after = (
        run(load_session(m), {"input": x})[0] for m in (dense, result.model, store(student, result.model))
    )
    assert np.square(after - wanted).mean() < 0.5 * np.square(before - wanted).mean()


def test_nothing_worse_than_what_was_given_comes_back() -> None:
    dense = load(MODELS / "digits_resnet.onnx").model
    result = spa.prune(dense, ratio=0.2, criterion="l2", round_to=1)
    student = graph_module(result.model)
    given = {k: v.clone() for k, v in student.state_dict().items()}
    done = recover(student, graph_module(dense), batches(3), epochs=1, lr=10.0)
    assert (done.epoch, done.after) == (0, done.before)
    assert all(torch.equal(v, given[k]) for k, v in student.state_dict().items())


def test_one_batch_is_too_few() -> None:
    module = graph_module(load(MODELS / "digits_resnet.onnx").model)
    with pytest.raises(PlanError, match=r"recovery was given 1 batches: one to learn from, one to decide\. Give 2"):
        recover(module, module, batches(1))


class _Sees(torch.nn.Module):
    """A network of the mean of its images, or of every pixel."""

    def __init__(self, pixels: bool) -> None:
        super().__init__()
        self.pixels = pixels

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image.flatten(1) if self.pixels else image.mean(dim=(1, 2, 3))[:, None]


@pytest.mark.parametrize(("pixels", "changes"), [(False, 2), (True, 0)])
@pytest.mark.parametrize("shape", [(4, 3, 16, 16), (4, 16, 16, 3)])
def test_images_are_changed_as_far_as_the_dense_outputs_bear_it(
    shape: tuple[int, ...], pixels: bool, changes: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    # Slowly varying images of different brightness: their means say which is which.
    ramp = torch.linspace(0, 1, 16)[:, None] + torch.linspace(0, 2, 16)
    images = (ramp[..., None] if shape[-1] == 3 else ramp) + 3 * torch.arange(4.0)[:, None, None, None]
    images = images.expand(shape).contiguous()
    if pixels:
        images = torch.rand(shape, generator=generator)
    lessons = _lessons(_Sees(pixels), [{"image": images}], generator)
    assert len(lessons.changes) == changes


def test_other_inputs_than_images_are_left_alone() -> None:
    feed = {"tokens": torch.arange(12).reshape(4, 3), "features": torch.rand(4, 16, 16, 8)}
    lessons = _lessons(_SumOf(), [feed], torch.Generator())
    assert lessons.changes == []


class _SumOf(torch.nn.Module):
    def forward(self, tokens: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return (features.sum(dim=(1, 2, 3)) + tokens.sum(dim=1))[:, None]


def _lessons(teacher: torch.nn.Module, feeds: list[dict[str, torch.Tensor]], generator: torch.Generator) -> Any:
    return MODULE._Lessons(teacher, (), feeds, generator)


def test_residual_sums_agree_too_where_channels_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = load(MODELS / "digits_resnet.onnx").model
    result = spa.prune(dense, ratio=0.5, criterion="l2", round_to=1)
    analysis, data = couple(Graph(dense)), batches(6)
    kept = analysis.kept(result.plan.masks(analysis))
    name = next(n.output[0] for n in dense.graph.node if n.op_type == "Add")
    channels = kept.mask(analysis.axes[name][1])
    assert 0 < channels.sum() < len(channels)
    wanted = _tensor(dense, name, data[0])[:, channels]

    def error() -> float:
        trained = recovered(analysis, result.plan, result.model, data, epochs=3)
        return float(np.square(_tensor(trained, name, data[0]) - wanted).mean())

    with_sums = error()
    monkeypatch.setattr(MODULE, "_residual_sums", lambda *_: [])
    assert with_sums < 0.9 * error()


def _tensor(model: onnx.ModelProto, name: str, feed: dict[str, np.ndarray]) -> np.ndarray:
    other = onnx.ModelProto()
    other.CopyFrom(model)
    other.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    return np.asarray(run(load_session(other), feed)[-1])


def test_few_inputs_for_recovery_are_noted() -> None:
    data = batches(1, 96)[0]
    result = spa.prune(MODELS / "digits_resnet.onnx", ratio=0.3, criterion="l2", data=data, recover=1)
    assert any(n.startswith("recovery learnt from ") and "it gains more from 2000" in n for n in result.report.notes)
