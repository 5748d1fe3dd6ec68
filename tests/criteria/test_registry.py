"""The registry: what is in it, what may stand for a name, the three kinds of answer, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import spa
from spa import criteria
from spa.coupling.plan import make_plan
from spa.criteria import Context, Criterion, Curve, Curves, Parameter, Removal, registry
from spa.errors import PlanError

ROOT = Path(__file__).parents[2]
RESNET = ROOT / "models" / "digits_resnet.onnx"
DATA = ROOT / "models" / "digits_train.npz"
BUILT_IN = {  # what each needs beside weights, and its reconstruction
    "activation_l2": ({"inputs"}, "none"),
    "bn_scale": (set(), "none"),
    "crop": ({"hessian_gradients"}, "none"),
    "fisher": ({"squared_gradients"}, "none"),
    "flap": ({"inputs"}, "bias"),
    "fpgm": (set(), "none"),
    "gate": ({"inputs"}, "none"),
    "grasp": ({"hessian_gradients"}, "none"),
    "l1": (set(), "none"),
    "l2": (set(), "none"),
    "lamp": (set(), "none"),
    "obspa": ({"inputs"}, "full"),
    "random": (set(), "none"),
    "snip": ({"gradients"}, "none"),
    "taylor": ({"gradients"}, "none"),
    "wanda": ({"inputs"}, "none"),
    "zero": (set(), "none"),
}


@pytest.fixture(autouse=True)
def entries(monkeypatch: pytest.MonkeyPatch) -> dict[str, Criterion]:
    """The registry, whose changes are undone."""
    spa.criterion  # noqa: B018 - obspa and zero are registered with it
    copy = dict(registry._CRITERIA)
    monkeypatch.setattr(registry, "_CRITERIA", copy)
    return copy


def absolute(parameter: Parameter) -> np.ndarray:
    return parameter.per_channel(np.abs)


def test_every_criterion_says_what_it_needs_and_where_it_comes_from() -> None:
    found = {n: c for n, c in criteria.registered().items() if n in BUILT_IN}
    assert {n: (set(c.needs) - {"weights"}, c.reconstruct) for n, c in found.items()} == BUILT_IN
    for name, entry in found.items():
        assert entry.name == name
        assert re.fullmatch(r"[A-Z][^.]*\.", entry.summary), entry.summary
        assert entry.source or name == "random"


def test_names_are_sorted_and_can_be_those_that_need_little() -> None:
    names = criteria.names()
    assert names == sorted(names) and set(BUILT_IN) <= set(names)
    little = criteria.names({"weights"})
    assert {n for n in little if n in BUILT_IN} == {n for n, (needs, _) in BUILT_IN.items() if not needs}


@pytest.mark.parametrize("name", BUILT_IN)
def test_no_name_is_taken_twice(name: str) -> None:
    with pytest.raises(ValueError, match=f"criterion '{name}' is registered already"):
        spa.criterion(name)(absolute)


@pytest.mark.parametrize(
    ("chosen", "hint"), [("lampp", " Did you mean 'lamp'?"), ("waanda", " Did you mean 'wanda'?"), ("?", ""), (3, "")]
)
def test_an_unknown_name_is_refused_with_the_known_ones(chosen: Any, hint: str) -> None:
    with pytest.raises(PlanError) as error:
        spa.prune(RESNET, criterion=chosen)
    assert str(error.value) == f"unknown criterion {chosen!r}.{hint} Choose one of {', '.join(criteria.names())}."


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"needs": frozenset({"weights", "labls"})}, "criterion 'x' needs 'labls'. Choose from gradients, hessian"),
        ({"reconstruct": "all"}, "criterion 'x' has reconstruct 'all'. Choose one of none, bias, full."),
    ],
)
def test_entries_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Criterion(name="x", score=lambda context: {}, summary="X.", **options)


@pytest.mark.parametrize("name", [None, 3, "", " ", ["x"]])
def test_what_is_no_name_is_refused(name: Any) -> None:
    for register in (lambda: spa.criterion(name)(absolute), lambda: Criterion(name, lambda context: {}, "X.")):
        with pytest.raises(ValueError, match=f"a criterion is named {re.escape(repr(name))}. Name it with a string"):
            register()


def test_a_decorator_without_a_name_is_refused_with_the_right_call(entries: dict[str, Criterion]) -> None:
    before = dict(entries)
    with pytest.raises(TypeError, match=r"Write @spa\.criterion\('absolute'\) above it\."):
        spa.criterion(absolute)  # type: ignore[call-overload] # the mistake
    with pytest.raises(TypeError, match=r"criterion 'x' is 3\. Decorate a function of a Parameter\."):
        spa.criterion("x")(3)  # type: ignore[arg-type] # the mistake
    with pytest.raises(TypeError, match=r"criterion 'x' has the score 3\. Give a function of a Context\."):
        Criterion("x", 3, "X.")  # type: ignore[arg-type] # the mistake
    assert entries == before


@pytest.mark.parametrize("kind", [list, tuple, set, frozenset])
def test_needs_are_any_collection_of_names(kind: Any) -> None:
    entry = Criterion("x", lambda context: {}, "X.", needs=kind(["weights", "inputs"]))
    assert entry.needs == {"weights", "inputs"} and isinstance(entry.needs, frozenset)


@pytest.mark.parametrize("needs", ["weights", None, 3, [["weights"]], [3, "weights"]])
def test_needs_that_are_no_names_are_refused(needs: Any) -> None:
    with pytest.raises(ValueError, match=r"criterion 'x' (has needs .* Give a set|needs .* Choose from)"):
        Criterion("x", lambda context: {}, "X.", needs=needs)


# -- what may stand for a name ----------------------------------------------------------------------------------------


def test_a_function_prunes_as_the_criterion_of_its_formula_does() -> None:
    found = spa.prune(RESNET, criterion=absolute, ratio=0.3)
    assert found.plan == spa.prune(RESNET, criterion="l1", ratio=0.3).plan
    assert found.plan != spa.prune(RESNET, criterion="random", ratio=0.3).plan
    assert json.loads(json.dumps(found.report.to_dict()))["requested"]["scoring"]["criterion"] == "absolute"
    assert "absolute" not in criteria.names()


def test_a_decorated_function_is_found_by_its_name_and_stays_as_it_is() -> None:
    decorated = spa.criterion("mine", source="Here.", reconstruct="bias")(absolute)
    assert decorated is absolute
    entry = criteria.get("mine")
    assert (entry.name, entry.source, entry.reconstruct, entry.needs) == ("mine", "Here.", "bias", {"weights"})
    assert spa.criterion("other", summary="Said.")(absolute) and criteria.get("other").summary == "Said."
    report = spa.prune(RESNET, criterion="mine", ratio=0.3, samples=16).report
    assert report.calibration is not None and report.calibration["reconstruct"] == "bias"
    assert report.calibration is not None and report.calibration["after"] != report.calibration["before"]


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (lambda p: np.ones(p.channels + 1), r"returns shape \(\d+,\)"),
        (lambda p: 1.0, r"returns shape \(\)"),
        (lambda p: np.full(p.channels, np.nan), "returns values that are not finite numbers"),
        (lambda p: np.full(p.channels, "a"), "returns values that are not finite numbers"),
    ],
)
def test_a_function_that_gives_no_scores_is_refused(function: Callable[[Parameter], Any], what: str) -> None:
    with pytest.raises(PlanError, match=f"criterion '<lambda>' {what} for parameter '.*'. Return one finite score"):
        spa.prune(RESNET, criterion=function, ratio=0.3)


def test_a_function_that_raises_is_named_with_the_parameter() -> None:
    def mine(parameter: Parameter) -> np.ndarray:
        return absolute(parameter) / np.zeros(2)[5]

    with pytest.raises(PlanError, match=r"criterion 'mine' raises IndexError for parameter '.+': index 5 is") as error:
        spa.prune(RESNET, criterion=mine, ratio=0.3)
    assert isinstance(error.value.__cause__, IndexError)


def test_packages_register_through_their_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    def entry_points(group: str) -> list[SimpleNamespace]:
        assert group == "spa.criteria"
        return [SimpleNamespace(load=lambda: spa.criterion("of_a_package")(absolute))]

    monkeypatch.setattr(registry, "entry_points", entry_points)
    registry._load_packages.cache_clear()
    assert "of_a_package" in criteria.names() and criteria.get("of_a_package").name == "of_a_package"


# -- what a criterion is given, and what it may answer ----------------------------------------------------------------


def test_only_what_is_needed_is_in_the_context() -> None:
    seen: dict[str, Context] = {}

    def keep(context: Context) -> dict[str, np.ndarray]:
        seen["context"] = context
        return {g.name: np.arange(g.size, dtype=float) for g in context.groups}

    request: dict[str, Any] = {"ratio": 0.3, "data": DATA, "samples": 20, "reconstruct": "bias"}  # inputs are there
    entry = Criterion(name="seeing", score=keep, summary="All.", needs=frozenset({"weights"}))
    spa.prune(RESNET, criterion=entry, norm="max", agg="prod", seed=3, **request)
    context = seen["context"]
    assert (context.norm, context.agg, context.seed, context.inputs, context.derivatives) == (
        "max",
        "prod",
        3,
        None,
        {},
    )
    with pytest.raises(PlanError, match="the criterion runs the model, but there are no inputs"):
        context.required_inputs()
    spa.prune(RESNET, criterion=replace(entry, needs=frozenset({"inputs"})), **request)
    inputs = seen["context"].required_inputs()
    assert (inputs.samples, inputs.labels, inputs.synthetic) == (20, None, False)
    spa.prune(RESNET, criterion=replace(entry, needs=frozenset({"labels"})), **request | {"reconstruct": None})
    labels = seen["context"].required_inputs().labels
    assert labels is not None and labels.shape == (20,)
    given = {"stem": np.ones(1)}
    spa.prune(RESNET, criterion=replace(entry, needs=frozenset({"squared_gradients"})), gradients=given, ratio=0.3)
    assert seen["context"].derivatives == {"squared_gradients": given} and seen["context"].inputs is None


def test_labels_that_a_criterion_needs_and_nobody_gives_are_asked_for() -> None:
    entry = Criterion(name="labelled", score=lambda context: {}, summary="X.", needs=frozenset({"labels"}))
    with pytest.raises(PlanError, match=r"criterion 'labelled' needs labelled data\. Give data"):
        spa.prune(RESNET, criterion=entry, samples=8)


def test_curves_divide_the_budget_and_are_reported_as_losses() -> None:
    def steep(context: Context) -> Curves:
        """The first group costs nothing, all others much."""
        curves = {}
        for i, g in enumerate(context.groups):
            curves[g.name] = Curve(np.arange(g.size)[::-1], np.linspace(0, 0 if i == 0 else 100, g.size + 1))
        return Curves((curves,))

    analysis = spa.analyze(RESNET)
    first = next(g for g in analysis.prunable if not g.crossings)
    entry = Criterion(name="steep", score=steep, summary="X.")
    result = spa.prune(RESNET, criterion=entry, ratio=0.05, round_to=1)
    kept = result.plan.kept[first.name]
    assert kept == tuple(range(len(kept)))  # the curve's order: the last channel goes first
    assert [g.loss for g in result.report.groups if g.name == first.name] == [0.0]
    scores = criteria.score(analysis, [first, analysis.free[-1]], entry)
    assert (scores[first.name] == 0).all() and scores[analysis.free[-1].name].min() > 0


def test_a_removal_is_carried_out_whatever_the_budget() -> None:
    folded = []

    def one(context: Context) -> Removal:
        group = context.groups[0]
        plan = make_plan(context.analysis, {group.name: np.arange(1, group.size)})
        return Removal(plan, lambda model, base: folded.append(model), ("said",))

    entry = Criterion(name="one", score=one, summary="X.")
    result = spa.prune(RESNET, criterion=entry, ratio=0.9)
    ((name, kept),) = result.plan.kept.items()
    assert kept == tuple(range(1, result.plan.sizes[name]))
    assert len(folded) == 1 and "said" in result.report.notes
    with pytest.raises(PlanError, match="criterion 'one' gives no scores"):
        criteria.score(result.analysis, result.analysis.free, entry)


def pruned_by(answer: Callable[[str, int], Any]) -> spa.Result:
    """Prune by a criterion that answers for each group; None leaves a group out."""

    def score(context: Context) -> Any:
        found = {g.name: answer(g.name, g.size) for g in context.groups}
        return {name: scores for name, scores in found.items() if scores is not None}

    return spa.prune(RESNET, criterion=Criterion("mine", score, "X."), ratio=0.1)


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (lambda name, n: np.full(n, np.nan), "values that are not finite numbers"),
        (lambda name, n: [float("inf")] * n, "values that are not finite numbers"),
        (lambda name, n: np.ones(n, complex), "values that are not finite numbers"),
        (lambda name, n: ["a"] * n, "values that are not finite numbers"),
        (lambda name, n: [None] * n, "values that are not finite numbers"),
        (lambda name, n: np.ones((n, 1)), r"shape \(\d+, 1\)"),
        (lambda name, n: 1.0, r"shape \(\)"),
        (lambda name, n: {1: 2}, "a dict"),
        (lambda name, n: [[1], [1, 2]], "a list that is no array"),
    ],
)
def test_scores_that_are_none_are_refused_with_the_criterion_and_the_group(answer: Any, fault: str) -> None:
    message = (
        rf"criterion 'mine' gives {fault} for group '.+\[\d\]'\. Give one finite score per channel, shape \(\d+,\)\."
    )
    with pytest.raises(PlanError, match=message):
        pruned_by(answer)


@pytest.mark.parametrize("answer", [None, 3, [np.ones(3)], np.ones(3)])
def test_an_answer_of_no_kind_is_refused(answer: Any) -> None:
    entry = Criterion("mine", lambda context: answer, "X.")
    analysis = spa.analyze(RESNET)
    for ask in (
        lambda: spa.prune(RESNET, criterion=entry, ratio=0.1),
        lambda: criteria.score(analysis, analysis.free, entry),
    ):
        with pytest.raises(PlanError, match=f"criterion 'mine' answers with a {type(answer).__name__}. Return scores"):
            ask()


def test_scores_may_be_lists_and_leave_groups_out_which_keep_everything() -> None:
    only = max(spa.analyze(RESNET).free, key=lambda g: g.size).name
    result = pruned_by(lambda name, n: list(range(n)) if name == only else None)
    assert result.plan.kept.keys() == {only}
    kept = result.plan.kept[only]
    assert kept == tuple(range(result.plan.sizes[only]))[-len(kept) :]
    with pytest.raises(PlanError, match="criterion 'mine' name no group that can be pruned"):
        pruned_by(lambda name, n: None)


@pytest.mark.parametrize(
    ("curve", "message"),
    [
        (lambda n: np.ones(n), "gives no curve for group"),
        (lambda n: Curve(np.zeros(n, int), np.arange(n + 1.0)), "gives no curve for group"),
        (lambda n: Curve(np.arange(n), np.arange(n)), "gives no curve for group"),
        (lambda n: Curve(np.arange(n), np.full(n + 1, np.nan)), "gives no curve for group"),
    ],
)
def test_curves_that_are_none_are_refused(curve: Any, message: str) -> None:
    entry = Criterion("mine", lambda c: Curves(({g.name: curve(g.size) for g in c.groups},)), "X.")
    with pytest.raises(PlanError, match=f"criterion 'mine' {message}"):
        spa.prune(RESNET, criterion=entry, ratio=0.1)


def test_the_guide_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(registry, "_CRITERIA", dict(registry._CRITERIA))
    text = (ROOT / "docs" / "guides" / "write-a-criterion.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 4
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(block, namespace)
    assert {"spread", "readers"} <= set(criteria.names())
