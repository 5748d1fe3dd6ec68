"""One output per place: U-Net, FPN, super-resolution, a YOLO-like detector, a diffusion U-Net."""
# ruff: noqa: D102 -- each `forward` is what its class says

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.builders.convnets import conv_bn, image
from models.builders.export import Network


class UNet(nn.Module):
    """Two steps down, two up with transposed convolutions, skips by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Sequential(conv_bn(3, 8), conv_bn(8, 10))
        self.down2 = nn.Sequential(conv_bn(10, 13), conv_bn(13, 15))
        self.bottom = nn.Sequential(conv_bn(15, 21), conv_bn(21, 23))
        self.up2 = nn.ConvTranspose2d(23, 14, 2, 2)
        self.conv2 = nn.Sequential(conv_bn(29, 16), conv_bn(16, 12))
        self.up1 = nn.ConvTranspose2d(12, 9, 2, 2)
        self.conv1 = nn.Sequential(conv_bn(19, 11))
        self.head = nn.Conv2d(11, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        x = self.bottom(F.max_pool2d(two, 2))
        x = self.conv2(torch.cat([two, self.up2(x)], 1))
        return self.head(self.conv1(torch.cat([one, self.up1(x)], 1)))


def unet() -> Network:
    return Network(UNet(), image(3, 16))


class FeaturePyramid(nn.Module):
    """A backbone with laterals, nearest up-sampling to the size of the next level, and one shared head."""

    def __init__(self) -> None:
        super().__init__()
        widths = [9, 13, 19]
        self.stages = nn.ModuleList([conv_bn(3, 9, 3, 2), conv_bn(9, 13, 3, 2), conv_bn(13, 19, 3, 2)])
        self.lateral = nn.ModuleList([nn.Conv2d(width, 14, 1) for width in widths])
        self.smooth = nn.ModuleList([nn.Conv2d(14, 14, 3, padding=1) for _ in widths])
        self.head = nn.Sequential(nn.Conv2d(14, 11, 3, padding=1), nn.ReLU(), nn.Conv2d(11, 5, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        levels = [lateral(feature) for lateral, feature in zip(self.lateral, features, strict=True)]
        for i in (1, 0):
            levels[i] = levels[i] + F.interpolate(levels[i + 1], size=levels[i].shape[-2:], mode="nearest")
        return tuple(self.head(smooth(level)) for smooth, level in zip(self.smooth, levels, strict=True))


def fpn() -> Network:
    axes = {0: "batch", 2: "height", 3: "width"}
    return Network(FeaturePyramid(), image(3, 24), ["fine", "middle", "coarse"], {"input": axes})


class SuperResolution(nn.Module):
    """ESPCN with residual blocks, two pixel shuffles, and a bilinear shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Conv2d(3, 10, 5, padding=2)
        self.body = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(10, m, 3, padding=1), nn.PReLU(m), nn.Conv2d(m, 10, 3, padding=1))
                for m in (7, 13)
            ]
        )
        self.up1 = nn.Sequential(nn.Conv2d(10, 4 * 9, 3, padding=1), nn.PixelShuffle(2), nn.PReLU())
        self.up2 = nn.Sequential(nn.Conv2d(9, 4 * 3, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.start(x)
        for block in self.body:
            y = y + block(y)
        return self.up2(self.up1(y)) + F.interpolate(x, scale_factor=4, mode="bilinear", align_corners=False)


def super_resolution() -> Network:
    axes = {0: "batch", 2: "height", 3: "width"}
    return Network(SuperResolution(), image(3, 8), dynamic={"input": axes, "output": axes})


class C2f(nn.Module):
    """YOLOv8's CSP block: split in two, a chain of bottlenecks on the second, concatenate all stages."""

    def __init__(self, inner: int, outer: int, half: int, depth: int, shortcut: bool) -> None:
        super().__init__()
        self.cv1 = conv_bn(inner, 2 * half, 1, act=nn.SiLU)
        self.cv2 = conv_bn((2 + depth) * half, outer, 1, act=nn.SiLU)
        self.m = nn.ModuleList(
            [
                nn.Sequential(conv_bn(half, half + 2 + i, act=nn.SiLU), conv_bn(half + 2 + i, half, act=nn.SiLU))
                for i in range(depth)
            ]
        )
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.cv1(x).chunk(2, 1))
        for block in self.m:
            parts.append(parts[-1] + block(parts[-1]) if self.shortcut else block(parts[-1]))
        return self.cv2(torch.cat(parts, 1))


class SPPF(nn.Module):
    """Spatial pyramid pooling, fast: three max poolings in a row, all concatenated."""

    def __init__(self, inner: int, middle: int, outer: int) -> None:
        super().__init__()
        self.cv1 = conv_bn(inner, middle, 1, act=nn.SiLU)
        self.cv2 = conv_bn(4 * middle, outer, 1, act=nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.cv1(x)]
        for _ in range(3):
            parts.append(F.max_pool2d(parts[-1], 5, 1, 2))
        return self.cv2(torch.cat(parts, 1))


class Detect(nn.Module):
    """YOLOv8's head: boxes as distributions over `bins` distances, decoded with anchors; class scores."""

    def __init__(self, widths: list[int], classes: int = 5, bins: int = 4, size: int = 32) -> None:
        super().__init__()
        self.classes, self.bins = classes, bins
        self.box = nn.ModuleList(
            [nn.Sequential(conv_bn(w, 11, act=nn.SiLU), nn.Conv2d(11, 4 * bins, 1)) for w in widths]
        )
        self.cls = nn.ModuleList(
            [nn.Sequential(conv_bn(w, 13, act=nn.SiLU), nn.Conv2d(13, classes, 1)) for w in widths]
        )
        anchors, strides = [], []
        for stride in (8, 16):
            line = torch.arange(size // stride) + 0.5
            grid = torch.stack(torch.meshgrid(line, line, indexing="ij")[::-1], -1).view(-1, 2)
            anchors.append(grid.T)
            strides.append(torch.full((1, len(grid)), float(stride)))
        self.register_buffer("anchors", torch.cat(anchors, 1))
        self.register_buffer("strides", torch.cat(strides, 1))
        self.dfl = nn.Conv2d(bins, 1, 1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        maps = [torch.cat([b(x), c(x)], 1) for b, c, x in zip(self.box, self.cls, features, strict=True)]
        n = maps[0].shape[0]
        flat = torch.cat([m.view(n, 4 * self.bins + self.classes, -1) for m in maps], 2)
        box, scores = flat.split((4 * self.bins, self.classes), 1)
        distances = self.dfl(box.view(n, 4, self.bins, -1).transpose(2, 1).softmax(1)).view(n, 4, -1)
        left, right = distances.chunk(2, 1)
        low, high = self.anchors - left, self.anchors + right
        boxes = torch.cat([(low + high) / 2, high - low], 1) * self.strides
        return torch.cat([boxes, scores.sigmoid()], 1)


class Yolo(nn.Module):
    """Backbone of CSP blocks, a neck that goes up and down again, two detection scales."""

    def __init__(self) -> None:
        super().__init__()
        act = nn.SiLU
        self.stem = nn.Sequential(conv_bn(3, 8, 3, 2, act=act), conv_bn(8, 12, 3, 2, act=act))
        self.c1 = C2f(12, 14, 6, 1, True)
        self.down1 = conv_bn(14, 18, 3, 2, act=act)
        self.c2 = C2f(18, 20, 7, 2, True)
        self.down2 = conv_bn(20, 26, 3, 2, act=act)
        self.sppf = SPPF(26, 9, 24)
        self.up = nn.Upsample(scale_factor=2)
        self.c3 = C2f(44, 16, 8, 1, False)
        self.down3 = conv_bn(16, 17, 3, 2, act=act)
        self.c4 = C2f(41, 22, 9, 1, False)
        self.detect = Detect([16, 22])

    def forward(self, x: Tensor) -> Tensor:
        middle = self.c2(self.down1(self.c1(self.stem(x))))
        deep = self.sppf(self.down2(middle))
        fine = self.c3(torch.cat([self.up(deep), middle], 1))
        coarse = self.c4(torch.cat([self.down3(fine), deep], 1))
        return self.detect([fine, coarse])


def yolo() -> Network:
    return Network(Yolo(), image(3, 32))


class TimeResidual(nn.Module):
    """GroupNorm, SiLU, convolution, twice; the time embedding is added per channel in between."""

    def __init__(self, inner: int, outer: int, groups: tuple[int, int], time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups[0], inner), nn.Conv2d(inner, outer, 3, padding=1)
        self.time = nn.Linear(time, outer)
        self.norm2, self.conv2 = nn.GroupNorm(groups[1], outer), nn.Conv2d(outer, outer, 3, padding=1)
        self.shortcut = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(time))[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class SpatialAttention(nn.Module):
    """Attention between all places, with 1x1 convolutions as projections."""

    def __init__(self, channels: int, groups: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv, self.proj = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, 3, self.heads, c // self.heads, h * w).unbind(1)
        weights = torch.softmax(q.transpose(2, 3) @ k / math.sqrt(c // self.heads), -1)
        return x + self.proj((v @ weights.transpose(2, 3)).reshape(n, c, h, w))


class DiffusionUNet(nn.Module):
    """Noise predictor: sinusoidal time embedding and MLP, one level down and up, attention at the bottom."""

    def __init__(self) -> None:
        super().__init__()
        self.time1, self.time2 = nn.Linear(10, 22), nn.Linear(22, 26)
        self.start = nn.Conv2d(3, 8, 3, padding=1)
        self.down = TimeResidual(8, 12, (4, 3), 26)
        self.pool = nn.Conv2d(12, 12, 3, 2, 1)
        self.middle1 = TimeResidual(12, 20, (6, 5), 26)
        self.attention = SpatialAttention(20, 5, 2)
        self.middle2 = TimeResidual(20, 20, (4, 10), 26)
        self.up = nn.Conv2d(20, 18, 3, padding=1)
        self.decode = TimeResidual(30, 14, (6, 7), 26)
        self.norm, self.end = nn.GroupNorm(2, 14), nn.Conv2d(14, 3, 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        rates = torch.exp(torch.arange(5, device=x.device) * (-math.log(1000.0) / 5))
        angles = timestep.float()[:, None] * rates[None]
        time = self.time2(F.silu(self.time1(torch.cat([angles.sin(), angles.cos()], -1))))
        skip = self.down(self.start(x), time)
        y = self.middle2(self.attention(self.middle1(self.pool(skip), time)), time)
        y = self.up(F.interpolate(y, scale_factor=2.0, mode="nearest"))
        y = self.decode(torch.cat([y, skip], 1), time)
        return self.end(F.silu(self.norm(y)))


def diffusion_unet() -> Network:
    inputs = {"input": torch.randn(2, 3, 8, 8), "timestep": torch.tensor([3, 70])}
    return Network(DiffusionUNet(), inputs)
