"""The scores and the table of benchmarks/real.py, on outputs made by hand."""

import importlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_ctc_merges_repeats_but_not_across_a_blank(module):
    greedy = module("real_networks.reading").greedy
    assert greedy(np.array([1, 1, 0, 1, 2, 0]), ["", "a", "b"], blank=0) == "aab"
    assert greedy(np.array([2, 0, 0, 1]), "ab", blank=2) == "ab"


def test_boxes_are_grown_and_those_that_moved_do_not_match(module):
    reading = module("real_networks.reading")
    text, moved = np.zeros((2, 1, 60, 90))
    text[0, 20:30, 10:50] = moved[0, 20:30, 48:88] = 0.9
    (box,) = reading.boxes(text[0])
    assert box == pytest.approx([20 - 6.4, 10 - 6.4, 30 + 6.4, 50 + 6.4])  # 1.6 times the area over the perimeter
    score = lambda found: reading.detector_score(None, {"p": text[None]}, {"p": found[None]})["box F1"]  # noqa: E731
    assert score(text) == 100
    assert score(moved) == 0
    merged = text.copy()
    merged[0, 20:50, 10:50] = 0.9
    assert score(merged) == 0  # three lines in one box
    assert score(np.zeros_like(text)) == 0


def test_a_states_samples_lie_along_their_own_axis(module):
    inputs = module("real_networks.base").Inputs(
        feeds={"x": np.arange(10).reshape(5, 2), "state": np.arange(15).reshape(3, 5)}, axes={"state": 1}, batch=2
    )
    shapes = [{name: array.shape for name, array in batch.items()} for batch in inputs.batches()]
    assert shapes == [{"x": (2, 2), "state": (3, 2)}] * 2 + [{"x": (1, 2), "state": (3, 1)}]
    assert (
        np.concatenate([batch["state"] for batch in inputs.batches()], axis=1).tolist()
        == inputs.feeds["state"].tolist()
    )


def test_faces_and_photographs_of_calibration_and_test_are_disjoint(module, tmp_path):
    faces, base = module("real_networks.faces"), module("real_networks.base")
    data = tmp_path / "skimage" / "data"
    data.mkdir(parents=True)
    people = np.arange(200.0)[:, None, None] / 255 * np.ones((1, 25, 25))  # each of one grey
    np.save(data / "lfw_subset.npy", people)
    for part in (0, 1):
        assert len(faces.PHOTOGRAPHS[part]) == 8
        for at, name in enumerate(faces.PHOTOGRAPHS[part]):
            Image.new("L", (90, 80), 100 * part + at).save(data / name)
    place = base.Place(tmp_path)
    greys = [{int(np.asarray(f).max()) for f in faces.real_faces(place, part)} for part in (0, 1)]
    assert [len(g) for g in greys] == [50, 50] and not greys[0] & greys[1] and max(greys[0] | greys[1]) < 100
    for part in (0, 1):
        grounds = [int(np.asarray(image).min()) for image in faces.photographs(place, part)]
        assert all(100 * part <= g + 2 and g - 2 <= 100 * part + 7 for g in grounds)
        assert faces.cuts(24)(place, part, 20).feeds["cuts"].shape == (20, 3, 24, 24)
    mine = tmp_path / "mine"
    mine.mkdir()
    for at in range(3):
        Image.new("RGB", (90, 80), (at, at, at)).save(mine / f"{at}.png")
    counts = [len(faces.photographs(base.Place(tmp_path, mine), part)) for part in (0, 1)]
    assert counts == [2, 1]


def test_words_and_fonts_of_calibration_and_test_are_disjoint(module):
    text, missing = module("real_networks.text"), module("real_networks.base").Missing
    assert not set(text.words(0)) & set(text.words(1))
    assert not set(text.sentences(0)) & set(text.sentences(1))
    assert not set(text.chinese_words(0)) & set(text.chinese_words(1))
    try:
        assert not set(text.fonts(0)) & set(text.fonts(1))
    except missing as error:
        assert "fonts" in str(error)


@pytest.mark.parametrize(
    ("data", "reported", "apart", "said"),
    [("128", 0.02, 0.03, "yes"), ("128", 0.02, 0.05, "**no**"), ("none", 0.02, 0.05, ""), ("128", None, 0.05, "")],
)
def test_a_report_with_real_data_is_honest_from_half_of_the_change_apart(module, data, reported, apart, said):
    row = {"title": "net", "metric": "top-1", "status": "ok", "reason": "", "seconds": 10.0}
    row |= {"data": {"dense": {"top-1": 90}, "pruned": {"top-1": 80}, "change apart": apart, "dense pass": 2.0}}
    row |= {"report": {"calibration": {"after": reported, "agreement": {"y": 0.5}}}}
    cells = module("real").cells(f"net/obspa/{data}/0.3", "abc", row)
    assert cells[8] == said
    assert cells[-2:] == ["5.0", "abc"]


def test_a_run_that_failed_is_a_row_that_says_so(module):
    row = {"title": "net", "metric": "top-1", "status": "out of memory", "reason": "bad_alloc", "peak_mb": 4776.2}
    cells = module("real").cells("net/obspa/none/0.3", "abc", row)
    assert "out of memory: bad_alloc" in cells
    assert "4776" in cells
