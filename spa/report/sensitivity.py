"""The record of what each group costs alone, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class GroupCurve:
    """The cost of pruning one group alone, at some widths.

    Attributes:
        name: the group's.
        layer: the layer that computes it, by name.
        channels: its width in the dense model.
        widths: the widths, falling.
        loss: at each width, what the criterion estimates; what it is depends on the criterion.
        macs: at each width, the fraction of the model's MACs that is gone.
        params: the same of the parameters.
        change: at each width, the measured change of the outputs without a repair, relative to their variance; None
            where it was not measured.
    """

    name: str
    layer: str
    channels: int
    widths: tuple[int, ...]
    loss: tuple[float, ...]
    macs: tuple[float, ...]
    params: tuple[float, ...]
    change: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Sensitivity:
    """The cost of each group.

    Attributes:
        model: what it is called.
        criterion: what estimates the losses.
        groups: in the order of the network.
    """

    model: str
    criterion: str
    groups: tuple[GroupCurve, ...]

    def to_dict(self) -> dict[str, Any]:
        """Convert the curves to plain data, ready for JSON."""
        return asdict(self)

    def to_csv(self) -> str:
        """Return the curves as a table of comma-separated values, a line for each width."""
        lines = ["group,layer,channels,width,loss,macs,params,change"]
        for g in self.groups:
            change = g.change or [None] * len(g.widths)
            for cells in zip(g.widths, g.loss, g.macs, g.params, change, strict=True):
                numbers = ("" if c is None else f"{c:.6g}" for c in cells)
                lines.append(",".join([_quoted(g.name), _quoted(g.layer), str(g.channels), *numbers]))
        return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if set(text) & set(',"\n') else text
