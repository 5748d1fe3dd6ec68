"""A report as one self-contained HTML page."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from spa.report import Report
from spa.report.text import calibrated, cost_cells, count, group_cells, measured, timed


def page(report: Report, source: str, target: str) -> str:
    """Return the page's text: costs before and after, every group, what was not pruned and why.

    Args:
        report: of a pruned model.
        source: what the dense model is called.
        target: what the pruned model is called.
    """
    # A file and no package: spa may be imported from a checkout that is not installed.
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    sentences = [
        *([calibrated(report.calibration)] if report.calibration else []),
        *([timed(report.latency)] if report.latency else []),
        *([measured(report.metric)] if report.metric else []),
        *report.notes,
    ]
    return environment.get_template("page.html.jinja").render(
        source=source,
        target=target,
        costs=cost_cells(report),
        sentences=sentences,
        groups=group_cells(report),
        not_pruned=(*report.skipped, *report.frozen),
        barriers=report.barriers,
        requested=report.requested.items(),
        seconds=report.seconds.items(),
        memory=None if report.memory is None else count(report.memory),
    )
