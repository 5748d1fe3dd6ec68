"""Networks that read: PP-OCRv4's text detector, text-direction classifier and recogniser, and a CAPTCHA reader.

Images are prepared as the packages do it: BGR, (x / 255 - 0.5) / 0.5, lines scaled to 48 rows and padded on the right
by zeros; the CAPTCHA reader takes 0..255.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage

from real_networks.base import (
    Array,
    Inputs,
    Missing,
    Network,
    Outputs,
    Place,
    Scores,
    in_package,
    percent,
    run_batches,
    seeded,
)
from real_networks.text import chinese_words, font, fonts, words

OCR = "rapidocr_onnxruntime/models/"
ROWS, DIRECTION_COLUMNS, LINE_COLUMNS = 48, 192, 320
PAGE_ROWS, PAGE_COLUMNS = 320, 480
ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LIKE_OTHERS = "0O1I"  # which CAPTCHAs leave out, because nobody can tell them apart
THRESHOLD, BOX_THRESHOLD, UNCLIP, OVERLAP = 0.3, 0.5, 1.6, 0.5  # of RapidOCR; overlap (IoU) of two equal boxes
CHINESE_LINES = 4  # one line in so many is Chinese


def _colours(rng: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Choose a ground and an ink; one in four is light on dark."""
    light, dark = rng.integers(190, 256, 3), rng.integers(0, 80, 3)
    pair = tuple(light.tolist()), tuple(dark.tolist())
    return pair[::-1] if rng.random() < 0.25 else pair


def _line(text: str, face: Path, rng: np.random.Generator) -> Image.Image:
    """Draw a line of text as a detector cuts it out: with a narrow margin, a little blurred and noisy."""
    size = int(rng.integers(20, 44))
    drawn = font(face, size)
    left, top, right, bottom = drawn.getbbox(text)
    margin = int(rng.integers(2, 2 + size // 5))
    ground, ink = _colours(rng)
    image = Image.new("RGB", (round(right - left) + 2 * margin, round(bottom - top) + 2 * margin), ground)
    ImageDraw.Draw(image).text((margin - left, margin - top), text, ink, drawn)
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.2, 0.7))))
    noisy = np.asarray(image, np.float32) + rng.normal(0, rng.uniform(0, 6), (image.height, image.width, 1))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def _normalised(image: Image.Image) -> Array:
    """Return (channels, rows, columns) in BGR and −1..1."""
    return (np.asarray(image, np.float32) / 127.5 - 1).transpose(2, 0, 1)[::-1]


def _fitted(image: Image.Image, columns: int) -> Array:
    """Scale a line to its rows, at most to so many columns, and pad it by zeros."""
    width = min(columns, math.ceil(ROWS * image.width / image.height))
    fitted = np.zeros((3, ROWS, columns), np.float32)
    fitted[:, :, :width] = _normalised(image.resize((width, ROWS), Image.Resampling.BILINEAR))
    return fitted


def _english(part: int, rng: np.random.Generator, count: int) -> str:
    return " ".join(rng.choice(words(part), count))


def _text(part: int, rng: np.random.Generator, chinese: bool, most: int) -> tuple[str, Path]:
    """Choose some words and a font for them."""
    faces = fonts(part, chinese)
    face = faces[int(rng.integers(len(faces)))]
    if chinese:
        return "".join(rng.choice(chinese_words(part), int(rng.integers(2, most + 2)))), face
    return _english(part, rng, int(rng.integers(1, most + 1))), face


# -- direction -------------------------------------------------------------------------------------------


def direction_inputs(place: Place, part: int, count: int) -> Inputs:
    """Draw lines, half of them upside down."""
    rng = seeded(part, 1)
    images, turned = [], rng.integers(2, size=count)
    for upside_down in turned:
        image = _line(*_text(part, rng, rng.random() < 0.25 and _has_chinese(part), 2), rng)
        images.append(_fitted(image.rotate(180) if upside_down else image, DIRECTION_COLUMNS))
    return Inputs(feeds={"x": np.stack(images)}, truth=turned)


def direction_score(inputs: Inputs, dense: Outputs, found: Outputs) -> Scores:
    """Return the accuracy."""
    (output,) = found.values()
    return {"accuracy": percent(output.argmax(axis=1) == inputs.truth)}


def _has_chinese(part: int) -> bool:
    try:
        return bool(fonts(part, True))
    except Missing:
        return False


# -- detector --------------------------------------------------------------------------------------------


def pages(place: Place, part: int, count: int) -> Inputs:
    """Draw pages of lines in several sizes, on plain or shaded grounds or photographs."""
    rng = seeded(part, 2)
    grounds = _photographs(place, part)
    return Inputs(feeds={"x": np.stack([_normalised(_page(part, rng, grounds)) for _ in range(count)])}, batch=4)


def _page(part: int, rng: np.random.Generator, grounds: Sequence[Image.Image]) -> Image.Image:
    paper, ink = _colours(rng)
    image = Image.new("RGB", (PAGE_COLUMNS, PAGE_ROWS), paper)
    if grounds and rng.random() < 0.3:
        ground = grounds[int(rng.integers(len(grounds)))].resize(image.size)
        image = Image.blend(image, ground, float(rng.uniform(0.1, 0.4)))
    draw, y = ImageDraw.Draw(image), float(rng.uniform(4, 30))
    base = rng.uniform(12, 26)
    while y < PAGE_ROWS - 16:
        size = int(base * rng.uniform(0.8, 1.3))
        text, face = _text(part, rng, rng.random() < 0.15 and _has_chinese(part), 6)
        draw.text((float(rng.uniform(4, PAGE_COLUMNS / 4)), y), text, ink, font(face, size))
        y += size * rng.uniform(1.3, 2.6)
    return image


def _photographs(place: Place, part: int) -> list[Image.Image]:
    """Open the photographs of a part, if there is a folder of them."""
    if place.photos is None:
        return []
    files = sorted(p for p in place.photos.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    return [Image.open(path).convert("RGB") for path in files[part::2]]


def boxes(probabilities: Array) -> Array:
    """Find boxes in a map of text, as the package does but upright.

    Args:
        probabilities: (rows, columns).

    Returns:
        (boxes, 4): top, left, bottom, right.
    """
    labels, count = ndimage.label(probabilities > THRESHOLD)
    if not count:
        return np.zeros((0, 4))
    parts = ndimage.find_objects(labels)
    box = np.array([(r.start, c.start, r.stop, c.stop) for r, c in parts], float)
    score = np.array([probabilities[part].mean() for part in parts])
    high, wide = box[:, 2] - box[:, 0], box[:, 3] - box[:, 1]
    grown = (high * wide * UNCLIP / (2 * (high + wide)))[:, None]
    sides = np.concatenate([box[:, :2] - grown, box[:, 2:] + grown], axis=1)
    return sides[(score > BOX_THRESHOLD) & (np.minimum(high, wide) >= 3)]


def detector_score(inputs: Inputs, dense: Outputs, found: Outputs) -> Scores:
    """Return the F1 of boxes against those of the dense network."""
    (a,), (b,) = dense.values(), found.values()
    equal = total = 0
    for one, other in zip(a[:, 0], b[:, 0], strict=True):
        first, second = boxes(one), boxes(other)
        total += len(first) + len(second)
        equal += _matches(first, second)
    return {"box F1": 200 * equal / total if total else 0.0}


def _matches(a: Array, b: Array) -> int:
    """Count the boxes that overlap one of the other set; pairs above one half are unique."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = (high - low).clip(0).prod(axis=2)
    area_a, area_b = ((x[:, 2:] - x[:, :2]).prod(axis=1) for x in (a, b))
    return int((shared / (area_a[:, None] + area_b - shared) > OVERLAP).any(axis=1).sum())


# -- recogniser ------------------------------------------------------------------------------------------


def lines(place: Place, part: int, count: int) -> Inputs:
    """Draw lines to read, one in four Chinese where there are fonts for it."""
    rng = seeded(part, 3)
    images, texts = [], []
    while len(images) < count:
        chinese = len(images) % CHINESE_LINES == CHINESE_LINES - 1 and _has_chinese(part)
        text, face = _text(part, rng, chinese, 2)
        image = _line(text, face, rng)
        if image.width * ROWS <= LINE_COLUMNS * image.height * 1.1:
            images.append(_fitted(image, LINE_COLUMNS))
            texts.append(text)
    return Inputs(feeds={"x": np.stack(images)}, truth=(texts, _dictionary(recogniser(place))), batch=8)


recogniser = in_package(OCR + "ch_PP-OCRv4_rec_infer.onnx")


def _dictionary(path: Path) -> list[str]:
    """Read the characters of the classes: a blank, those in the file's metadata, a space."""
    found = {p.key: p.value for p in onnx.load(path, load_external_data=False).metadata_props}
    return ["", *found["character"].splitlines(), " "]


def greedy(classes: Array, letters: Sequence[str], blank: int) -> str:
    """Decode the best class of each step by CTC: repeated classes are one, blanks none."""
    kept = (classes != np.concatenate([[-1], classes[:-1]])) & (classes != blank)
    return "".join(letters[c] for c in classes[kept])


def recogniser_score(inputs: Inputs, dense: Outputs, found: Outputs) -> Scores:
    """Return the share of lines that are read without a mistake, spaces aside: all, Latin, Chinese."""
    texts, letters = inputs.truth
    (output,) = found.values()
    read = [greedy(steps, letters, 0) for steps in output.argmax(axis=2)]
    right = np.array([a.replace(" ", "") == b.replace(" ", "") for a, b in zip(read, texts, strict=True)])
    latin = np.array([text.isascii() for text in texts])
    return {"Latin": percent(right[latin])} | ({"Chinese": percent(right[~latin])} if not latin.all() else {})


# -- CAPTCHA ---------------------------------------------------------------------------------------------


def captchas(place: Place, part: int, count: int) -> Inputs:
    """Draw CAPTCHAs by the package that makes them."""
    try:
        from captcha.image import ImageCaptcha
    except ImportError as error:
        raise Missing("the package captcha") from error
    rng = seeded(part, 4)
    faces = [str(f) for f in fonts(part) if "Sans" in f.name and "CJK" not in f.name] or [str(fonts(part)[0])]
    generator = ImageCaptcha(160, 60, fonts=faces)
    random.seed(part)  # which that package draws from
    letters = [letter for letter in ALPHABET if letter not in LIKE_OTHERS]
    texts = ["".join(rng.choice(letters, 4)) for _ in range(count)]
    images = [generator.generate_image(text).convert("RGB").resize((160, 60)) for text in texts]
    pixels = np.stack([np.asarray(image, np.float32).transpose(2, 0, 1)[::-1] for image in images])
    return Inputs(feeds={"image": pixels}, truth=texts)


def run_captcha(model: Path, inputs: Inputs) -> Outputs:
    """Run the reader, whose output has the steps first."""
    single = Inputs(feeds=inputs.feeds, batch=inputs.count)
    return {name: array.swapaxes(0, 1) for name, array in run_batches(model, single).items()}


def captcha_score(inputs: Inputs, dense: Outputs, found: Outputs) -> Scores:
    """Return the share of CAPTCHAs that are read without a mistake."""
    (output,) = found.values()
    read = [greedy(steps, ALPHABET, len(ALPHABET)) for steps in output.argmax(axis=2)]
    return {"exact": percent([a == b for a, b in zip(read, inputs.truth, strict=True)])}


NETWORKS = (
    Network(
        name="direction",
        title="text-direction classifier (PP-OCR v2)",
        metric="accuracy, %",
        find=in_package(OCR + "ch_ppocr_mobile_v2.0_cls_infer.onnx"),
        inputs=direction_inputs,
        score=direction_score,
        tests=800,
    ),
    Network(
        name="detector",
        title="PP-OCRv4 text detector",
        metric="box F1 against dense, %",
        find=in_package(OCR + "ch_PP-OCRv4_det_infer.onnx"),
        inputs=pages,
        score=detector_score,
        tests=40,
        most=128,
    ),
    Network(
        name="crnn",
        title="CAPTCHA CRNN",
        metric="exact match, %",
        find=in_package("captcha_whisperer/models/captcha_crnn.onnx"),
        inputs=captchas,
        score=captcha_score,
        run=run_captcha,
        tests=240,
    ),
    Network(
        name="recogniser",
        title="PP-OCRv4 text recogniser",
        metric="exact match, %",
        find=recogniser,
        inputs=lines,
        score=recogniser_score,
        tests=240,
        most=128,
        options=("--size", "x[2]=48"),  # rows, which its file leaves open and its last layers do not
    ),
)
