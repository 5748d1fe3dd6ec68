"""The commands."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from spa._version import __version__
from spa.cli.bars import progress_bars
from spa.cli.failures import Interrupted, run
from spa.cli.options import (
    OnnxFile,
    Outputs,
    RandomInputs,
    RequestCommand,
    Talk,
    Timed,
    Tolerances,
    completing,
    parse_callable,
    parse_example_inputs,
    parse_sizes,
    with_options,
)
from spa.errors import OptionError, SpaError, printable
from spa.request import Request

if TYPE_CHECKING:
    import numpy as np

    from spa.api import Result


def _targets() -> tuple[str, ...]:
    from spa.exporting import TARGETS

    return TARGETS


class _Commands(TyperGroup):
    """The commands, which an interrupt ends with a message of ours."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override] # typer's own context is click's
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:  # before typer makes of it what its version does
            raise Interrupted from interrupt


app = typer.Typer(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Structured pruning of any network, on its ONNX graph.\n\n"
    "Exit codes: 0 done, 1 cannot write or models differ, 2 wrong command line, 3 impossible request, "
    "4 malformed model, 5 model not covered, 6 a file is missing, 70 a bug in spa, 130 interrupted.",
)

Model = Annotated[Path, typer.Argument(help="An .onnx file.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Size = Annotated[list[str] | None, typer.Option(help="Size of an open axis, NAME=N; repeatable.")]


@app.callback(invoke_without_command=True)
def options(version: Annotated[bool, typer.Option("--version", "-V", help="Print the version.")] = False) -> None:
    """Options of the program itself."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command(cls=RequestCommand)
@with_options
def prune(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.", show_default=False)],
    request: Request,
    outputs: Outputs,
    talk: Talk,
) -> None:
    """Remove channels from MODEL until the budget is met, and write the smaller network."""
    from spa import api
    from spa.model.writing import text_draft

    texts = {"--plan-out": outputs.plan_out, "--report": outputs.report, "--plot": outputs.plot}
    check_targets({"--output": output, **texts}, model)
    with progress_bars(not outputs.as_json and not talk.verbose, talk.quiet) as progress:
        result = api.prune_file(model, request, progress)
    with ExitStack() as stack:  # everything is drafted before anything takes its name
        drafts = [stack.enter_context(text_draft(p, t)) for p, t in _texts(result, outputs, model, output)]
        result.save(output, force=outputs.force)
        for draft in drafts:
            draft.publish(draft.folder)
    if outputs.as_json:
        print_json(result.report.to_dict() | {"output": str(output)})
    elif not talk.quiet:
        from spa.report.text import show_report

        show_report(result.report, str(model), str(output), bool(talk.verbose))


@app.command()
@with_options
def prove(
    model: Model,
    plan: Annotated[Path, typer.Argument(help="A plan that prune wrote with --plan-out.", show_default=False)],
    inputs: RandomInputs,
    talk: Talk,
    as_json: AsJson = False,
) -> None:
    """Prove that PLAN applied to MODEL computes what MODEL computes with the removed channels masked."""
    from spa import api
    from spa.coupling.plan import Plan
    from spa.running.trial import try_out

    try_out(model)
    proof = api.prove(model, Plan.load(plan), **inputs.keywords())
    if as_json:
        print_json(proof.to_dict())
    elif not talk.quiet:
        from spa.report.text import show_proof

        show_proof(proof)
    if not proof.holds:
        raise typer.Exit(1)


@app.command()
@with_options
def inspect(
    model: Model,
    talk: Talk,
    every: Annotated[bool, typer.Option("--all", help="Show every group, not the largest twenty.")] = False,
    size: Size = None,
    as_json: AsJson = False,
) -> None:
    """Show the groups of MODEL, what is frozen and why, and where parameters and MACs are."""
    from spa import api
    from spa.report.inspection import inspection

    found = inspection(api.analyze(model, sizes=parse_sizes(size)))
    if as_json:
        print_json(found)
    else:
        from spa.report.text import show_inspection

        show_inspection(found, str(model), None if every or talk.verbose else 20)


@app.command()
@with_options
def verify(
    a: Model,
    b: Model,
    inputs: RandomInputs,
    talk: Talk,
    tolerances: Tolerances,
    data: Annotated[
        Path | None, typer.Option(help="Inputs to compare on, in place of random ones: .npz, .npy or a folder.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="With --data: how many of them at most.")] = 64,
    as_json: AsJson = False,
) -> None:
    """Compare two models: the same interface? how far apart are their outputs, on random inputs or on --data?"""
    from spa.running.trial import try_out
    from spa.running.verify import verify as compare

    options = inputs.keywords()
    for path in (a, b):
        try_out(path)
    if data is not None:
        options["feeds"] = _feeds(data, a, samples, options["seed"], options["sizes"])
    found = compare(str(a), str(b), atol=tolerances.atol, rtol=tolerances.rtol, **options)
    if as_json:
        print_json(found.to_dict())
    elif not talk.quiet:
        from spa.report.text import show_verification

        show_verification(found)
    if not found.same_interface or found.equal is False:
        raise typer.Exit(1)


@app.command()
@with_options
def bench(
    models: Annotated[list[Path], typer.Argument(help="One or more .onnx files.", show_default=False)],
    talk: Talk,
    timed: Timed,
    seconds: Annotated[float, typer.Option(min=0.01, help="Measuring time for each model.")] = 2.0,
    seed: Seed = 0,
    size: Size = None,
    as_json: AsJson = False,
) -> None:
    """Measure latency, throughput and memory, the models in turns."""
    from spa.running.bench import bench as measure
    from spa.running.trial import try_out

    place = timed.place()
    place.check()

    for model in models:
        try_out(model)
    found = measure(
        [str(m) for m in models],
        seconds=seconds,
        batch=timed.batch,
        threads=timed.threads,
        seed=seed,
        sizes=parse_sizes(size),
        place=place,
    )
    if as_json:
        print_json(found.to_dict())
    else:
        from spa.report.text import show_bench

        show_bench(found)


@app.command()
@with_options
def doctor(talk: Talk, as_json: AsJson = False) -> None:
    """Show versions, extras, providers, cores and memory, and what is wrong with them."""
    from spa.report.doctor import examination

    found = examination()
    if as_json:
        print_json(found)
    else:
        from spa.report.text import show_examination

        show_examination(found)
    if found["problems"]:
        raise typer.Exit(1)


@app.command()
@with_options
def export(
    model: Model,
    to: Annotated[
        str,
        typer.Option(
            help="onnx, ort, openvino, torch, tensorflow or jax.",
            show_default=False,
            autocompletion=completing(_targets),
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="A file with onnx and ort, a folder or .tflite else.", show_default=False),
    ],
    talk: Talk,
    file: OnnxFile,
    size: Annotated[list[str] | None, typer.Option(help="Fix an open size of the inputs, NAME=N; repeatable.")] = None,
) -> None:
    """Write MODEL for another runtime or framework, and compare what it computes."""
    from spa.exporting import export as write

    if to in ("onnx", "ort"):
        check_targets({"--output": output}, model)
    written = write(model, to, output, sizes=parse_sizes(size), **_given(asdict(file)))
    if not talk.quiet:
        typer.echo(printable(f"{model} → {written}"))


@app.command()
@with_options
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="A .pt, .pth, .pt2, .ckpt, .safetensors, .keras, .pb or .tflite file, or a SavedModel's folder.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .onnx file to write.", show_default=False)],
    talk: Talk,
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

    check_targets({"--output": output}, source)
    options = {"signature": signature, "opset": opset, "trust": trust}
    if factory:
        options["factory"] = parse_callable(factory)
    imported = convert_model(source, parse_example_inputs(inputs), **_given(options))
    write(Source(imported.model), output)
    if talk.quiet:
        return
    typer.echo(printable(f"{source} → {output}: {imported.kind}, by {imported.exporter}"))
    typer.echo(f"largest difference to {imported.kind}'s own outputs: {imported.error:.2g} of their size")
    for note in imported.notes:
        typer.echo(printable(note))


def _feeds(
    data: Path, model: Path, samples: int, seed: int, sizes: dict[str, int] | None
) -> list[dict[str, np.ndarray]]:
    """Read inputs of a model from files."""
    from spa.calibration.data import Images, read_data
    from spa.running.runtime import load_graph

    read = read_data(data, load_graph(str(model)), samples=samples, seed=seed, images_as=Images(sizes=sizes))
    return read.batches


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given."""
    return {name: value for name, value in options.items() if value is not None and value is not False}


def check_targets(targets: dict[str, Path | None], model: Path) -> None:
    """Refuse files that could not be written, or would replace a model or each other, before any work.

    Raises:
        OptionError: two of them are one file.
        SpaError: one of them cannot or must not be written, or a text would replace what is none.
    """
    from spa.model.files import data_file
    from spa.model.writing import check_data_target, check_target

    taken = {_real(model): "the model that is pruned"}
    for option, path in targets.items():
        if path is None:
            continue
        place = _real(path)
        if option != "--output" and place in taken:
            raise OptionError(f"{option} {str(path)!r} is {taken[place]}. Choose another file.")
        try:
            check_target(path, models=[model])
            if option == "--output":
                check_data_target(path, model)
        except SpaError as error:
            raise SpaError(f"{option}: {error}") from error
        if option != "--output" and place.exists() and not _is_text(place):
            raise SpaError(f"{option} {str(path)!r} exists and is no JSON, HTML or figure. Choose another file.")
        if option == "--plot":
            from spa.report.figures import check_format

            check_format(path)
        if option == "--output":
            taken.setdefault(_real(data_file(path)), "where the weights of --output may go")
        taken.setdefault(place, f"what {option} writes")


def _real(path: Path) -> Path:
    """Return the file that a path leads to: links in a circle, which ``Path.resolve`` fails on, lead to themselves."""
    return Path(os.path.realpath(path))


def _is_text(path: Path) -> bool:
    """Return whether an existing file may be a plan, a page or a figure that is written anew; weights are none."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(64).lstrip()[:1] in (b"", b"{", b"<", b"\x89")


def _texts(result: Result, outputs: Outputs, model: Path, output: Path) -> Iterator[tuple[Path, str | bytes]]:
    """Yield the texts and figures to write with the files that they go to."""
    if outputs.plan_out:
        yield outputs.plan_out, result.plan.to_json()
    if outputs.report:
        from spa.report.html import page

        yield outputs.report, page(result.report, str(model), str(output))
    if outputs.plot:
        from spa.report.figures import pruning_figure

        yield outputs.plot, pruning_figure(result.report, outputs.plot)


def print_json(content: Any) -> None:
    """Print plain data as JSON."""
    typer.echo(json.dumps(content, indent=1, default=str))


def main() -> None:
    """Run the program; errors are one message on standard error and a documented exit code."""
    # Read where numpy is loaded, which no command has done yet: idle threads of OpenBLAS wait 2^20 cycles for more work
    # and not 2^28, in which they would take the cores from onnxruntime.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "20")
    sys.exit(run(app))
