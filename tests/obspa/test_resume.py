"""An interrupted calibration goes on in its folder, to the same bytes; another one is refused there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

import spa
from spa.coupling.analysis import couple
from spa.coupling.plan import make_plan
from spa.errors import OptionError, SpaError
from spa.model.graph import Graph
from spa.obspa import resume, score
from spa.obspa.readers import rows
from spa.obspa.readers.base import FitSettings
from spa.obspa.refit import reconstruct_together
from spa.obspa.score import ScoreSettings, curves
from spa.progress import Progress, silent
from spa.running import journal
from spa.running.journal import LOCK, Journal
from spa.surgery.apply import apply
from tests.obspa.test_obspa import residual_net

MODELS = Path(__file__).parent.parent.parent / "models"
VIT, VGG, TRAIN = MODELS / "digits_vit.onnx", MODELS / "digits_vgg.onnx", MODELS / "digits_train.npz"
OPTIONS: dict[str, Any] = {"ratio": 0.4, "threads": 1, "samples": 16}


class Interrupted(Exception):
    pass


def stop_at(wanted: str, share: float) -> Callable[[str, float], None]:
    def progress(stage: str, done: float) -> None:
        if stage == wanted and done >= share:
            raise Interrupted

    return progress


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def test_scores_and_refits_that_are_kept_are_not_found_again(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_ROWS", 60)  # so that positions are drawn
    rng = np.random.default_rng(0)
    analysis = couple(Graph(residual_net(rng, True, False)))
    batches = [{"x": rng.standard_normal((8, 3, 9, 7)).astype(np.float32)} for _ in range(4)]
    settings = FitSettings(producer_rounds=2, seed=5)

    def run(kept: Journal, progress: Progress = silent) -> tuple[dict[str, list[float]], bytes]:
        losses, _ = curves(analysis, analysis.free, batches, ScoreSettings(seed=7, progress=progress, journal=kept))
        plan = make_plan(analysis, {g.name: np.arange(0, g.size, 2) for g in analysis.free})
        pruned = apply(analysis, plan)
        reconstruct_together(analysis, [(plan, pruned)], batches, settings, progress=progress, journals=[kept])
        return {name: curve.loss.tolist() for name, curve in losses.items()}, pruned.SerializeToString()

    whole = run(Journal())
    for stage, share in (("score", 0.3), ("score", 0.6), ("reconstruct", 0.3), ("reconstruct", 0.6)):
        with pytest.raises(Interrupted):
            run(Journal(work), stop_at(stage, share))
    found = run(Journal(work))
    assert found == whole and list(found[0]) == list(whole[0])
    scored, fitted = counted(monkeypatch, score, "_scored"), counted(monkeypatch, resume, "_recorded")
    assert run(Journal(work)) == whole and not scored and not fitted


@pytest.mark.slow
@pytest.mark.parametrize(("model", "data"), [(VIT, TRAIN), (VGG, None)], ids=["given", "made up"])
def test_an_interrupted_calibration_goes_on_to_the_same_bytes(
    model: Path, data: Path | None, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "MAX_ROWS", 60)  # so that positions are drawn
    scored, fitted = counted(monkeypatch, score, "_scored"), counted(monkeypatch, resume, "_recorded")
    options = OPTIONS | {"samples": 48}
    whole = spa.prune(model, data=data, **options)
    once = len(scored)
    scored.clear()
    for stage, share in (("score", 0.5), ("reconstruct", 0.4), ("reconstruct", 0.7)):
        with pytest.raises(Interrupted):
            spa.prune(model, data=data, work=work, progress=stop_at(stage, share), **options)
    before = len(fitted)
    assert before > 1
    result = spa.prune(model, data=data, work=work, **options)
    assert result.model.SerializeToString() == whole.model.SerializeToString()
    assert len(scored) == once and len(fitted) > before  # nothing twice
    scored.clear()
    fitted.clear()
    again = spa.prune(model, data=data, work=work, **options)
    assert again.model.SerializeToString() == whole.model.SerializeToString()
    assert not scored and not fitted


def counted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[str]:
    calls: list[str] = []
    function = getattr(module, name)

    def call(*arguments: Any) -> Any:
        calls.append(name)
        return function(*arguments)

    monkeypatch.setattr(module, name, call)
    return calls


def test_another_model_other_options_and_other_inputs_are_refused(work: Path, tmp_path: Path) -> None:
    options = {"reconstruct": "none", "work": work, **OPTIONS}
    x = np.load(TRAIN)["input"][:9]
    spa.prune(VGG, data={"input": x}, **options)
    spa.prune(VGG, data={"input": x.copy()}, jobs=1, **options)
    for model, changed in (
        (MODELS / "digits_resnet.onnx", {}),
        (VGG, {"ratio": 0.3}),
        (VGG, {"seed": 1}),
        (VGG, {"data": {"input": x + 1}}),
    ):
        with pytest.raises(OptionError, match="holds the calibration of another model, of other options or inputs"):
            spa.prune(model, **{"data": {"input": x}, **options, **changed})
    with pytest.raises(OptionError, match=r"cannot be told of a Python object. Give a file or arrays"):
        spa.prune(VGG, data=iter([{"input": x}]), **options)
    with FileLock(work / LOCK), pytest.raises(OptionError, match="another calibration is at work"):
        spa.prune(VGG, data={"input": x}, **options)
    (work / journal.NAME).write_text("no JSON")
    with pytest.raises(OptionError, match="holds the calibration of another model"):
        spa.prune(VGG, data={"input": x}, **options)


def test_a_criterion_of_weights_keeps_nothing(work: Path) -> None:
    spa.prune(VGG, ratio=0.3, criterion="l2", work=work)
    assert not list(work.iterdir())


def test_a_full_disk_is_said(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, value: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(journal, "write_value", full)
    with pytest.raises(SpaError, match=r"cannot keep what was calibrated in .*: No space left on device. Choose"):
        spa.prune(VGG, data=TRAIN, reconstruct="none", work=work, **OPTIONS)


@pytest.fixture(autouse=True)
def nothing_half(work: Path) -> Iterator[None]:
    """No test leaves a file that is not whole."""
    yield
    assert all(p.suffix in (journal.SUFFIX, ".json", ".lock") for p in work.iterdir())


def test_values_are_kept_by_key(work: Path) -> None:
    kept = Journal(work)
    part = kept.part("refit", "a/b [0]")
    part.keep({"w": np.arange(3.0)}, 7)
    assert part.get(7)["w"].tolist() == [0, 1, 2]
    assert kept.get(7) is None and part.get(8) is None and kept.part("refit", "a/b [1]").get(7) is None
    assert Journal().get(7) is None
    Journal().keep(1, 7)
