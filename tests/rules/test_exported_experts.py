"""Mixtures of experts as PyTorch's exporters write them: inner widths of experts go exactly, whatever the form."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable

import onnx
import pytest
from onnx import ModelProto

from spa.coupling.analysis import couple
from spa.model.graph import Graph
from spa.model.io import load
from spa.model.simplify import simplified
from tests.oracle import check

torch = pytest.importorskip("torch", reason="needs  pip install 'spa-onnx[torch]'")

WIDTH, INNER, EXPERTS, PICKED = 12, 11, 5, 2
Tensor = torch.Tensor
nn, F = torch.nn, torch.nn.functional


class Expert(nn.Module):
    """A gated feed-forward layer, as Mixtral's experts are."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(WIDTH, INNER, bias=False) for _ in range(2))
        self.w2 = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Mixture(nn.Module):
    """A network of one mixture, of the form ``mix`` on rows of channels.

    Separate experts are modules (transformers before version 5), others are stacked in two tensors (since then).
    """

    def __init__(self, mix: Callable[[Mixture, Tensor], Tensor]) -> None:
        super().__init__()
        self.mix = mix
        self.table, self.head = nn.Embedding(50, WIDTH), nn.Linear(WIDTH, 7)
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, 2 * INNER) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) / INNER**0.5)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, picked = torch.topk(F.softmax(self.gate(x), -1), PICKED, -1)
        return weights / weights.sum(-1, keepdim=True), picked

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.head(self.mix(self, x.view(-1, WIDTH)).view(*ids.shape, WIDTH))


def one_hot_and_index_add(net: Mixture, x: Tensor) -> Tensor:
    """Mixtral's and Qwen2's: each expert takes its rows by `where` and adds its results in place."""
    weights, picked = net.route(x)
    out, mask = torch.zeros_like(x), F.one_hot(picked, EXPERTS).permute(2, 1, 0)
    for e, expert in enumerate(net.experts):
        which, rows = torch.where(mask[e])
        out.index_add_(0, rows, expert(x[None, rows].reshape(-1, WIDTH)) * weights[rows, which, None])
    return out


def assigned_by_masks(net: Mixture, x: Tensor) -> Tensor:
    """DeepSeek's: rows are repeated for each pick, and each expert's results are assigned by a mask."""
    weights, picked = net.route(x)
    repeated, flat = x.repeat_interleave(PICKED, 0), picked.view(-1)
    out = torch.empty_like(repeated)
    for e, expert in enumerate(net.experts):
        out[flat == e] = expert(repeated[flat == e])
    return (out.view(-1, PICKED, WIDTH) * weights[..., None]).sum(1)


def all_experts_weighted(net: Mixture, x: Tensor) -> Tensor:
    """Every expert computes every row, of which most weights are zero."""
    weights, picked = net.route(x)
    return sum(expert(x) * (weights * (picked == e)).sum(-1, keepdim=True) for e, expert in enumerate(net.experts))


def tiled_and_scattered(net: Mixture, x: Tensor) -> Tensor:
    """Llama 4's and gpt-oss': rows are tiled for all experts; gates and values lie in turns."""
    weights, picked = net.route(x)
    scores = torch.zeros(x.shape[0], EXPERTS).scatter(1, picked, weights).transpose(0, 1).reshape(EXPERTS, -1, 1)
    both = torch.bmm(x.repeat(EXPERTS, 1).view(EXPERTS, -1, WIDTH), net.up)
    return (torch.bmm(F.silu(both[..., ::2]) * both[..., 1::2], net.down) * scores).sum(0)


def weights_gathered(net: Mixture, x: Tensor) -> Tensor:
    """Since transformers 5: each row gathers the weights of its experts."""
    weights, picked = net.route(x)
    gates, values = torch.einsum("nd,nkdh->nkh", x, net.up[picked]).chunk(2, -1)
    return torch.einsum("nkh,nkhd,nk->nd", F.silu(gates) * values, net.down[picked], weights)


def exported(mix: Callable[[Mixture, Tensor], Tensor]) -> ModelProto:
    torch.manual_seed(0)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer's
        torch.onnx.export(
            Mixture(mix).eval(),
            (torch.randint(0, 50, (2, 7)),),
            buffer,
            dynamo=False,
            input_names=["ids"],
            dynamic_axes={"ids": {0: "batch", 1: "sequence"}},
            opset_version=17,
        )
    return simplified(load(onnx.load_from_string(buffer.getvalue()))).model


@pytest.mark.parametrize(
    ("mix", "groups"),
    [
        (one_hot_and_index_add, EXPERTS),
        (assigned_by_masks, EXPERTS),
        (all_experts_weighted, EXPERTS),
        (tiled_and_scattered, 1),
        (weights_gathered, 1),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_inner_widths_go_exactly_and_which_expert_is_picked_stays(
    mix: Callable[[Mixture, Tensor], Tensor], groups: int
) -> None:
    model = exported(mix)
    analysis = couple(Graph(model))
    assert [g.size for g in analysis.free if g.size == INNER] == [INNER] * groups
    reasons = [g.frozen for g in analysis.groups if g.size == EXPERTS]
    assert "TopK '/TopK' finds positions along it" in reasons and all(reasons)  # docs/guides/read-a-refusal.md
    check(model, groups=[g.name for g in analysis.free if g.size == INNER])
