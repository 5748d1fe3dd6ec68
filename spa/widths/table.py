"""Latencies of a network's parts in a table: written with the parts as models, measured elsewhere, read again."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from onnx import ModelProto, helper

from spa.coupling.analysis import Analysis, Group
from spa.coupling.cost import Sizes
from spa.errors import MetricError, ModelError, OptionError, SpaError
from spa.model.files import place, read_bytes
from spa.model.writing import draft_folder, text_draft
from spa.progress import Progress, silent
from spa.running.place import Place
from spa.surgery.apply import apply
from spa.widths.budget import Budget
from spa.widths.latency import _Cut, _design, _features, _narrowed, _Network, _parts
from spa.widths.stopwatch import Cache, Stopwatch

SHEET = "layers.csv"
COLUMNS = ("key", "layer", "inputs", "file", "ms")


@dataclass
class TabledStopwatch(Stopwatch):
    """A timer that looks parts up in a table, and measures whole networks where it has a command for that.

    Attributes:
        table: the file.
    """

    table: Path = field(default_factory=Path)

    @property
    def context(self) -> str:
        """Nothing: the table says where its times come from."""
        return ""

    @property
    def measures(self) -> bool:
        """Return whether whole networks are measured."""
        return self.place.command is not None

    @property
    def label(self) -> str:
        """Return what times whole networks."""
        return super().label if self.measures else f"the table {os.fspath(self.table)!r}"

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what the user should know of its times."""
        if self.measures:
            return ()
        return ("the latency is estimated from the table, and was not measured: time the pruned network",)

    def known(self) -> Cache:
        """Return the table's times."""
        return _Table(self.table)

    def part(self, model: ModelProto, feeds: Mapping[str, np.ndarray]) -> float:
        """Refuse a part that the table does not have."""
        raise ModelError("the table does not have this part")


class _Table(Cache):
    """The times of a table; nothing is added."""

    def _read(self) -> dict[str, float]:
        return {row["key"]: float(row["ms"]) for row in read(self._path) if row["ms"]}

    def save(self) -> None:
        """Leave the table as it is."""


def read(path: Path) -> list[dict[str, str]]:
    """Read a table's rows, as text by column.

    Raises:
        UnreadableError: the file is not there or cannot be opened.
        OptionError: it is no such table.
    """
    name = os.fspath(path)
    try:
        rows = list(csv.DictReader(io.StringIO(read_bytes(path, "the table").decode("utf-8-sig"))))
    except (UnicodeDecodeError, csv.Error) as error:
        raise OptionError(f"cannot read the table {name!r}: {error}.") from error
    for at, row in enumerate(rows, 2):
        if not row.get("key") or "ms" not in row:
            raise OptionError(f"{name!r}, line {at}: a column key or ms is missing. Write a table with  spa layers.")
        row["ms"] = (row["ms"] or "").strip()
        try:
            if row["ms"] and not 0 <= float(row["ms"]) < math.inf:
                raise ValueError
        except ValueError:
            raise OptionError(
                f"{name!r}, line {at}: ms is {row['ms']!r}. Give milliseconds, or leave it empty."
            ) from None
    if not any(row["ms"] for row in rows):
        raise OptionError(f"the table {name!r} has no times. Measure its files, and enter the milliseconds as ms.")
    return rows


def write_layers(
    analysis: Analysis,
    groups: Sequence[Group],
    budget: Budget,
    watch: Stopwatch,
    folder: Path,
    progress: Progress = silent,
) -> Path:
    """Write the parts of a network at the widths that a budget of latency needs to know, and a table of them.

    A table that is there already keeps its times, so that what was interrupted goes on.

    Args:
        analysis: the dense network.
        groups: the groups that may be pruned.
        budget: says which widths they may have.
        watch: gives the sizes of inputs; where it has a command, that measures the parts.
        folder: for the table and the models; made where it is missing.
        progress: called with the stage and the fraction of it that is done.

    Returns:
        The table.

    Raises:
        MetricError: the command fails; what it has measured before is in the table.
        SpaError: the files cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpaError(f"cannot make the folder {os.fspath(folder)!r}: {error.strerror}. Choose another.") from error
    sheet = folder / SHEET
    rows = {row["key"]: row for row in _rows(sheet)}
    for cut, share in _cuts(analysis, groups, budget, watch.inputs(analysis.graph.self_contained())):
        progress("layers", share)
        key = cut.key("")
        if key in rows or not cut.can_run:
            continue
        name = f"{key}.onnx"
        with draft_folder(folder) as draft:
            place(_typed(cut), draft / name, None)
            (draft / name).replace(folder / name)
        shapes = " ".join(f"{n}:{'x'.join(map(str, a.shape))}" for n, a in cut.feeds().items())
        rows[key] = dict(zip(COLUMNS, (key, cut.nodes[0].label, shapes, name, ""), strict=True))
    _write(sheet, rows.values())
    if watch.place.command is not None:
        _measure(sheet, list(rows.values()), watch.place, progress)
    return sheet


def _cuts(
    analysis: Analysis, groups: Sequence[Group], budget: Budget, inputs: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[_Cut, float]]:
    """Yield the parts that :func:`spa.widths.latency.measure` times, each with the fraction of all that come before."""
    parts, points = _parts(analysis), _design(analysis, groups, budget)
    sizes = Sizes(analysis.space, groups)
    moving = [any(sizes.term(axes).axes for f in _features(analysis, nodes) for axes in f) for nodes in parts]
    for k, widths in enumerate(points):
        narrow = analysis.graph.model if k == 0 else apply(analysis, _narrowed(analysis, groups, widths))
        network = _Network(narrow, analysis.graph.base, inputs, analysis)
        for i, nodes in enumerate(parts):
            if k == 0 or moving[i]:
                yield network.cut(nodes), (k + i / len(parts)) / len(points)


def _typed(cut: _Cut) -> ModelProto:
    """Return a part as a model whose outputs have types and shapes, which other tools need."""
    model, walk = cut.model(), cut.network.walk
    for output in model.graph.output:
        output.CopyFrom(helper.make_tensor_value_info(output.name, walk.dtype[output.name], walk.shape[output.name]))
    return model


def _rows(sheet: Path) -> list[dict[str, str]]:
    """Return the rows of a table that may not be there yet.

    Raises:
        OptionError: a file of its name is something else.
    """
    if not sheet.exists():
        return []
    content = csv.DictReader(io.StringIO(read_bytes(sheet, "the table").decode(errors="replace")))
    if not set(COLUMNS) <= set(content.fieldnames or ()):
        raise OptionError(f"{os.fspath(sheet)!r} exists and is no table of layers. Choose another folder.")
    return list(content)


def _measure(sheet: Path, rows: list[dict[str, str]], where: Place, progress: Progress) -> None:
    """Let a command measure the models of a table, and keep each time at once."""
    todo = [row for row in rows if not row["ms"]]
    for done, row in enumerate(todo):
        progress("measure", done / len(todo))
        try:
            row["ms"] = repr(where.milliseconds(sheet.with_name(row["file"]), row["layer"]))
        except MetricError as error:
            raise MetricError(
                f"{error}\n{done} times before it are in {os.fspath(sheet)!r}; the next call goes on."
            ) from error
        _write(sheet, rows)


def _write(sheet: Path, rows: Iterable[Mapping[str, str]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    with text_draft(sheet, text.getvalue()) as draft:
        draft.publish(draft.folder)
