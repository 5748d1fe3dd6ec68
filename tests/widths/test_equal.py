"""Groups that keep the same fraction of their channels: head sizes, found in the graph, and sets by pattern."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from math import gcd

import numpy as np
import pytest
from onnx import ModelProto, numpy_helper

import spa
from spa.coupling.analysis import Analysis
from spa.errors import PlanError
from spa.running.verify import verify
from spa.surgery.masking import masked
from spa.widths.budget import Budget
from spa.widths.equal import cuts, equal_sets, head_sizes
from spa.widths.ladders import ladders_of, widths_at
from spa.widths.ranking import RANKINGS
from spa.widths.sparsity import suggested_ratio
from tests.oracle import Net
from tests.zoo import exported


@cache
def analysis_of(name: str) -> Analysis:
    return spa.analyze(exported(name))


def fractions(result: spa.Result, names: frozenset[str]) -> set[float]:
    sizes = {g.name: g.size for g in result.analysis.groups}
    return {len(result.plan.kept.get(n, range(sizes[n]))) / sizes[n] for n in names}


def sizes_of(name: str) -> list[list[int]]:
    groups = {g.name: g.size for g in analysis_of(name).groups}
    return [sorted(groups[n] for n in names) for names in head_sizes(analysis_of(name))]


# -- head sizes in the graph -----------------------------------------------------------------------------------------


def test_queries_and_values_of_separate_projections_are_found() -> None:
    assert head_sizes(analysis_of("bert")) == [
        frozenset({f"layer.{i}.query.weight[0]#2", f"layer.{i}.value.weight[0]"}) for i in range(2)
    ]
    assert sizes_of("bert_dynamo") == [[7, 7], [7, 7]]
    assert sizes_of("t5") == [[8, 8]] * 6  # two layers of the encoder; of the decoder, with attention to both sides


def test_halves_of_a_rotated_head_count_twice() -> None:
    assert sizes_of("llama") == sizes_of("llama_dynamo") == [[3, 6], [3, 6]]
    assert equal_sets(analysis_of("llama"), analysis_of("llama").prunable, ["heads"]) == (
        frozenset(
            {"inv_freq[0]", "layers.0.v_proj.weight[0]", "layers.1.v_proj.weight[0]"}
        ),  # one table for all layers
    )


def test_a_fused_projection_of_one_size_needs_no_set() -> None:
    assert sizes_of("vit") == [[6], [6]]
    assert equal_sets(analysis_of("vit"), analysis_of("vit").prunable, ["heads"]) == ()


@pytest.mark.parametrize("name", ["resnet_basic", "lstm", "unet", "mlp_mixer", "handmade_grouped", "siamese"])
def test_networks_without_attention_have_none(name: str) -> None:
    assert head_sizes(analysis_of(name)) == []


def attention(q: int, v: int, form: str = "products", heads: int = 3, frozen: bool = False) -> ModelProto:
    """x [n 5 6] -> heads of q and v dimensions -> y: two products with a softmax, one operator, or q (kT v)."""
    net = Net(opset=23)
    x = net.input("x", ["n", 5, 6])
    made = {n: net.matmul(x, 6, heads * size, name=n) for n, size in (("q", q), ("k", q), ("v", v))}
    if form == "operator":
        y = net.node("Attention", *made.values(), q_num_heads=heads, kv_num_heads=heads)
    else:
        shape = net.constant(np.array([0, 5, heads, -1]))
        rows = {n: net.node("Reshape", m, shape) for n, m in made.items()}
        keys = net.node("Transpose", rows["k"], perm=[0, 2, 3, 1])
        queries, values = (net.node("Transpose", rows[n], perm=[0, 2, 1, 3]) for n in "qv")
        if form == "linear":
            y = net.node("MatMul", queries, net.node("MatMul", keys, values))
        else:
            scores = net.node("Mul", net.node("MatMul", queries, keys), net.constant(0.3))
            y = net.node("MatMul", net.node("Softmax", scores), values)
        y = net.node("Transpose", y, perm=[0, 2, 1, 3])
        y = net.node("Reshape", y, net.constant(np.array([0, 5, heads * v])))
    return net.model(y if frozen else net.matmul(y, heads * v, 4))


@pytest.mark.parametrize("form", ["products", "operator", "linear"])
def test_every_form_of_attention_has_its_head_sizes(form: str) -> None:
    assert head_sizes(spa.analyze(attention(8, 8, form))) == [frozenset({"q[1]#2", "v[1]"})]
    assert head_sizes(spa.analyze(attention(8, 12, form))) == []  # which a class must have two sizes for
    assert len(head_sizes(spa.analyze(attention(8, 8, form, heads=1)))) == 1


def test_values_that_cannot_shrink_hold_the_queries() -> None:
    model = attention(8, 8, frozen=True)
    request = {"criterion": "l2", "ratio": 0.1, "of": "params", "round_to": 1}
    assert list(spa.prune(model, **request).plan.kept) == ["q[1]#2"]
    with pytest.raises(PlanError, match=r"at most 0\.0% can go"):
        spa.prune(model, **request, equal=["heads"])


def cut_in(parts: list[int], form: str = "Split", frozen: bool = False) -> ModelProto:
    """x [n 6] -> a layer's outputs in parts, each with a layer of its own (the last is an output where frozen) -> y."""
    net = Net(opset=18)
    made = net.matmul(net.input("x", ["n", 6]), 6, sum(parts), name="wide")
    if form == "Split":
        cut = net.node("Split", made, net.constant(np.array(parts)), axis=1, outputs=len(parts))
        cut = [cut] if isinstance(cut, str) else list(cut)
    else:
        ends = np.cumsum([0, *parts])
        cut = [net.node("Slice", made, *(net.constant(np.array([v])) for v in (a, b, 1))) for a, b in pairwise(ends)]
    ys = [net.matmul(part, n, 5, name=f"head{i}") for i, (part, n) in enumerate(zip(cut, parts, strict=True))]
    y = ys[0]
    for other in ys[1:]:
        y = net.node("Add", y, other)
    return net.model(y, cut[-1]) if frozen else net.model(y)


@pytest.mark.parametrize("form", ["Split", "Slice"])
def test_equal_parts_of_an_axis_are_a_set(form: str) -> None:
    analysis = spa.analyze(cut_in([11, 7, 11], form))
    sizes = {g.name: g.size for g in analysis.free}
    (names,) = equal_sets(analysis, analysis.free, ["parts"])
    assert [sizes[name] for name in names] == [11, 11]
    assert equal_sets(spa.analyze(cut_in([5, 7, 11], form)), analysis.free, ["parts"]) == ()


@pytest.mark.parametrize("form", ["Split", "Slice"])
def test_only_the_axis_that_is_cut_has_parts(form: str) -> None:
    (((_, axis), parts),) = cuts(spa.analyze(cut_in([11, 7, 11], form))).items()
    assert axis == 1 and [part.size for part in parts] == [11, 7, 11]


def test_parts_of_which_one_must_stay_whole_make_no_set() -> None:
    analysis = spa.analyze(cut_in([11, 11], frozen=True))
    assert len(analysis.free) == 1
    assert equal_sets(analysis, analysis.free, ["parts"]) == ()


def test_queries_keys_and_values_keep_their_heads_apart_from_the_heads_sizes() -> None:
    analysis = spa.analyze(exported("vit"))
    assert equal_sets(analysis, analysis.free, ["parts"]) == ()


def test_equal_parts_keep_one_fraction() -> None:
    model = cut_in([12, 9, 12])
    request = {"criterion": "l2", "ratio": 0.4, "of": "params", "round_to": 1}
    result = spa.prune(model, **request, equal=["parts"])
    sets = equal_sets(result.analysis, result.analysis.free, ["parts"])
    assert [len(fractions(result, names)) for names in sets] == [1]
    assert min(fractions(result, sets[0])) < 1
    assert verify(result.model, masked(result.analysis, result.plan), atol=1e-5, rtol=1e-5).equal


def test_layers_are_what_has_one_name_but_for_numbers_and_one_size() -> None:
    analysis = analysis_of("bert")
    sets = equal_sets(analysis, analysis.free, ["layers"])
    sizes = {g.name: g.size for g in analysis.free}
    assert sizes["layer.0.dense.weight[1]"] != sizes["layer.1.dense.weight[1]"]
    assert not any("layer.0.dense.weight[1]" in names for names in sets)
    assert frozenset({"layer.0.value.weight[0]", "layer.1.value.weight[0]"}) in sets
    assert all(len({name.partition("layer.")[2][1:] for name in names}) == 1 for names in sets)


# -- widths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("criterion", ["l2", "obspa"])
def test_groups_of_a_set_keep_one_fraction_and_the_network_is_the_masked_original(ranking: str, criterion: str) -> None:
    for name in ("bert", "llama"):
        request = {"ratio": 0.77, "of": "params", "round_to": 1, "ranking": ranking, "criterion": criterion}
        result = spa.prune(exported(name), **request, equal=["heads"], reconstruct="none", samples=16)
        sets = equal_sets(result.analysis, result.analysis.free, ["heads"])
        assert sets
        assert all(len(fractions(result, names)) == 1 for names in sets)
        assert min(min(fractions(result, names)) for names in sets) < 1
        assert abs(result.report.reached - 0.75) < 0.03
        same = verify(result.model, masked(result.analysis, result.plan), atol=1e-5, rtol=1e-5)
        assert same.equal


def test_groups_of_a_set_keep_the_indices_that_matter_in_each() -> None:
    result = spa.prune(exported("bert"), ratio=0.5, of="params", round_to=1, criterion="l2", equal=["heads"])
    kept = [result.plan.kept[n] for n in ("layer.0.query.weight[0]#2", "layer.0.value.weight[0]")]
    assert len(kept[0]) == len(kept[1])
    assert kept[0] != kept[1]


def test_sets_by_pattern_are_equally_wide_in_all_layers() -> None:
    request = {"ratio": 0.4, "of": "params", "round_to": 1, "criterion": "l2"}
    pattern = "layer.*.intermediate.weight*"
    result = spa.prune(exported("bert"), **request, equal=["heads", pattern])
    assert fractions(result, frozenset({"layer.0.dense.weight[1]", "layer.1.dense.weight[1]"})) == {0.5}
    assert result.report.requested["constraints"]["equal"] == ["heads", pattern]
    assert spa.prune(exported("bert"), **request).report.requested["constraints"]["equal"] is None


def test_nothing_goes_of_a_set_of_which_one_may_not_be_pruned() -> None:
    request = {"ratio": 0.3, "of": "params", "round_to": 1, "criterion": "l2", "equal": ["heads"]}
    result = spa.prune(exported("bert"), **request, ignore=["layer.0.value.weight"])
    assert "layer.0.query.weight[0]#2" not in result.plan.kept
    assert "layer.1.query.weight[0]#2" in result.plan.kept


def test_sets_that_share_a_group_are_one() -> None:
    analysis = analysis_of("bert")
    sets = equal_sets(analysis, analysis.free, ["heads", "layer.?.value.weight[[]0]"])
    assert sorted(map(len, sets)) == [6]  # of the two layers the heads, the dimensions of queries, and those of values
    with pytest.raises(PlanError, match=r"equal: 'nothing\*' matches none of the groups that may be pruned"):
        equal_sets(analysis, analysis.free, ["nothing*"])
    with pytest.raises(PlanError, match=r"matches the group 'layer\.0\.dense\.weight\[1\]' alone"):
        equal_sets(analysis, analysis.free, ["layer.0.intermediate.weight[0]"])


@pytest.mark.parametrize(("round_to", "min_width"), [(1, 1), (4, 1), (1, 5)])
def test_rungs_are_allowed_in_each_group_and_the_same_fraction_in_all(round_to: int, min_width: int) -> None:
    analysis = analysis_of("llama")
    groups = analysis.free
    sets = equal_sets(analysis, groups, ["heads"])
    alone = ladders_of(analysis, groups, round_to=round_to, min_width=min_width)
    ladders = ladders_of(analysis, groups, round_to=round_to, min_width=min_width, equal=sets)
    assert widths_at(ladders, [0] * len(ladders)) == [g.size for g in groups]
    assert sorted(m for ladder in ladders for m in ladder.members) == list(range(len(groups)))
    for ladder in ladders:
        sizes = [groups[m].size for m in ladder.members]
        for widths in ladder.rungs:
            assert len({w / n for w, n in zip(widths, sizes, strict=True)}) == 1
            assert all((w,) in alone[m].rungs for m, w in zip(ladder.members, widths, strict=True))
        possible = [
            j
            for j in range(1, gcd(*sizes) + 1)
            if all((n * j // gcd(*sizes),) in alone[m].rungs for m, n in zip(ladder.members, sizes, strict=True))
        ]
        assert len(ladder.rungs) == len(possible)


def test_a_suggested_ratio_leaves_what_each_of_a_set_needs() -> None:
    model = ModelProto()
    model.CopyFrom(exported("bert"))
    for tensor in model.graph.initializer:  # the first layer needs 1 channel in 46, the second all
        if tensor.name.startswith("layer.0."):
            value = numpy_helper.to_array(tensor) * 0
            value.flat[0] = 1
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    analysis = spa.analyze(model)
    pair = frozenset({"layer.0.dense.weight[1]", "layer.1.dense.weight[1]"})
    groups = [g for g in analysis.free if g.name in pair]
    assert suggested_ratio(analysis, groups, Budget(round_to=1)) > 0.2
    with pytest.raises(PlanError, match="the PQ index removes nothing"):
        suggested_ratio(analysis, groups, Budget(round_to=1, equal=(pair,)))


def test_the_order_in_which_a_set_is_given_does_not_matter() -> None:
    first, second = (
        spa.prune(exported("llama"), ratio=0.4, criterion="l2", round_to=1, equal=equal)
        for equal in (["heads", "*.up_proj.weight*"], ["*.up_proj.weight*", "heads"])
    )
    assert first.plan == second.plan
