"""Made-up images: their domain and their values, given or told by the network's own responses.

Files of deployed networks have their BatchNormalizations folded, so that nothing in them says which values they expect.
But a network that sees values of another scale answers with few of its channels, at all depths. Of several
normalisations the right scale is the one that most channels respond to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from onnx import ModelProto, ValueInfoProto, numpy_helper

from spa.calibration.drawings import drawings, textures
from spa.calibration.images import MEAN, STD, Numbers
from spa.calibration.leaves import dead_leaves
from spa.calibration.lettering import lettering
from spa.errors import PlanError
from spa.model.bodies import nested
from spa.running.runtime import load_session, run

Array = np.ndarray
Feeds = Mapping[str, Array]
DOMAINS = ("auto", "photo", "text", "mixed", "drawing", "texture")
SMALLEST_TEXT = 16  # rows or columns below which nothing can be read
WATCHED = frozenset({"Conv", "Relu", "HardSwish", "Sigmoid", "LeakyRelu", "PRelu", "Clip", "Mul"})
MOST_WATCHED = 60  # tensors whose channels are counted
IMAGES = 4  # that are tried on each scale
RESPONDS = 0.1  # a channel does whose standard deviation exceeds this fraction of the layer's median
MOST_MISFIT = 10.0  # of one channel: a few that are far off decide nothing
NEARER = 0.8  # of the usual images' distance from BatchNormalizations' statistics, at which others are taken
MARGIN = 0.01  # by which more channels must respond to a scale than to the usual one
OTHERS = ("drawing", "texture")  # domains that are taken only if the network itself asks for them
OTHERS_MARGIN = 0.1  # by which more channels must respond to one of them than to the usual images


@dataclass(frozen=True)
class Imagery:
    """The way in which images are made up.

    Attributes:
        domain: ``photo`` (dead leaves), ``text`` (lines of words), ``mixed`` (half of each), ``drawing`` (lines, boxes,
            curves) or ``texture`` (gradients, waves, noise).
        mean: is subtracted from values in 0..1: one number, or one for each channel; None for the usual one.
        std: divides them after that.
        values: the values that come of that, in words.
        note: what was chosen and why, a sentence for the report; empty if nothing was.
    """

    domain: str = "photo"
    mean: Numbers | None = None
    std: Numbers | None = None
    values: str = "as usually normalised"
    note: str = ""

    def draw(self, count: int, channels: int, height: int, width: int, rng: np.random.Generator) -> Array:
        """Draw images with values in [0, 1], float32, (count, channels, height, width)."""
        if self.domain in OTHERS:
            return (drawings if self.domain == "drawing" else textures)(count, channels, height, width, rng)
        written = np.arange(count) % 2 == rng.integers(2) if self.domain == "mixed" else np.zeros(count, bool)
        if self.domain == "text":
            written[:] = True
        if min(height, width) < SMALLEST_TEXT:
            written[:] = False
        if not written.any():
            return dead_leaves(count, channels, height, width, rng)
        images = np.empty((count, channels, height, width), np.float32)
        for mask, source in ((~written, dead_leaves), (written, lettering)):
            images[mask] = source(int(mask.sum()), channels, height, width, rng)
        return images

    def normalised(self, images: Array, name: str) -> Array:
        """Return images, (count, channels, height, width) in [0, 1], with the values that the network expects.

        Raises:
            PlanError: the mean or the deviation does not fit the channels of input ``name``.
        """
        channels = images.shape[1]
        like = channels if channels in MEAN else 1
        mean = _per_channel("mean", MEAN[like] if self.mean is None else self.mean, channels, name)
        std = _per_channel("std", STD[like] if self.std is None else self.std, channels, name)
        if not (std > 0).all():
            raise PlanError(f"std is {std.ravel().tolist()}, which is not positive. Give positive numbers.")
        images -= mean
        images /= std
        return images


def _per_channel(option: str, value: Numbers, channels: int, name: str) -> Array:
    values = np.asarray(value, np.float32).reshape(-1)
    if len(values) not in (1, channels):
        raise PlanError(
            f"{option} has {len(values)} entries; input '{name}' has {channels} channels. Give one number for each."
        )
    return np.broadcast_to(values, (channels,)).reshape(-1, 1, 1)


def unused(imagery: Imagery, shapes: Sequence[Sequence[int]]) -> Imagery:
    """Return images of a domain that these are not of, with the same values.

    Args:
        imagery: the images.
        shapes: of the inputs that hold them.
    """
    other = {"photo": "text", "mixed": "drawing"}.get(imagery.domain, "photo")
    shows_text = all(sorted(shape)[-2] >= SMALLEST_TEXT for shape in shapes)
    return replace(imagery, domain="drawing" if other == "text" and not shows_text else other)


def candidates(imagery: Imagery) -> tuple[Imagery, ...]:
    """Return the same images with the values that networks are fed with, the usual ones first.

    Scales that differ by less than a few times, as -1..1 and ImageNet's, make no difference that responses could tell.
    """
    return (
        imagery,
        replace(imagery, mean=0.0, std=1 / 255, values="0 to 255"),
        replace(imagery, mean=0.45, std=1 / 255, values="0 to 255 less a mean of 115"),
    )


def responding(model: ModelProto, feeds: Sequence[Feeds], threads: int = 2) -> list[float]:
    """Return for each of several inputs the mean fraction of a layer's channels that respond to it.

    Args:
        model: the network, which is not changed.
        feeds: the inputs.
        threads: of onnxruntime.
    """
    model = nested(model)  # branches do not always run
    names = [n.output[0] for n in model.graph.node if n.op_type in WATCHED and not n.domain][:MOST_WATCHED]
    if not names:
        return [0.0] * len(feeds)
    session = load_session(_watching(model, names), threads=threads)
    return [_share(run(session, batch)) for batch in feeds]


def _watching(model: ModelProto, names: Iterable[str]) -> ModelProto:
    """Return a copy of a model whose outputs are some of its tensors."""
    copy = ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    copy.graph.output.extend(ValueInfoProto(name=name) for name in dict.fromkeys(names))
    return copy


def _share(activations: Sequence[Array]) -> float:
    """Return the mean over maps of the fraction of channels whose deviation is near the median of all or above."""
    shares = []
    for a in activations:
        if a.ndim == 4 and a.shape[1] >= 8 and a.shape[2] * a.shape[3] >= 4:
            spread = a.std(axis=(0, 2, 3), dtype=np.float64)
            shares.append(float((spread > RESPONDS * np.median(spread) + 1e-9).mean()))
    return float(np.mean(shares)) if shares else 0.0


def misfits(model: ModelProto, feeds: Sequence[Feeds], threads: int = 2) -> list[float]:
    """Return for each of several inputs how far they are from the statistics of a network's BatchNormalizations.

    Of each channel that is the squared difference of the means over the variance in the file, plus the squared
    logarithm of the ratio of the variances; the mean over channels and nodes, each at most :data:`MOST_MISFIT`.

    Args:
        model: the network, which is not changed.
        feeds: the inputs.
        threads: of onnxruntime.

    Returns:
        One number per input; none if the file holds no such statistics.
    """
    model = nested(model)
    stored = {t.name: t for t in model.graph.initializer}
    norms = [n for n in model.graph.node if n.op_type == "BatchNormalization" and {*n.input[3:5]} <= stored.keys()]
    if not norms:
        return []
    session = load_session(_watching(model, [n.input[0] for n in norms]), threads=threads)
    statistics = [[numpy_helper.to_array(stored[name]).astype(np.float64) for name in n.input[3:5]] for n in norms]
    found = []
    for batch in feeds:
        values = dict(zip((o.name for o in session.get_outputs()), run(session, batch), strict=True))
        parts = []
        for norm, (mean, variance) in zip(norms, statistics, strict=True):
            x = values[norm.input[0]].astype(np.float64)
            axes = (0, *range(2, x.ndim))
            variance = variance + 1e-5
            distance = np.square(x.mean(axes) - mean) / variance + np.square(np.log((x.var(axes) + 1e-5) / variance))
            parts.append(np.minimum(distance, MOST_MISFIT).mean())
        found.append(float(np.mean(parts)))
    return found


def choose(model: ModelProto, make: Callable[[Imagery], Feeds], domain: str, fixed: bool, threads: int = 2) -> Imagery:
    """Choose what images show and the values that they have, by what the network itself tells.

    With BatchNormalizations in the file, the images that come nearest to their statistics are taken; without any, a
    mixture of domains, and the values that most channels respond to; drawings or textures only if far more channels
    respond to them. The usual choice is taken where another makes little difference.

    Args:
        model: the network.
        make: makes inputs of images.
        domain: one of :data:`DOMAINS`; ``auto`` is decided.
        fixed: whether the values are given, so that they are not to be decided.
        threads: of onnxruntime.
    """
    domains = ("photo", "mixed") if domain == "auto" else (domain,)
    tried = [c for d in domains for c in (candidates(Imagery(d))[:1] if fixed else candidates(Imagery(d)))]
    distances = misfits(model, [make(c) for c in tried], threads) if len(tried) > 1 else []
    if distances:
        if domain == "auto":
            others = [replace(tried[int(np.argmin(distances))], domain=other) for other in OTHERS]
            tried += others
            distances += misfits(model, [make(c) for c in others], threads)
        best = tried[int(np.argmin(distances))]
        if min(distances) > NEARER * distances[0]:
            return tried[0]
        why = (
            f"nearest to the statistics of the BatchNormalizations ({min(distances):.2g}; usual photographs "
            f"{distances[0]:.2g})"
        )
        return replace(best, note=f"made-up images are {_said(best)}, {why}")
    usual = "mixed" if domain == "auto" else domain
    best, share = _best([c for c in tried if c.domain == usual], MARGIN, model, make, threads)
    if domain != "auto" or (share is not None and share > 1 - OTHERS_MARGIN):  # more than so many cannot respond
        return best
    others = [best, *(replace(best, domain=d, note="") for d in OTHERS)]
    return _best(others, OTHERS_MARGIN, model, make, threads, share)[0]


def _best(
    tried: Sequence[Imagery],
    margin: float,
    model: ModelProto,
    make: Callable[[Imagery], Feeds],
    threads: int,
    usual: float | None = None,
) -> tuple[Imagery, float | None]:
    """Choose the images that most channels respond to, the first ones unless others are better by a margin.

    Args:
        tried: the images.
        margin: a fraction of the channels.
        model: the network.
        make: makes inputs of images.
        threads: of onnxruntime.
        usual: the fraction that responds to the first ones, where it is known.

    Returns:
        The images, with a note if they are not the first ones, and the fraction of the channels that responds to them;
        None if nobody asked.
    """
    if len(tried) == 1:
        return tried[0], None
    asked = tried if usual is None else tried[1:]
    shares = [*(() if usual is None else (usual,)), *responding(model, [make(c) for c in asked], threads)]
    at = int(np.argmax(shares))
    if shares[at] <= shares[0] + margin:
        return tried[0], shares[0]
    other = f"{SHOWN[tried[0].domain]}, with values {tried[0].values}"
    why = f"to which {shares[at]:.0%} of the channels respond ({shares[0]:.0%} to images {other})"
    note = f"made-up images are {_said(tried[at])}, {why}; --range and --domain give others"
    return replace(tried[at], note=note), shares[at]


SHOWN = {
    "photo": "like photographs",
    "text": "of text",
    "mixed": "half like photographs, half of text",
    "drawing": "drawings",
    "texture": "gradients and textures",
}


def _said(imagery: Imagery) -> str:
    return f"{SHOWN[imagery.domain]}, with values {imagery.values}"
