"""Train the four reference networks on scikit-learn's digits, and write them as `.onnx` files.

    python -m models.train [--seed 0] [--only digits_vit]

Takes about five minutes on two cores. Needs torch and scikit-learn.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import onnx
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from models.builders.export import Network, torchscript
from models.evaluate import accuracy

HERE = Path(__file__).parent


class Residual(nn.Module):
    """Two 3x3 convolutions with BatchNorm, and a shortcut around them."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inner != outer:
            self.shortcut = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        """Map [n c h w] to [n outer h/stride w/stride]."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """Stem and five residual blocks in three stages of 32, 64 and 128 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.layer1 = nn.Sequential(Residual(32, 32, 1), Residual(32, 32, 1))
        self.layer2 = nn.Sequential(Residual(32, 64, 2), Residual(64, 64, 1))
        self.layer3 = nn.Sequential(Residual(64, 128, 2))
        self.fc = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n 1 8 8] to [n 10]."""
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class VGG(nn.Module):
    """Three stages of two 3x3 convolutions with BatchNorm, max pooling between them, and a hidden linear layer."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 96), hidden: int = 128) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inner = 1
        for width in widths:
            if layers:
                layers.append(nn.MaxPool2d(2))
            for size in (inner, width):
                layers += [nn.Conv2d(size, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            inner = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(4 * inner, hidden), nn.ReLU(), nn.Linear(hidden, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Map [n 1 8 8] to [n 10]."""
        return self.classifier(self.features(x).flatten(1))


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n t c] to [n t c]."""
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        weights = ((q * (c // self.heads) ** -0.5) @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(n, t, c))


class Block(nn.Module):
    """A transformer block that normalises first."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n t c] to [n t c]."""
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Patches of 2x2, a class token, learned positions, four blocks."""

    def __init__(self, dim: int = 64, heads: int = 4, depth: int = 4) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(1, dim, 2, 2)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, 17, dim) * 0.02)
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n 1 8 8] to [n 10]."""
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class Recurrent(nn.Module):
    """A bidirectional LSTM over the rows of the image, an LSTM over its states, and a classifier."""

    def __init__(self, hidden: int = 96) -> None:
        super().__init__()
        self.rnn1 = nn.LSTM(8, hidden, batch_first=True, bidirectional=True)
        self.rnn2 = nn.LSTM(2 * hidden, hidden, batch_first=True)
        self.fc = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n 1 8 8] to [n 10]."""
        x, _ = self.rnn1(x.squeeze(1))
        x, _ = self.rnn2(F.dropout(x, 0.2, self.training))
        return self.fc(x[:, -1])


def data(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Load images in -1 .. 1 as [n 1 8 8] and labels: train, test (a fifth, stratified)."""
    digits = load_digits()
    images = (digits.images[:, None] / 8 - 1).astype(np.float32)
    parts = train_test_split(images, digits.target, test_size=0.2, stratify=digits.target, random_state=seed)
    x, x_test, y, y_test = map(torch.from_numpy, parts)
    return x, y, x_test, y_test


def augment(x: Tensor) -> Tensor:
    """Turn, scale and shift each image a little."""
    n = len(x)
    angle = (torch.rand(n) - 0.5) * 0.4
    scale = 1 + (torch.rand(n) - 0.5) * 0.2
    shift = (torch.rand(n, 2) - 0.5) * 0.35
    cos, sin = angle.cos() * scale, angle.sin() * scale
    theta = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    # Sampling pads with 0, which is grey here; the background is -1.
    return F.grid_sample(x + 1, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False) - 1


def fit(module: nn.Module, x: Tensor, y: Tensor, epochs: int, rate: float) -> None:
    """Train with AdamW, one cycle of the learning rate, and label smoothing."""
    batch = 64
    steps = epochs * (len(x) // batch)
    optimiser = torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    module.train()
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(batch):
            if len(index) < batch:
                continue
            loss = F.cross_entropy(module(augment(x[index])), y[index], label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimiser.step()
            schedule.step()


RECIPES = {  # name: module, epochs, learning rate
    "digits_resnet": (ResNet, 40, 4e-3),
    "digits_vgg": (VGG, 40, 4e-3),
    "digits_vit": (VisionTransformer, 120, 2e-3),
    "digits_lstm": (Recurrent, 80, 5e-3),
}


def name_recurrent_weights(model: onnx.ModelProto) -> None:
    """Name W, R and B of each LSTM after its module (folding its gates into ONNX's order loses the names)."""
    for node in model.graph.node:
        if node.op_type == "LSTM":
            module = node.name.split("/")[1]
            for place, letter in ((1, "W"), (2, "R"), (3, "B")):
                tensor = next(t for t in model.graph.initializer if t.name == node.input[place])
                tensor.name = node.input[place] = f"{module}.{letter}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=RECIPES, help="train this one only")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    x, y, x_test, y_test = data(arguments.seed)
    np.savez_compressed(HERE / "digits_test.npz", input=x_test.numpy(), label=y_test.numpy())
    np.savez_compressed(HERE / "digits_train.npz", input=x.numpy(), label=y.numpy())
    print("| model | parameters | file | accuracy | train |\n| --- | --- | --- | --- | --- |")
    for name in [arguments.only] if arguments.only else RECIPES:
        build, epochs, rate = RECIPES[name]
        torch.manual_seed(arguments.seed)
        module, start = build(), time.perf_counter()
        fit(module, x, y, epochs, rate)
        seconds = time.perf_counter() - start
        folded = {"do_constant_folding": name == "digits_lstm"}
        model = torchscript(Network(module, {"input": x_test[:3]}, ["logits"], script=folded))
        name_recurrent_weights(model)
        correct = accuracy(model.SerializeToString(), x_test.numpy(), y_test.numpy())
        onnx.helper.set_model_props(
            model,
            {
                "script": "models/train.py",
                "seed": str(arguments.seed),
                "dataset": "scikit-learn digits, test split in models/digits_test.npz",
                "input": "pixel / 8 - 1, [batch, 1, 8, 8]",
                "test_accuracy": f"{correct:.4f}",
            },
        )
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, HERE / f"{name}.onnx")
        parameters = sum(p.numel() for p in module.parameters())
        size = (HERE / f"{name}.onnx").stat().st_size / 1e6
        print(f"| {name}.onnx | {parameters:,} | {size:.2f} MB | {correct:.2%} | {seconds:.0f} s |", flush=True)


if __name__ == "__main__":
    main()
