"""Language models as transformers writes them: BERT, GPT-2, Llama, T5."""
# ruff: noqa: D102 -- each `forward` is what its class says

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.builders.export import Network

TOKENS = {0: "batch", 1: "sequence"}
LOWEST = torch.finfo(torch.float32).min


def ids(vocabulary: int, length: int = 6) -> Tensor:
    """Make an input of token numbers [batch sequence]."""
    return torch.randint(vocabulary, (2, length))


class BertLayer(nn.Module):
    """Separate q, k, v; LayerNorm after each shortcut."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-12), nn.LayerNorm(dim, eps=1e-12)
        self.intermediate, self.dense = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.heads, -1).permute(0, 2, 1, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self._heads(self.query(x)), self._heads(self.key(x)), self._heads(self.value(x))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + mask).softmax(-1)
        context = (weights @ v).permute(0, 2, 1, 3).contiguous()
        x = self.norm1(self.output(context.view(x.shape[0], x.shape[1], -1)) + x)
        return self.norm2(self.dense(F.gelu(self.intermediate(x))) + x)


class Bert(nn.Module):
    """Encoder with word, position and type embeddings, a padding mask, a pooler and a classifier."""

    def __init__(self, dim: int = 28, heads: int = 4) -> None:
        super().__init__()
        self.word_embeddings, self.position_embeddings = nn.Embedding(53, dim), nn.Embedding(16, dim)
        self.token_type_embeddings, self.norm = nn.Embedding(2, dim), nn.LayerNorm(dim, eps=1e-12)
        self.register_buffer("position_ids", torch.arange(16)[None])
        self.layer = nn.ModuleList([BertLayer(dim, heads, 46), BertLayer(dim, heads, 58)])
        self.pooler, self.classifier = nn.Linear(dim, dim), nn.Linear(dim, 5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> tuple[Tensor, Tensor]:
        positions = self.position_embeddings(self.position_ids[:, : input_ids.shape[1]])
        x = self.norm(self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids) + positions)
        mask = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * LOWEST
        for layer in self.layer:
            x = layer(x, mask)
        return self.classifier(torch.tanh(self.pooler(x[:, 0]))), x


def bert() -> Network:
    tokens = ids(53)
    mask = torch.ones_like(tokens)
    mask[0, -2:] = 0
    inputs = {"input_ids": tokens, "attention_mask": mask, "token_type_ids": (tokens % 2)}
    outputs = ["logits", "last_hidden_state"]
    return Network(Bert(), inputs, outputs, dict.fromkeys(inputs, TOKENS) | {outputs[1]: TOKENS})


class Conv1D(nn.Module):
    """GPT-2's linear layer: the weight is [in out]."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(inner, outer)), nn.Parameter(torch.zeros(outer))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return y.view((*x.size()[:-1], self.bias.size(0)))


class Gpt2Block(nn.Module):
    """Fused q, k, v split along the channels; causal mask by slicing a table; GELU with tanh."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.dim, self.heads = dim, heads
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.c_attn, self.c_proj = Conv1D(dim, 3 * dim), Conv1D(dim, dim)
        self.c_fc, self.mlp_proj = Conv1D(dim, hidden), Conv1D(hidden, dim)
        self.register_buffer("causal", torch.ones(16, 16, dtype=torch.bool).tril()[None, None])

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (
            part.view(n, t, self.heads, -1).transpose(1, 2) for part in self.c_attn(self.ln_1(x)).split(self.dim, 2)
        )
        scores = q @ k.transpose(-1, -2) / (self.dim // self.heads) ** 0.5
        weights = torch.where(self.causal[:, :, :t, :t], scores, LOWEST).softmax(-1)
        x = x + self.c_proj((weights @ v).transpose(1, 2).reshape(n, t, self.dim))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class Gpt2(nn.Module):
    """Decoder whose output layer is its embedding."""

    def __init__(self, dim: int = 30, heads: int = 5) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(47, dim), nn.Embedding(16, dim)
        self.h = nn.ModuleList([Gpt2Block(dim, heads, 56), Gpt2Block(dim, heads, 64)])
        self.ln_f, self.lm_head = nn.LayerNorm(dim), nn.Linear(dim, 47, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.wte(input_ids) + self.wpe(torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def gpt2() -> Network:
    return Network(Gpt2(), {"input_ids": ids(47)}, ["logits"], {"input_ids": TOKENS, "logits": TOKENS})


class RMSNorm(nn.Module):
    """Divide by the root mean square."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def rotate_half(x: Tensor) -> Tensor:
    """Map halves (a, b) to (-b, a)."""
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def repeat_kv(x: Tensor, times: int) -> Tensor:
    """Map [n k t d] to [n (k times) t d]."""
    n, k, t, d = x.shape
    return x[:, :, None].expand(n, k, times, t, d).reshape(n, k * times, t, d)


class LlamaLayer(nn.Module):
    """Grouped-query attention with rotary positions; SwiGLU."""

    def __init__(self, dim: int, heads: int, kv_heads: int, head: int, hidden: int) -> None:
        super().__init__()
        self.head, self.repeats = head, heads // kv_heads
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(dim), RMSNorm(dim)
        self.q_proj = nn.Linear(dim, heads * head, bias=False)
        self.k_proj = nn.Linear(dim, kv_heads * head, bias=False)
        self.v_proj = nn.Linear(dim, kv_heads * head, bias=False)
        self.o_proj = nn.Linear(heads * head, dim, bias=False)
        self.gate_proj, self.up_proj = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        n, t, _ = x.shape
        y = self.input_layernorm(x)
        q, k, v = (p(y).view(n, t, -1, self.head).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        k, v = repeat_kv(k, self.repeats), repeat_kv(v, self.repeats)
        weights = (q @ k.transpose(2, 3) * self.head**-0.5 + mask).softmax(-1)
        x = x + self.o_proj((weights @ v).transpose(1, 2).contiguous().reshape(n, t, -1))
        y = self.post_attention_layernorm(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


class Llama(nn.Module):
    """Decoder: 6 query heads on 2 key-value heads of 6 channels, wider than the residual stream."""

    def __init__(self, dim: int = 26, head: int = 6) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(43, dim)
        self.layers = nn.ModuleList([LlamaLayer(dim, 6, 2, head, 46), LlamaLayer(dim, 6, 2, head, 58)])
        self.norm, self.lm_head = RMSNorm(dim), nn.Linear(dim, 43, bias=False)
        self.register_buffer("inv_freq", 1.0 / 10000 ** (torch.arange(0, head, 2) / head))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        angles = positions[:, None].float() * self.inv_freq[None]
        angles = torch.cat((angles, angles), -1)
        mask = torch.where(positions[None, :] > positions[:, None], LOWEST, 0.0)[None, None]
        for layer in self.layers:
            x = layer(x, angles.cos()[None, None], angles.sin()[None, None], mask)
        return self.lm_head(self.norm(x))


def llama() -> Network:
    return Network(Llama(), {"input_ids": ids(43)}, ["logits"], {"input_ids": TOKENS, "logits": TOKENS})


class T5Attention(nn.Module):
    """Unscaled attention; the first layer of a stack owns the relative position bias."""

    def __init__(self, dim: int, heads: int, head: int, bias: bool = False) -> None:
        super().__init__()
        self.head = head
        self.q, self.k, self.v = (nn.Linear(dim, heads * head, bias=False) for _ in range(3))
        self.o = nn.Linear(heads * head, dim, bias=False)
        self.relative_attention_bias = nn.Embedding(8, heads) if bias else None

    def position_bias(self, length: Tensor | int, both: bool) -> Tensor:
        """Compute the bias [1 heads t t] from buckets: exact for near tokens, logarithmic for far ones."""
        line = torch.arange(length)
        distance = line[None, :] - line[:, None]
        buckets = 4 if both else 8
        offset = (distance > 0).long() * buckets if both else torch.zeros_like(distance)
        distance = distance.abs() if both else -torch.min(distance, torch.zeros_like(distance))
        exact = buckets // 2
        far = exact + (torch.log(distance.float() / exact) / math.log(20 / exact) * (buckets - exact)).long()
        far = torch.min(far, torch.full_like(far, buckets - 1))
        bucket = offset + torch.where(distance < exact, distance, far)
        return self.relative_attention_bias(bucket).permute(2, 0, 1).unsqueeze(0)

    def forward(self, x: Tensor, memory: Tensor, bias: Tensor) -> Tensor:
        n, t, _ = x.shape
        q = self.q(x).view(n, t, -1, self.head).transpose(1, 2)
        k, v = (p(memory).view(n, memory.shape[1], -1, self.head).transpose(1, 2) for p in (self.k, self.v))
        weights = (q @ k.transpose(3, 2) + bias).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).contiguous().view(n, t, -1))


class T5Layer(nn.Module):
    """Self-attention, cross-attention in the decoder, and a gated feed-forward layer."""

    def __init__(self, dim: int, heads: int, head: int, hidden: int, first: bool, decoder: bool) -> None:
        super().__init__()
        self.norm1, self.attention = RMSNorm(dim), T5Attention(dim, heads, head, first)
        if decoder:
            self.norm2, self.cross = RMSNorm(dim), T5Attention(dim, heads, head)
        self.norm3 = RMSNorm(dim)
        self.wi_0, self.wi_1 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.wo = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor, memory: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, bias)
        if memory is not None and mask is not None:
            x = x + self.cross(self.norm2(x), memory, mask)
        y = self.norm3(x)
        return x + self.wo(F.gelu(self.wi_0(y), approximate="tanh") * self.wi_1(y))


class T5(nn.Module):
    """Encoder and decoder of two layers each; one embedding for both inputs and the output."""

    def __init__(self, dim: int = 22, heads: int = 3, head: int = 8) -> None:
        super().__init__()
        self.shared = nn.Embedding(37, dim)
        self.encoder = nn.ModuleList([T5Layer(dim, heads, head, h, h == 38, False) for h in (38, 42)])
        self.decoder = nn.ModuleList([T5Layer(dim, heads, head, h, h == 34, True) for h in (34, 46)])
        self.norm_e, self.norm_d = RMSNorm(dim), RMSNorm(dim)
        self.lm_head = nn.Linear(dim, 37, bias=False)
        self.lm_head.weight = self.shared.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> Tensor:
        padding = (1.0 - attention_mask[:, None, None, :].float()) * LOWEST
        x, length = self.shared(input_ids), decoder_input_ids.shape[1]
        bias = self.encoder[0].attention.position_bias(input_ids.shape[1], True) + padding
        for layer in self.encoder:
            x = layer(x, bias)
        memory, y = self.norm_e(x), self.shared(decoder_input_ids)
        line = torch.arange(length)
        causal = torch.where(line[None, :] > line[:, None], LOWEST, 0.0)
        bias = self.decoder[0].attention.position_bias(length, False) + causal[None, None]
        for layer in self.decoder:
            y = layer(y, bias, memory, padding)
        return self.lm_head(self.norm_d(y) * self.shared.embedding_dim**-0.5)


def t5() -> Network:
    tokens = ids(37)
    mask = torch.ones_like(tokens)
    mask[1, -1:] = 0
    inputs = {"input_ids": tokens, "attention_mask": mask, "decoder_input_ids": ids(37, 5)}
    target = {0: "batch", 1: "target"}
    axes = {"input_ids": TOKENS, "attention_mask": TOKENS, "decoder_input_ids": target, "logits": target}
    return Network(T5(), inputs, ["logits"], axes)
