"""A short training by the dense network's outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import spa
from spa.errors import PlanError
from spa.exporters.pytorch import graph_module, recover, store
from spa.model.io import load
from spa.running.runtime import load_session, run

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
