"""Grouped, depthwise, gated: ResNeXt, MobileNet, EfficientNet, ShuffleNet, RegNet, ConvNeXt."""
# ruff: noqa: D102 -- each `forward` is what its class says

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.builders.convnets import Bottleneck, Head, conv_bn, image, stem
from models.builders.export import Network


def resnext() -> Network:
    blocks = [
        Bottleneck(10, 12, 18, groups=3),
        Bottleneck(18, 20, 18, groups=5),
        Bottleneck(18, 16, 26, 2, groups=4),
    ]
    return Network(nn.Sequential(*stem(10), *blocks, Head(26)), image(3, 24))


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate computed from the channels' means."""

    def __init__(self, channels: int, squeeze: int, act: type[nn.Module], gate: type[nn.Module]) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, squeeze, 1), nn.Conv2d(squeeze, channels, 1)
        self.act, self.gate = act(), gate()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc2(self.act(self.fc1(F.adaptive_avg_pool2d(x, 1)))))


class InvertedResidual(nn.Module):
    """Expand, depthwise, perhaps squeeze and excite, project; a shortcut where shapes agree."""

    def __init__(
        self,
        inner: int,
        middle: int,
        outer: int,
        stride: int = 1,
        kernel: int = 3,
        act: type[nn.Module] = nn.ReLU6,
        squeeze: int = 0,
        gate: type[nn.Module] = nn.Sigmoid,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [conv_bn(inner, middle, 1, act=act)] if middle != inner else []
        layers += [conv_bn(middle, middle, kernel, stride, middle, act)]
        if squeeze:
            layers += [SqueezeExcite(middle, squeeze, act if act is nn.SiLU else nn.ReLU, gate)]
        self.block = nn.Sequential(*layers, conv_bn(middle, outer, 1, act=None))
        self.shortcut = stride == 1 and inner == outer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.shortcut else self.block(x)


def mobilenet_v2() -> Network:
    body = [conv_bn(3, 9, 3, 2, act=nn.ReLU6), InvertedResidual(9, 9, 7), InvertedResidual(7, 30, 10, 2)]
    body += [InvertedResidual(10, 34, 10), InvertedResidual(10, 41, 13), conv_bn(13, 37, 1, act=nn.ReLU6)]
    return Network(nn.Sequential(*body, nn.Dropout(0.2), Head(37)), image(3, 16))


def mobilenet_v3() -> Network:
    act, gate = nn.Hardswish, nn.Hardsigmoid
    body = [
        conv_bn(3, 9, 3, 2, act=act),
        InvertedResidual(9, 9, 9, 1, 3, nn.ReLU, 5, gate),
        InvertedResidual(9, 26, 12, 2, 5, act, 7, gate),
        InvertedResidual(12, 31, 12, 1, 5, act, 8, gate),
        conv_bn(12, 29, 1, act=act),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(29, 33),
        act(),
        nn.Dropout(0.2),
        nn.Linear(33, 7),
    ]
    return Network(nn.Sequential(*body), image(3, 16))


def efficientnet() -> Network:
    act = nn.SiLU
    body = [
        conv_bn(3, 10, 3, 2, act=act),
        InvertedResidual(10, 10, 8, 1, 3, act, 4),
        InvertedResidual(8, 25, 12, 2, 3, act, 6),
        InvertedResidual(12, 38, 12, 1, 5, act, 5),
        conv_bn(12, 35, 1, act=act),
    ]
    return Network(nn.Sequential(*body, nn.Dropout(0.2), Head(35)), image(3, 16))


class ShuffleUnit(nn.Module):
    """ShuffleNetV2's unit: split (or two strided branches), concatenate, shuffle."""

    def __init__(self, inner: int, outer: int, stride: int = 1) -> None:
        super().__init__()
        half = outer // 2
        self.stride = stride
        if stride == 2:
            self.branch1 = nn.Sequential(conv_bn(inner, inner, 3, 2, inner, None), conv_bn(inner, half, 1))
        self.branch2 = nn.Sequential(
            conv_bn(inner if stride == 2 else half, half, 1),
            conv_bn(half, half, 3, stride, half, None),
            conv_bn(half, half, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 2:
            x = torch.cat([self.branch1(x), self.branch2(x)], 1)
        else:
            first, second = x.chunk(2, 1)
            x = torch.cat([first, self.branch2(second)], 1)
        n, c, h, w = x.size()
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def shufflenet_v2() -> Network:
    units = [ShuffleUnit(9, 14, 2), ShuffleUnit(14, 14), ShuffleUnit(14, 22, 2), ShuffleUnit(22, 22)]
    return Network(nn.Sequential(*stem(9), *units, conv_bn(22, 27, 1), Head(27)), image(3, 32))


class RegNetBlock(nn.Module):
    """RegNetY's block: 1x1, grouped 3x3, squeeze and excite, 1x1, shortcut."""

    def __init__(self, inner: int, outer: int, stride: int, groups: int, squeeze: int) -> None:
        super().__init__()
        self.a = conv_bn(inner, outer, 1)
        self.b = conv_bn(outer, outer, 3, stride, groups)
        self.se = SqueezeExcite(outer, squeeze, nn.ReLU, nn.Sigmoid)
        self.c = conv_bn(outer, outer, 1, act=None)
        self.proj = conv_bn(inner, outer, 1, stride, act=None) if stride != 1 or inner != outer else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.proj is None else self.proj(x)
        return F.relu(shortcut + self.c(self.se(self.b(self.a(x)))))


def regnet() -> Network:
    blocks = [RegNetBlock(9, 12, 2, 3, 5), RegNetBlock(12, 12, 1, 3, 4), RegNetBlock(12, 20, 2, 5, 7)]
    return Network(nn.Sequential(conv_bn(3, 9, 3, 2), *blocks, Head(20)), image(3, 24))


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of [n c h w]."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, LayerNorm and two linear layers channels-last, layer scale, shortcut."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.layer_scale = nn.Parameter(torch.ones(dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.pwconv2(F.gelu(self.pwconv1(y)))
        return x + self.layer_scale * y.permute(0, 3, 1, 2)


def convnext() -> Network:
    body = [nn.Conv2d(3, 10, 4, 4), LayerNorm2d(10), ConvNeXtBlock(10, 38), ConvNeXtBlock(10, 42)]
    body += [LayerNorm2d(10), nn.Conv2d(10, 18, 2, 2), ConvNeXtBlock(18, 70)]
    body += [nn.AdaptiveAvgPool2d(1), LayerNorm2d(18), nn.Flatten(), nn.Linear(18, 7)]
    return Network(nn.Sequential(*body), image(3, 24))
