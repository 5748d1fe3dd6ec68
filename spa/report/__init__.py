"""The record of what was done to a model, as plain data; :mod:`spa.report.text` and :mod:`spa.report.html` show it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from spa.coupling.cost import Cost


@dataclass(frozen=True)
class GroupReport:
    """The outcome for one group: its channels, and the fraction of the dense model that ran through it.

    Attributes:
        name: the group's name.
        size: channels before.
        kept: channels after.
        params: fraction of all parameters, before.
        macs: fraction of all MACs, before.
        crossings: labels of the normalisations that take statistics over it.
        loss: the estimated relative error of what reads it, after compensation, where there is an estimate.
        curve: (channels, that loss with so many left) at some widths, where there is an estimate.
    """

    name: str
    size: int
    kept: int
    params: float
    macs: float
    crossings: tuple[str, ...]
    loss: float | None = None
    curve: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class BranchReport:
    """The outcome for one residual branch, or detour, that might have gone as a whole.

    Attributes:
        name: the branch's name.
        gone: whether it went; a constant stands for it, for a detour a scale and a shift.
        params: fraction of all parameters in it, before.
        macs: fraction of all MACs in it, before.
        loss: the estimated loss if it goes, in the unit of the groups' losses; None where nothing was estimated.
    """

    name: str
    gone: bool
    params: float
    macs: float
    loss: float | None = None


@dataclass(frozen=True)
class Report:
    """The outcome of pruning.

    Attributes:
        before: cost of the dense model.
        after: cost of the pruned model.
        requested: what was asked for, by section and option (see :class:`spa.Request`).
        reached: the fraction of the requested unit that was removed.
        groups: every group that could be pruned under the request; those inside branches that went keep 0 channels.
        frozen: (group, channels, reason) of groups that cannot be pruned.
        skipped: (group, channels, reason) of groups that were left out by the request.
        barriers: (operator, reason) where coupling could not be traced.
        notes: what the user should know.
        seconds: time by stage.
        calibration: the inputs' ``source`` and number of ``samples``; the number ``held_out`` of every fit, on which
            all that follows is measured (on the samples themselves if it is 0); which repair was made
            (``reconstruct``); the outputs' mean squared change over their variance ``before`` and ``after`` it, of
            logits where an output ends in a softmax or sigmoid; the ``agreement`` of the decisions by such outputs;
            the ``accuracy`` in percent of the dense and the pruned model, where labels were given; the shapes
            of the first batch (``inputs``); for made-up inputs the change in the end on a few of another
            domain (``elsewhere``: its ``inputs`` and the change ``after``).
        latency: where it is the budget, milliseconds asked for (``goal``), ``estimated``, ``measured`` and, beside
            that, ``dense``; how many ``choices`` were made, onnxruntime's ``threads``, the ``block`` that widths were
            rounded to, the ``inputs``' shapes.
        metric: of the user's metric its ``name``, which way is ``better``, its value for the ``dense`` and the
            ``pruned`` model (None where it failed), how much worse that is (``drop``) and the standard error of
            that (``noise``), what was asked for (``max_drop``, ``min_metric``), the ``ratio`` that a
            search arrived at, and all ``evaluations`` in turn.
        memory: the most bytes that the process has had resident so far; None where the platform does not say.
        inputs: the shapes of the inputs at which MACs are counted, per sample.
        layers: by group the layer that computes it, by name, in the order of the network.
        environment: the versions and the machine.
        branches: the residual branches, and detours, that could go as a whole under the request.
        sizes: the sizes in them of open axes that do not count samples, by ``input[axis]``; the option sets others.
    """

    before: Cost
    after: Cost
    requested: dict[str, Any]
    reached: float
    groups: tuple[GroupReport, ...]
    frozen: tuple[tuple[str, int, str], ...]
    skipped: tuple[tuple[str, int, str], ...]
    barriers: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    seconds: dict[str, float]
    calibration: dict[str, Any] | None = None
    latency: dict[str, Any] | None = None
    metric: dict[str, Any] | None = None
    memory: int | None = None
    inputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    layers: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    branches: tuple[BranchReport, ...] = ()

    @property
    def gone(self) -> tuple[str, ...]:
        """The names of the residual branches that went as a whole."""
        return tuple(branch.name for branch in self.branches if branch.gone)

    def to_dict(self) -> dict[str, Any]:
        """Convert the report to plain data, ready for JSON."""
        return asdict(self)
