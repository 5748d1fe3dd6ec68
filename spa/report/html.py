"""A report as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from spa.report import Report
from spa.report.text import calibrated, count, timed

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .2em .8em; border-bottom: 1px solid #ddd }
td:not(:first-child), th:not(:first-child) { text-align: right }
"""


def page(report: Report, source: str, target: str) -> str:
    """The page's text: costs before and after, every group, what was left alone and why."""
    costs = []
    for name, title in (("macs", "MACs"), ("params", "parameters"), ("bytes", "bytes"), ("channels", "channels")):
        before, after = getattr(report.before, name), getattr(report.after, name)
        costs.append((title, count(before), count(after), f"{1 - after / before:.1%}" if before else "-"))
    groups = [
        (g.name, g.size, g.kept, f"{g.params:.1%}", f"{g.macs:.1%}", "-" if g.loss is None else f"{g.loss:.2g}")
        for g in report.groups
    ]
    parts = [
        f"<h1>{escape(source)} → {escape(target)}</h1>",
        _table(("", "before", "after", "removed"), costs),
        f"<p>{escape(calibrated(report.calibration))}.</p>" if report.calibration else "",
        f"<p>{escape(timed(report.latency))}.</p>" if report.latency else "",
        "".join(f"<p>{escape(note)}.</p>" for note in report.notes),
        "<h2>Groups</h2>",
        _table(("group", "channels", "kept", "of parameters", "of MACs", "loss"), groups),
        "<h2>Left alone</h2>",
        _table(("group", "channels", "why"), (*report.skipped, *report.frozen)),
        "<h2>Barriers</h2>" + _table(("operator", "why"), report.barriers) if report.barriers else "",
        "<h2>Request</h2>",
        _table(("option", "value"), report.requested.items()),
        _table(("stage", "seconds"), report.seconds.items()),
        f"<p>At most {count(report.memory)} bytes of memory.</p>" if report.memory is not None else "",
    ]
    head = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>spa: {escape(source)}</title><style>{_STYLE}</style>"
    )
    return head + "\n".join(parts) + "\n</html>\n"


def _table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    top = "".join(f"<th>{escape(h)}</th>" for h in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"
