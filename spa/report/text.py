"""Reports on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from spa.errors import printable

if TYPE_CHECKING:
    from spa.report import Report
    from spa.report.comparison import Sweep
    from spa.report.sensitivity import Sensitivity
    from spa.running.bench import BenchReport
    from spa.running.verify import VerifyReport
    from spa.surgery.proof import Proof

COSTS = {"macs": "MACs", "params": "parameters", "bytes": "bytes", "channels": "channels", "memory": "memory"}


def count(number: float) -> str:
    """Write a number with a unit prefix: 4.09 G."""
    for factor, prefix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= factor:
            return f"{number / factor:.2f}{prefix}"
    return f"{number:.0f}"


def shapes_text(shapes: Mapping[str, Sequence[int]]) -> str:
    """Write shapes of inputs: x 2x3x64x64."""
    return ", ".join(f"{name} {'x'.join(map(str, shape)) or 'scalar'}" for name, shape in shapes.items())


def _text(content: str) -> Text:
    """Return what is printed as it is: neither markup of rich nor a terminal's escape sequences count in it."""
    return Text(printable(content))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=_text(title))
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    return table


def _row(table: Table, *cells: object) -> None:
    table.add_row(*(_text(str(c)) for c in cells))


def _print(console: Console, table: Table) -> None:
    """Print a table under its title; names that it has no room for stand whole below it, by their numbers."""
    if table.title:
        console.print(table.title, style="bold", soft_wrap=True)
        table.title = None
    first, *others = table.columns
    narrowest = table.__rich_measure__(console, console.options.update(max_width=10**6)).minimum
    if narrowest <= console.width:
        first.no_wrap = True
        console.print(table)
        return
    names = [str(cell) for cell in first.cells]
    numbers = {name: str(number) for number, name in enumerate(dict.fromkeys(n for n in names if n), 1)}
    short = Table()
    short.add_column("", justify="right")
    for column in others:
        short.add_column(column.header, justify=column.justify, overflow="fold")
    for name, *cells in zip(names, *(column.cells for column in others), strict=True):
        short.add_row(numbers.get(name, ""), *cells)
    console.print(short)
    for name, number in numbers.items():
        console.print(_text(f"{number}: {name}"), soft_wrap=True)


def cost_cells(report: Report) -> list[Sequence[object]]:
    """Return a row of cells for each cost: its name, before, after, and the fraction removed."""
    rows: list[Sequence[object]] = []
    for name, title in COSTS.items():
        before, after = getattr(report.before, name), getattr(report.after, name)
        rows.append((title, count(before), count(after), f"{1 - after / before:.1%}" if before else "-"))
    return rows


def one_line(report: Report) -> str:
    """Say what pruning has removed, and what it has changed, in one line."""
    costs = [f"{title} {before} → {after} (−{removed})" for title, before, after, removed in cost_cells(report)[:3]]
    calibration, metric = report.calibration or {}, report.metric or {}
    if calibration.get("after") is not None:
        costs.append(f"output error {calibration['after']:.3f}")
    if metric.get("pruned") is not None:
        costs.append(f"{metric['name']} {metric['dense']:.6g} → {metric['pruned']:.6g}")
    return ", ".join(costs)


def group_cells(report: Report) -> list[Sequence[object]]:
    """Return a row of cells for each group: its name, channels, those kept, fractions of the dense model, and loss."""
    return [
        (g.name, g.size, g.kept, f"{g.params:.1%}", f"{g.macs:.1%}", "-" if g.loss is None else f"{g.loss:.2g}")
        for g in report.groups
    ]


def show_report(report: Report, source: str, target: str, verbose: bool = False) -> None:
    """Print the costs before and after; with ``verbose`` every group, too."""
    console = Console()
    table = _table(f"{source} → {target}", "", "before", "after", "removed")
    for cells in cost_cells(report):
        _row(table, *cells)
    _print(console, table)
    if report.sizes:
        console.print(_text(f"MACs per sample, counted for {shapes_text(report.inputs)}"))
    if verbose:
        groups = _table("groups", "group", "channels", "kept", "of params", "of MACs", "loss")
        for cells in group_cells(report):
            _row(groups, *cells)
        _print(console, groups)
        console.print(_text(effort(report)))
    if report.branches:
        console.print(_text(branched(report)))
    if report.calibration:
        console.print(_text(calibrated(report.calibration)))
    if report.latency:
        console.print(_text(timed(report.latency)))
    if report.metric:
        _show_evaluations(console, report.metric)
    for note in report.notes:
        console.print(_text(f"note: {note}."))
    if report.skipped:
        console.print(
            _text(f"left out: {len(report.skipped)} groups, first {report.skipped[0][0]!r}: {report.skipped[0][2]}")
        )
    for label, reason in report.barriers:
        console.print(_text(f"barrier: {label}: {reason}"))


def _show_evaluations(console: Console, found: dict[str, Any]) -> None:
    """Print what a metric says, and what was evaluated on the way there."""
    if len(found["evaluations"]) > 2:
        table = _table("evaluations", "model", found["name"], "drop", "noise", "met", "output error", "seconds")
        for e in found["evaluations"]:
            met = "" if e["met"] is None else "yes" if e["met"] else "no"
            change = "" if e["change"] is None else f"{e['change']:.3f}"
            cells = f"{e['value']:.6g}", f"{e['drop']:.3g}", f"{e['noise']:.2g}", met, change, f"{e['seconds']:.1f}"
            _row(table, e["model"], *cells)
        _print(console, table)
    console.print(_text(measured(found)))


def measured(found: dict[str, Any]) -> str:
    """Say what a metric was before and after, and what was asked for, in one line."""
    text = f"{found['name']} ({found['better']} is better): {found['dense']:.6g} before"
    if found["pruned"] is not None:
        text += f", {found['pruned']:.6g} after: {found['drop']:.3g} worse"
        text += f", with a standard error of {found['noise']:.2g}" if found["noise"] else ""
    if found["max_drop"] is not None:
        text += f"; {found['max_drop']:g} was allowed, with 95 % confidence"
    if found["min_metric"] is not None:
        text += f"; {found['min_metric']:g} was asked for, with 95 % confidence"
    return f"{text}; {len(found['evaluations'])} evaluations"


def effort(report: Report) -> str:
    """Say the time of each stage and the memory, in one line."""
    stages = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in report.seconds.items())
    return stages + ("" if report.memory is None else f"; peak memory {count(report.memory)}B")


def branched(report: Report) -> str:
    """Say which residual branches went as a whole, and which detours."""
    names = f": {', '.join(report.gone)}" if report.gone else ""
    kinds = {"residual branches": [], "activations, depthwise convolutions and gates": []}  # type: dict[str, list[bool]]
    for part in report.branches:
        kinds[list(kinds)[not part.name.endswith("[branch]")]].append(part.gone)
    said = [f"{sum(gone)} of {len(gone)} {kind}" for kind, gone in kinds.items() if gone]
    return f"{' and '.join(said)} went as a whole{names}"


def calibrated(found: dict[str, Any]) -> str:
    """Say what inputs were used and how the outputs changed, in one line."""
    held_out = found["held_out"]
    where = f"on {held_out} others" if held_out else "on the same inputs"
    text = f"{found['samples']} {found['source']} inputs"
    if "inputs" in found:
        text += f" ({shapes_text(found['inputs'])})"
    if found["before"] is not None:
        text += f"; output error (MSE / variance) {where}: {found['before']:.3f} after pruning"
        if found["after"] != found["before"]:
            text += f", {found['after']:.3f} after reconstruction"
    if (other := found.get("elsewhere")) and other["after"] is not None:
        text += f", {other['after']:.3f} on {other['inputs']} instead"
    for output, fraction in found["agreement"].items():
        text += f"; {fraction:.1%} of the decisions of {output!r} as before"
    if "accuracy" in found:
        text += f"; accuracy {where}: " + "{:.1f} % before, {:.1f} % after".format(*found["accuracy"])
    return text


def timed(found: dict[str, Any]) -> str:
    """Say the latency before and after, in one line."""
    inputs = shapes_text(found["inputs"])
    return (
        f"latency {found['measured']:.3g} ms, estimated {found['estimated']:.3g}, dense {found['dense']:.3g} "
        f"({found['by']}, {found['threads']} threads; {inputs})"
    )


def show_sweep(found: Sweep) -> None:
    """Print the points of a sweep, the Pareto front and its knee."""
    console = Console()
    title = f"{found.model}: {len(found.points)} points in {found.folder}"
    table = _table(title, "network", "MACs", "parameters", "ms", "change", found.metric_name or "accuracy", "front")
    dense = found.dense
    quality = dense["metric"] if found.metric_name else dense["accuracy"]
    _row(table, "dense", *_cells(dense["macs"], dense["params"], dense["milliseconds"], 0.0, quality), "")
    for p in found.points:
        if p.refused:
            continue
        quality = p.metric if found.metric_name else p.accuracy
        mark = "knee" if p.name == found.knee else "yes" if p.on_front else ""
        _row(table, p.name, *_cells(p.macs, p.params, p.milliseconds, p.change, quality), mark)
    _print(console, table)
    for p in found.points:
        if p.refused:
            console.print(_text(f"no {p.name}: {p.refused}"))
    if found.loss is None:
        console.print(_text("nothing was measured that a network could be better in: no front."))
    if found.again is not None:
        console.print(
            _text(f"Repaired quickly, to compare. The network at the knee with the full repair: {found.again}")
        )


def _cells(macs: Any, params: Any, ms: Any, change: Any, quality: Any) -> Iterator[str]:
    yield count(macs)
    yield count(params)
    yield "-" if ms is None else f"{ms:.3f}"
    yield "-" if change is None else f"{change:.4f}"
    yield "-" if quality is None else f"{quality:.6g}"


def show_sensitivity(found: Sensitivity) -> None:
    """Print what each group costs alone, a line for each width."""
    console = Console()
    title = f"{found.model}: each group pruned alone; losses by {found.criterion}"
    table = _table(title, "layer", "width", "of", "loss", "MACs", "parameters", "change")
    for g in found.groups:
        changes = g.change or [None] * len(g.widths)
        for i, (width, loss, macs, params, change) in enumerate(
            zip(g.widths, g.loss, g.macs, g.params, changes, strict=True)
        ):
            layer, size = (g.layer, g.channels) if i == 0 else ("", "")
            measured_change = "-" if change is None else f"{change:.3g}"
            _row(table, layer, width, size, f"{loss:.3g}", f"-{macs:.1%}", f"-{params:.1%}", measured_change)
    _print(console, table)


def show_inspection(found: dict[str, Any], source: str, most: int | None) -> None:
    """Print groups, frozen groups, barriers and reach."""
    console = Console()
    cost = found["cost"]
    console.print(_text(f"{source}: {count(cost['params'])} parameters, {count(cost['macs'])} MACs"))
    console.print(_text(f"MACs per sample, counted for {shapes_text(found['inputs'])}"))
    if found["open"]:
        console.print(_text(f"open axes: {', '.join(found['open'])} (--size NAME=N counts for other sizes)"))
    table = _table("groups, by fraction of the parameters", "group", "channels", "params", "MACs", "crosses")
    for g in found["groups"][:most]:
        crosses = g["crossings"][0] if g["crossings"] else ""
        _row(table, g["name"], g["channels"], f"{g['params']:.1%}", f"{g['macs']:.1%}", crosses)
    _print(console, table)
    if most is not None and len(found["groups"]) > most:
        console.print(_text(f"... and {len(found['groups']) - most} more (--all)"))
    frozen = _table("frozen", "group", "channels", "params", "reason")
    for g in found["frozen"][:most]:
        _row(frozen, g["name"], g["channels"], f"{g['params']:.1%}", g["frozen"])
    _print(console, frozen)
    for b in found["barriers"]:
        console.print(_text(f"barrier: {b['operator']}: {b['reason']}"))
    free, crossing = found["reach"]["free"], found["reach"]["with crossings"]
    console.print(
        _text(
            f"removing half of every free group removes {free:.1%} of the parameters; with --cross-norm {crossing:.1%}"
        )
    )


def show_verification(found: VerifyReport) -> None:
    """Print the interfaces' differences and the outputs'."""
    console = Console()
    console.print(_text("same interface" if found.same_interface else "different interfaces:"))
    for sentence in found.interface:
        console.print(_text(f"  {sentence}"))
    table = _table("outputs", "output", "shape", "largest difference", "cosine", "equal")
    for o in found.outputs:
        cosine = "-" if o.cosine is None else f"{o.cosine:.6f}"
        largest = "-" if o.max_abs_diff is None else f"{o.max_abs_diff:.3g}"
        equal = "-" if o.equal is None else "yes" if o.equal else "no"
        _row(table, o.name, "x".join(map(str, o.shape_a)), largest, cosine, equal)
    _print(console, table)
    console.print(_text(f"on inputs such as {shapes_text(found.inputs)}"))


def show_proof(found: Proof) -> None:
    """Print whether the pruned network equals the masked original, and what that says."""
    console = Console()
    inputs = shapes_text(found.inputs)
    verdict = "equal to" if found.holds else "DIFFERENT from"
    console.print(_text(f"{len(found.groups)} groups pruned: {verdict} the masked original"))
    console.print(
        _text(
            f"largest difference {found.error:.2g} of the outputs' size (allowed: {found.tolerance:g}); "
            f"masking itself moved them by {found.effect:.2g}"
        )
    )
    console.print(_text(f"{len(found.seeds)} random inputs; {inputs}"))
    if found.is_empty:
        console.print(_text("note: masking moved no output on these inputs, so that equality says nothing."))
    if found.crossing:
        console.print(
            _text(
                f"note: {len(found.crossing)} groups cross a normalisation, whose statistics change when channels go; "
                f"they were left whole here, first {found.crossing[0]!r}."
            )
        )


def show_bench(found: BenchReport) -> None:
    """Print latency, throughput and memory, with ratios against the first model."""
    console = Console()
    title = f"{found.place}, {found.threads} threads, {found.runs} alternating runs"
    columns = "median\nms", "p10", "p90", "samples\nper s", "speed-up", "by p10", "file\nMB", "peak\nMB"
    table = _table(title, "model", *columns)
    for m in found.models:
        peak = "-" if m.peak_memory_bytes is None else f"{m.peak_memory_bytes / 1e6:.0f}"
        cells = [f"{m.median_ms:.3f}", f"{m.p10_ms:.3f}", f"{m.p90_ms:.3f}", f"{m.throughput:.1f}", f"{m.speedup:.2f}x"]
        cells.append(f"{m.speedup_p10:.2f}x")
        _row(table, m.name, *cells, f"{m.file_bytes / 1e6:.2f}", peak)
    _print(console, table)
    for shapes in {shapes_text(inputs): None for inputs in found.inputs}:
        console.print(_text(f"timed with {shapes}"))


def show_examination(found: dict[str, Any]) -> None:
    """Print versions, extras, the machine, and what is wrong with them."""
    console = Console()
    for name, value in found["environment"].items():
        console.print(_text(f"{name}: {value}"))
    cores, memory = found["cores"], found["memory"]
    console.print(_text(f"cores: {cores['usable']:g} of {cores['machine']}"))
    sizes = ", ".join(f"{count(memory[key])}B {key}" for key in ("total", "available") if memory[key] is not None)
    console.print(_text(f"memory: {sizes or 'unknown'}"))
    console.print(_text(f"providers of onnxruntime: {', '.join(found['providers'])}"))
    table = _table("extras", "extra", "package", "version", "needed")
    for extra, packages in found["extras"].items():
        for at, (name, package) in enumerate(packages.items()):
            _row(table, "" if at else extra, name, package["version"] or "not installed", package["needed"])
    _print(console, table)
    for group, names in found["plugins"].items():
        if names:
            console.print(_text(f"plug-ins of {group}: {', '.join(names)}"))
    cache, temporary = found["cache"], found["temporary"]
    console.print(_text(f"measured latencies: {cache['latencies']} in {cache['path']}"), soft_wrap=True)
    console.print(_text(f"temporary files: {temporary['path']}, {count(temporary['free'])}B free"), soft_wrap=True)
    for problem in found["problems"]:
        console.print(_text(f"problem: {problem}"))
    if not found["problems"]:
        console.print(_text("everything that SPA needs is there."))
