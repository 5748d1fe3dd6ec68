"""Figures of reports for papers, as PNG or SVG, drawn by Matplotlib (the extra ``plot``)."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spa.errors import OptionError
from spa.extras import extra
from spa.report import Report
from spa.report.comparison import Sweep

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg")
BEFORE, AFTER, ACCENT = "#b8c4d6", "#2f6db5", "#d2691e"
WIDTH, PANEL, DPI = 7.0, 2.6, 200  # inches, of a text column; dots per inch
STYLE: dict[Any, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "spa"}


def check_format(path: Path) -> None:
    """Refuse a figure of another kind.

    Raises:
        OptionError: the name ends otherwise.

    >>> check_format(Path("figure.bmp"))
    Traceback (most recent call last):
    spa.errors.OptionError: a figure is PNG or SVG, not 'figure.bmp'. Give it a name that ends in .png or .svg.
    """
    if path.suffix.lower() not in FORMATS:
        raise OptionError(f"a figure is PNG or SVG, not {path.name!r}. Give it a name that ends in .png or .svg.")


def pruning_figure(report: Report, path: Path) -> bytes:
    """Draw a pruning: the widths before and after, and where the MACs were, by group in the order of the network.

    Args:
        report: of a pruned model.
        path: where it will go; its ending tells the format.

    Returns:
        The file's content.

    Raises:
        OptionError: the ending is another.
        UnsupportedError: Matplotlib is not installed.
    """

    def draw(figure: Figure) -> None:
        by_name = {g.name: g for g in report.groups}
        groups = [by_name[name] for name in report.layers if name in by_name]
        at = range(len(groups))
        widths, shares = figure.subplots(2, 1, sharex=True)
        widths.bar(at, [g.size for g in groups], 0.8, color=BEFORE, label="before")
        widths.bar(at, [g.kept for g in groups], 0.8, color=AFTER, label="after")
        widths.set_ylabel("channels")
        widths.legend(frameon=False)
        shares.bar(at, [100 * g.macs for g in groups], 0.8, color=AFTER)
        shares.set_ylabel("share of the MACs, %")
        shares.set_xlabel("groups in the order of the network")
        shares.xaxis.get_major_locator().set_params(integer=True)

    return _drawn(draw, path, panels=2)


def sweep_figure(found: Sweep, path: Path) -> bytes:
    """Draw a sweep: cost and loss of each network, the Pareto front and its knee.

    Args:
        found: the sweep.
        path: where it will go; its ending tells the format.

    Returns:
        The file's content.

    Raises:
        OptionError: the ending is another, or nothing was measured that a network could be better in.
        UnsupportedError: Matplotlib is not installed.
    """
    loss = found.loss
    if loss is None:
        raise OptionError("nothing was measured that a network could be better in. Give --data, or --evaluate.")

    def place(point: Any) -> tuple[float, float]:
        return getattr(point, found.cost), getattr(point, str(loss))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        made = [p for p in found.points if not p.refused]
        front = sorted(place(p) for p in made if p.on_front)
        axes.plot(*zip(*front, (found.dense[found.cost], 0.0), strict=True), color=BEFORE, zorder=1)
        for criterion in dict.fromkeys(p.criterion for p in made):
            axes.scatter(*zip(*(place(p) for p in made if p.criterion == criterion), strict=True), label=criterion)
        axes.scatter(float(found.dense[found.cost] or 0.0), 0.0, color="black", label="dense")
        if knee := [place(p) for p in made if p.name == found.knee]:
            axes.scatter(*knee[0], 120, facecolors="none", edgecolors=ACCENT, label="knee")
        axes.set_xlabel({"macs": "MACs", "params": "parameters"}.get(found.cost, found.cost))
        axes.set_ylabel(f"drop of {found.metric_name}" if loss == "drop" else "output error")
        axes.legend(frameon=False)

    return _drawn(draw, path, panels=1.4)


def _drawn(draw: Callable[[Figure], None], path: Path, panels: float) -> bytes:
    """Return a figure as the content of a file."""
    check_format(path)
    with extra("plot"):
        import matplotlib as mpl
        from matplotlib.figure import Figure

    content, kind = io.BytesIO(), path.suffix.lower()[1:]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, panels * PANEL), layout="constrained")
        draw(figure)
        figure.savefig(content, format=kind, dpi=DPI, metadata={"Date": None} if kind == "svg" else None)
    return content.getvalue()
