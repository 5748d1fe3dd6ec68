"""Transformers for images: ViT (two ways of writing its attention), Swin, and MLP-Mixer."""
# ruff: noqa: D102 -- each `forward` is what its class says

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.builders.convnets import image
from models.builders.export import Network


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class FusedAttention(nn.Module):
    """Self-attention as timm writes it: one projection reshaped to (3 h d)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        qkv = self.qkv(x).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = (q * (c // self.heads) ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(n, t, c))


class TorchAttention(nn.Module):
    """Self-attention as torchvision writes it: `nn.MultiheadAttention`."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.self_attention = nn.MultiheadAttention(dim, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.self_attention(x, x, x, need_weights=False)[0]


class ViT(nn.Module):
    """Patches, class token, learned positions, blocks that normalise first."""

    def __init__(self, attention: type[nn.Module], dim: int, heads: int, hidden: list[int]) -> None:
        super().__init__()
        self.conv_proj = nn.Conv2d(3, dim, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 10, dim))
        self.norm1 = nn.ModuleList([nn.LayerNorm(dim, eps=1e-6) for _ in hidden])
        self.attn = nn.ModuleList([attention(dim, heads) for _ in hidden])
        self.norm2 = nn.ModuleList([nn.LayerNorm(dim, eps=1e-6) for _ in hidden])
        self.mlp = nn.ModuleList([Mlp(dim, width) for width in hidden])
        self.norm, self.head = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        for norm1, attention, norm2, mlp in zip(self.norm1, self.attn, self.norm2, self.mlp, strict=True):
            x = x + attention(norm1(x))
            x = x + mlp(norm2(x))
        return self.head(self.norm(x)[:, 0])


def vit() -> Network:
    return Network(ViT(FusedAttention, 30, 5, [50, 70]), image(3, 12))


def vit_torchvision() -> Network:
    return Network(ViT(TorchAttention, 28, 4, [46, 62]), image(3, 12))


class WindowAttention(nn.Module):
    """Attention within windows of [window window], shifted by `shift`, with a relative position bias."""

    def __init__(self, dim: int, heads: int, window: int, shift: int, size: int) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        line = torch.arange(window)
        places = torch.stack(torch.meshgrid(line, line, indexing="ij")).flatten(1)
        offsets = places[:, :, None] - places[:, None] + window - 1
        self.register_buffer("relative_position_index", offsets[0] * (2 * window - 1) + offsets[1])
        if shift:
            part = torch.zeros(size)
            part[-window:-shift], part[-shift:] = 1, 2
            regions = self._windows((part[:, None] * 3 + part)[None, :, :, None]).squeeze(-1)
            differ = regions[:, None] != regions[:, :, None]
            self.register_buffer("attn_mask", torch.zeros(differ.shape).masked_fill(differ, -100.0))

    def _windows(self, x: Tensor) -> Tensor:
        """Map [n (a p) (b q) c] to [(n a b) (p q) c]."""
        n, h, w, c = x.shape
        x = x.view(n, h // self.window, self.window, w // self.window, self.window, c)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, self.window * self.window, c)

    def forward(self, x: Tensor) -> Tensor:
        n, h, w, c = x.shape
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        x = self._windows(x)
        b, t, _ = x.shape
        qkv = self.qkv(x).reshape(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * (c // self.heads) ** -0.5, qkv[1], qkv[2]
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        scores = q @ k.transpose(-2, -1) + bias.view(t, t, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
        if self.shift:
            groups = self.attn_mask.shape[0]
            scores = scores.view(b // groups, groups, self.heads, t, t) + self.attn_mask[None, :, None]
            scores = scores.view(-1, self.heads, t, t)
        x = self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, c))
        side = h // self.window
        x = x.view(n, side, side, self.window, self.window, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        return torch.roll(x, (self.shift, self.shift), (1, 2)) if self.shift else x


class SwinBlock(nn.Module):
    """Window attention and MLP, both after LayerNorm and with shortcuts."""

    def __init__(self, dim: int, heads: int, shift: int, size: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, 2, shift, size)
        self.mlp = Mlp(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    """Four neighbours are concatenated and projected."""

    def __init__(self, dim: int, outer: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, outer, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
        return self.reduction(self.norm(torch.cat(parts, -1)))


class Swin(nn.Module):
    """Two stages of Swin blocks, channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed, self.norm0 = nn.Conv2d(3, 12, 2, 2), nn.LayerNorm(12)
        self.stage1 = nn.Sequential(SwinBlock(12, 3, 0, 8, 34), SwinBlock(12, 3, 1, 8, 38))
        self.merge = PatchMerging(12, 20)
        self.stage2 = nn.Sequential(SwinBlock(20, 5, 0, 4, 54), SwinBlock(20, 5, 1, 4, 58))
        self.norm, self.head = nn.LayerNorm(20), nn.Linear(20, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm0(self.patch_embed(x).permute(0, 2, 3, 1))
        x = self.norm(self.stage2(self.merge(self.stage1(x))))
        return self.head(F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), 1).flatten(1))


def swin() -> Network:
    return Network(Swin(), image(3, 16))


class MixerBlock(nn.Module):
    """An MLP over the tokens, an MLP over the channels."""

    def __init__(self, tokens: int, dim: int, token_hidden: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.token_mlp, self.channel_mlp = Mlp(tokens, token_hidden), Mlp(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token_mlp(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channel_mlp(self.norm2(x))


class Mixer(nn.Module):
    """MLP-Mixer on patches of 4 x 4."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 22, 4, 4)
        self.blocks = nn.Sequential(MixerBlock(9, 22, 14, 37), MixerBlock(9, 22, 17, 41))
        self.norm, self.head = nn.LayerNorm(22), nn.Linear(22, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(1))


def mlp_mixer() -> Network:
    return Network(Mixer(), image(3, 12))
