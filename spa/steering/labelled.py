"""Ready-made metrics: how well a model does on labelled samples, or how far it does what the dense model does.

``top1:PATH`` and ``top5:PATH`` are the percentage of samples whose label is among the highest scores of the first
output, ``mae:PATH`` the mean absolute error to targets, ``agreement:PATH`` the percentage of samples on which the top
class is the dense model's. The path is an ``.npz`` file (inputs under their names; ``label``, ``labels`` or ``y``;
targets under the output's name, or ``target``), or a folder with a folder of images for each class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from spa.calibration.data import Calibration, Images, read_data
from spa.errors import MetricError, UnreadableError
from spa.model.graph import Graph
from spa.running.runtime import output_specs, run
from spa.running.sessions import open_session
from spa.steering.measurement import Measurement

KINDS = {"top1": True, "top5": True, "mae": False, "agreement": True}  # whether higher is better
PERCENT = 100.0
TARGETS = ("target", "targets")
Scored = Iterator[tuple[np.ndarray, Any]]  # by batch: outputs, and labels or targets


@dataclass(frozen=True)
class Samples:
    """The samples of a ready-made metric.

    Attributes:
        path: where they are.
        graph: the dense model.
        labels: the name of the array of classes, if the user gave one.
        images_as: the normalisation and the size of images.
        preprocess: makes inputs of a sample, if the user gave it.
    """

    path: Path
    graph: Graph
    labels: str | None = None
    images_as: Images | None = None
    preprocess: Callable[[Any], Any] | None = None

    def read(self, data: Any, labelled: bool = True) -> Calibration:
        """Read samples, all of them; a normalisation is for images alone."""
        is_folder = isinstance(data, Path) and data.is_dir()
        return read_data(
            data,
            self.graph.model,
            labels=self.labels if labelled else None,
            samples=None,
            images_as=self.images_as if is_folder else None,
            preprocess=self.preprocess,
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays of the ``.npz`` file.

        Raises:
            MetricError: it is none.
        """
        if not self.path.exists():
            raise UnreadableError(f"{self.path}: there is no such file or folder. Check --evaluate.")
        if self.path.suffix.lower() != ".npz":
            raise MetricError(f"{self.path}: targets come as an .npz file. Write one with numpy.savez.")
        with np.load(self.path, allow_pickle=False) as loaded:
            return {name: loaded[name] for name in loaded.files}

    def labelled_batches(self) -> Iterator[tuple[Mapping[str, np.ndarray], np.ndarray]]:
        """Yield batches of inputs with their classes, (samples,); images are read class by class, anew each time.

        Raises:
            MetricError: there are no labels.
        """
        folders = sorted(p for p in self.path.iterdir() if p.is_dir()) if self.path.is_dir() else []
        if folders:
            for label, folder in zip(_classes(folders), folders, strict=True):
                for batch in self.read(folder, labelled=False).batches:
                    yield batch, np.full(_rows(batch), label)
            return
        read = self.read(self.path)
        if read.labels is None:
            raise MetricError(
                f"{self.path}: it has no labels. Name an array 'label' (or say --labels), or give a folder per class."
            )
        ends = np.cumsum([_rows(batch) for batch in read.batches])[:-1]
        yield from zip(read.batches, np.split(read.labels, ends), strict=True)


def _rows(batch: Mapping[str, np.ndarray]) -> int:
    return len(next(a for a in batch.values() if a.ndim))


def _classes(folders: list[Path]) -> list[int]:
    """Return the class of each folder: its name, where all are whole numbers, else its position."""
    names = [folder.name for folder in folders]
    return [int(name) for name in names] if all(name.isdecimal() for name in names) else list(range(len(names)))


def top(samples: Samples, k: int) -> Callable[[ModelProto], Measurement]:
    """Return the metric of samples whose label is among the k highest scores, in percent."""

    def measure(model: ModelProto) -> Measurement:
        def hits() -> Iterator[np.ndarray]:
            for scores, labels in _scored(model, samples, samples.labelled_batches()):
                rows = _class_scores(scores, samples, len(labels))
                kth = min(k, rows.shape[1])
                best = np.argpartition(-rows, kth - 1, axis=1)[:, :kth] if k > 1 else rows.argmax(axis=1)[:, None]
                yield (best == np.asarray(labels)[:, None]).any(axis=1) * PERCENT

        return _of_samples(np.concatenate(list(hits())), PERCENT)

    return measure


def agreement(samples: Samples) -> Callable[[ModelProto], Measurement]:
    """Return the metric of samples on which a model's top class is the dense model's, in percent."""
    batches = samples.read(samples.path).batches

    def decisions(model: ModelProto) -> np.ndarray:
        pairs = ((batch, _rows(batch)) for batch in batches)
        rows = [_class_scores(s, samples, n).argmax(axis=1) for s, n in _scored(model, samples, pairs)]
        return np.concatenate(rows)

    dense = decisions(samples.graph.model)
    return lambda model: _of_samples((decisions(model) == dense) * PERCENT, PERCENT)


def mean_absolute_error(samples: Samples) -> Callable[[ModelProto], Measurement]:
    """Return the metric of the mean absolute difference from targets, over all entries of the output."""
    arrays = samples.arrays()
    outputs = [spec.name for spec in output_specs(samples.graph.model)]
    name = next((n for n in (*outputs[:1], *TARGETS) if n in arrays), None)
    if name is None:
        raise MetricError(f"{samples.path}: it has no targets. Name an array 'target', like the output.")
    targets = arrays.pop(name)
    batches = samples.read(arrays).batches
    count = sum(_rows(batch) for batch in batches)
    if count != len(targets):
        raise MetricError(f"{samples.path}: {len(targets)} targets for {count} samples. Give one for each.")
    ends = np.cumsum([_rows(batch) for batch in batches])[:-1]
    parts = np.split(targets, ends)

    def measure(model: ModelProto) -> Measurement:
        def errors() -> Iterator[np.ndarray]:
            for found, wanted in _scored(model, samples, zip(batches, parts, strict=True)):
                if found.size != wanted.size:
                    shapes = f"output {outputs[0]!r} has shape {found.shape}, the targets {wanted.shape}"
                    raise MetricError(f"{samples.path}: {shapes}. Give targets like the output.")
                difference = np.abs(found.reshape(len(wanted), -1) - wanted.reshape(len(wanted), -1))
                yield difference.mean(axis=1, dtype=np.float64)

        return _of_samples(np.concatenate(list(errors())), 0.0)

    return measure


MAKERS: dict[str, Callable[[Samples], Callable[[ModelProto], Measurement]]] = {
    "top1": lambda samples: top(samples, 1),
    "top5": lambda samples: top(samples, 5),
    "mae": mean_absolute_error,
    "agreement": agreement,
}


def _of_samples(values: np.ndarray, step: float) -> Measurement:
    return replace(Measurement(float(values.mean())), by_sample=values, step=step)


def _scored(
    model: ModelProto, samples: Samples, pairs: Iterator[tuple[Mapping[str, np.ndarray], Any]]
) -> Iterator[tuple[np.ndarray, Any]]:
    """Run a model on batches; yield its first output with what came with each batch."""
    with open_session(model, samples.graph.base) as session:
        for batch, beside in pairs:
            yield np.asarray(run(session, batch)[0]), beside


def _class_scores(scores: np.ndarray, samples: Samples, count: int) -> np.ndarray:
    """Return scores as one row per sample, (samples, classes).

    Raises:
        MetricError: the output is something else.
    """
    if scores.ndim != 2 or len(scores) != count:
        name = samples.graph.outputs[0]
        raise MetricError(
            f"output {name!r} has shape {scores.shape}, not one row of class scores per sample. "
            "Write a metric of your own: module:function."
        )
    return scores
