"""Three dimensions, shared weights, tied weights, several inputs and outputs."""
# ruff: noqa: D102 -- each `forward` is what its class says

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.builders.convnets import Head, conv_bn
from models.builders.export import Network


class Conv3d(nn.Module):
    """Video classifier: full and factorised ((2+1)-dimensional) convolutions, and a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv3d(2, 9, 3, padding=1, bias=False), nn.BatchNorm3d(9)
        self.space, self.bn2 = nn.Conv3d(9, 13, (1, 3, 3), padding=(0, 1, 1), bias=False), nn.BatchNorm3d(13)
        self.time, self.bn3 = nn.Conv3d(13, 9, (3, 1, 1), padding=(1, 0, 0), bias=False), nn.BatchNorm3d(9)
        self.fc = nn.Linear(9 * 8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool3d(F.relu(self.bn1(self.conv1(x))), (1, 2, 2))
        x = F.relu(x + self.bn3(self.time(F.relu(self.bn2(self.space(x))))))
        return self.fc(F.avg_pool3d(x, 2).flatten(1))


def conv3d() -> Network:
    return Network(Conv3d(), {"input": torch.randn(2, 2, 4, 8, 8)})


class Siamese(nn.Module):
    """One encoder for two images; the distance of their codes, and a score."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(conv_bn(3, 9), conv_bn(9, 14, 3, 2), Head(14, 17))
        self.score = nn.Linear(17, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.score(torch.abs(self.encoder(left) - self.encoder(right)))


def siamese() -> Network:
    return Network(Siamese(), {"left": torch.randn(2, 3, 10, 10), "right": torch.randn(2, 3, 10, 10)})


class TiedEmbeddings(nn.Module):
    """A language model without attention, and an auto-encoder that decodes with its transposed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(29, 18)
        self.fc1, self.fc2 = nn.Linear(18, 25), nn.Linear(25, 18)
        self.code = nn.Parameter(torch.zeros(11, 18))
        self.norm = nn.LayerNorm(18)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.fc2(F.relu(self.fc1(x)))
        x = x + torch.relu(F.linear(x, self.code)) @ self.code
        return F.linear(self.norm(x), self.embedding.weight)


def tied_embeddings() -> Network:
    return Network(TiedEmbeddings(), {"tokens": torch.randint(29, (2, 5))}, ["logits"])


class MultiIO(nn.Module):
    """An image, numbers and a token meet; a class, boxes and an inner feature map come out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv_bn(3, 9, 3, 2), conv_bn(9, 15)
        self.numbers = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 8))
        self.embedding = nn.Embedding(13, 8)
        self.film = nn.Linear(8, 30)
        self.merge = nn.Linear(23, 19)
        self.classes, self.boxes = nn.Linear(19, 7), nn.Linear(19, 4)

    def forward(self, image: Tensor, numbers: Tensor, token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        side = self.numbers(numbers) + self.embedding(token)
        scale, shift = self.film(side).chunk(2, 1)
        features = self.conv1(image)
        x = self.conv2(features) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        x = F.relu(self.merge(torch.cat([x.mean((2, 3)), side], 1)))
        return self.classes(x), self.boxes(x).sigmoid(), features


def multi_io() -> Network:
    inputs = {
        "image": torch.randn(2, 3, 12, 12),
        "numbers": torch.randn(2, 5),
        "token": torch.randint(13, (2,)),
    }
    return Network(MultiIO(), inputs, ["classes", "boxes", "features"])
