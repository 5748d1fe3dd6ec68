"""Pruned weights in classes whose code has sizes written into it: wider than pruning left them, with zeros."""

from __future__ import annotations

import gc
import re
import sys
import weakref
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spa
from spa.coupling.plan import make_plan
from spa.exporters.pytorch import to_torch, write_back
from tests.exporters.test_write_back import IMAGE, Attention, Block, apart, imported, pruned, size


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(32, 4, 96, 0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Windows(Attention):
    """Has the size of its heads written into its code."""

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, 4, dim // 4).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, length, dim))


class Windowed(Block):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Windows(32, 4)


class Inner(nn.Module):
    """Has a size written into its code, and lacks a bias that reconstruction would give it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(12, 24, 3, padding=1)
        self.conv2 = nn.Conv2d(24, 32, 1, bias=False)
        self.conv3 = nn.Conv2d(32, 12, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv2(F.silu(self.conv1(x))))
        return self.conv3(F.relu(x.reshape(len(x), 32, -1).unflatten(-1, (8, 8))))


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.last = nn.Conv2d(3, 12, 3, padding=1), Inner(), nn.Conv2d(12, 40, 3)
        self.head = nn.Conv2d(40, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.last(F.relu(self.inner(F.relu(self.stem(x)))))))


@pytest.mark.parametrize(
    ("build", "example", "path", "why"),
    [
        (Encoder, torch.randn(3, 5, 32), "layer.self_attn", "nn.MultiheadAttention 'layer.self_attn' has "),
        (Windowed, torch.randn(3, 5, 32), "attention", ": 'q, k, v = self.qkv(x).reshape("),
        (Outer, IMAGE, "inner", ": 'return self.conv3(F.relu(x.reshape("),
    ],
    ids=["multihead", "windows", "convolutions"],
)
@pytest.mark.parametrize("reconstruct", ["none", "full"])
def test_what_cannot_be_narrower_keeps_its_width_with_zeros(
    build: type[nn.Module], example: Tensor, path: str, why: str, reconstruct: str
) -> None:
    module, model, names = imported(build, example)
    result = spa.prune(model, ratio=0.4, of="params", criterion="l2", round_to=1, reconstruct=reconstruct, samples=32)
    small, how, notes = to_torch(result, module, names, example)
    assert (how, type(small)) == ("module", type(module))
    assert apart(small, result.model, example) < 1e-5
    assert size(small) < size(module)
    part, whole = small.get_submodule(path), module.get_submodule(path)
    first = next(name for name, _ in whole.named_parameters())
    assert len(part.get_parameter(first)) == len(whole.get_parameter(first))
    assert any((p == 0).flatten(1).all(1).any() for p in part.parameters() if p.dim() > 1)
    assert re.match(rf"{type(whole).__name__} \({path}\) is wider than pruning left it, with zeros in place", notes[0])
    assert why in notes[0]
    assert f"ignore=['{path}.*']" in notes[0]


def test_a_copy_that_failed_is_let_go_before_the_next_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    code = sys.modules["spa.exporters.pytorch.write_back"]
    make, copies = code._narrowed, []

    def spied(*args: Any) -> Any:
        gc.collect()
        assert not [copy for copy in copies if copy() is not None]
        made = make(*args)
        copies.append(weakref.ref(made[0]))
        return made

    monkeypatch.setattr(code, "_narrowed", spied)
    example = torch.randn(3, 5, 32)
    module, model, names = imported(Windowed, example)
    write_back(module, spa.prune(model, ratio=0.4, of="params", criterion="l2", round_to=1), names, example)
    assert len(copies) > 1


class Separate(nn.Module):
    """Has one size for the heads of queries, keys and values."""

    def __init__(self, dim: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = heads, dim // heads, 0.3
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.query, self.key, self.value)
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in layers)
        return self.out(((q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_what_code_has_one_size_for_is_levelled() -> None:
    class Network(Block):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Separate()

    example = torch.randn(3, 5, 32)
    module, model, names = imported(Network, example)
    analysis = spa.analyze(model)
    heads = next(g for g in analysis.prunable if g.size == 4)
    first, second = (g for g in analysis.prunable if g.size == 8)
    kept = {heads.name: np.array([0, 2, 3]), first.name: np.array([1, 3]), second.name: np.array([0, 2, 4, 5, 7])}
    result = spa.prune(model, plan=make_plan(analysis, kept))
    small, how, notes = to_torch(result, module, names, example)
    assert (how, type(small)) == ("module", Network)
    attention = small.attention
    assert (attention.head_dim, attention.num_heads) == (5, 3)
    assert attention.query.out_features == attention.key.out_features == attention.value.out_features == 3 * 5
    assert apart(small, result.model, example) < 1e-5
    assert notes[0].startswith("Separate (attention) is wider than pruning left it, with zeros in place of what went.")


@pytest.mark.parametrize("build", [Encoder, Windowed])
def test_zeros_of_an_attention_that_stays_wide_stay_zeros_while_training(build: type[nn.Module]) -> None:
    example = torch.randn(3, 5, 32)
    module, model, names = imported(build, example)
    small = write_back(module, spa.prune(model, ratio=0.4, of="params", criterion="l2", round_to=1), names, example)
    small(example).square().mean().backward()
    zeros = [p.grad[p == 0] for p in small.parameters()]
    assert sum(map(len, zeros)) > 100
    assert all(not z.any() for z in zeros)


def test_nothing_stays_wide_where_the_code_allows_it() -> None:
    module, result, names, example = pruned("block")
    assert to_torch(result, module, names, example)[1:] == ("module", ())


def test_where_all_would_stay_wide_the_graph_takes_its_place() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Windows(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x)

    example = torch.randn(3, 5, 32)
    module, model, names = imported(Network, example)
    result = spa.prune(model, ratio=0.3, of="params", criterion="l2", round_to=1)
    other, how, notes = to_torch(result, module, names, example)
    assert how == "graph"
    assert "works only with the sizes before pruning" in notes[0]
    assert apart(other, result.model, example) < 1e-5


def back(build: type[nn.Module], ranking: str = "global") -> tuple[nn.Module, spa.Result]:
    torch.manual_seed(0)
    options = {"example_inputs": torch.randn(2, 3, 8, 8), "convert_options": {"exporter": "torchscript"}}
    result = spa.prune(build(), ratio=0.4, ranking=ranking, criterion="l2", round_to=1, **options)
    return result.pruned, result


class SharedAct(nn.Module):
    """Uses one small activation at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.o, self.act = nn.Conv2d(16, 3, 1), nn.PReLU(16)
        with torch.no_grad():
            self.act.weight.uniform_(0.1, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.act(self.b(self.act(self.a(x)))))


class SharedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(3, 16, 3, padding=1)
        self.h = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.h(torch.relu(self.a(x))), self.h(torch.relu(self.b(x)))


@pytest.mark.parametrize("build", [SharedAct, SharedHead])
def test_a_small_module_that_is_used_twice_is_one_parameter(build: type[nn.Module]) -> None:
    small, result = back(build)
    assert type(small) is build
    assert small.a.out_channels == small.b.out_channels < 16
    assert result.prove().holds


class Zeros(nn.Module):
    """Makes one thing as wide as another, which the graph does not say."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.o = nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.a(x))
        return self.o(torch.cat([a, torch.zeros_like(a) + torch.relu(self.b(a))], 1))


def test_widths_that_the_outermost_code_ties_are_levelled() -> None:
    with pytest.warns(UserWarning, match=r"Zeros \(the outermost module\) is wider .* Or pass equal="):
        small, result = back(Zeros)
    widths = [len(kept) for kept in result.plan.kept.values()]
    assert type(small) is Zeros
    assert len(set(widths)) == 2
    assert small.a.out_channels == small.b.out_channels == max(widths) < 16


class Written(nn.Module):
    """Has one size written into the outermost code."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 16, 3, padding=1)
        self.f, self.o = nn.Linear(16 * 16, 30), nn.Linear(30, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.b(torch.relu(self.a(x)))), 2)
        return self.o(torch.relu(self.f(x.view(-1, 256))))


def test_one_size_in_the_outermost_code_keeps_one_group_whole() -> None:
    with pytest.warns(UserWarning, match="ignore= with the one before a written size"):
        small, _ = back(Written, "uniform")
    assert type(small) is Written
    assert small.b.out_channels == 16
    assert small.a.out_channels < 24 and small.f.out_features < 30
