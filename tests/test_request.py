"""A request: one frozen value that the API, the command line, files, reports and documentation share."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

import spa
from spa.criteria import Parameter, get
from spa.errors import OptionError
from spa.report.schema import report_schema, request_schema
from spa.report.tables import options_table
from spa.request import Request, options
from spa.request.option import default_of, flag_of

ROOT = Path(__file__).parent.parent
RESNET = ROOT / "models" / "digits_resnet.onnx"

REQUEST = {
    "ratio": 0.25,
    "of": "params",
    "criterion": "fpgm",
    "ranking": "isomorphic",
    "norm": "max",
    "agg": "l2",
    "ignore": ("head.*", "Gemm"),
    "only": ("layer*",),
    "width": {"fc1": 24},
    "ratio_of": {"layer3.*": 0.5},
    "heads": {"blocks.0*": 2},
    "keep_at_least": {"layer1.*": 8},
    "depth": "layer3.1*",
    "equal": ("heads",),
    "round_to": 4,
    "min_width": 2,
    "cross_norm": True,
    "data": "/data/images",
    "samples": 64,
    "labels": "y",
    "mean": (0.5, 0.25, 0.125),
    "std": (0.5, 0.5, 0.5),
    "domain": "text",
    "text": "/data/pages.txt",
    "tokenizer": "/data/tokenizer.json",
    "reconstruct": "bias",
    "recover": 3,
    "insist": True,
    "evaluate": "python eval.py {model}",
    "metric": "top5",
    "better": "higher",
    "evaluate_seconds": 60.0,
    "threads": 1,
    "batch": 5,
    "sizes": {"seq": 7},
    "seed": 11,
    "providers": ("cpu",),
    "latency_command": "bench {model}",
    "latency_seconds": 30.0,
    "latency_table": "/tables/layers.csv",
    "jobs": 2,
    "work": "/work",
}


def test_every_option_of_the_command_line_round_trips_through_a_file(tmp_path: Path) -> None:
    request = Request.of(**REQUEST)
    path = tmp_path / "request.toml"
    path.write_text(request.to_toml(), encoding="utf-8")
    assert Request.from_toml(path) == request
    untested = {f.name for _, f in options() if f.metadata["kind"].on_file} - REQUEST.keys()
    assert untested == {
        "max_distortion",
        "max_drop",
        "min_metric",
        "latency_ms",
        "value_range",  # which excludes mean and std
        "plan",
        "runtime",  # which excludes providers
        "backend",  # which excludes jobs
        "scheduler",
    }  # goals, of which a request has one
    for goal in (
        {"runtime": "openvino"},
        {"backend": "dask", "scheduler": "tcp://127.0.0.1:8786"},
        {"max_distortion": 0.01},
        {"latency_ms": 2.5},
        {"plan": "/plans/plan.json"},
        {"ratio": "auto"},
    ):
        path.write_text(Request.of(**goal).to_toml(), encoding="utf-8")
        assert Request.from_toml(path) == Request.of(**goal)


def test_a_file_holds_what_differs_from_the_defaults() -> None:
    assert Request().to_toml() == ""
    assert Request.of(ratio=0.3, ignore=["head"]).to_toml() == (
        '[goal]\nratio = 0.3\n\n[constraints]\nignore = [\n    "head",\n]\n'
    )


def l2_like(parameter: Parameter) -> np.ndarray:
    return (parameter.rows() ** 2).sum(axis=1)


def test_a_criterion_of_ones_own_is_named_in_the_report() -> None:
    assert Request.of(criterion=l2_like).to_dict()["scoring"]["criterion"] == "l2_like"
    assert Request.of(criterion=get("lamp")).to_dict()["scoring"]["criterion"] == "lamp"


def test_what_no_file_can_hold_is_refused_by_name() -> None:
    for name, value in (("data", iter(())), ("gradients", {"w": np.ones(3)}), ("criterion", l2_like)):
        with pytest.raises(spa.PlanError, match=f"{name} is an object, which no file can hold"):
            Request.of(**{name: value}).to_toml()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ratio = 0.3\n", r"'ratio' is no section. It belongs to \[goal\]"),
        ("[tables]\nratio = 0.3\n", r"'tables' is no section. Use \[goal\], \[scoring\]"),
        ("[goals]\nratio = 0.3\n", r"'goals' is no section. Did you mean 'goal'"),
        ("[goal]\nratios = 0.3\n", r"\[goal\] has no option 'ratios'. Did you mean 'ratio' in \[goal\]"),
        ("[goal]\nround_to = 8\n", r"has no option 'round_to'. It belongs to \[constraints\]"),
        ("[timing]\nsize = {a = 1}\n", r"has no option 'size'. Did you mean 'sizes' in \[timing\]"),
        ("[scoring]\ngradients = 3\n", r"\[scoring\] has no option 'gradients'"),
        ("[goal\n", "cannot read the request"),
    ],
)
def test_a_file_that_is_no_request_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "request.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(spa.PlanError, match=message):
        Request.from_toml(path)


def test_a_request_is_frozen_and_changed_by_making_another() -> None:
    request = Request.of(ratio=0.3)
    with pytest.raises(FrozenInstanceError):
        request.goal.ratio = 0.4  # type: ignore[misc] # what is tested
    assert Request.of(request, criterion="l1").goal.ratio == 0.3
    assert Request.of(request, ratio=0.5) == Request.of(ratio=0.5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ratoi": 0.3}, "unknown option 'ratoi'. Did you mean 'ratio'"),
        ({"criterion": "l3"}, "unknown criterion 'l3'"),
        ({"of": "flops"}, "unknown of 'flops'. Choose one of macs, params, bytes, channels, memory, latency."),
        ({"ranking": "globl"}, "Did you mean 'global'"),
        ({"norm": "median"}, "unknown norm"),
        ({"agg": "median"}, "unknown agg"),
        ({"round_to": 0}, "round_to is 0. Give a whole number of 1 or more"),
        ({"samples": 0}, "samples is 0. Give a whole number of 1 or more"),
        ({"recover": -1}, "recover is -1. Give a whole number of 0 or more"),
        ({"reconstruct": "half"}, "unknown reconstruct 'half'"),
        ({"latency_ms": 3, "of": "params"}, "asked for together"),
        ({"latency_ms": float("inf")}, "Give a number above 0"),
    ],
)
def test_an_option_that_means_nothing_is_refused_before_any_work(given: dict[str, object], message: str) -> None:
    with pytest.raises(spa.PlanError, match=message):
        Request.of(**given)


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("ratio", [True, "0.5", [0.5], np.array([0.5]), {}, 1j, float("nan"), b"auto"], "a number between 0 and 1"),
        ("round_to", [2.5, 8.0, True, "8", float("inf"), [8]], "a whole number of 1 or more"),
        ("threads", [0, 1.5, 10**6], "a whole number from 1 to 1024"),
        ("seed", [-1, 1.5, "a", 2**70], "a whole number from 0 to"),
        ("cross_norm", ["no", 1], "True or False"),
        ("ignore", [1, [1], [""], [Path("a")]], "a shell pattern, or a list of them"),
        ("equal", [1, [1]], "a shell pattern, or a list of them"),
        ("sizes", ["batch=1", {"a": "b"}, {"a": -1}, {1: 2}, {"a": 1.5}], "a mapping from names to whole numbers"),
        ("mean", ["0.5", ["a"], [True]], "a number, or one for each channel"),
        (
            "value_range",
            [3, (0, 1, 2), (1, 0), (2, 2), (0, float("inf")), "0:1", [0]],
            "two numbers, the lower one first",
        ),
        ("labels", [1, ["a"]], "a string"),
        ("data", [3, b"", ""], "a path"),
        ("gradients", [3, []], "a mapping from initializer names to arrays"),
        ("max_distortion", ["a", True, float("nan")], "a number"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_name(name: str, values: list[object], expected: str) -> None:
    for value in values:
        with pytest.raises(spa.PlanError, match=f"^{name} is .*Give {expected}"):
            Request.of(**{name: value})


def test_values_of_numpy_and_single_ones_become_pythons_own() -> None:
    request = Request.of(
        ratio=np.float32(0.5), round_to=np.int64(4), cross_norm=np.bool_(True), ignore="head.*", mean=np.array([0.5])
    )
    assert json.dumps(request.to_dict())
    assert (request.goal.ratio, request.constraints.round_to, request.constraints.cross_norm) == (0.5, 4, True)
    assert (request.constraints.ignore, request.inputs.mean) == (("head.*",), (0.5,))
    images = np.ones((4, 1, 8, 8), np.float32)
    assert Request.of(data=images).inputs.data is images
    assert Request.of(round_to=None, ignore=None) == Request()  # None stands for the default


def test_paths_in_a_file_are_relative_to_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "request.toml"
    path.write_text('\ufeff[inputs]\ndata = "images"\n', encoding="utf-8")
    assert Request.from_toml(path).inputs.data == str(tmp_path / "images")
    path.write_text('[constraints]\nround_to = "8"\n', encoding="utf-8")
    with pytest.raises(spa.PlanError, match=r"request\.toml': round_to is '8'\. Give a whole number"):
        Request.from_toml(path)


def test_a_range_of_values_stands_in_place_of_mean_and_deviation(tmp_path: Path) -> None:
    request = Request.of(value_range=[0, 255])
    assert request.inputs.value_range == (0.0, 255.0)
    path = tmp_path / "request.toml"
    path.write_text(request.to_toml(), encoding="utf-8")
    assert Request.from_toml(path) == request
    for other in ("mean", "std"):
        with pytest.raises(
            spa.PlanError, match=rf"value_range \(--range\) and {other} are given together. Leave one of them out"
        ):
            Request.of(value_range=(0, 255), **{other: 0.5})


def test_the_words_and_the_switches_of_reconstruction_mean_the_same() -> None:
    words = [Request.of(reconstruct=given).repair.reconstruct for given in (None, True, False, "full")]
    assert words == ["auto", "full", "none", "full"]


@pytest.mark.parametrize("name", ["ratio", "max_distortion", "latency_ms", "plan"])
def test_a_new_goal_replaces_the_old_one_and_two_at_once_are_refused(name: str) -> None:
    goals = {"ratio": 0.3, "max_distortion": 0.1, "latency_ms": 2.0, "plan": "plan.json"}
    for other, value in goals.items():
        base = Request.of(**{other: value}, round_to=4)
        changed = Request.of(base, **{name: goals[name]})
        assert changed == Request.of(**{name: goals[name]}, round_to=4)
        if other != name:
            with pytest.raises(spa.PlanError, match="are asked for together"):
                Request.of(**{name: goals[name], other: value})


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({}, "ratio"),
        ({"ratio": "auto"}, "auto"),
        ({"max_distortion": 0.1}, "distortion"),
        ({"latency_ms": 1.0}, "latency_ms"),
        ({"plan": "plan.json"}, "plan"),
        ({"max_drop": 1.0, "evaluate": "top1:x.npz"}, "metric"),
    ],
)
def test_a_request_has_one_goal(given: dict[str, object], kind: str) -> None:
    assert Request.of(**given).goal.kind == kind


def test_the_signature_and_the_docstring_of_prune_are_the_requests() -> None:
    parameters = inspect.signature(spa.prune).parameters
    for _, about in options():
        assert parameters[about.name].default == about.default
        assert f"{about.name}: {about.metadata['help']}" in (spa.prune.__doc__ or "")


def test_readme_shows_the_options_and_criteria_as_they_are() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert options_table() in text
    # In a process of its own: other tests register criteria.
    code = "from spa.report.tables import criteria_table; print(criteria_table())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() in text


def test_each_help_text_is_a_phrase_and_fits_two_lines() -> None:
    for _, about in options():
        text = about.metadata["help"]
        assert not text.endswith("."), about.name
        assert len(text) <= 200, about.name
        assert flag_of(about).startswith("--"), about.name


def test_a_report_is_valid_under_the_schema_and_a_wrong_one_is_not() -> None:
    result = spa.prune(RESNET, ratio=0.3, criterion="l2", ignore=["fc.*"])
    report = json.loads(json.dumps(result.report.to_dict())) | {"output": "small.onnx"}
    jsonschema.validate(report, report_schema())
    assert report["requested"] == Request.of(ratio=0.3, criterion="l2", ignore=["fc.*"]).to_dict()
    for path, value in ((("reached",), "much"), (("requested", "goal", "of"), 3), (("groups", 0, "kept"), None)):
        broken = json.loads(json.dumps(report))
        at = broken
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, report_schema())


def test_the_committed_schema_is_the_one_that_the_code_makes() -> None:
    text = (ROOT / "docs" / "report.schema.json").read_text(encoding="utf-8")
    assert json.loads(text) == report_schema()


def test_the_schema_explains_every_option() -> None:
    properties = request_schema()["properties"]
    for section, about in options():
        assert properties[section]["properties"][about.name]["description"] == about.metadata["help"]
        assert default_of(about) is not None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"runtime": "openvino"}, "runtime (--runtime)"),
        ({"providers": ["cpu"]}, "providers (--providers)"),
        ({"latency_command": "bench {model}"}, "latency_command (--measure)"),
        ({"latency_command": "bench {model}", "latency_seconds": 9.0}, "latency_command (--measure)"),
        ({"latency_table": "layers.csv", "of": "params"}, "latency_table (--latency-table)"),
        ({"latency_table": "layers.csv", "max_distortion": 0.1}, "latency_table (--latency-table)"),
    ],
)
def test_how_latency_is_measured_is_refused_where_none_is(given: dict[str, Any], said: str) -> None:
    for function in (spa.prune, spa.sensitivity):
        with pytest.raises(OptionError) as error:
            function("nowhere.onnx", **given)
        assert str(error.value) == (
            f"{said} says how latency is measured, and none is: the goal is none of latency. Give of='latency' "
            "(--of latency) or latency_ms (--latency-ms), or leave it out."
        )


@pytest.mark.parametrize("goal", [{"of": "latency"}, {"latency_ms": 2.0}])
def test_how_latency_is_measured_goes_with_a_goal_of_latency(goal: dict[str, Any]) -> None:
    Request.of(runtime="openvino", latency_table="layers.csv", threads=1, **goal).refuse_idle_timing()
    Request.of(threads=4, batch=2).refuse_idle_timing()


def test_a_command_line_that_measures_no_latency_ends_with_code_2(tmp_path: Path) -> None:
    arguments = [
        "prune",
        str(RESNET),
        "-o",
        str(tmp_path / "small.onnx"),
        "--criterion",
        "l2",
        "--measure",
        "bench {model}",
    ]
    run = subprocess.run([sys.executable, "-m", "spa.cli", *arguments], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == OptionError.exit_code == 2
    assert "latency_command (--measure) says how latency is measured" in run.stderr
