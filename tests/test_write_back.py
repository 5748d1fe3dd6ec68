"""Pruned weights in the user's own PyTorch classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from onnx import ModelProto
from spa.exporters.pytorch import write_back
from torch import Tensor, nn

import spa
from models.builders.export import Network, dynamo, randomise, torchscript
from spa.runtime import load_session, run


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(24)
        self.conv1 = nn.Conv2d(24, 40, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(40)
        self.act = nn.PReLU(40)
        self.conv2 = nn.Conv2d(40, 24, 3, padding=1)
        self.fc = nn.Linear(24, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.conv2(self.act(self.norm1(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.depth = nn.Conv2d(24, 48, 3, padding=1, groups=24)
        self.groups = nn.Conv2d(48, 40, 3, padding=1, groups=8)
        self.norm = nn.GroupNorm(4, 40)
        self.up = nn.ConvTranspose2d(40, 20, 2, 2, groups=4)
        self.head = nn.Conv2d(20, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.depth(F.relu(self.stem(x))))
        x = F.silu(self.norm(self.groups(x)))
        return self.head(F.relu(self.up(x)))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(11, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 32, bias=False), nn.Tanh()
        )
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(31, 16)
        self.first = nn.LSTM(16, 24, batch_first=True, bidirectional=True)
        self.second = nn.LSTM(48, 24, batch_first=True)
        self.fc = nn.Linear(24, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x, _ = self.first(self.embedding(tokens))
        x, _ = self.second(x)
        return self.fc(x[:, -1])


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(9, 24, 2, batch_first=True)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(x)[0][:, -1])


class Attention(nn.Module):
    """Counts its heads, and their size, in attributes."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, dim // heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.scale = self.head_dim**-0.5

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class HardCoded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3, padding=1)
        self.fc = nn.Linear(32 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(F.relu(self.conv(x)), 2)
        x = x.view(-1, 128)
        return self.fc(x)


IMAGE, STEPS = torch.randn(3, 3, 8, 8), torch.randn(3, 5, 9)
MODULES = {
    "residual": (Residual, IMAGE),
    "depthwise": (Depthwise, IMAGE),
    "mlp": (Mlp, torch.randn(3, 11)),
    "lstm": (Recurrent, torch.randint(31, (3, 6))),
    "block": (Block, torch.randn(3, 5, 32)),
}


def imported(
    build: type[nn.Module], example: Tensor, script: bool = False
) -> tuple[nn.Module, ModelProto, dict[str, str]]:
    """A module with random weights, its ONNX model, and the state_dict keys of its initializers."""
    torch.manual_seed(0)
    module = build()
    network = Network(module, {"x": example}, ["y"], dynamo={"optimize": False})
    randomise(network)
    model = torchscript(network) if script else dynamo(network)
    state = module.state_dict()
    return module, model, {t.name: t.name for t in model.graph.initializer if t.name in state}


def apart(module: nn.Module, model: ModelProto, example: Tensor) -> float:
    wanted = run(load_session(model), {model.graph.input[0].name: example.numpy()})[0]
    with torch.no_grad():
        got = module(example).numpy()
    assert got.shape == wanted.shape
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("script", [False, True], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("name", MODULES)
def test_the_users_class_takes_the_pruned_weights_and_gives_the_pruned_graphs_outputs(name: str, script: bool) -> None:
    module, model, names = imported(*MODULES[name], script)
    example = MODULES[name][1]
    before = {k: v.clone() for k, v in module.state_dict().items()}
    result = spa.prune(model, ratio=0.5, of="params", criterion="l2", round_to=1)
    small = write_back(module, result, names, example)
    assert type(small) is type(module)
    assert size(small) < 0.8 * size(module)
    assert apart(small, result.model, example) < 1e-5
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
