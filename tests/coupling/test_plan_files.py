"""Plans as text: what is read, and what is refused in a sentence that says where."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spa
from spa.errors import SpaError, UnreadableError
from tests.oracle import Net

PLAN = spa.Plan(kept={"g": (0, 2)}, sizes={"g": 3}, parameters={"w": {0: (0, 2)}})


def text(**fields: Any) -> str:
    return json.dumps(json.loads(PLAN.to_json()) | fields)


def group(**fields: Any) -> str:
    return text(groups={"g": {"size": 3, "kept": [0, 2]} | fields})


@pytest.mark.parametrize("given", [PLAN.to_json(), "\ufeff" + PLAN.to_json(), group(kept=[2, 0])])
def test_a_plan_is_read_with_a_byte_order_mark_and_in_any_order(given: str) -> None:
    assert spa.Plan.from_json(given) == PLAN


def test_a_constant_that_uses_cut_differently_is_listed_for_each_use(tmp_path: Path) -> None:
    net = Net()
    shared = net.constant(np.linspace(0.5, 1.5, 16), "shared")
    x = net.input("x", ["n", 5])
    hidden = [net.node("Mul", net.matmul(x, 5, 16, bias=False), shared) for _ in range(2)]
    ends = [net.matmul(net.node("Relu", h), 16, 3, bias=False) for h in hidden]
    whole = net.node("Mul", net.matmul(x, 5, 16, bias=False), shared)
    model = net.model(net.node("Add", *ends), whole)
    plan = spa.prune(model, criterion="random", ratio=0.3, round_to=1).plan
    assert "shared" not in plan.parameters
    cuts = {cut.output: cut for cut in plan.uses["shared"]}
    assert cuts.keys() == {*hidden, whole}
    assert {cut.operand for cut in cuts.values()} == {1}
    assert cuts[whole].kept == {}
    kept = [cuts[h].kept[0] for h in hidden]
    assert kept[0] != kept[1]
    assert set(kept) == set(plan.kept.values())
    assert spa.Plan.from_json(plan.to_json()) == plan


def uses(*entries: Any) -> str:
    return text(uses={"w": list(entries)})


REFUSED = {
    text(uses=[]): "'uses' is a list, expected an object",
    text(uses={"w": 3}): "the uses of 'w' are a number, expected a list",
    uses(3): "one of the uses of 'w' is a number, expected an object",
    uses({"output": "y"}): "one of the uses of 'w' names no 'output' and 'operand'",
    uses({"output": "y", "operand": True, "kept": {}}): "one of the uses of 'w' names no 'output' and 'operand'",
    uses({"output": "y", "operand": 1, "kept": {"0": [0.5]}}): "parameter 'w' keeps 0.5, which is no index",
    "": "it is empty",
    " \n": "it is empty",
    "{": "it is not JSON at line 1",
    '{"size": ' + "1" * 5000: "it is not JSON",
    "[" * 100_000: "it is nested too deeply",
    "[]": "it is a list, expected an object",
    "null": "it is nothing, expected an object",
    "{}": "it names no 'format'",
    text(format="1"): 'its format is "1", expected the number 1',
    text(format=True): "its format is true, expected the number 1",
    text(groups=None): "'groups' is nothing, expected an object",
    text(groups={"g": 3}): "group 'g' is a number, expected an object",
    text().replace('"kept": {', '"format": 1, "kept": {'): "it names 'format' twice in one place",
    **{
        group(size=size): f"group 'g' has the size {size!r}, expected a positive whole number"
        for size in (3.0, "3", True, None, -1, 0, float("inf"), [3])
    },
    group(kept=None): "group 'g' keeps nothing, expected a list of indices",
    group(kept="02"): "group 'g' keeps a string, expected a list of indices",
    group(kept=[True, False, True]): "group 'g' keeps a mask, expected a list of indices",
    group(kept=[0, True]): "group 'g' keeps true, which is no index",
    group(kept=[0, 1.0]): "group 'g' keeps 1.0, which is no index",
    group(kept=["1"]): "group 'g' keeps \"1\", which is no index",
    group(kept=[float("inf")]): "group 'g' keeps Infinity, which is no index",
    group(kept=[[0]]): "group 'g' keeps [0], which is no index",
    group(kept=[1, 0, 1]): "group 'g' keeps index 1 twice",
    group(kept=[-1]): "group 'g' keeps index -1: its channels are 0 to 2",
    group(kept=[0, 3]): "group 'g' keeps index 3: its channels are 0 to 2",
    text(kept=[]): "'kept' is a list, expected an object",
    text(kept={"w": [0]}): "parameter 'w' is a list, expected an object",
    text(kept={"w": {"a": [0]}}): "parameter 'w' has the axis 'a', expected a whole number",
    text(kept={"w": {"0": [-1]}}): "parameter 'w' keeps index -1, which is negative",
    text(kept={"w": {"0": [1.5]}}): "parameter 'w' keeps 1.5, which is no index",
}


@pytest.mark.parametrize("given", REFUSED, ids=range(len(REFUSED)))
def test_what_is_no_plan_is_refused_and_says_where(given: str) -> None:
    with pytest.raises(spa.PlanError) as error:
        spa.Plan.from_json(given)
    fact = REFUSED[given]
    assert str(error.value).startswith(f"this is not a plan: {fact}")
    assert str(error.value).endswith(". Write one with --plan-out.")


def test_a_plan_of_another_format_is_refused_with_both() -> None:
    with pytest.raises(spa.PlanError, match=r"the plan has format 2, this version reads 1\. Make a new plan\."):
        spa.Plan.from_json(text(format=2))


def test_a_file_that_cannot_be_read_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "latin.json").write_bytes(b"\xe9")
    with pytest.raises(spa.PlanError, match=r"this is not a plan: '.*latin.json' is not text in UTF-8"):
        spa.Plan.load(tmp_path / "latin.json")
    for name, fact in (("none.json", "No such file or directory"), ("", "it is a folder")):
        with pytest.raises(UnreadableError) as error:
            spa.Plan.load(tmp_path / name)
        assert str(error.value) == f"cannot read the plan {str(tmp_path / name)!r}: {fact}. Check the path."


def test_a_plan_is_written_and_read_again(tmp_path: Path) -> None:
    plan = spa.Plan(kept={"w[0]": (0, 2)}, sizes={"w[0]": 3}, parameters={"w": {0: (0, 2)}})
    plan.save(tmp_path / "plan.json")
    assert spa.Plan.load(tmp_path / "plan.json") == plan
    with pytest.raises(SpaError, match="its folder does not exist"):
        plan.save(tmp_path / "none" / "plan.json")


def test_a_plan_that_computes_its_indices_is_the_one_that_holds_them() -> None:
    plan = spa.prune("models/digits_vit.onnx", ratio=0.3, criterion="l2").plan
    held = spa.Plan.from_json(plan.to_json())
    assert plan.parameters and plan == held and held == plan
    sent = pickle.loads(pickle.dumps(plan))
    assert type(sent.parameters) is dict and sent == held


def test_what_a_plan_says_against_its_groups_is_noted() -> None:
    model = Path("models/digits_vgg.onnx")
    plan = spa.prune(model, ratio=0.3, criterion="l2").plan
    again = spa.prune(model, plan=spa.Plan.from_json(plan.to_json()))
    assert not [n for n in again.report.notes if "'kept'" in n]
    edited = json.loads(plan.to_json())
    name, axes = next(iter(edited["kept"].items()))
    axes[next(iter(axes))] = [10**30]
    noted = spa.prune(model, plan=spa.Plan.from_json(json.dumps(edited)))
    assert noted.plan.kept == plan.kept
    assert [n for n in noted.report.notes if n.startswith(f"the plan's 'kept' says of {name!r} what does not")]
