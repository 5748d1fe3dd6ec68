"""Patterns of layers, and the widths that a user gives by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spa
from models.builders.handmade import handmade_rms_attention
from spa.coupling.analysis import Analysis
from spa.errors import OptionError, PlanError
from spa.request import Request
from spa.widths.equal import head_counts
from spa.widths.patterns import writes
from tests.rules.test_experts import mixture
from tests.test_cli import refused
from tests.test_cli import spa as run_cli

MODELS = Path(__file__).parent.parent.parent / "models"
VGG, RESNET, VIT = (MODELS / f"digits_{name}.onnx" for name in ("vgg", "resnet", "vit"))
LAYERS = ("features.0", "features.3", "features.7", "features.10", "features.14", "features.17", "classifier.0")
DENSE = dict(zip(LAYERS, (32, 32, 64, 64, 96, 96, 128), strict=True))


@pytest.fixture(scope="module")
def vgg() -> Analysis:
    return spa.analyze(VGG)


def widths(**options: Any) -> dict[str, int]:
    """The widths of the layers of the pruned VGG."""
    report = spa.prune(VGG, criterion="l2", **options).report
    kept = {report.layers[g.name].split("/")[-2]: g.kept for g in report.groups}
    return {layer: kept.get(layer, DENSE[layer]) for layer in LAYERS}


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        ("features.10", ["features.10"]),
        ("features.10.weight", ["features.10"]),
        ("features.11.bias", ["features.10"]),  # the BatchNormalization behind
        ("/features/features.1?/Conv", ["features.10", "features.14", "features.17"]),
        ("classifier", ["classifier.0"]),
        ("Gemm", ["classifier.0"]),
        ("features.14.weight", ["features.14"]),  # not features.10, whose outputs it reads
        ("features.10.weight[1]", ["features.7"]),  # the name of a group
        ("classifier.2*", []),
    ],
)
def test_a_pattern_means_the_layers_whose_outputs_are_pruned(vgg: Analysis, pattern: str, layers: list[str]) -> None:
    found = [g for g in vgg.prunable if writes(vgg, g, pattern)]
    assert sorted(vgg.graph.nodes[g.writers[0]].proto.name.split("/")[-2] for g in found) == sorted(layers)


def test_only_the_layers_that_are_named_are_pruned() -> None:
    found = widths(ratio=0.2, only=["classifier", "features.1[047]*"])
    assert all(found[layer] == DENSE[layer] for layer in LAYERS[:3]) and found["features.14"] < 96
    with pytest.raises(PlanError, match="the request prunes only others"):
        widths(ratio=0.2, only=["classifier.2"])


def test_a_module_is_left_alone_with_all_that_it_touches() -> None:
    found = widths(ratio=0.2, ignore=["classifier"])
    assert (found["features.17"], found["classifier.0"]) == (96, 128)
    assert found["features.10"] < 64


def test_widths_are_exact_and_all_others_stay_whole() -> None:
    found = widths(width={"features.10": 50}, ratio_of={"features.14*": 0.5})
    assert found == {**DENSE, "features.10": 50, "features.14": 48}


def test_widths_beside_a_ratio_are_kept_and_the_others_make_up_for_them() -> None:
    result = spa.prune(VGG, criterion="l2", ratio=0.5, width={"features.10": 50}, keep_at_least={"features.14": 90})
    kept = {result.report.layers[g.name].split("/")[-2]: g.kept for g in result.report.groups}
    assert kept["features.10"] == 50 and kept["features.14"] == 96  # 88 is the next multiple of 8 below
    assert result.report.reached == pytest.approx(0.5, abs=0.02)


def test_the_channels_of_a_given_width_are_the_best() -> None:
    analysis = spa.analyze(VGG)
    (group,) = (g for g in analysis.prunable if writes(analysis, g, "features.10"))
    result = spa.prune(VGG, criterion="l2", width={"features.10": 37})
    scores = spa.score(analysis, criterion="l2")[group.name]
    assert result.plan.kept == {group.name: tuple(np.sort(np.argsort(scores, kind="stable")[-37:]).tolist())}
    assert spa.prove(VGG, result.plan).holds


def test_heads_are_counted_by_attention_and_what_is_left_computes_the_same() -> None:
    result = spa.prune(VIT, criterion="l2", heads={"blocks.0": 3, "blocks.2.attn": 1})
    narrower = {g.name: (g.size, g.kept) for g in result.report.groups if g.kept < g.size}
    assert narrower == {"blocks.0.attn.proj.weight[1]": (4, 3), "blocks.2.attn.proj.weight[1]": (4, 1)}
    assert result.prove().holds
    with_ratio = spa.prune(VIT, criterion="l2", heads={"blocks*": 2}, ratio=0.5).report
    kept = {g.name: g.kept for g in with_ratio.groups}
    assert [kept[f"blocks.{i}.attn.proj.weight[1]"] for i in range(4)] == [2] * 4
    assert with_ratio.reached == pytest.approx(0.5, abs=0.02)


def test_the_heads_of_grouped_queries_are_those_of_keys() -> None:
    model = handmade_rms_attention()
    (name,) = head_counts(spa.analyze(model))
    result = spa.prune(model, criterion="l2", heads={"wk": 1})
    assert [(g.name, g.size, g.kept) for g in result.report.groups if g.kept < g.size] == [(name, 2, 1)]
    assert result.model.graph.node[7].op_type == "Attention" and result.prove().holds
    assert {a.name: a.i for a in result.model.graph.node[7].attribute}["q_num_heads"] == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"heads": {"blocks.0.mlp": 2}}, "heads: nothing in the model matches"),
        ({"heads": {"blocks.0.fc1": 2}}, "names no attention whose heads may go"),
        ({"heads": {"blocks.0": 5}}, "has 4 channels, not 5"),
        ({"heads": {"blocks.0": 2, "blocks*": 3}}, "2 and 3. Leave one out"),
        ({"heads": {"blocks.0": 2}, "width": {"blocks.0.attn.proj.weight[1]": 3}}, "width and heads give group"),
        ({"heads": {"blocks.0": 2}, "ratio_of": {"blocks.0.attn.proj.weight[1]": 0.5}}, "both name group"),
        ({"heads": {"blocks.0": 2}, "keep_at_least": {"blocks.0.attn.proj.weight[1]": 3}}, "and 2 exactly"),
    ],
)
def test_numbers_of_heads_that_make_no_sense_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        spa.prune(VIT, criterion="l2", **options)


def test_obspa_and_uniform_rankings_keep_given_widths_too() -> None:
    common: dict[str, Any] = {"width": {"layer2.1.conv1": 24}, "ratio": 0.3, "samples": 16, "threads": 1}
    for options in ({"criterion": "obspa"}, {"criterion": "l1", "ranking": "uniform"}):
        report = spa.prune(RESNET, data=MODELS / "digits_train.npz", **common, **options).report
        assert {report.layers[g.name]: g.kept for g in report.groups}["/layer2/layer2.1/conv1/Conv"] == 24


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"ignore": ["featurs.10*"]},
            r"ignore: nothing in the model matches 'featurs.10\*'. Did you mean 'features.10'",
        ),
        ({"only": ["xyz"]}, "only: nothing in the model matches 'xyz'. Look for names"),
        ({"width": {"Features.10": 3}}, "width: nothing in the model matches 'Features.10'. Did you mean"),
        ({"width": {"classifier.2": 3}}, "names no layer whose outputs may be pruned"),
        ({"width": {"classifier.0": 300}}, "has 128 channels, not 300"),
        ({"keep_at_least": {"classifier.0": 129}}, "has 128 channels, not 129"),
        ({"width": {"features.14": 9}, "ratio_of": {"features.14": 0.5}}, "both name group"),
        ({"width": {"features.14": 9, "features.1*": 16}}, "9 and 16. Leave one out"),
        ({"width": {"features.14": 9}, "keep_at_least": {"features.1*": 16}}, "16 channels at least, and 9 exactly"),
        (
            {"width": {"features.14": 9, "features.10": 16}, "equal": ["features.1[04].weight*"]},
            "has another width than they may have",
        ),
    ],
)
def test_patterns_and_widths_that_make_no_sense_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        widths(**options)


@pytest.mark.parametrize(
    "options",
    [{"ratio_of": {"a": 1.5}}, {"ratio_of": {"a": "x"}}, {"width": {"a": 0}}, {"width": 3}, {"ratio_of": [1]}],
)
def test_values_of_another_kind_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        Request.of(**options)


def test_bytes_are_a_unit_of_budgets() -> None:
    report = spa.prune(VGG, criterion="l2", ratio=0.5, of="bytes").report
    assert report.reached == pytest.approx(0.5, abs=0.01)
    assert report.after.bytes / report.before.bytes == pytest.approx(0.5, abs=0.01)


def test_the_command_line_takes_them(tmp_path: Path) -> None:
    target = tmp_path / "o.onnx"
    given = ("--criterion", "l2", "--width", "features.10=50", "--ratio-of", "features.14=0.5")
    done = run_cli("prune", VGG, "-o", target, *given, "--json")
    assert done.returncode == 0, done.stderr
    assert '"kept": 50' in done.stdout and '"kept": 48' in done.stdout
    refused(run_cli("prune", VGG, "-o", target, "--ratio-of", "features.14"), 2, "no NAME=FLOAT")


def test_a_hidden_size_is_given_exactly() -> None:
    result = spa.prune(VIT, criterion="l2", width={"pos_embed*": 47}, cross_norm=True)
    assert [(g.size, g.kept) for g in result.report.groups if g.kept != g.size] == [(64, 47)]
    shapes = {t.name: tuple(t.dims) for t in result.model.graph.initializer}
    assert shapes["pos_embed"] == (1, 17, 47) and shapes["blocks.0.fc1.weight"] == (256, 47)


def test_a_number_of_experts_is_given_by_their_router() -> None:
    model = mixture(activation_type="relu")
    result = spa.prune(model, criterion="l2", width={"router": 3}, cross_norm=True)
    shapes = {t.name: tuple(t.dims) for t in result.model.graph.initializer}
    (experts,) = (n for n in result.model.graph.node if n.op_type == "MoE")
    assert shapes["router"] == (8, 3) and {shapes[n][0] for n in experts.input[2:] if n} == {3}


def test_what_crosses_a_normalisation_is_named_with_the_remedy() -> None:
    with pytest.raises(PlanError) as error:
        spa.prune(mixture(activation_type="relu"), criterion="l2", width={"router": 3})
    assert "What it names crosses MoE 'moe" in str(error.value)
    assert str(error.value).endswith(": allow --cross-norm (cross_norm=True).")
    with pytest.raises(PlanError, match=r"'classifier.2' names no layer .*'spa inspect --all' lists"):
        widths(width={"classifier.2": 3})
