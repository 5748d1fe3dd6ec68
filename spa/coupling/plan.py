"""Plans: the channels to keep, as frozen data that JSON holds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from spa.algebra.axes import Dim, Expr, Kept
from spa.coupling.analysis import Analysis, Part
from spa.errors import PlanError
from spa.model.files import read_bytes
from spa.model.writing import text_draft

FORMAT = 1


@dataclass(frozen=True)
class Cut:
    """The part of a constant that one use keeps, where uses keep different parts.

    Attributes:
        output: the first output of the node that reads it.
        operand: the position of the operand.
        kept: axis → sorted kept indices; axes that are not named stay whole.
    """

    output: str
    operand: int
    kept: Mapping[int, tuple[int, ...]]


@dataclass(frozen=True)
class Plan:
    """Kept indices of each pruned group; groups that are not named keep everything. An empty plan is the identity.

    A residual branch is a group of one channel, and none is kept where it goes.

    Attributes:
        kept: group name → sorted kept indices.
        sizes: group name → number of channels of the group in the dense model.
        parameters: initializer name → axis → sorted kept indices, for use in other tools.
        uses: initializer name → what each use keeps, of those that are read several times and cut differently.

    >>> plan = Plan(kept={"fc1.weight[0]": (0, 2)}, sizes={"fc1.weight[0]": 3}, parameters={})
    >>> plan.removes, Plan.from_json(plan.to_json()) == plan
    (True, True)
    """

    kept: Mapping[str, tuple[int, ...]]
    sizes: Mapping[str, int]
    parameters: Mapping[str, Mapping[int, tuple[int, ...]]]
    uses: Mapping[str, tuple[Cut, ...]] = field(default_factory=dict)

    @property
    def removes(self) -> bool:
        """True if the plan removes any channel."""
        return any(len(kept) < self.sizes[name] for name, kept in self.kept.items())

    def masks(self, analysis: Analysis) -> dict[Dim, np.ndarray]:
        """Return by dimension a boolean array of shape (size,), True where the index is kept.

        Raises:
            PlanError: the plan does not fit the model, prunes a frozen group, or removes every channel of a group.
        """
        groups = analysis.by_name(self.kept)
        masks: dict[Dim, np.ndarray] = {}
        for name, kept in self.kept.items():
            group = groups.get(name)
            if group is None or group.size != self.sizes[name]:
                fact = "has no group of that name" if group is None else f"has {group.size} channels there"
                raise PlanError(
                    f"the plan names {name!r} with {self.sizes[name]} channels: the model {fact}. Make a new plan."
                )
            if len(kept) == group.size:
                continue
            if group.frozen is not None:
                raise PlanError(f"group {name!r} is frozen: {group.frozen}. Take it out of the plan.")
            if len(kept) < group.least:
                raise PlanError(f"group {name!r} keeps none of its {group.size} channels. Keep 1 or more of them.")
            if kept and (min(kept) < 0 or max(kept) >= group.size):
                raise PlanError(
                    f"group {name!r} keeps indices {min(kept)} to {max(kept)}, but its channels are 0 to "
                    f"{group.size - 1}. Make a new plan."
                )
            mask = np.zeros(group.size, dtype=bool)
            mask[list(kept)] = True
            masks[group.dim] = mask
        return masks

    def to_json(self) -> str:
        """Return the plan as JSON text; equal plans give equal text."""
        content: dict[str, Any] = {
            "format": FORMAT,
            "groups": {n: {"size": self.sizes[n], "kept": list(k)} for n, k in self.kept.items()},
            "kept": {t: _plain(axes) for t, axes in self.parameters.items()},
        }
        if self.uses:
            content["uses"] = {
                tensor: [{"output": c.output, "operand": c.operand, "kept": _plain(c.kept)} for c in cuts]
                for tensor, cuts in self.uses.items()
            }
        return json.dumps(content, indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read a plan that :meth:`to_json` wrote.

        Raises:
            PlanError: the text is not a plan of this format.
        """
        content = _content(text)
        groups = _mapping(content.get("groups"), "'groups'")
        sizes, kept = {}, {}
        for name, entry in groups.items():
            where = f"group {name!r}"
            fields = _mapping(entry, where)
            size = fields.get("size")
            if type(size) is not int or size < 1:
                raise _no_plan(f"{where} has the size {size!r}, expected a positive whole number")
            sizes[name], kept[name] = size, _indices(fields.get("kept"), where, size)
        parameters = {t: _axes(v, t) for t, v in _mapping(content.get("kept", {}), "'kept'").items()}
        uses = {t: _cuts(v, t) for t, v in _mapping(content.get("uses", {}), "'uses'").items()}
        return Plan(kept=kept, sizes=sizes, parameters=parameters, uses=uses)

    def save(self, path: str | Path) -> None:
        """Write the plan to a file, which :meth:`load` reads.

        Raises:
            SpaError: the file cannot or must not be written.
        """
        target = Path(path)
        with text_draft(target, self.to_json()) as draft:
            draft.publish(draft.folder)

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan from a file.

        Raises:
            UnreadableError: the file is not there or cannot be opened.
            PlanError: it is not a plan.
        """
        try:
            text = read_bytes(Path(path), "the plan").decode("utf-8")
        except UnicodeDecodeError as error:
            raise _no_plan(f"{str(path)!r} is not text in UTF-8") from error
        return Plan.from_json(text)


# -- reading ----------------------------------------------------------------------------------------------------------


def _no_plan(fact: str) -> PlanError:
    return PlanError(f"this is not a plan: {fact}. Write one with --plan-out.")


def _content(text: str) -> dict[str, Any]:
    """Return what the text of a plan holds, of the right format; a byte order mark before it is no fault."""
    if not isinstance(text, str):
        raise _no_plan(f"it is a {type(text).__name__}, expected text")
    text = text.removeprefix("\ufeff")
    if not text.strip():
        raise _no_plan("it is empty")
    try:
        content = json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError as error:
        raise _no_plan("it is nested too deeply") from error
    except ValueError as error:
        at = f" at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise _no_plan(f"it is not JSON{at}") from error
    content = _mapping(content, "it")
    if "format" not in content:
        raise _no_plan("it names no 'format'")
    version = content["format"]
    if type(version) is not int:
        raise _no_plan(f"its format is {json.dumps(version)}, expected the number {FORMAT}")
    if version != FORMAT:
        raise PlanError(f"the plan has format {version}, this version reads {FORMAT}. Make a new plan.")
    return content


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise _no_plan(f"it names {name!r} twice in one place")
        content[name] = value
    return content


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _no_plan(f"{where} is {_kind(value)}, expected an object")
    return value


def _axes(value: Any, tensor: str) -> dict[int, tuple[int, ...]]:
    where = f"parameter {tensor!r}"
    return {_axis(axis, tensor): _indices(k, where) for axis, k in _mapping(value, where).items()}


def _cuts(value: Any, tensor: str) -> tuple[Cut, ...]:
    where = f"the uses of {tensor!r}"
    if not isinstance(value, list):
        raise _no_plan(f"{where} are {_kind(value)}, expected a list")
    cuts = []
    for entry in value:
        fields = _mapping(entry, f"one of {where}")
        output, operand = fields.get("output"), fields.get("operand")
        if not isinstance(output, str) or type(operand) is not int or operand < 0:
            raise _no_plan(f"one of {where} names no 'output' and 'operand'")
        cuts.append(Cut(output, operand, _axes(fields.get("kept"), tensor)))
    return tuple(cuts)


def _plain(axes: Mapping[int, tuple[int, ...]]) -> dict[str, list[int]]:
    return {str(axis): list(kept) for axis, kept in axes.items()}


def _axis(text: str, tensor: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise _no_plan(f"parameter {tensor!r} has the axis {text!r}, expected a whole number")
    return int(text)


def _indices(value: Any, where: str, size: int | None = None) -> tuple[int, ...]:
    """Return kept indices, sorted; `size` is how many channels there are, where that is known."""
    if not isinstance(value, list):
        raise _no_plan(f"{where} keeps {_kind(value)}, expected a list of indices")
    if value and all(isinstance(i, bool) for i in value):
        raise _no_plan(f"{where} keeps a mask, expected a list of indices")
    for index in value:
        if type(index) is not int:
            raise _no_plan(f"{where} keeps {json.dumps(index)[:40]}, which is no index")
        if index < 0 or (size is not None and index >= size):
            channels = "" if size is None else f": its channels are 0 to {size - 1}"
            raise _no_plan(f"{where} keeps index {index}{channels or ', which is negative'}")
    indices = tuple(sorted(value))
    if twice := [a for a, b in pairwise(indices) if a == b]:
        raise _no_plan(f"{where} keeps index {twice[0]} twice")
    return indices


def _kind(value: Any) -> str:
    """Return the kind of a value of JSON, in the words of JSON."""
    if value is None:
        return "nothing"
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list"}
    return kinds.get(type(value), "an object")


# -- making -----------------------------------------------------------------------------------------------------------


def make_plan(analysis: Analysis, kept: Mapping[str, np.ndarray]) -> Plan:
    """Make a plan from kept indices by group name; groups that keep everything are left out.

    Args:
        analysis: the model.
        kept: group name → kept indices, in any order.

    Raises:
        PlanError: a group is unknown or frozen, or would lose every channel.
    """
    groups = analysis.by_name(kept)
    pruned: dict[str, tuple[int, ...]] = {}
    for name, indices in kept.items():
        unique = tuple(sorted({int(i) for i in indices}))
        if name not in groups or len(unique) != groups[name].size:
            pruned[name] = unique
    sizes = {name: groups[name].size if name in groups else -1 for name in pruned}
    masks = Plan(kept=pruned, sizes=sizes, parameters={}).masks(analysis)
    parameters, uses = _parameters(analysis, analysis.kept(masks))
    return Plan(kept=pruned, sizes=sizes, parameters=parameters, uses=uses)


def disagreeing(analysis: Analysis, plan: Plan) -> list[str]:
    """Return the constants of which a plan says that other indices are kept than follow from its groups."""
    if not plan.parameters:
        return []
    right = make_plan(analysis, {name: np.asarray(kept, int) for name, kept in plan.kept.items()}).parameters
    return [name for name, axes in plan.parameters.items() if right.get(name) != axes]


def dropped(analysis: Analysis, kept: Kept) -> tuple[Part, ...]:
    """Return the parts that go, but for those inside of others that do."""
    gone = [p for p in analysis.parts if not kept.size(p.dim)] if kept.empties else []
    nodes = {p.name: set(p.operators) for p in gone}
    return tuple(p for p in gone if not any(nodes[p.name] < nodes[o.name] for o in gone))


class _KeptOfConstants(Mapping[str, Mapping[int, tuple[int, ...]]]):
    """The kept indices of constants, computed when asked for: those of large ones take more than the weights."""

    def __init__(self, kept: Kept, axes: Mapping[str, Mapping[int, Expr]]) -> None:
        self._kept, self._axes = kept, axes

    def __getitem__(self, name: str) -> Mapping[int, tuple[int, ...]]:
        return _indices_by_axis(self._kept, self._axes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._axes)

    def __len__(self) -> int:
        return len(self._axes)

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce__(self) -> tuple[type[dict[Any, Any]], tuple[dict[str, Any]]]:
        return dict, (dict(self),)  # other processes need not have the network


def _indices_by_axis(kept: Kept, axes: Mapping[int, Expr]) -> dict[int, tuple[int, ...]]:
    return {axis: tuple(np.flatnonzero(kept.mask(expr)).tolist()) for axis, expr in axes.items()}


def _parameters(analysis: Analysis, kept: Kept) -> tuple[_KeptOfConstants, dict[str, tuple[Cut, ...]]]:
    """Return by constant what stays of it; for those that uses cut differently, what stays for each use."""
    cuts: dict[str, dict[tuple[int, int], dict[int, Expr]]] = {}
    for (name, index, operand), axes in analysis.uses.items():
        cuts.setdefault(name, {})[(index, operand)] = {
            axis: expr for axis, expr in enumerate(axes) if kept.size(expr) != expr.size
        }
    alike: dict[str, dict[int, Expr]] = {}
    different: dict[str, tuple[Cut, ...]] = {}
    for name, by_use in sorted(cuts.items()):
        first, *others = by_use.values()
        if all(_same_cut(kept, first, other) for other in others):
            if first:
                alike[name] = first
            continue
        nodes = analysis.graph.nodes
        different[name] = tuple(
            Cut(nodes[i].outputs[0], o, _indices_by_axis(kept, axes))
            for (i, o), axes in sorted(by_use.items())
            if i >= 0  # not in sub-graphs
        )
    return _KeptOfConstants(kept, alike), different


def _same_cut(kept: Kept, a: Mapping[int, Expr], b: Mapping[int, Expr]) -> bool:
    return a.keys() == b.keys() and all(
        a[axis] == b[axis] or np.array_equal(kept.mask(a[axis]), kept.mask(b[axis])) for axis in a
    )
