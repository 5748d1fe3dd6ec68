"""Command-line options made from the fields of a request, and the parsers of their values."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import Field, dataclass, is_dataclass
from functools import partial, wraps
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from spa.cli.log import start_logging
from spa.request import Request, criterion_names, examples, options
from spa.request.option import (
    EVALUATION,
    FILE,
    FRACTIONS,
    NUMBER,
    NUMBERS,
    PATTERNS,
    RANGE,
    RATIO,
    SIZES,
    SWITCH,
    WHOLE,
    WORDS,
    default_of,
    flag_of,
)
from spa.request.toml import found_in

if TYPE_CHECKING:
    import numpy as np

    from spa.running.place import Place


@dataclass(frozen=True)
class Outputs:
    """The files that ``spa prune`` writes beside the model, and the form of its report.

    Attributes:
        plan_out: where the plan goes.
        report: where the HTML page goes.
        plot: where the figure goes.
        force: whether the output may be the input.
        as_json: whether the report is printed as JSON.
    """

    plan_out: Annotated[Path | None, typer.Option(help="Write the plan here.")] = None
    report: Annotated[Path | None, typer.Option(help="Write an HTML report here.")] = None
    plot: Annotated[Path | None, typer.Option(help="Draw a figure here, .png or .svg.")] = None
    force: Annotated[bool, typer.Option("--force", help="Allow the output to be the input.")] = False
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False


@dataclass(frozen=True)
class Tolerances:
    """The differences of outputs that are allowed.

    Attributes:
        atol: absolute.
        rtol: relative.
    """

    atol: Annotated[float | None, typer.Option(help="Largest absolute difference allowed.")] = None
    rtol: Annotated[float | None, typer.Option(help="Largest relative difference allowed.")] = None


@dataclass(frozen=True)
class OnnxFile:
    """The form of an ONNX file.

    Attributes:
        opset: of its operators.
        ir_version: of the format.
        external: whether large weights lie beside it.
        optimise: whether it is folded and fused.
    """

    opset: Annotated[int | None, typer.Option(help="With onnx: convert to this opset.")] = None
    ir_version: Annotated[int | None, typer.Option(help="With onnx: the file's IR version.")] = None
    external: Annotated[bool, typer.Option("--external", help="With onnx: large weights in NAME.data.")] = False
    optimise: Annotated[
        bool, typer.Option("--optimise", help="With onnx: fold and fuse within the standard's operators.")
    ] = False


def completing(words: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """Return a function that lists the words that begin like an incomplete one."""

    def complete(incomplete: str) -> list[str]:
        return [word for word in words() if word.startswith(incomplete)]

    return complete


def runtimes() -> tuple[str, ...]:
    """Return the names of runtimes."""
    from spa.running.place import RUNTIMES

    return RUNTIMES


@dataclass(frozen=True)
class Timed:
    """The place and the conditions of timing.

    Attributes:
        batch: samples per run.
        threads: of the runtime.
        runtime: in this process.
        providers: of onnxruntime.
        measure: a command that times a model elsewhere.
        measure_seconds: the limit of one run of it.
    """

    batch: Annotated[int, typer.Option(min=1, help="Samples per run.")] = 1
    threads: Annotated[int, typer.Option(min=1, help="Threads of the runtime.")] = 2
    runtime: Annotated[str, typer.Option(help="onnxruntime or openvino.", autocompletion=completing(runtimes))] = (
        "onnxruntime"
    )
    providers: Annotated[str | None, typer.Option(help="Of onnxruntime: cuda,cpu.", metavar="NAME,...")] = None
    measure: Annotated[str | None, typer.Option(help="A command that prints the milliseconds of {model}.")] = None
    measure_seconds: Annotated[float, typer.Option(help="Limit of one run of the command.")] = 600.0

    def place(self) -> Place:
        """Return the place."""
        from spa.running.place import Place

        providers = tuple(word.strip() for word in (self.providers or "").split(",") if word.strip())
        return Place(self.runtime, providers, self.measure, self.measure_seconds)


_VERBOSE = "Say more: every group, and each step as it is done; -vv: details of the steps."


@dataclass(frozen=True)
class Talk:
    """The amount that a command says.

    Attributes:
        verbose: 1: every group, and each step as it is done; 2: details of the steps.
        quiet: whether errors are all that is said.
    """

    verbose: Annotated[int, typer.Option("--verbose", "-v", count=True, show_default=False, help=_VERBOSE)] = 0
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Say nothing but errors, and what the command is there to print.")
    ] = False


@dataclass(frozen=True)
class RandomInputs:
    """The random inputs on which models are compared.

    Attributes:
        seeds: how many.
        seed: of the first; the others follow it.
        threads: of onnxruntime.
        size: of open axes, ``NAME=N``.
    """

    seeds: Annotated[int, typer.Option(min=1, help="How many random inputs.")] = 3
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0
    threads: Annotated[int, typer.Option(min=1, help="Threads of onnxruntime.")] = 2
    size: Annotated[list[str] | None, typer.Option(help="Size of an open axis, NAME=N; repeatable.")] = None

    def keywords(self) -> dict[str, Any]:
        """Return them as functions of the package take them."""
        return {
            "seeds": self.seeds,
            "seed": self.seed,
            "threads": self.threads,
            "sizes": parse_sizes(self.size),
        }


class RequestCommand(TyperCommand):
    """A command of many options: what an option that is not given would need is not made.

    Its help lists the choices of options, which are looked up where help is asked for; and typer would build a
    validator for each option at every start, which takes longer than reading a small network.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        for parameter in self.params:
            if not parameter.required and not getattr(parameter, "multiple", False):
                parameter.process_value = partial(_process_given, parameter.process_value)  # type: ignore[method-assign] # click's own hook

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help text."""
        choices = {about.name: about.metadata["choices"] for _, about in options()}
        choices["criterion"] = criterion_names
        for parameter in self.params:
            known = choices.get(parameter.name or "")
            if known is not None:
                parameter.help = f"{parameter.help} One of: {', '.join(known())}."  # type: ignore[attr-defined] # an option
        super().format_help(ctx, formatter)


def _process_given(process: Callable[[Any, Any], Any], context: Any, value: Any) -> Any:
    return None if value is None else process(context, value)


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace parameters of a command that are dataclasses by an option for each of their fields.

    A :class:`~spa.request.Request` becomes an option for each of its fields, and ``--config`` for a file of them.

    Args:
        command: its parameters are what typer reads, or a dataclass of such, or a request.

    Returns:
        A function with one parameter per option, as typer reads them.
    """
    declared = inspect.signature(command, eval_str=True).parameters.values()
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for parameter in declared:
        kind = parameter.annotation
        if kind is Request:
            parameters += _request_parameters()
        elif is_dataclass(kind):
            groups[parameter.name] = kind
            parameters += [p.replace(kind=keyword) for p in _fields_of(kind)]
        else:
            parameters.append(parameter.replace(kind=keyword))
    takes_request = any(p.annotation is Request for p in declared)

    @wraps(command)
    def called(**values: Any) -> None:
        grouped = {n: k(**{p.name: values.pop(p.name) for p in _fields_of(k)}) for n, k in groups.items()}
        talk = next((g for g in grouped.values() if isinstance(g, Talk)), Talk())
        start_logging(talk.verbose, talk.quiet)
        if takes_request:
            grouped["request"] = _taken_request(values, talk.quiet)
        command(**values, **grouped)

    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined] # typer reads it
    called.__annotations__ = {p.name: p.annotation for p in parameters}
    return called


def _fields_of(kind: Any) -> list[inspect.Parameter]:
    return list(inspect.signature(kind, eval_str=True).parameters.values())


def _flags() -> list[Field[Any]]:
    return [about for _, about in options() if about.metadata["kind"].on_file]


def _request_parameters() -> list[inspect.Parameter]:
    keyword = inspect.Parameter.KEYWORD_ONLY
    config = typer.Option(
        help="A TOML file with such options, which those on the command line override. Default: spa.toml of this "
        r"folder, or \[tool.spa] of its pyproject.toml.",
    )
    shown = examples()
    return [
        *(
            inspect.Parameter(
                about.name,
                keyword,
                default=_absent(about),
                annotation=_annotation(about, f"{section.capitalize()}: {shown[section]}"),
            )
            for section, about in options()
            if about.metadata["kind"].on_file
        ),
        inspect.Parameter("config", keyword, default=None, annotation=Annotated[Path | None, config]),
    ]


def _absent(about: Field[Any]) -> bool | None:
    return False if about.metadata["kind"] is SWITCH else None


def _taken_request(values: dict[str, Any], quiet: bool) -> Request:
    """Take the options of a request out of a command's values; without ``--config`` this folder's file counts."""
    path = values.pop("config")
    if path is None and (path := found_in(Path())) and not quiet:
        typer.echo(f"spa: with the options of {path}", err=True)
    base = Request.from_toml(path) if path else None
    given = {about.name: _parsed(about, values.pop(about.name)) for about in _flags()}
    return Request.of(base, **{name: value for name, value in given.items() if value is not None})


_METAVARS = {
    RATIO: "FLOAT|auto",
    SIZES: "NAME=N",
    FRACTIONS: "NAME=FLOAT",
    NUMBERS: "FLOAT,...",
    RANGE: "LOW:HIGH",
    WORDS: "NAME,...",
}


def _annotation(about: Field[Any], panel: str) -> Any:
    """Return the type that typer parses an option as; None, or False of a switch, stands for one that is not given."""
    kind, (least, most) = about.metadata["kind"], about.metadata["bounds"] or (None, None)
    types = {NUMBER: float, WHOLE: int, PATTERNS: list[str], FILE: Path, SIZES: list[str], FRACTIONS: list[str]}
    text = about.metadata["help"].replace("`", "").replace("[", r"\[")  # which rich would read as markup
    shown = default_of(about).replace("`", "")
    option = typer.Option(
        flag_of(about),  # one name alone: a switch without its opposite
        help=text[0].upper() + text[1:] + "." + (f" Default: {shown}." if shown else ""),
        show_default=False,
        metavar=_METAVARS.get(kind),
        min=least,
        max=most,
        rich_help_panel=panel,
        autocompletion=_completion(about),
    )
    return Annotated[bool if kind is SWITCH else types.get(kind, str) | None, option]


def _completion(about: Field[Any]) -> Callable[[str], list[str]] | None:
    """Return what completes an option's value on a shell's command line; None leaves it to the shell."""
    if about.metadata["kind"] is FILE:
        return None
    return completing(lambda: _words(about))


def _words(about: Field[Any]) -> Iterable[str]:
    """Return the words that an option takes."""
    if about.name == "criterion":
        return criterion_names()
    if about.metadata["kind"] is EVALUATION:
        from spa.steering.labelled import KINDS

        return (f"{kind}:" for kind in KINDS)
    choices = about.metadata["choices"]
    return choices() if choices is not None else ()


def _parsed(about: Field[Any], value: Any) -> Any:
    """Return an option's value from what typer made of it; None where it was not given."""
    if value is None or value is False or value == []:
        return None
    kind = about.metadata["kind"]
    if kind == RATIO:
        return parse_ratio(value)
    if kind == SIZES:
        return parse_sizes(value, flag_of(about))
    if kind == FRACTIONS:
        return parse_fractions(value, flag_of(about))
    if kind == NUMBERS:
        return parse_numbers(value, flag_of(about))
    if kind == WORDS:
        return [word.strip() for word in value.split(",")]
    if kind == RANGE:
        return parse_range(value, flag_of(about))
    return value


def parse_ratio(text: str) -> float | str:
    """Return a number, or ``auto``."""
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is neither a number nor auto", param_hint="--ratio") from error


def parse_numbers(text: str, flag: str) -> list[float]:
    """Return comma-separated numbers."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is no list of numbers such as 0.5,0.5,0.5", param_hint=flag) from error


def parse_range(text: str, flag: str) -> tuple[float, float]:
    """Return two numbers from ``LOW:HIGH``."""
    try:
        low, high = (float(part) for part in text.split(":"))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is no LOW:HIGH such as 0:255", param_hint=flag) from error
    return low, high


def parse_fractions(items: list[str], flag: str) -> dict[str, float]:
    """Return fractions by name from ``NAME=FLOAT``."""
    fractions = {}
    for item in items:
        name, _, number = item.rpartition("=")
        try:
            fractions[name] = float(number)
        except ValueError:
            name = ""
        if not name:
            raise typer.BadParameter(f"{item!r} is no NAME=FLOAT such as layer3.*=0.6", param_hint=flag)
    return fractions


def parse_sizes(items: list[str] | None, flag: str = "--size") -> dict[str, int] | None:
    """Return sizes by name from ``NAME=N``."""
    sizes = {}
    for item in items or ():
        name, equals, number = item.rpartition("=")
        if not equals or not number.isdigit() or int(number) < 1:
            raise typer.BadParameter(f"{item!r} is no NAME=N with N of 1 or more", param_hint=flag)
        sizes[name] = int(number)
    return sizes or None


def parse_callable(name: str) -> Any:
    """Return what ``module:callable`` names; modules of the working directory are found, too."""
    module, colon, attribute = name.partition(":")
    try:
        if not (module and colon and attribute):
            raise ValueError("it is no module:callable")
        sys.path.insert(0, "")
        target = getattr(import_module(module), attribute)
        if not callable(target):
            raise ValueError(f"it is a {type(target).__name__}")
    except (ValueError, ImportError, AttributeError) as error:
        raise typer.BadParameter(f"cannot use {name!r}: {error}", param_hint="--factory") from error
    return target


def parse_example_inputs(items: list[str] | None) -> tuple[np.ndarray, ...] | dict[str, np.ndarray] | None:
    """Return seeded arrays in order, or by name; integers are 0 or 1, which every table of ids or positions has."""
    import numpy as np

    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for at, item in enumerate(items or ()):
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
    named = [item for item in items or () if "=" in item]
    if named and len(named) < len(arrays):
        raise typer.BadParameter("either all inputs have names, or none", param_hint="--input")
    return (arrays if named else tuple(arrays.values())) or None
