"""Sound: a Whisper-like encoder, WaveNet, and a plain one-dimensional convolutional network."""
# ruff: noqa: D102 -- each `forward` is what its class says

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.builders.export import Network


class WhisperLayer(nn.Module):
    """Self-attention whose key projection has no bias, and an MLP."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.attn_ln, self.mlp_ln = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key, self.value = (
            nn.Linear(dim, dim),
            nn.Linear(dim, dim, bias=False),
            nn.Linear(dim, dim),
        )
        self.out = nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attn_ln(x)
        q, k, v = (
            p(y).view(*y.shape[:2], self.heads, -1).permute(0, 2, 1, 3) for p in (self.query, self.key, self.value)
        )
        weighted = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(weighted.permute(0, 2, 1, 3).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.mlp_ln(x))))


class WhisperEncoder(nn.Module):
    """Two convolutions over the mel frames, sinusoidal positions, transformer layers."""

    def __init__(self, mels: int = 11, dim: int = 24, frames: int = 16) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(mels, 20, 3, padding=1), nn.Conv1d(20, dim, 3, 2, 1)
        rates = torch.exp(-math.log(10000.0) / (dim // 2 - 1) * torch.arange(dim // 2))
        angles = torch.arange(frames // 2)[:, None] * rates[None]
        self.register_buffer("positional_embedding", torch.cat([angles.sin(), angles.cos()], 1))
        self.blocks = nn.Sequential(WhisperLayer(dim, 3, 50), WhisperLayer(dim, 3, 42))
        self.ln_post = nn.LayerNorm(dim)

    def forward(self, mel: Tensor) -> Tensor:
        x = F.gelu(self.conv2(F.gelu(self.conv1(mel)))).permute(0, 2, 1)
        return self.ln_post(self.blocks(x + self.positional_embedding))


def whisper_encoder() -> Network:
    return Network(WhisperEncoder(), {"mel": torch.randn(2, 11, 16)})


class Gated(nn.Module):
    """Dilated convolution, tanh times sigmoid, a residual and a skip output."""

    def __init__(self, residual: int, gate: int, skip: int, dilation: int, fused: bool) -> None:
        super().__init__()
        self.fused, self.pad = fused, dilation
        if fused:
            self.both = nn.Conv1d(residual, 2 * gate, 2, dilation=dilation)
        else:
            self.filter = nn.Conv1d(residual, gate, 2, dilation=dilation)
            self.gate = nn.Conv1d(residual, gate, 2, dilation=dilation)
        self.residual, self.skip = nn.Conv1d(gate, residual, 1), nn.Conv1d(gate, skip, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.pad(x, (self.pad, 0))
        a, b = self.both(y).chunk(2, 1) if self.fused else (self.filter(y), self.gate(y))
        y = torch.tanh(a) * torch.sigmoid(b)
        return x + self.residual(y), self.skip(y)


class WaveNet(nn.Module):
    """Gated causal blocks; the sum of their skips is the output."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Conv1d(1, 10, 1)
        self.blocks = nn.ModuleList([Gated(10, gate, 14, 2**i, fused=i % 2 == 1) for i, gate in enumerate((9, 11, 13))])
        self.end1, self.end2 = nn.Conv1d(14, 17, 1), nn.Conv1d(17, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        total: Tensor | None = None
        for block in self.blocks:
            x, skip = block(x)
            total = skip if total is None else total + skip
        return self.end2(F.relu(self.end1(F.relu(total))))


def wavenet() -> Network:
    return Network(WaveNet(), {"input": torch.randn(2, 1, 24)}, dynamic={"input": {0: "batch", 2: "time"}})


def conv1d() -> Network:
    """Build a network for keyword spotting: strided convolutions with BatchNorm, InstanceNorm and a flatten."""
    layers = [nn.Conv1d(4, 11, 7, 2, 3), nn.BatchNorm1d(11), nn.ELU(), nn.Conv1d(11, 15, 5, 2, 2)]
    layers += [nn.InstanceNorm1d(15, affine=True), nn.LeakyReLU(0.1), nn.Conv1d(15, 19, 3), nn.MaxPool1d(2)]
    return Network(nn.Sequential(*layers, nn.Flatten(), nn.Linear(19 * 3, 6)), {"input": torch.randn(2, 4, 32)})
