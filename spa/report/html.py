"""A report as one self-contained HTML page."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from spa.report import Report
from spa.report.text import calibrated, count, timed


def page(report: Report, source: str, target: str) -> str:
    """Return the page's text: costs before and after, every group, what was left alone and why.

    Args:
        report: of a pruned model.
        source: what the dense model is called.
        target: what the pruned model is called.
    """
    # A file and no package: spa may be imported from a checkout that is not installed.
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    costs = []
    for name, title in (("macs", "MACs"), ("params", "parameters"), ("bytes", "bytes"), ("channels", "channels")):
        before, after = getattr(report.before, name), getattr(report.after, name)
        costs.append((title, count(before), count(after), f"{1 - after / before:.1%}" if before else "-"))
    groups = [
        (g.name, g.size, g.kept, f"{g.params:.1%}", f"{g.macs:.1%}", "-" if g.loss is None else f"{g.loss:.2g}")
        for g in report.groups
    ]
    sentences = [
        *([calibrated(report.calibration)] if report.calibration else []),
        *([timed(report.latency)] if report.latency else []),
        *report.notes,
    ]
    return environment.get_template("page.html.jinja").render(
        source=source,
        target=target,
        costs=costs,
        sentences=sentences,
        groups=groups,
        left_alone=(*report.skipped, *report.frozen),
        barriers=report.barriers,
        requested=report.requested.items(),
        seconds=report.seconds.items(),
        memory=None if report.memory is None else count(report.memory),
    )
