"""A request: everything that a pruning can be asked for, as one frozen value.

:func:`spa.prune` builds it from its options, the command line from its flags, ``--config`` from a TOML file; the report
prints it. Each option is stated once, here: its default, its help text, its choices. The command line, README's table,
the documentation of :func:`spa.prune` and the JSON schema of reports are made from these fields.

>>> request = Request.of(ratio=0.3, criterion="l2", ignore=["head.*"])
>>> request.goal.kind, request.goal.unit, request.constraints.ignore
('ratio', 'macs', ('head.*',))
>>> Request.of(ratio=0.3, latency_ms=2.0)
Traceback (most recent call last):
spa.errors.OptionError: ratio=0.3 and latency_ms=2 are asked for together. Choose one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spa.errors import OptionError, suggestion
from spa.request.option import (
    ANYTHING,
    ARRAYS,
    DEPTH,
    EVALUATION,
    FILE,
    FRACTIONS,
    FUNCTION,
    NUMBER,
    NUMBERS,
    PATTERNS,
    RANGE,
    RATIO,
    SIZES,
    SWITCH,
    WHOLE,
    WORD,
    WORDS,
    Section,
    flag_of,
    option,
    plain,
)

if TYPE_CHECKING:
    from spa.coupling.plan import Plan
    from spa.criteria import Criterion, ParameterScore
    from spa.running.place import Place
    from spa.running.tasks import Workers

RECONSTRUCTIONS = ("auto", "full", "quick", "readers", "bias", "none")
DEFAULT_RATIO = 0.5
MOST_THREADS = 1024
PLACE = ("runtime", "providers", "latency_command", "latency_seconds")  # options that say where latency is measured
WAYS = (*PLACE, "latency_table")  # options that say how latency is measured
TARGETS = ("ratio", "max_distortion", "max_drop", "min_metric", "latency_ms", "plan")  # of which a goal has one


def _budget() -> Any:  # imported where choices are asked for, so that --help stays quick
    from spa.widths import budget

    return budget


def _domains() -> tuple[str, ...]:
    from spa.calibration.imagery import DOMAINS

    return DOMAINS


def _runtimes() -> tuple[str, ...]:
    from spa.running.place import RUNTIMES

    return RUNTIMES


def _backends() -> tuple[str, ...]:
    from spa.running.tasks import BACKENDS

    return BACKENDS


def _directions() -> tuple[str, ...]:
    from spa.steering.metric import DIRECTIONS

    return DIRECTIONS


def _criteria() -> Any:
    import spa.obspa.criterion
    import spa.zero.criterion  # noqa: F401 # both register a criterion
    from spa import criteria

    return criteria


def criterion_names() -> tuple[str, ...]:
    """Return the names of all criteria that are registered."""
    return tuple(_criteria().names())


@dataclass(frozen=True)
class Goal(Section):
    """The goal: a ratio, a tolerated change of outputs or metric, milliseconds, or the channels of a plan."""

    example = "--ratio 0.5 --of params"

    ratio: float | str | None = option(
        None,
        "fraction to remove, met within 1 % of the original or the nearest that was found, which is said; `auto`: as "
        "much as the PQ index of the weights suggests",
        kind=RATIO,
        shown=str(DEFAULT_RATIO),
    )
    of: str = option(
        "macs",
        "the unit of the ratio: `macs`, `params`, `bytes` of weights, `channels`, `memory` (most bytes of activations "
        "at a time) or `latency` (in onnxruntime here, or as `--runtime` … `--latency-table` say)",
        kind=WORD,
        choices=lambda: _budget().UNITS,
    )
    max_distortion: float | None = option(
        None,
        "instead of a ratio: how far the outputs may change, as mean squared change over variance; 0.01 is hardly "
        "noticed",
        kind=NUMBER,
    )
    max_drop: float | None = option(
        None,
        "instead of a ratio: how much worse your metric may become, in its own units (a point of a percentage is 1); "
        "the most that can go is searched, in at most 8 evaluations",
        kind=NUMBER,
    )
    min_metric: float | None = option(
        None,
        "instead of a ratio: the value that your metric must reach; where lower is better, must not exceed",
        kind=NUMBER,
    )
    latency_ms: float | None = option(
        None, "instead of a ratio: the milliseconds that the pruned model may take", kind=NUMBER
    )
    plan: Plan | str | os.PathLike[str] | None = option(
        None, "instead of a ratio: keep exactly the channels of this plan, a JSON file", kind=FILE
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        number = None if self.ratio == "auto" else self.ratio
        targets = {
            "ratio": number,
            "latency_ms": self.latency_ms,
            "max_distortion": self.max_distortion,
            "max_drop": self.max_drop,
            "min_metric": self.min_metric,
        }
        requested = [f"{name}={value:g}" for name, value in targets.items() if value is not None]
        requested += ["a plan"] if self.plan is not None else []
        if len(requested) > 1:
            raise OptionError(f"{' and '.join(requested)} are asked for together. Choose one.")
        for name in ("latency_ms", "max_distortion", "max_drop"):
            value = targets[name]
            if value is not None and not 0 < float(value) < float("inf"):
                raise OptionError(f"{name} is {value:g}. Give a number above 0.")
        if number is not None and not 0 < float(number) < 1:
            raise OptionError(
                f"ratio is {number:g}, the fraction to remove. Choose one between 0 and 1, ends excluded."
            )
        if self.min_metric is not None and not math.isfinite(self.min_metric):
            raise OptionError(f"min_metric is {self.min_metric:g}. Give a finite number.")
        if self.of == "latency" and (self.ratio == "auto" or self.kind in ("distortion", "metric")):
            raise OptionError("a budget of latency takes a number. Give a ratio or latency_ms, or another unit.")
        if self.latency_ms is not None and (self.ratio == "auto" or self.of not in ("macs", "latency")):
            other = "ratio 'auto'" if self.ratio == "auto" else f"a budget of {self.of}"
            raise OptionError(
                f"a latency of {self.latency_ms:g} ms and {other} are asked for together. Leave one of the two out."
            )

    @property
    def kind(self) -> str:
        """Return ``plan``, ``metric``, ``distortion``, ``latency_ms``, ``auto`` or ``ratio``."""
        if self.plan is not None:
            return "plan"
        if self.max_drop is not None or self.min_metric is not None:
            return "metric"
        if self.max_distortion is not None:
            return "distortion"
        if self.latency_ms is not None:
            return "latency_ms"
        return "auto" if self.ratio == "auto" else "ratio"

    @property
    def unit(self) -> str:
        """Return the unit of the budget; milliseconds are a budget of latency."""
        return "latency" if self.latency_ms is not None else self.of

    @property
    def number(self) -> float:
        """Return the ratio as a number; the default where something else says how much is removed."""
        return DEFAULT_RATIO if self.ratio is None or isinstance(self.ratio, str) else float(self.ratio)


@dataclass(frozen=True)
class Scoring(Section):
    """The scoring and comparison of channels."""

    example = "--criterion l2 --ranking isomorphic"

    criterion: str | Criterion | ParameterScore = option(
        "obspa",
        "the way to score channels; see the table of criteria",
        kind=ANYTHING,
        choices=None,
    )
    ranking: str = option(
        "global",
        "which scores are compared: those of all groups (`global`), of none, so that each loses the same fraction "
        "(`uniform`), or of groups of one structure (`isomorphic`)",
        kind=WORD,
        choices=lambda: _budget().RANKINGS,
    )
    norm: str = option(
        "mean",
        "the normalisation of scores within a parameter: `none`, `sum`, `mean`, `max` or `standardise`",
        kind=WORD,
        choices=lambda: tuple(_criteria().NORMS),
    )
    agg: str = option(
        "mean",
        "the combination of the scores of a group's parameters: `sum`, `mean`, `max`, `prod` or `l2`",
        kind=WORD,
        choices=lambda: tuple(_criteria().AGGREGATES),
    )
    gradients: Mapping[str, Any] | None = option(
        None,
        "gradients by initializer, from any framework, for `snip` and `taylor`; mean squared ones for `fisher`. "
        "Without them PyTorch differentiates the cross-entropy on labelled data",
        kind=ARRAYS,
    )
    hessian_gradients: Mapping[str, Any] | None = option(
        None, "products of Hessian and gradient by initializer, for `crop` and `grasp`", kind=ARRAYS
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _criteria().get(self.criterion)  # refuses what is no criterion


@dataclass(frozen=True)
class Constraints(Section):
    """The constraints on groups and widths."""

    example = "--ignore 'head.*' --round-to 16"

    ignore: tuple[str, ...] = option(
        (),
        "a pattern; groups stay whole in which a parameter, a node, an operator or a module matches it; repeatable; in "
        "Python also a module of PyTorch itself",
        kind=PATTERNS,
    )
    only: tuple[str, ...] = option(
        (),
        "a pattern; only the outputs of layers are pruned that it matches, by the same names; repeatable",
        kind=PATTERNS,
    )
    width: Mapping[str, int] | None = option(
        None,
        "the exact width of the outputs of layers that match: `fc1=256`; repeatable. Without another goal all other "
        "groups stay whole",
        kind=SIZES,
    )
    ratio_of: Mapping[str, float] | None = option(
        None,
        "the fraction to remove from the outputs of layers that match: `layer3.*=0.6`; repeatable. Without another "
        "goal all other groups stay whole",
        kind=FRACTIONS,
    )
    heads: Mapping[str, int] | None = option(
        None,
        "the number of heads of attentions that match (of grouped queries that of the key-value heads): `blocks.0*=4`; "
        "repeatable. Without another goal all other groups stay whole",
        kind=SIZES,
    )
    keep_at_least: Mapping[str, int] | None = option(
        None, "the width that the outputs of layers that match do not fall below: `head*=64`; repeatable", kind=SIZES
    )
    depth: str = option(
        "off",
        "residual branches that go as a whole: `auto`, those that matter less than channels do, and for latency "
        "activations, depthwise layers and gates; a number, the cheapest; a pattern, those that match",
        kind=DEPTH,
    )
    equal: tuple[str, ...] | None = option(
        None,
        "a pattern of axes, `tensor[axis]`, whose groups keep the same fraction of channels; `heads`: sizes in an "
        "attention, `parts`: equal parts of an axis, `layers`: equal names but for numbers; repeatable",
        kind=PATTERNS,
        shown="`heads` and `parts` for PyTorch's and JAX's models, `layers`, too, for Hugging Face's",
    )
    round_to: int = option(
        8, "the number that widths become multiples of, which runtimes like", kind=WHOLE, bounds=(1, None)
    )
    min_width: int = option(1, "the width that no group falls below", kind=WHOLE, bounds=(1, None))
    cross_norm: bool = option(
        False,
        "whether to prune groups over which a normalisation takes statistics, too (the residual width of transformers)",
        kind=SWITCH,
        shown="off",
    )

    @property
    def depth_kind(self) -> str:
        """Return ``off``, ``auto``, ``number`` or ``pattern``."""
        return self.depth if self.depth in ("off", "auto") else "number" if self.depth.isdigit() else "pattern"


@dataclass(frozen=True)
class Inputs(Section):
    """The inputs that scores and repair learn from."""

    example = "--data images --samples 256"

    data: Any = option(
        None,
        "inputs to learn from: `.npz` (arrays named like the inputs), `.npy`, a folder of arrays or images; in Python "
        "also arrays, a data loader, a dataset, a list of feeds. Made up if not given",
        kind=FILE,
    )
    samples: int = option(
        512,
        "the number of inputs to learn from at most; changes are measured on an eighth as many others",
        kind=WHOLE,
        bounds=(1, None),
    )
    labels: str | None = option(
        None,
        "the array with the labels (`label`, `labels` or `y` are found by themselves); accuracy is reported, and "
        "criteria that need a loss use them",
        kind=WORD,
    )
    mean: tuple[float, ...] | None = option(
        None,
        "what is subtracted from images with values in 0..1, per channel: `0.5,0.5,0.5`",
        kind=NUMBERS,
        shown="ImageNet's, or what the network responds to",
    )
    std: tuple[float, ...] | None = option(
        None,
        "what images are then divided by, per channel",
        kind=NUMBERS,
        shown="ImageNet's, or what the network responds to",
    )
    value_range: tuple[float, float] | None = option(
        None,
        "the lowest and the highest value of images, and of other floats that are made up: `0:255`; in place of `mean` "
        "and `std`",
        kind=RANGE,
        flag="range",
        shown="what `--mean` and `--std` make of images in 0..1",
    )
    domain: str = option(
        "auto",
        "what made-up images show: `photo`, `text`, `mixed` (half of each), `drawing`, `texture`; `auto`: what suits "
        "the network's own statistics or responses",
        kind=WORD,
        choices=_domains,
    )
    text: str | os.PathLike[str] | None = option(
        None,
        "a file of text, in UTF-8, that made-up token ids are cut from",
        kind=FILE,
        shown="pages that come with SPA",
    )
    tokenizer: str | os.PathLike[str] | None = option(
        None,
        "the tokenizer of made-up text: `tokenizer.json`, `vocab.txt`, or `vocab.json` with `merges.txt` "
        "(needs the extra `text`)",
        kind=FILE,
        shown="the one beside the model",
    )
    preprocess: Callable[[Any], Any] | None = option(
        None,
        "a function that makes inputs of a sample: of an image of a folder (`PIL.Image`), a row of arrays or of a "
        "dataset, an item of an iterable",
        kind=FUNCTION,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        other = "mean" if self.mean is not None else "std" if self.std is not None else None
        if self.value_range is not None and other is not None:
            raise OptionError(f"value_range (--range) and {other} are given together. Leave one of them out.")


@dataclass(frozen=True)
class Repair(Section):
    """The repair of the network that remains."""

    example = "--reconstruct readers"

    reconstruct: str = option(
        "auto",
        "`full` refits all layers, `quick` with fewer steps of those before cuts, `readers` with none, `bias` moves "
        "means, `none` nothing; `auto` suits the criterion: `full` for obspa, in a sweep `quick`",
        kind=WORD,
        choices=lambda: RECONSTRUCTIONS,
    )
    recover: int = option(
        0,
        "epochs of training by the dense model's outputs on the same inputs, without labels (needs torch)",
        kind=WHOLE,
        bounds=(0, None),
    )
    insist: bool = option(
        False,
        "whether to keep a refitted network whose outputs are no better than a constant, which is refused otherwise",
        kind=SWITCH,
        shown="off",
    )

    def __post_init__(self) -> None:
        if isinstance(self.reconstruct, bool):
            object.__setattr__(self, "reconstruct", "full" if self.reconstruct else "none")
        super().__post_init__()


@dataclass(frozen=True)
class Evaluation(Section):
    """The user's metric, by which pruned models are judged."""

    example = "--evaluate top1:validation.npz"

    evaluate: str | Callable[[str], Any] | None = option(
        None,
        "your metric: `module:function` of a model's path, a command with `{model}` in it, or `top1:`, `top5:`, `mae:` "
        "or `agreement:` and the path of labelled samples; in Python also a function",
        kind=EVALUATION,
    )
    metric: str | None = option(
        None, "which of several numbers is the metric, by name", kind=WORD, shown="the first of them"
    )
    better: str = option(
        "auto",
        "whether `higher` or `lower` is better; `auto`: lower for `mae`, else higher",
        kind=WORD,
        choices=_directions,
    )
    evaluate_seconds: float = option(
        3600.0,
        "the seconds that an evaluation may take in a process of its own; a function given in Python runs in this one, "
        "where nothing stops it",
        kind=NUMBER,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.evaluate is not None:
            from spa.steering.metric import check_evaluate

            check_evaluate(self.evaluate)
        if not self.evaluate_seconds > 0:
            raise OptionError(f"evaluate_seconds is {self.evaluate_seconds:g}. Give a number above 0.")


@dataclass(frozen=True)
class Timing(Section):
    """The running and timing of models."""

    example = "--threads 4 --runtime openvino"

    threads: int = option(
        2,
        "threads of onnxruntime and of linear algebra, while calibrating and timing",
        kind=WHOLE,
        bounds=(1, MOST_THREADS),
    )
    batch: int = option(1, "samples per run while timing", kind=WHOLE, bounds=(1, None))
    sizes: Mapping[str, int] | None = option(
        None,
        "the size of an open axis, by its name or as `input[axis]`, wherever a size is needed: MACs, made-up inputs, "
        "timing; the axis stays open in the result. `NAME=N`; repeatable",
        kind=SIZES,
        flag="size",
        shown="realistic ones, which `spa inspect` shows",
    )
    seed: int = option(0, "the seed of everything random", kind=WHOLE, bounds=(0, 2**32 - 1))
    runtime: str = option(
        "onnxruntime",
        "what latencies are measured in, in this process: `onnxruntime`, or `openvino` (needs the extra `openvino`)",
        kind=WORD,
        choices=_runtimes,
    )
    providers: tuple[str, ...] = option(
        (),
        "onnxruntime's providers to measure latencies with, the first preferred: `cuda,cpu`; `spa doctor` lists those "
        "that are there",
        kind=WORDS,
        shown="`cpu`",
    )
    latency_command: str | None = option(
        None,
        "a command that prints the milliseconds of a model, wherever it runs it: `ssh board bench {model}`; no shell "
        "reads it",
        kind=WORD,
        flag="measure",
    )
    latency_seconds: float = option(
        600.0, "the seconds that one such measurement may take", kind=NUMBER, flag="measure-seconds"
    )
    latency_table: str | os.PathLike[str] | None = option(
        None,
        "the measured latencies of the network's layers, a table that `spa layers` writes and you fill; without "
        "`--measure` they are all that a budget of latency knows",
        kind=FILE,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        own = {name for name in PLACE if getattr(self, name) != getattr(type(self), name)}
        if own:
            _ = self.place  # which refuses what means nothing

    @property
    def place(self) -> Place:
        """Return where latencies are measured."""
        from spa.running.place import Place

        return Place(self.runtime, self.providers, self.latency_command, self.latency_seconds)


@dataclass(frozen=True)
class Execution(Section):
    """The processes and machines that share the work; no result depends on them."""

    example = "--jobs 2"

    jobs: int = option(
        1,
        "processes that share scoring, the networks of a sweep and the groups of a sensitivity, each with `--threads`",
        kind=WHOLE,
        bounds=(1, None),
    )
    backend: str = option(
        "loky",
        "who runs what is shared: processes of this machine (`loky`), or a cluster's, by the extras `dask` and `ray`",
        kind=WORD,
        choices=_backends,
    )
    scheduler: str | None = option(
        None, "the address of the cluster: `tcp://host:8786`; of Ray also `ray://host:10001`", kind=WORD
    )
    work: str | os.PathLike[str] | None = option(
        None,
        "a folder for what is computed on the way: the same `prune` goes on there after an interruption; all "
        "machines of a cluster must see it",
        kind=FILE,
        shown="the sweep's own, else the system's for temporary files",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.backend == "loky" and self.scheduler is not None:
            raise OptionError(f"scheduler is {self.scheduler!r}, and no cluster is asked for. Give backend, too.")
        if self.backend != "loky" and self.scheduler is None:
            raise OptionError(
                f"backend {self.backend!r} needs a cluster. Give scheduler, such as tcp://127.0.0.1:8786."
            )
        if self.backend != "loky" and self.jobs != 1:
            raise OptionError("a cluster uses all of its workers, and jobs is given, too. Leave one of the two out.")

    @property
    def workers(self) -> Workers:
        """Return the workers."""
        from spa.running.tasks import Workers

        folder = None if self.work is None else Path(self.work)
        return Workers(self.jobs, self.backend, self.scheduler, folder)


@dataclass(frozen=True)
class Request:
    """Everything that a pruning can be asked for.

    Attributes:
        goal: how much is removed.
        scoring: how channels are scored and compared.
        constraints: what must hold for the widths.
        inputs: what scores and repair learn from.
        repair: how what remains is made to do what was removed.
        evaluation: the user's metric.
        timing: how models are run and timed.
        execution: who does the work.
    """

    goal: Goal = field(default_factory=Goal)
    scoring: Scoring = field(default_factory=Scoring)
    constraints: Constraints = field(default_factory=Constraints)
    inputs: Inputs = field(default_factory=Inputs)
    repair: Repair = field(default_factory=Repair)
    evaluation: Evaluation = field(default_factory=Evaluation)
    timing: Timing = field(default_factory=Timing)
    execution: Execution = field(default_factory=Execution)

    def __post_init__(self) -> None:
        """Refuse options of different sections that contradict each other.

        Raises:
            OptionError: two do.
        """
        if self.goal.kind == "metric" and self.evaluation.evaluate is None:
            name = "max_drop" if self.goal.max_drop is not None else "min_metric"
            raise OptionError(f"{name} needs a metric, and there is none. Give evaluate, such as top1:labelled.npz.")
        depth, ranking = self.constraints.depth, self.scoring.ranking
        if depth == "auto" and ranking != "global":
            raise OptionError(
                f"depth 'auto' compares branches with channels, and ranking {ranking!r} does not. "
                "Use ranking 'global', or give a number or a pattern."
            )
        if depth != "off" and self.goal.kind == "plan":
            raise OptionError(f"a plan says which branches go, and depth is {depth!r}. Leave one of the two out.")

    def refuse_idle_timing(self) -> None:
        """Refuse options that say how latency is measured where none will be.

        Not for sweeps, which time every network.

        Raises:
            OptionError: there is one.
        """
        if self.goal.unit == "latency":
            return
        about = next((f for f in fields(Timing) if f.name in WAYS and getattr(self.timing, f.name) != f.default), None)
        if about is not None:
            raise OptionError(
                f"{about.name} ({flag_of(about)}) says how latency is measured, and none is: the goal is none of "
                "latency. Give of='latency' (--of latency) or latency_ms (--latency-ms), or leave it out."
            )

    @classmethod
    def of(cls, base: Request | None = None, /, **given: Any) -> Request:
        """Build a request from options by name.

        Args:
            base: where options that are not given come from; the defaults without it.
            **given: the fields of the sections: ``ratio``, ``criterion``, ``round_to`` …

        Raises:
            OptionError: an option is unknown or out of range, or two contradict each other.
        """
        homes = {about.name: section for section, about in options()}
        for name in given:
            if name not in homes:
                hint = suggestion(name, homes) or f" Choose among {', '.join(homes)}."
                raise OptionError(f"unknown option {name!r}.{hint}")
        base = base or cls()
        if any(given.get(name) is not None for name in TARGETS):  # a new goal replaces the old one
            base = replace(base, goal=Goal(of=base.goal.of))
        changed: dict[str, Any] = {}
        for section in {homes[name] for name in given}:
            values = {n: v for n, v in given.items() if homes[n] == section}
            changed[section] = replace(getattr(base, section), **values)
        return replace(base, **changed)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return the request as plain data by section; objects that JSON lacks become the name of their type."""
        return {
            section.name: {f.name: plain(getattr(getattr(self, section.name), f.name)) for f in fields(kind)}
            for section, kind in _sections()
        }

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str]) -> Request:
        """Read a request from a TOML file with the sections as tables; paths in it are relative to its folder.

        Args:
            path: the file; of a ``pyproject.toml`` the tables below ``[tool.spa]`` count.

        Raises:
            UnreadableError: the file is not there or cannot be opened.
            OptionError: it is no TOML, or holds what is no option.
        """
        from spa.request.toml import read

        name = os.fspath(path)
        given = read(Path(path), {section.name: {f.name: f for f in fields(kind)} for section, kind in _sections()})
        try:
            return cls.of(**given)
        except OptionError as error:
            raise OptionError(f"{name!r}: {error}") from error

    def to_toml(self) -> str:
        """Return the request as TOML, the options that differ from the defaults.

        Raises:
            OptionError: an option holds an object that no file can hold.
        """
        import tomli_w

        content: dict[str, dict[str, Any]] = {}
        for section, kind in _sections():
            for about in fields(kind):
                value = getattr(getattr(self, section.name), about.name)
                if value is about.default:
                    continue
                value = os.fspath(value) if isinstance(value, os.PathLike) else value
                value = list(value) if isinstance(value, tuple) else value
                if not about.metadata["kind"].on_file or not isinstance(value, str | int | float | list | dict):
                    raise OptionError(f"{about.name} is an object, which no file can hold. Give a path or a name.")
                if value != about.default:
                    content.setdefault(section.name, {})[about.name] = value
        return tomli_w.dumps(content)


def _sections() -> Iterator[tuple[Field[Any], Any]]:
    """Yield each section of a request with its class."""
    for section in fields(Request):
        yield section, section.default_factory


def options() -> Iterator[tuple[str, Field[Any]]]:
    """Yield every option as (section, field); ``field.metadata`` is what :func:`option` was given.

    >>> [f.name for section, f in options() if section == "repair"]
    ['reconstruct', 'recover', 'insist']
    """
    for section, kind in _sections():
        for about in fields(kind):
            yield section.name, about


def examples() -> dict[str, str]:
    """Return by section some of its options on a command line."""
    return {section.name: kind.example for section, kind in _sections()}
