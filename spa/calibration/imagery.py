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

from spa.calibration.images import MEAN, STD, Numbers
from spa.calibration.leaves import dead_leaves
from spa.calibration.lettering import lettering
from spa.errors import PlanError
from spa.running.runtime import load_session, run

Array = np.ndarray
Feeds = Mapping[str, Array]
DOMAINS = ("auto", "photo", "text", "mixed")
SMALLEST_TEXT = 16  # rows or columns below which nothing can be read
WATCHED = frozenset({"Conv", "Relu", "HardSwish", "Sigmoid", "LeakyRelu", "PRelu", "Clip", "Mul"})
MOST_WATCHED = 60  # tensors whose channels are counted
IMAGES = 4  # that are tried on each scale
RESPONDS = 0.1  # a channel does whose standard deviation exceeds this fraction of the layer's median
MOST_MISFIT = 10.0  # of one channel: a few that are far off decide nothing
NEARER = 0.8  # of the usual images' distance from BatchNormalizations' statistics, at which others are taken
MARGIN = 0.01  # by which more channels must respond to a scale than to the usual one


@dataclass(frozen=True)
class Imagery:
    """The way in which images are made up.

    Attributes:
        domain: ``photo`` (dead leaves), ``text`` (lines of words) or ``mixed`` (half of each).
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
    mixture of domains, and the values that most channels respond to. The usual choice is taken where another makes
    little difference.

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
        best = tried[int(np.argmin(distances))]
        if min(distances) > NEARER * distances[0]:
            return tried[0]
        why = (
            f"nearest to the statistics of the BatchNormalizations ({min(distances):.2g}; usual photographs "
            f"{distances[0]:.2g})"
        )
        return replace(best, note=f"made-up images are {_said(best)}, {why}")
    tried = [c for c in tried if c.domain == domains[-1]]
    if len(tried) == 1:
        return tried[0]
    shares = responding(model, [make(c) for c in tried], threads)
    at = int(np.argmax(shares))
    if shares[at] <= shares[0] + MARGIN:
        return tried[0]
    why = f"to which {shares[at]:.0%} of the channels respond ({shares[0]:.0%} to images {tried[0].values})"
    return replace(tried[at], note=f"made-up images are {_said(tried[at])}, {why}; --mean and --std give others")


def _said(imagery: Imagery) -> str:
    shown = {"photo": "like photographs", "text": "of text", "mixed": "half like photographs, half of text"}
    return f"{shown[imagery.domain]}, with values {imagery.values}"
