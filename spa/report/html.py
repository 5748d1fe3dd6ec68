"""Reports as self-contained HTML pages: nothing is fetched, and each opens from a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from spa.report import Report
from spa.report.command import command_line
from spa.report.comparison import Point, Sweep
from spa.report.environment import environment
from spa.report.notebook import table
from spa.report.sensitivity import Sensitivity
from spa.report.text import COSTS, branched, calibrated, count, measured, timed

HERE = Path(__file__).parent  # files and no package: spa may be imported from a checkout that is not installed
# What would free a group, by words of the reason for which it was left alone (docs/guides/read-a-refusal.md).
REMEDIES = {
    "the request ignores": "leave out --ignore",
    "takes statistics over it": "--cross-norm, then fine-tune",
    "not finite": "repair the weights",
    "no rule for": "write a rule (spa.rule), a line for most operators",
    "graph input": "nothing: the interface must not change",
    "graph output": "nothing: the interface must not change",
}


def page(report: Report, source: str, target: str) -> str:
    """Return a page about a pruning: costs before and after, widths and shares by depth, every group, what was left.

    Args:
        report: of a pruned model.
        source: what the dense model is called.
        target: what the pruned model is called.
    """
    groups = _groups(report)
    metric = report.metric or {}
    evaluations = metric.get("evaluations", [])
    searched = [e for e in evaluations if e["ratio"] is not None]
    return _rendered(
        "page.html.jinja",
        {
            "groups": groups,
            "evaluations": [evaluations[0], *searched] if searched else [],
            "metric": metric.get("name"),
        },
        source=source,
        target=target,
        tiles=_tiles(report),
        sentences=_sentences(report),
        groups=groups,
        has_losses=any(g["loss"] for g in groups),
        has_curves=any(g["curve"] for g in groups),
        evaluations=evaluations if len(evaluations) > 2 else [],
        has_search=bool(searched),
        metric=metric.get("name"),
        left=[_left(report, *entry) for entry in (*report.skipped, *report.frozen)],
        barriers=report.barriers,
        command=command_line("prune", source, target, report.requested, {}),
        environment=report.environment.items(),
        requested=report.requested.items(),
        seconds=report.seconds.items(),
        memory=None if report.memory is None else count(report.memory),
    )


def sweep_page(found: Sweep, command: str) -> str:
    """Return a page about a sweep: the Pareto plot, and every network with links to its files.

    Args:
        found: the sweep; the page belongs into its folder.
        command: makes it again.
    """
    data = found.to_dict()
    measures = {  # the title and the form of each field
        "milliseconds": ("ms", "%.3f"),
        "change": ("output error", "%.4f"),
        "accuracy": ("accuracy", "%.1f"),
        "metric": (found.metric_name, "%.6g"),
        "drop": ("drop", "%.3g"),
    }
    shown = [(*measures[n], n) for n in measures if any(getattr(p, n) is not None for p in found.points)]
    return _rendered(
        "sweep.html.jinja",
        {**{name: data[name] for name in ("points", "dense", "cost", "loss", "knee")}, "metric": found.metric_name},
        found=found,
        headings=[(title, True) for title, _, _ in shown],
        shown=shown,
        tiles=_sweep_tiles(found),
        command=command,
        environment=found.environment.items(),
    )


def sensitivity_page(found: Sensitivity, command: str) -> str:
    """Return a page about what each group costs alone: its curves, and a table.

    Args:
        found: the curves.
        command: makes them again.
    """
    rows = [
        {"name": g.name, "layer": g.layer, "channels": g.channels, "width": w, "gone": 1 - w / g.channels}
        | {"loss": g.loss[i], "macs": g.macs[i], "params": g.params[i], "change": g.change[i] if g.change else None}
        for g in found.groups
        for i, w in enumerate(g.widths)
    ]
    starts = [
        {"name": g.name, "layer": g.layer, "channels": g.channels, "width": g.channels, "gone": 0.0, "loss": 0.0}
        | {"change": 0.0 if g.change else None}
        for g in found.groups
    ]
    return _rendered(
        "sensitivity.html.jinja",
        {"rows": [*starts, *rows]},
        found=found,
        rows=rows,
        has_changes=any(g.change for g in found.groups),
        tiles=[_tile("groups", "", str(len(found.groups)), f"scored by {found.criterion}")],
        command=command,
        environment=environment().items(),
    )


def summary(report: Report) -> str:
    """Return the costs before and after as a small table, for notebooks."""
    rows = [(t["name"], t["before"], t["after"], t["change"]) for t in _tiles(report)]
    return table(("", "before", "after", ""), rows, report.notes)


def _rendered(template: str, data: Mapping[str, Any], **variables: Any) -> str:
    templates = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"count": count, "percent": _percent}
    script = json.dumps(data, default=str).replace("<", r"\u003c")  # which would end the element that holds it
    assets = {name.partition(".")[0]: Markup(_asset(name)) for name in ("page.css", "d3.min.js", "plot.umd.min.js")}
    return templates.get_template(template).render(
        data=Markup(script), script=Markup(_asset("page.js")), **assets, **variables
    )


@cache
def _asset(name: str) -> str:
    return (HERE / "assets" / name).read_text(encoding="utf-8")


def _percent(fraction: float) -> str:
    return f"{fraction:.1%}"


def _tile(name: str, before: str, after: str, change: str) -> dict[str, str]:
    return {"name": name, "before": before, "after": after, "change": change}


def _tiles(report: Report) -> list[dict[str, str]]:
    """Return what is shown largest: a name, the value before and after, and the change in words."""
    tiles = []
    for name, title in COSTS.items():
        before, after = getattr(report.before, name), getattr(report.after, name)
        tiles.append(_tile(title, count(before), count(after), f"−{1 - after / before:.1%}" if before else ""))
    if (timing := report.latency) is not None:
        faster = f"{timing['dense'] / timing['measured']:.2f} times as fast"
        tiles.append(_tile("latency, ms", f"{timing['dense']:.3g}", f"{timing['measured']:.3g}", faster))
    calibration = report.calibration or {}
    if calibration.get("after") is not None:
        cut = f"{calibration['before']:.3f} before the repair"
        tiles.append(_tile("output error", "0", f"{calibration['after']:.3f}", cut))
    if "accuracy" in calibration:
        before, after = calibration["accuracy"]
        tiles.append(_tile("accuracy, %", f"{before:.1f}", f"{after:.1f}", f"on {calibration['held_out']} inputs"))
    if (metric := report.metric) is not None and metric["pruned"] is not None:
        worse = f"{metric['drop']:.3g} ± {metric['noise']:.2g} worse"
        tiles.append(_tile(metric["name"], f"{metric['dense']:.6g}", f"{metric['pruned']:.6g}", worse))
    return tiles


def _sweep_tiles(found: Sweep) -> list[dict[str, str]]:
    made = [p for p in found.points if not p.refused]
    tiles = [_tile("networks", "", str(len(made)), f"{sum(p.on_front for p in made)} on the front")]
    best = next((p for p in made if p.name == found.knee), None)
    if best is not None:
        tiles.append(_tile("at the knee", "", best.name, _removed(best, found)))
    titles = {
        "macs": "MACs",
        "params": "parameters",
        found.cost: COSTS.get(found.cost, found.cost),
        "milliseconds": "ms",
    }
    for name, title in titles.items():
        before = found.dense.get(name)
        if best is not None and before and (after := getattr(best, name)) is not None:
            shown = count if name != "milliseconds" else "{:.3f}".format
            tiles.append(_tile(title, shown(before), shown(after), f"−{1 - after / before:.1%}"))
    return tiles


def _removed(point: Point, found: Sweep) -> str:
    loss = getattr(point, found.loss) if found.loss else None
    return "" if loss is None else f"{found.loss} {loss:.3g}"


def _sentences(report: Report) -> Sequence[str]:
    return [
        *([branched(report)] if report.branches else []),
        *([calibrated(report.calibration)] if report.calibration else []),
        *([timed(report.latency)] if report.latency else []),
        *([measured(report.metric)] if report.metric else []),
        *report.notes,
    ]


def _groups(report: Report) -> list[dict[str, Any]]:
    """Return the groups in the order of the network, each with its layer and position."""
    order = {name: i for i, name in enumerate(report.layers)}
    groups = sorted(report.groups, key=lambda g: order.get(g.name, len(order)))
    return [
        {
            "at": at,
            "name": g.name,
            "layer": report.layers.get(g.name, g.name),
            "size": g.size,
            "kept": g.kept,
            "params": round(g.params, 6),
            "macs": round(g.macs, 6),
            "loss": None if g.loss is None else float(f"{g.loss:.4g}"),
            "curve": [(width, float(f"{loss:.3g}")) for width, loss in g.curve],
        }
        for at, g in enumerate(groups)
    ]


def _left(report: Report, name: str, channels: int, reason: str) -> dict[str, Any]:
    remedy = next((r for words, r in REMEDIES.items() if words in reason), "")
    layer = report.layers.get(name, name)
    return {"layer": layer, "name": name, "channels": channels, "reason": reason, "remedy": remedy}
