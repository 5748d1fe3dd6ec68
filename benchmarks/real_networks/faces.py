"""MTCNN's R-Net and O-Net, which tell faces from other cuts of photographs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from real_networks.base import Inputs, Network, Outputs, Place, Scores, percent, seeded
from real_networks.exporting import exported

FACES = 0.5  # the share of faces among the cuts, half of them real ones, half drawn
PHOTOGRAPHS = (  # of scikit-image, eight sources of either part
    "chelsea.png coffee.png rocket.jpg ihc.png brick.png coins.png grass.png moon.png".split(),
    "astronaut.png motorcycle_left.png hubble_deep_field.jpg retina.jpg camera.png cell.png gravel.png "
    "clock_motion.png".split(),
)
REAL_FACES = 100  # that come first in scikit-image's subset of Labeled Faces in the Wild; no faces follow


def photographs(place: Place, part: int) -> list[Image.Image]:
    """Return photographs of a part: the user's, else those of scikit-image, of which no two parts share one."""
    if place.photos is not None:
        files = sorted(p for p in place.photos.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png"))[part::2]
    else:
        files = [place.site / "skimage/data" / name for name in PHOTOGRAPHS[part]]
    return [Image.open(path).convert("RGB") for path in files]


def real_faces(place: Place, part: int) -> list[Image.Image]:
    """Return photographs of faces, 25 by 25 in grey; no photograph is in both parts."""
    faces = np.load(place.site / "skimage/data/lfw_subset.npy")[:REAL_FACES][part::2]
    return [Image.fromarray((255 * face).astype(np.uint8)).convert("RGB") for face in faces]


def _cut(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """Cut out a square of any size and scale it."""
    side = int(min(image.size) * rng.uniform(0.05, 0.6)) + 8
    left, top = (int(rng.integers(0, length - side)) for length in image.size)
    return image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BILINEAR)


def _real_face(face: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """Return a photograph of a face, mirrored or not, nearer or farther, brighter or darker, a little coloured."""
    margin = float(rng.uniform(0, 3))
    face = face.crop((margin, margin, face.width - margin, face.height - margin))
    face = face.resize((size, size), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        face = face.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    light = rng.uniform(0.6, 1.3) * np.array([1.1, 1.0, 0.9]) ** rng.uniform(0, 2)
    return Image.fromarray((np.asarray(face, np.float32) * light).clip(0, 255).astype(np.uint8))


def _face(ground: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """Draw a face: an oval of skin with eyes, brows, a nose and a mouth, lit from a side."""
    side = 96
    image = ground.resize((side, side))
    draw = ImageDraw.Draw(image)
    skin = np.array([225, 180, 150]) * rng.uniform(0.35, 1.1)
    dark = tuple((skin * 0.3).astype(int).tolist())

    def oval(x: float, y: float, wide: float, high: float, colour: tuple[int, ...]) -> None:
        draw.ellipse((x - wide, y - high, x + wide, y + high), colour)

    x, y = side / 2 + rng.normal(0, 4), side / 2 + rng.normal(0, 4)
    scale = rng.uniform(0.8, 1.15)
    oval(x, y - 8 * scale, 36 * scale, 44 * scale, dark)
    oval(x, y, 33 * scale, 42 * scale, tuple(skin.clip(0, 255).astype(int).tolist()))
    for sign in (-1, 1):
        oval(x + sign * 14 * scale, y - 8 * scale, 6 * scale, 3.5 * scale, (235, 235, 235))
        oval(x + sign * 14 * scale, y - 8 * scale, 3.2 * scale, 3.2 * scale, (30, 20, 20))
        brow = x + sign * 14 * scale
        draw.line((brow - 7 * scale, y - 16 * scale, brow + 7 * scale, y - 17 * scale), dark, max(2, int(3 * scale)))
    shade = tuple((skin * 0.75).clip(0, 255).astype(int).tolist())
    oval(x, y + 8 * scale, 5 * scale, 3 * scale, shade)
    oval(x, y + 22 * scale, 11 * scale, 3.5 * scale, (int(skin[0] * 0.7), int(skin[1] * 0.35), int(skin[2] * 0.4)))
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(1.6)), np.float32)
    light = 1 + rng.uniform(-0.4, 0.4) * np.linspace(-1, 1, side)[None, :, None]
    lit = Image.fromarray((pixels * light).clip(0, 255).astype(np.uint8))
    return lit.resize((size, size), Image.Resampling.BILINEAR)


def cuts(size: int) -> Callable[[Place, int, int], Inputs]:
    """Return what makes cuts of a size, in RGB, (x − 127.5) / 128."""

    def make(place: Place, part: int, count: int) -> Inputs:
        rng, images, people = seeded(part, 11), photographs(place, part), real_faces(place, part)
        made = []
        for i in range(count):
            ground = _cut(images[i % len(images)], size, rng)
            kind = rng.random()
            if kind < FACES / 2:
                made.append(_real_face(people[int(rng.integers(len(people)))], size, rng))
            else:
                made.append(_face(ground, size, rng) if kind < FACES else ground)
        pixels = np.stack([np.asarray(image, np.float32) for image in made])
        return Inputs(feeds={"cuts": ((pixels - 127.5) / 128).transpose(0, 3, 1, 2).copy()})

    return make


def face_score(inputs: Inputs, dense: Outputs, found: Outputs) -> Scores:
    """Return the share of cuts that both networks take for a face, or both do not; and the share of faces."""
    a, b = dense["face"][:, 1] > 0.5, found["face"][:, 1] > 0.5
    return {"agreement": percent(a == b), "faces": percent(a)}


def mtcnn(name: str, size: int) -> Callable[[Place], Path]:
    """Return what exports one of the networks, O-Net or R-Net."""
    convolutions = {"rnet": ((3, 28, 3), (28, 48, 3), (48, 64, 2))}
    convolutions["onet"] = ((3, 32, 3), (32, 64, 3), (64, 64, 3), (64, 128, 2))
    pools = {"rnet": (3, 3), "onet": (3, 3, 2)}[name]
    flat, width = {"rnet": (576, 128), "onet": (1152, 256)}[name]
    heads = {"rnet": (2, 4), "onet": (2, 4, 10)}[name]

    def build_for(place: Place) -> Callable[[Any], tuple[Any, Any]]:
        def build(torch: Any) -> tuple[Any, Any]:
            nn, last = torch.nn, len(convolutions[name]) + 1

            class Refine(nn.Module):
                def __init__(self) -> None:
                    super().__init__()
                    for i, (read, write, kernel) in enumerate(convolutions[name], 1):
                        setattr(self, f"conv{i}", nn.Conv2d(read, write, kernel))
                        setattr(self, f"prelu{i}", nn.PReLU(write))
                    setattr(self, f"dense{last}", nn.Linear(flat, width))
                    setattr(self, f"prelu{last}", nn.PReLU(width))
                    for i, outputs in enumerate(heads, 1):
                        setattr(self, f"dense{last + 1}_{i}", nn.Linear(width, outputs))

                def forward(self, x: Any) -> Any:
                    for i in range(1, last):
                        x = getattr(self, f"prelu{i}")(getattr(self, f"conv{i}")(x))
                        if i <= len(pools):
                            x = nn.functional.max_pool2d(x, pools[i - 1], 2, ceil_mode=True)
                    x = x.permute(0, 3, 2, 1).reshape(-1, flat)
                    x = getattr(self, f"prelu{last}")(getattr(self, f"dense{last}")(x))
                    found = [getattr(self, f"dense{last + 1}_{i}")(x) for i in range(1, len(heads) + 1)]
                    return torch.softmax(found[0], dim=1), *found[1:]

            net = Refine()
            net.load_state_dict(torch.load(place.site / f"facenet_pytorch/data/{name}.pt", weights_only=True))
            return net, torch.zeros(2, 3, size, size)

        return build

    outputs = ["face", "box", "marks"][: len(heads)]
    return lambda place: exported(place, name, build_for(place), inputs=["cuts"], outputs=outputs)


NETWORKS = tuple(
    Network(
        name=name,
        title=f"MTCNN {name[0].upper()}-Net",
        metric="agreement with dense, %",
        find=mtcnn(name, size),
        inputs=cuts(size),
        score=face_score,
    )
    for name, size in (("rnet", 24), ("onet", 48))
)
