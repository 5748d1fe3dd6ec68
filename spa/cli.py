"""The command line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from spa._version import __version__
from spa.errors import SpaError

if TYPE_CHECKING:
    import numpy as np
    from rich.progress import TaskID


class _Commands(TyperGroup):
    """The commands, which an interrupt ends with a message and not with a traceback."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override] # typer's own context is click's
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            sys.stderr.write("spa: interrupted; no half-written file is left\n")
            raise typer.Exit(130) from interrupt


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Structured pruning of any network, on its ONNX graph.\n\n"
    "Exit codes: 0 done, 1 cannot write or models differ, 2 wrong command line, 3 impossible request, "
    "4 malformed model, 5 model not covered, 70 a bug in spa, 130 interrupted.",
)

Model = Annotated[Path, typer.Argument(help="An .onnx file.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of onnxruntime.")]
Size = Annotated[list[str] | None, typer.Option(help="Size of a dynamic axis, NAME=N; repeatable.")]


@app.callback(invoke_without_command=True)
def options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Options of the program itself."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def prune(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.", show_default=False)],
    ratio: Annotated[
        str | None,
        typer.Option(help="Fraction to remove, between 0 and 1, or auto; 0.5 by default.", show_default=False),
    ] = None,
    of: Annotated[str, typer.Option(help="Of what: macs, params, channels or latency.")] = "macs",
    max_distortion: Annotated[
        float | None, typer.Option(help="Instead of a ratio: the change of the outputs to tolerate, 0.01 say.")
    ] = None,
    latency_ms: Annotated[
        float | None, typer.Option(help="Milliseconds the pruned model may take, instead of a ratio.")
    ] = None,
    ranking: Annotated[str, typer.Option(help="global, uniform or isomorphic.")] = "global",
    criterion: Annotated[
        str,
        typer.Option(
            help="obspa, wanda, flap, activation_l2, l1, l2, bn_scale, fpgm, lamp, random, snip, taylor, fisher, crop, "
            "grasp, gate or zero."
        ),
    ] = "obspa",
    data: Annotated[
        Path | None, typer.Option(help="Inputs to learn from: .npz, .npy or a folder; none needed.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many inputs to use at most.")] = 512,
    labels: Annotated[str | None, typer.Option(help="Name of the labels in the data, to report accuracy.")] = None,
    mean: Annotated[str | None, typer.Option(help="Subtracted from images, per channel: 0.5,0.5,0.5.")] = None,
    std: Annotated[str | None, typer.Option(help="What images are then divided by, per channel.")] = None,
    reconstruct: Annotated[
        str, typer.Option(help="full, bias, none or auto: full with obspa, bias with flap, else none.")
    ] = "auto",
    recover: Annotated[
        int, typer.Option(min=0, help="Epochs of training by the dense model's outputs, without labels; needs torch.")
    ] = 0,
    norm: Annotated[str, typer.Option(help="Within a parameter: none, sum, mean, max or standardise.")] = "mean",
    agg: Annotated[str, typer.Option(help="Over a group's parameters: sum, mean, max, prod or l2.")] = "mean",
    ignore: Annotated[list[str] | None, typer.Option(help="Leave alone what matches; repeatable.")] = None,
    round_to: Annotated[int, typer.Option(help="Widths become multiples of this.")] = 8,
    min_width: Annotated[int, typer.Option(help="No group becomes narrower.")] = 1,
    cross_norm: Annotated[bool, typer.Option("--cross-norm", help="Prune through normalisations, too.")] = False,
    equal: Annotated[
        list[str] | None,
        typer.Option(help="Keep the same share of all groups that match, or of each attention's head sizes: heads."),
    ] = None,
    seed: Seed = 0,
    threads: Threads = 2,
    batch: Annotated[int, typer.Option(min=1, help="Samples per run while timing.")] = 1,
    size: Size = None,
    plan: Annotated[Path | None, typer.Option(help="Apply this plan instead of choosing.")] = None,
    plan_out: Annotated[Path | None, typer.Option(help="Write the plan here.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write an HTML report here.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Allow the output to be the input.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show every group.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove channels from MODEL until the budget is met, and write the smaller network."""
    from spa import api
    from spa.coupling.plan import Plan

    given = Plan.load(plan) if plan else None
    with _progress(not as_json) as progress:
        result = api.prune(
            model,
            ratio=_ratio(ratio),
            of=of,
            max_distortion=max_distortion,
            latency_ms=latency_ms,
            ranking=ranking,
            criterion=criterion,
            data=data,
            samples=samples,
            labels=labels,
            mean=_numbers(mean, "--mean"),
            std=_numbers(std, "--std"),
            reconstruct=reconstruct,
            recover=recover,
            norm=norm,
            agg=agg,
            ignore=ignore or (),
            round_to=round_to,
            min_width=min_width,
            cross_norm=cross_norm,
            equal=equal,
            seed=seed,
            threads=threads,
            batch=batch,
            sizes=_sizes(size),
            plan=given,
            progress=progress,
        )
    result.save(output, force=force)
    if plan_out:
        _write_text(plan_out, result.plan.to_json())
    if report:
        from spa.report.html import page

        _write_text(report, page(result.report, str(model), str(output)))
    if as_json:
        _print_json(result.report.to_dict() | {"output": str(output)})
    else:
        from spa.report.text import show_report

        show_report(result.report, str(model), str(output), verbose)


@app.command()
def inspect(
    model: Model,
    every: Annotated[bool, typer.Option("--all", help="Show every group, not the largest twenty.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the groups of MODEL, what is frozen and why, and where parameters and MACs are."""
    from spa import api
    from spa.report.inspection import inspection

    found = inspection(api.analyze(model))
    if as_json:
        _print_json(found)
    else:
        from spa.report.text import show_inspection

        show_inspection(found, str(model), None if every else 20)


@app.command()
def verify(
    a: Model,
    b: Model,
    atol: Annotated[float | None, typer.Option(help="Largest absolute difference allowed.")] = None,
    rtol: Annotated[float | None, typer.Option(help="Largest relative difference allowed.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many random inputs.")] = 3,
    seed: Seed = 0,
    threads: Threads = 2,
    size: Size = None,
    as_json: AsJson = False,
) -> None:
    """Compare two models: the same interface? how far apart are their outputs on random inputs?"""
    from spa.running.verify import verify as compare

    found = compare(str(a), str(b), seeds=seeds, seed=seed, atol=atol, rtol=rtol, threads=threads, sizes=_sizes(size))
    if as_json:
        _print_json(found.to_dict())
    else:
        from spa.report.text import show_verification

        show_verification(found)
    if not found.same_interface or found.equal is False:
        raise typer.Exit(1)


@app.command()
def bench(
    models: Annotated[list[Path], typer.Argument(help="One or more .onnx files.", show_default=False)],
    seconds: Annotated[float, typer.Option(min=0.01, help="Measuring time for each model.")] = 2.0,
    batch: Annotated[int, typer.Option(min=1, help="Samples per run.")] = 1,
    threads: Threads = 2,
    seed: Seed = 0,
    size: Size = None,
    as_json: AsJson = False,
) -> None:
    """Measure latency, throughput and memory in onnxruntime, the models in turns."""
    from spa.running.bench import bench as measure

    found = measure(
        [str(m) for m in models], seconds=seconds, batch=batch, threads=threads, seed=seed, sizes=_sizes(size)
    )
    if as_json:
        _print_json(found.to_dict())
    else:
        from spa.report.text import show_bench

        show_bench(found)


@app.command()
def export(
    model: Model,
    to: Annotated[str, typer.Option(help="onnx, ort, openvino, torch, tensorflow or jax.", show_default=False)],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="A file with onnx and ort, a folder or .tflite else.", show_default=False),
    ],
    size: Annotated[list[str] | None, typer.Option(help="Fix an open size of the inputs, NAME=N; repeatable.")] = None,
    opset: Annotated[int | None, typer.Option(help="With onnx: convert to this opset.")] = None,
    ir_version: Annotated[int | None, typer.Option(help="With onnx: the file's IR version.")] = None,
    external: Annotated[bool, typer.Option("--external", help="With onnx: large weights in NAME.data.")] = False,
    optimise: Annotated[
        bool, typer.Option("--optimise", help="With onnx: fold and fuse within the standard's operators.")
    ] = False,
) -> None:
    """Write MODEL for another runtime or framework, and compare what it computes."""
    from spa.exporting import export as write

    options = {"opset": opset, "ir_version": ir_version, "external": external, "optimise": optimise}
    written = write(model, to, output, sizes=_sizes(size), **_given(options))
    typer.echo(f"{model} → {written}")


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="A .pt, .pth, .pt2, .ckpt, .safetensors, .keras, .pb or .tflite file, or a SavedModel's folder.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .onnx file to write.", show_default=False)],
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", help="Shape of an example input: 1,3,224,224 or NAME=1,128:int64; repeatable."),
    ] = None,
    factory: Annotated[str | None, typer.Option(help="What builds the module of the weights: module:callable.")] = None,
    signature: Annotated[str | None, typer.Option(help="Which signature of a SavedModel.")] = None,
    opset: Annotated[int | None, typer.Option(help="Opset of the ONNX file.")] = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="Unpickle SOURCE, which can run any code that is in it.")
    ] = False,
) -> None:
    """Convert a framework's model to ONNX, and compare it with the framework's own outputs."""
    from spa.doors import convert as convert_model
    from spa.exporters.onnx import write
    from spa.model.io import Source

    options = {"signature": signature, "opset": opset, "trust": trust}
    if factory:
        options["factory"] = _callable(factory)
    imported = convert_model(source, _example_inputs(inputs), **_given(options))
    write(Source(imported.model), output)
    typer.echo(f"{source} → {output}: {imported.kind}, by {imported.exporter}")
    typer.echo(f"largest difference to {imported.kind}'s own outputs: {imported.error:.2g} of their size")
    for note in imported.notes:
        typer.echo(note)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None and value is not False}


def _callable(name: str) -> Any:
    """What module:callable names; modules of the working directory are found, too."""
    module, colon, attribute = name.partition(":")
    try:
        if not (module and colon and attribute):
            raise ValueError("it is no module:callable")
        sys.path.insert(0, "")
        found = getattr(import_module(module), attribute)
        if not callable(found):
            raise ValueError(f"it is a {type(found).__name__}")
    except (ValueError, ImportError, AttributeError) as error:
        raise typer.BadParameter(f"cannot use {name!r}: {error}", param_hint="--factory") from error
    return found


def _example_inputs(given: list[str] | None) -> tuple[np.ndarray, ...] | dict[str, np.ndarray] | None:
    """Seeded arrays, in order, or by name; integers are 0 or 1, which every table of ids, types or positions has."""
    import numpy as np

    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for at, item in enumerate(given or ()):
        name, _, rest = item.rpartition("=")
        sizes, _, kind = rest.partition(":")
        try:
            shape, dtype = [int(size) for size in sizes.split(",") if size], np.dtype(kind or "float32")
            if any(size < 1 for size in shape) or dtype.kind not in "fiub":
                raise ValueError
        except (TypeError, ValueError) as error:
            message = f"{item!r} is no shape such as 1,3,224,224 or NAME=1,128:int64"
            raise typer.BadParameter(message, param_hint="--input") from error
        value = rng.standard_normal(shape) if dtype.kind == "f" else rng.integers(0, 2, shape)
        if (name or str(at)) in arrays:
            raise typer.BadParameter(f"{name!r} is given twice", param_hint="--input")
        arrays[name or str(at)] = np.asarray(value, dtype)
    named = [item for item in given or () if "=" in item]
    if named and len(named) < len(arrays):
        raise typer.BadParameter("either all inputs have names, or none", param_hint="--input")
    return (arrays if named else tuple(arrays.values())) or None


def _sizes(given: list[str] | None) -> dict[str, int] | None:
    sizes = {}
    for item in given or ():
        name, equals, number = item.rpartition("=")
        if not equals or not number.isdigit() or int(number) < 1:
            raise typer.BadParameter(f"{item!r} is no NAME=N with N of 1 or more", param_hint="--size")
        sizes[name] = int(number)
    return sizes or None


def _ratio(given: str | None) -> float | str | None:
    """A number, or auto."""
    if given is None or given == "auto":
        return given
    try:
        return float(given)
    except ValueError as error:
        raise typer.BadParameter(f"{given!r} is neither a number nor auto", param_hint="--ratio") from error


def _numbers(given: str | None, option: str) -> list[float] | None:
    """Comma-separated numbers."""
    if given is None:
        return None
    try:
        return [float(part) for part in given.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{given!r} is no list of numbers such as 0.5,0.5,0.5", param_hint=option) from error


@contextmanager
def _progress(shown: bool) -> Iterator[Callable[[str, float], None]]:
    """A bar for each stage with the time left, on standard error where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description:12}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as bars:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, share: float) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=1.0)
            bars.update(tasks[stage], completed=share)

        yield show


def _write_text(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SpaError(f"cannot write {str(path)!r}: {error.strerror}. Choose another place.") from error


def _print_json(content: Any) -> None:
    typer.echo(json.dumps(content, indent=1, default=str))


def main() -> None:
    """Run the program; errors are one message on standard error and a documented exit code."""
    # Read where numpy is loaded, which no command has done yet: idle threads of OpenBLAS wait 2^20 cycles for more work
    # and not 2^28, in which they would take the cores from onnxruntime.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "20")
    try:
        app()
    except SpaError as error:
        sys.stderr.write(f"spa: error: {error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
