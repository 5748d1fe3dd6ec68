"""The record of a sweep: many networks of one dense model, as plain data."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from spa.report.notebook import table


@dataclass(frozen=True)
class Point:
    """A network of a sweep.

    Attributes:
        name: the stem of its files.
        criterion: how channels were scored.
        of: the unit of the ratio.
        ratio: the fraction that was asked to be removed, or None.
        latency_ms: the milliseconds that were asked for, or None.
        round_to: widths are multiples of this.
        refused: why there is no network; all that follows is None then.
        reached: the fraction of the unit that was removed.
        macs: of the network, per sample.
        params: parameters.
        bytes: of weights.
        memory: bytes of activations at the worst moment, per sample.
        change: of the outputs on inputs held out, relative to their variance.
        accuracy: in percent, where the data has labels.
        metric: the user's.
        drop: how much worse that is than the dense model's.
        milliseconds: what a tenth of the runs stay below, in turns with the others.
        seconds: that it took to choose, prune and repair it.
        repair: what it had: ``full``, ``quick``, ``readers``, ``bias`` or ``none``; None where nothing was run.
        on_front: whether no other network is at least as good in cost and loss.
    """

    name: str
    criterion: str
    of: str
    ratio: float | None
    latency_ms: float | None
    round_to: int
    refused: str | None = None
    reached: float | None = None
    macs: int | None = None
    params: int | None = None
    bytes: int | None = None
    memory: int | None = None
    change: float | None = None
    accuracy: float | None = None
    metric: float | None = None
    drop: float | None = None
    milliseconds: float | None = None
    seconds: float | None = None
    repair: str | None = None
    on_front: bool = False

    @property
    def file(self) -> str | None:
        """The name of the network's file in the folder; None where there is no network."""
        return None if self.refused else f"{self.name}.onnx"


@dataclass(frozen=True)
class Sweep:
    """The outcome of a sweep.

    Attributes:
        model: what the dense model is called.
        dense: its ``macs``, ``params``, ``bytes``, ``memory``, and ``metric``, ``accuracy``, ``milliseconds`` where
            measured.
        points: the networks, in the order of the request.
        cost: the field of points that is their cost: ``macs``, ``params``, ``bytes``, ``memory`` or ``milliseconds``.
        loss: the field that is their loss: ``drop`` or ``change``; None where neither was measured.
        metric_name: of the user's metric, or None.
        knee: the name of the point that is recommended; None where none stands out.
        folder: where the files are.
        environment: versions and processor.
        again: the command that makes the recommended network with the full repair, where it had a quicker one.
    """

    model: str
    dense: Mapping[str, float | None]
    points: tuple[Point, ...]
    cost: str
    loss: str | None
    metric_name: str | None
    knee: str | None
    folder: str
    environment: Mapping[str, str]
    again: str | None = None

    def _repr_html_(self) -> str:
        """Return a small table, which notebooks show."""
        losses = ["" if self.loss is None else f"{getattr(p, self.loss) or 0.0:.3g}" for p in self.points]
        rows = [
            (p.name, str(p.macs), str(p.params), loss, "knee" if p.name == self.knee else "yes" if p.on_front else "")
            for p, loss in zip(self.points, losses, strict=True)
            if not p.refused
        ]
        return table(("network", "MACs", "parameters", self.loss or "", "front"), rows)

    def to_dict(self) -> dict[str, Any]:
        """Convert the sweep to plain data, ready for JSON."""
        return asdict(self) | {"points": [asdict(p) | {"file": p.file} for p in self.points]}

    def to_csv(self) -> str:
        """Return the points as a table of comma-separated values, one line each."""
        text = io.StringIO()
        names = [f.name for f in fields(Point)]
        writer = csv.DictWriter(text, [*names, "file", "is_knee"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(p) | {"file": p.file, "is_knee": p.name == self.knee} for p in self.points)
        return text.getvalue()
