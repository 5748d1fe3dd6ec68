"""The commands that compare many prunings: ``sweep`` and ``sensitivity``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spa.cli.bars import progress_bars
from spa.cli.commands import AsJson, Model, app, check_targets, print_json
from spa.cli.options import RequestCommand, Talk, with_options
from spa.errors import printable
from spa.request import Request

if TYPE_CHECKING:
    from spa.report.sensitivity import Sensitivity


@dataclass(frozen=True)
class Grid:
    """The lists that a sweep goes through.

    Attributes:
        ratios: fractions to remove.
        latencies_ms: milliseconds to arrive at.
        criteria: names.
        round_tos: multiples.
    """

    ratios: Annotated[str | None, typer.Option(help="Ratios: 0.1:0.7:0.1, or 0.2,0.5.", metavar="LIST")] = None
    latencies_ms: Annotated[str | None, typer.Option(help="Milliseconds, as a list.", metavar="LIST")] = None
    criteria: Annotated[str | None, typer.Option(help="Criteria: obspa,l2.", metavar="LIST")] = None
    round_tos: Annotated[str | None, typer.Option(help="Multiples of widths: 1,8.", metavar="LIST")] = None

    def options(self) -> dict[str, Any]:
        """Return those that were given, as :func:`spa.sweep` takes them."""
        lists = {
            "ratio": self.ratios,
            "latency_ms": self.latencies_ms,
            "criterion": self.criteria,
            "round_to": self.round_tos,
        }
        return {name: value for name, value in lists.items() if value is not None}


@app.command(cls=RequestCommand)
@with_options
def sweep(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder for the files.", show_default=False)],
    grid: Grid,
    request: Request,
    talk: Talk,
    plot: Annotated[Path | None, typer.Option(help="Draw a figure here, .png or .svg.")] = None,
    as_json: AsJson = False,
) -> None:
    """Prune MODEL to many budgets with one calibration and one scoring; goes on where it was interrupted."""
    from spa.sweeping import sweep as run

    if plot is not None:
        check_targets({"--plot": plot}, model)
    with progress_bars(not as_json and not talk.verbose, talk.quiet) as progress:
        found = run(str(model), output, request=request, progress=progress, **grid.options())
    if plot is not None:
        from spa.report.figures import sweep_figure

        _write(plot, sweep_figure(found, plot))
    if as_json:
        print_json(found.to_dict())
    elif not talk.quiet:
        from spa.report.text import show_sweep

        show_sweep(found)


@app.command(cls=RequestCommand)
@with_options
def layers(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder for the files.", show_default=False)],
    request: Request,
    talk: Talk,
) -> None:
    """Write the layers of MODEL as files, and a table for their latencies, which --measure fills."""
    from spa.api import analyze
    from spa.goals import stopwatch_of
    from spa.job import prepare
    from spa.widths.table import write_layers

    job = prepare(analyze(model, sizes=request.timing.sizes), request)
    job.try_out()
    with progress_bars(not talk.verbose, talk.quiet) as progress:
        sheet = write_layers(job.analysis, job.selection.groups, job.budget, stopwatch_of(job), output, progress)
    if not talk.quiet:
        typer.echo(printable(str(sheet)))


@app.command(cls=RequestCommand)
@with_options
def sensitivity(
    model: Model,
    request: Request,
    talk: Talk,
    fractions: Annotated[str, typer.Option(help="Fractions of each group to remove.")] = "0.25,0.5,0.75",
    measure: Annotated[bool, typer.Option("--change", help="Measure the outputs' change at each, too.")] = False,
    report: Annotated[Path | None, typer.Option(help="Write an HTML page here.")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print comma-separated values.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what each group of MODEL costs when it alone is pruned."""
    from spa.sensing import sensitivity as run
    from spa.steering.grid import numbers

    if report is not None:
        check_targets({"--report": report}, model)
    with progress_bars(not as_json and not talk.verbose, talk.quiet) as progress:
        found = run(
            str(model), fractions=numbers(fractions, "fractions"), measure=measure, request=request, progress=progress
        )
    if report is not None:
        _write_page(report, found, str(model), request, fractions)
    if as_json:
        print_json(found.to_dict())
    elif as_csv:
        typer.echo(found.to_csv(), nl=False)
    else:
        from spa.report.text import show_sensitivity

        show_sensitivity(found)


def _write_page(target: Path, found: Sensitivity, model: str, request: Request, fractions: str) -> None:
    from spa.report.command import command_line
    from spa.report.html import sensitivity_page

    command = command_line("sensitivity", model, None, request.to_dict(), {"--fractions": fractions})
    _write(target, sensitivity_page(found, command))


def _write(target: Path, content: str | bytes) -> None:
    from spa.model.writing import text_draft

    with text_draft(target, content) as draft:
        draft.publish(draft.folder)
