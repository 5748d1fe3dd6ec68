"""Classic convolutional networks: plain, VGG, ResNet, DenseNet, Inception, GoogLeNet, SqueezeNet."""
# ruff: noqa: D102 -- each `forward` is what its class says

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.builders.export import Network


def image(channels: int = 3, size: int = 16, batch: int = 2) -> dict[str, Tensor]:
    """Make one input, `input` [batch channels size size]."""
    return {"input": torch.randn(batch, channels, size, size)}


def conv_bn(
    inner: int,
    outer: int,
    kernel: int = 3,
    stride: int = 1,
    groups: int = 1,
    act: type[nn.Module] | None = nn.ReLU,
) -> nn.Sequential:
    """Make a convolution with "same" padding, BatchNorm, and an activation if any."""
    layers = [
        nn.Conv2d(inner, outer, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outer),
    ]
    return nn.Sequential(*layers, *([act()] if act else []))


class Head(nn.Module):
    """Global average pooling and a linear layer."""

    def __init__(self, channels: int, classes: int = 7) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def plain_cnn() -> Network:
    body = [conv_bn(3, 10), conv_bn(10, 14, 3, 2), conv_bn(14, 22, 5), conv_bn(22, 18, 1)]
    return Network(nn.Sequential(*body, Head(18)), image(3, 14))


def vgg() -> Network:
    """Build VGG: convolutions with bias, max pooling, flatten into a wide classifier with dropout."""
    layers: list[nn.Module] = []
    for inner, outer, pool in [(3, 9, False), (9, 13, True), (13, 17, False), (17, 21, True)]:
        layers += [nn.Conv2d(inner, outer, 3, padding=1), nn.ReLU(inplace=True)]
        layers += [nn.MaxPool2d(2)] if pool else []
    layers += [nn.AdaptiveAvgPool2d((3, 4)), nn.Flatten(), nn.Linear(21 * 12, 41), nn.ReLU(), nn.Dropout()]
    layers += [nn.Linear(41, 29), nn.ReLU(), nn.Dropout(), nn.Linear(29, 7)]
    return Network(nn.Sequential(*layers), {"input": torch.randn(2, 3, 12, 16)})


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: projected, identical, or padded with zeros (option A)."""

    def __init__(self, inner: int, outer: int, stride: int = 1, middle: int | None = None, pad: bool = False) -> None:
        super().__init__()
        middle = middle or outer
        self.conv1 = conv_bn(inner, middle, 3, stride)
        self.conv2 = conv_bn(middle, outer, act=None)
        self.stride, self.pad = stride, (outer - inner if pad else 0)
        self.downsample = None
        if not pad and (stride != 1 or inner != outer):
            self.downsample = conv_bn(inner, outer, 1, stride, act=None)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        if self.pad:
            front = self.pad // 2
            shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, front, self.pad - front))
        return F.relu(self.conv2(self.conv1(x)) + shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3 (perhaps grouped), 1x1 convolutions and a shortcut."""

    def __init__(self, inner: int, middle: int, outer: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv1 = conv_bn(inner, middle, 1)
        self.conv2 = conv_bn(middle, middle, 3, stride, groups)
        self.conv3 = conv_bn(middle, outer, 1, act=None)
        self.downsample = conv_bn(inner, outer, 1, stride, act=None) if stride != 1 or inner != outer else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(self.conv3(self.conv2(self.conv1(x))) + shortcut)


def stem(channels: int) -> list[nn.Module]:
    """Make ResNet's start: a strided convolution and max pooling."""
    return [conv_bn(3, channels, 7, 2), nn.MaxPool2d(3, 2, 1)]


def resnet_basic() -> Network:
    blocks = [
        BasicBlock(10, 10, middle=14),
        BasicBlock(10, 10),
        BasicBlock(10, 18, 2),
        BasicBlock(18, 18, middle=22),
    ]
    return Network(nn.Sequential(*stem(10), *blocks, Head(18)), image(3, 24))


def resnet_bottleneck() -> Network:
    blocks = [Bottleneck(10, 6, 22), Bottleneck(22, 7, 22), Bottleneck(22, 9, 34, 2), Bottleneck(34, 11, 34)]
    return Network(nn.Sequential(*stem(10), *blocks, Head(34)), image(3, 24))


def resnet_padded_shortcut() -> Network:
    """Build CIFAR's ResNet: where widths grow the shortcut is padded with zero channels on both sides."""
    blocks = [
        BasicBlock(9, 9),
        BasicBlock(9, 14, 2, pad=True),
        BasicBlock(14, 14),
        BasicBlock(14, 22, 2, pad=True),
    ]
    return Network(nn.Sequential(conv_bn(3, 9), *blocks, Head(22)), image(3, 16))


def resnet_equal_constants() -> Network:
    """Build a ResNet as torch initialises it: the exporter merges its equal BatchNorm tensors into one."""
    blocks = [BasicBlock(10, 10), BasicBlock(10, 10), BasicBlock(10, 18, 2)]
    return Network(nn.Sequential(*stem(10), *blocks, Head(18)), image(3, 24), keep_fresh=True)


class DenseBlock(nn.Module):
    """Each layer (norm, relu, 1x1, norm, relu, 3x3) reads the concatenation of all before it."""

    def __init__(self, channels: int, growths: list[int], width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for growth in growths:
            self.layers.append(
                nn.Sequential(
                    nn.BatchNorm2d(channels),
                    nn.ReLU(),
                    nn.Conv2d(channels, width, 1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                    nn.Conv2d(width, growth, 3, padding=1, bias=False),
                )
            )
            channels += growth

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


def densenet() -> Network:
    transition = [nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 12, 1, bias=False), nn.AvgPool2d(2)]
    body = [*stem(10), DenseBlock(10, [4, 5, 5], 15), *transition, DenseBlock(12, [6, 3], 13)]
    return Network(nn.Sequential(*body, nn.BatchNorm2d(21), nn.ReLU(), Head(21)), image(3, 24))


class Branches(nn.Module):
    """Parallel branches, concatenated."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


def _inception(inner: int, one: int, three: tuple[int, int], five: tuple[int, int], pool: int) -> Branches:
    return Branches(
        conv_bn(inner, one, 1),
        nn.Sequential(conv_bn(inner, three[0], 1), conv_bn(three[0], three[1], 3)),
        nn.Sequential(conv_bn(inner, five[0], 1), conv_bn(five[0], five[1], 5)),
        nn.Sequential(nn.MaxPool2d(3, 1, 1), conv_bn(inner, pool, 1)),
    )


def googlenet() -> Network:
    blocks = [_inception(11, 5, (4, 9), (3, 6), 7), nn.MaxPool2d(3, 2, 1, ceil_mode=True)]
    blocks += [_inception(27, 8, (5, 10), (4, 7), 6)]
    return Network(nn.Sequential(*stem(11), *blocks, nn.Dropout(0.2), Head(31)), image(3, 24))


class InceptionE(nn.Module):
    """Inception v3's widest block: branches that fork again, 1x3 and 3x1 kernels, average pooling."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.one = conv_bn(inner, 6, 1)
        self.three = conv_bn(inner, 7, 1)
        self.three_a = nn.Conv2d(7, 5, (1, 3), padding=(0, 1))
        self.three_b = nn.Conv2d(7, 8, (3, 1), padding=(1, 0))
        self.pool = conv_bn(inner, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        three = self.three(x)
        three = torch.cat([F.relu(self.three_a(three)), F.relu(self.three_b(three))], 1)
        pooled = self.pool(F.avg_pool2d(x, 3, 1, 1))
        return torch.cat([self.one(x), three, pooled], 1)


class Reduction(nn.Module):
    """Inception v3's reduction: a strided branch beside max pooling of the input itself."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.conv = conv_bn(inner, outer, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x), F.max_pool2d(x, 3, 2, 1)], 1)


def inception() -> Network:
    body = [conv_bn(3, 9, 3, 2), InceptionE(9), Reduction(23, 10), InceptionE(33)]
    return Network(nn.Sequential(*body, Head(23)), image(3, 16))


class Fire(nn.Module):
    """SqueezeNet's module: squeeze, then 1x1 and 3x3 expansions side by side."""

    def __init__(self, inner: int, squeeze: int, one: int, three: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inner, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, one, 1)
        self.expand3x3 = nn.Conv2d(squeeze, three, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))], 1)


def squeezenet() -> Network:
    body = [nn.Conv2d(3, 12, 3, 2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True), Fire(12, 5, 9, 10)]
    body += [Fire(19, 6, 11, 8), nn.MaxPool2d(3, 2, ceil_mode=True), Fire(19, 7, 13, 10), nn.Dropout(0.5)]
    body += [nn.Conv2d(23, 7, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return Network(nn.Sequential(*body), image(3, 24))
