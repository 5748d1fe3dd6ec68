"""Attention classes that know one size of a head take pruned weights, train, and are pruned again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spa
from spa.coupling.plan import make_plan
from spa.exporters.pytorch import to_torch
from spa.exporters.pytorch.check import difference, feeds_of, outputs_of, reference
from spa.surgery.masking import masked
from spa.widths.equal import head_sizes


class Rotary(nn.Module):
    """Angles by a buffer that is not saved."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 100.0 ** -(torch.arange(0, size, 2) / size), persistent=False)

    def forward(self, length: int) -> tuple[Tensor, Tensor]:
        angles = torch.arange(length)[:, None] * self.inv_freq
        return torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class Decoder(nn.Module):
    """Rotated heads of which two share a key and a value; scores are divided by the root of a query's size."""

    def __init__(self, dim: int = 32, heads: int = 4, shared: int = 2) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_groups, self.head_dim = heads, heads // shared, dim // heads
        self.rotary, self.norm = Rotary(self.head_dim), nn.RMSNorm(dim)
        self.q_proj, self.o_proj = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(dim, dim * shared // heads) for _ in "kv")
        self.gate, self.up, self.down = nn.Linear(dim, 56), nn.Linear(dim, 56), nn.Linear(56, dim)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = self.rotary(x.shape[1])
        k, v = (t.repeat_interleave(self.num_key_value_groups, 1) for t in (turned(k, cos, sin), v))
        return self.o_proj(F.scaled_dot_product_attention(turned(q, cos, sin), k, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm(x))
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


class Encoder(nn.Module):
    """Heads by their size alone; scores with a scale of their own or without."""

    def __init__(self, scaled: bool) -> None:
        super().__init__()
        self.head_dim, self.scale = 12, 12**-0.5 if scaled else None
        self.query, self.key, self.value, self.out = (nn.Linear(24, 24) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for f in (self.query, self.key, self.value))
        return self.out(F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2))


def own(build: Callable[[], nn.Module]) -> tuple[nn.Module, Any]:
    module = build().eval()
    width = next(p for p in module.parameters() if p.ndim == 2).shape[1]
    return module, 2 * torch.randn(3, 7, width)


TEXT: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"intermediate_size": 56, "max_position_embeddings": 32, "use_cache": False}
T5 = {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 56, "num_layers": 2, "num_heads": 4}
IMAGE = {k: v for k, v in TEXT.items() if k.startswith(("hidden", "num", "inter"))} | {
    "image_size": 16,
    "patch_size": 8,
}
GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "use_cache": False}
WHISPER = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 56}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": TEXT | {"num_key_value_heads": 2},
    "PhiForCausalLM": TEXT,  # half of a head's dimensions are rotated
    "GPT2LMHeadModel": GPT2,
    "BertModel": TEXT,
    "ViTForImageClassification": IMAGE,
    "T5EncoderModel": T5,
    "WhisperEncoder": WHISPER | {"max_source_positions": 15},
}


@cache
def declared() -> torch.library.Library | None:
    """Where torchvision was built for another torch, transformers cannot import it until its operators are declared."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return None
    except RuntimeError:  # "operator torchvision::nms does not exist"
        for module in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[module]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


def transformer(name: str) -> tuple[nn.Module, Any]:
    library = pytest.importorskip("transformers", reason="needs  pip install transformers")
    declared()
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    cls = WhisperEncoder if name == "WhisperEncoder" else getattr(library, name)
    module = cls(cls.config_class(**TRANSFORMERS[name])).eval()
    with torch.no_grad():  # weights that matter
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.5 / parameter[0].numel() ** 0.5)
    if name.startswith("ViT"):
        return module, {"pixel_values": torch.randn(2, 3, 16, 16)}
    if name.startswith("Whisper"):
        return module, {"input_features": torch.randn(2, 80, 30)}
    return module, {"input_ids": torch.randint(61, (2, 9))}


def pruned(module: nn.Module, example: Any, **options: Any) -> tuple[nn.Module, spa.Result]:
    """The user's class after pruning, compared with the ONNX model, and that with the masked original."""
    request = {"ratio": 0.5, "of": "params", "criterion": "l2", "ranking": "uniform", "round_to": 1} | options
    if "plan" in options:
        del request["ratio"]
    result = spa.prune(module, example_inputs=example, **request)
    assert result.origin is not None
    small, how, notes = to_torch(result, module, result.origin.imported.names, example)
    assert (type(small), how, notes) == (type(module), "module", ())
    feeds = feeds_of(result.model, example)
    wanted = reference(result.model, None, feeds)
    assert difference(outputs_of(small, *_call(example)), wanted) < 1e-5
    if not request.get("cross_norm"):
        assert difference(wanted, reference(masked(result.analysis, result.plan), None, feeds)) < 1e-5
    return small, result


def _call(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((), example) if isinstance(example, dict) else ((example,), {})


def trained(module: nn.Module, example: Any) -> None:
    args, kwargs = _call(example)
    optimiser = torch.optim.SGD(module.parameters(), 1e-3)
    out = module(*args, **kwargs)
    out = out if isinstance(out, Tensor) else out[0]
    out.square().mean().backward()
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    assert len(gradients) > 4
    assert all(torch.isfinite(g).all() for g in gradients)
    optimiser.step()


def sizes(result: spa.Result) -> set[float]:
    """The shares that head sizes keep."""
    groups = {g.name: g.size for g in result.analysis.groups}
    return {len(result.plan.kept.get(n, range(groups[n]))) / groups[n] for s in head_sizes(result.analysis) for n in s}


OWN: dict[str, Callable[[], nn.Module]] = {
    "decoder": Decoder,
    "scaled": lambda: Encoder(True),
    "unscaled": lambda: Encoder(False),
}


@pytest.mark.parametrize("name", OWN)
def test_an_attention_of_ones_own_comes_back_trains_and_is_pruned_again(name: str) -> None:
    torch.manual_seed(0)
    module, example = own(OWN[name])
    small, result = pruned(module, example)
    assert small.head_dim < module.head_dim
    assert len(sizes(result)) == 1
    trained(small, example)
    again, _ = pruned(small, example, ratio=0.3)
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in small.parameters())


def test_rotations_and_shared_heads_follow_the_kept_dimensions() -> None:
    torch.manual_seed(0)
    module, example = own(Decoder)
    small, result = pruned(module, example)
    kept = result.plan.kept[next(g.name for g in result.analysis.groups if g.size == 4 and "inv_freq" in str(g.places))]
    assert torch.equal(small.rotary.inv_freq, module.rotary.inv_freq[list(kept)])
    assert small.head_dim == 2 * len(kept) == small.v_proj.out_features // (small.k_proj.out_features // small.head_dim)
    assert "rotary.inv_freq" not in small.state_dict()
    heads = small.q_proj.out_features // small.head_dim
    assert small.num_key_value_groups == heads // (small.k_proj.out_features // small.head_dim)


def test_shared_heads_are_counted_where_only_the_queries_lose_some() -> None:
    torch.manual_seed(0)
    module, example = own(Decoder)
    analysis = spa.analyze(spa.convert(module, example).model)
    only = next(g for g in analysis.free if g.size == 2 and all("k_proj" not in p.tensor for p in g.places))
    small, _ = pruned(module, example, plan=make_plan(analysis, {only.name: np.array([1])}))
    assert (small.num_key_value_groups, small.q_proj.out_features, small.k_proj.out_features) == (1, 16, 16)


def test_without_equal_sizes_the_class_keeps_the_larger_one_for_all_heads() -> None:
    torch.manual_seed(0)
    module, example = own(lambda: Encoder(True))
    analysis = spa.analyze(spa.convert(module, example).model)
    (names,) = head_sizes(analysis)
    plan = make_plan(analysis, dict(zip(sorted(names), (np.arange(5), np.arange(2, 9)), strict=True)))
    result = spa.prune(module, example_inputs=example, plan=plan)
    assert result.origin is not None
    small, how, notes = to_torch(result, module, result.origin.imported.names, example)
    assert (how, type(small)) == ("module", type(module))
    assert "wider than pruning left it" in notes[0] and "equal=" in notes[0]
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in module.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformer_comes_back_trains_and_is_pruned_again(name: str) -> None:
    torch.manual_seed(0)
    module, example = transformer(name)
    small, result = pruned(module, example)
    assert max(sizes(result)) < 1
    trained(small, example)
    again, _ = pruned(small, example, ratio=0.2)
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in small.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_a_transformer_comes_back_with_a_narrower_residual_stream(name: str) -> None:
    torch.manual_seed(0)
    module, example = transformer(name)
    small, _ = pruned(module, example, cross_norm=True)
    widths = {w.shape[1] for w in (e.weight for e in small.modules() if isinstance(e, nn.Embedding))}
    assert max(widths) < 32


class SideBySide(nn.Module):
    """Each head's queries, keys and values lie side by side in one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.head_size = 6
        self.query_key_value, self.out = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.query_key_value(x).unflatten(-1, (-1, 3 * self.head_size)).transpose(1, 2).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v, scale=0.4).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("weak", [(0, 1), (1, 2), (0, 3)])
def test_heads_go_where_their_queries_keys_and_values_lie_side_by_side(weak: tuple[int, ...]) -> None:
    module, x = own(SideBySide)
    with torch.no_grad():
        for head in weak:
            module.query_key_value.weight[18 * head : 18 * head + 18] *= 0.01
    small = spa.prune(module, ratio=0.48, criterion="l2", of="params", round_to=1, example_inputs=x).pruned
    assert type(small) is SideBySide
    assert small.query_key_value.out_features == 36
