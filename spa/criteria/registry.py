"""The registry of criteria: what each needs, how it scores, and what it is called.

A new criterion is one entry; nothing else in the pipeline knows criteria by name. See docs/guides/write-a-criterion.md.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache, wraps
from inspect import getdoc
from typing import Any, TypeAlias, overload

import numpy as np

from spa.criteria.answers import Answer, real_scores
from spa.criteria.context import Context
from spa.criteria.parameter import Parameter
from spa.criteria.scores import by_parameter
from spa.errors import OptionError, PlanError, SpaError, suggestion
from spa.extras import entry_points, load_entries

Array = np.ndarray
ParameterScore: TypeAlias = Callable[[Parameter], Array]

GRADIENTS, SQUARED_GRADIENTS, HESSIAN_GRADIENTS = "gradients", "squared_gradients", "hessian_gradients"
DERIVATIVES = frozenset((GRADIENTS, SQUARED_GRADIENTS, HESSIAN_GRADIENTS))
NEEDS = frozenset(("weights", "inputs", "labels")) | DERIVATIVES
RECONSTRUCTIONS = ("none", "bias", "full")


@dataclass(frozen=True)
class Criterion:
    """A way to tell which channels matter.

    Attributes:
        name: what users call it.
        score: from a :class:`~spa.criteria.context.Context` to scores by group name, each (channels,) and higher where
            a channel matters more; or to :class:`~spa.criteria.answers.Curves` or a
            :class:`~spa.criteria.answers.Removal`.
        summary: one sentence for help texts.
        source: the paper, with section or equation.
        needs: of ``weights``, ``inputs``, ``labels`` (of the inputs), and of derivatives of a loss: ``gradients``,
            ``squared_gradients`` (their mean squares over samples), ``hessian_gradients`` (the Hessian times the
            gradient). Only what is named here is in the context. Any collection of them will do.
        reconstruct: how the pruned network is repaired unless the user says otherwise: ``full``, ``bias`` or ``none``.

    Raises:
        TypeError: the score is no function.
        ValueError: the name is empty or no string, or a need or the reconstruction is unknown.
    """

    name: str
    score: Callable[[Context], Answer]
    summary: str
    source: str = ""
    needs: frozenset[str] = frozenset({"weights"})
    reconstruct: str = "none"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise ValueError(f"a criterion is named {self.name!r}. Name it with a string that is not empty.")
        if not callable(self.score):
            raise TypeError(f"criterion {self.name!r} has the score {self.score!r}. Give a function of a Context.")
        needs: Any = self.needs
        if isinstance(needs, str) or not isinstance(needs, Collection):
            raise ValueError(
                f"criterion {self.name!r} has needs {needs!r}. Give a set of names, such as {{'weights'}}."
            )
        if unknown := [need for need in needs if not isinstance(need, str) or need not in NEEDS]:
            first = min(map(repr, unknown))
            raise ValueError(f"criterion {self.name!r} needs {first}. Choose from {', '.join(sorted(NEEDS))}.")
        object.__setattr__(self, "needs", frozenset(needs))
        if self.reconstruct not in RECONSTRUCTIONS:
            raise ValueError(
                f"criterion {self.name!r} has reconstruct {self.reconstruct!r}. "
                f"Choose one of {', '.join(RECONSTRUCTIONS)}."
            )

    @property
    def derivatives(self) -> frozenset[str]:
        """The derivatives of a loss that it needs."""
        return self.needs & DERIVATIVES

    def needs_inputs(self, derivatives_given: bool = False) -> bool:
        """Return whether the model is run for it.

        Args:
            derivatives_given: whether the caller has the derivatives; otherwise they are taken on labelled inputs.
        """
        return bool(self.needs & {"inputs", "labels"}) or bool(self.derivatives and not derivatives_given)


_CRITERIA: dict[str, Criterion] = {}


@overload
def criterion(entry: Criterion, /) -> Criterion: ...


@overload
def criterion(
    entry: str, /, *, summary: str = "", source: str = "", reconstruct: str = "none"
) -> Callable[[ParameterScore], ParameterScore]: ...


def criterion(
    entry: str | Criterion, /, *, summary: str = "", source: str = "", reconstruct: str = "none"
) -> Criterion | Callable[[ParameterScore], ParameterScore]:
    """Register a criterion, so that it can be chosen by its name.

    With a name it decorates a function that scores one parameter by its weights:

    >>> import numpy as np
    >>> import spa
    >>> @spa.criterion("largest", source="This example.")
    ... def largest(parameter):
    ...     '''Score a channel by its largest weight.'''
    ...     return np.abs(parameter.rows()).max(axis=1)
    >>> get("largest").summary
    'Score a channel by its largest weight.'

    With a :class:`Criterion` it registers that, for criteria that need more than weights.

    Args:
        entry: the name, or the whole criterion.
        summary: one sentence for help texts; by default the first line of the function's docstring.
        source: the paper, with section or equation.
        reconstruct: how the pruned network is repaired by default: ``none``, ``bias`` or ``full``.

    Returns:
        The criterion as it is, or a decorator that returns the function as it is.

    Raises:
        TypeError: no name is given, or what is decorated is no function.
        ValueError: the name is taken, or a field is not valid.
    """
    if isinstance(entry, Criterion):
        return _register(entry)
    if callable(entry):
        name = getattr(entry, "__name__", "name")
        raise TypeError(f"criterion {name!r} has no name for users. Write @spa.criterion({name!r}) above it.")

    def register(function: ParameterScore) -> ParameterScore:
        if not callable(function):
            raise TypeError(f"criterion {entry!r} is {function!r}. Decorate a function of a Parameter.")
        _register(_of_function(function, entry, summary, source, reconstruct))
        return function

    return register


def _refuse_taken(name: str) -> None:
    if name in _CRITERIA:
        raise ValueError(f"criterion {name!r} is registered already. Choose another name.")


def _register(entry: Criterion) -> Criterion:
    _refuse_taken(entry.name)
    _CRITERIA[entry.name] = entry
    return entry


def _of_function(
    function: ParameterScore, name: str, summary: str = "", source: str = "", reconstruct: str = "none"
) -> Criterion:
    """Make a criterion of a user's function of a parameter, whose results are checked."""

    @wraps(function)
    def checked(parameter: Parameter) -> Array:
        try:
            answer = function(parameter)
        except SpaError:
            raise
        except Exception as error:  # a user's function may raise anything
            raise PlanError(
                f"criterion {name!r} raises {type(error).__name__} for parameter {parameter.name!r}: {error}. "
                "Correct its function."
            ) from error
        scores, fault = real_scores(answer, parameter.channels)
        if fault:
            raise PlanError(
                f"criterion {name!r} returns {fault} for parameter {parameter.name!r}. "
                f"Return one finite score per channel, shape {(parameter.channels,)}."
            )
        return scores

    first_line = (getdoc(function) or "").partition("\n")[0]
    return Criterion(
        name=name,
        score=by_parameter(checked),
        summary=summary or first_line,
        source=source,
        reconstruct=reconstruct,
    )


@cache
def _load_packages() -> None:
    """Import what installed packages register through the entry-point group ``spa.criteria``."""
    load_entries(entry_points(group="spa.criteria"))


def get(chosen: str | Criterion | ParameterScore) -> Criterion:
    """Return the criterion of a name; take a criterion, or a function that scores one parameter, as it is.

    So a function may stand wherever a name may. Here channel 1, whose largest weights are least, goes:

    >>> import onnx.parser
    >>> import spa
    >>> model = onnx.parser.parse_model('''
    ...     <ir_version: 8, opset_import: ["": 17]>
    ...     net (float[n,2] x) => (float[n,1] y) <float[2,3] a = {1, -2, 5, 4, 1, 3}, float[3,1] b = {1, 1, 1}> {
    ...         h = MatMul(x, a)
    ...         y = MatMul(h, b)
    ...     }''')
    >>> def largest(parameter):
    ...     return abs(parameter.rows()).max(axis=1)
    >>> [kept] = spa.prune(model, criterion=largest, ratio=0.3, round_to=1).plan.kept.values()
    >>> kept
    (0, 2)

    Raises:
        OptionError: no criterion has that name.
    """
    if isinstance(chosen, Criterion):
        return chosen
    if callable(chosen):
        return _of_function(chosen, getattr(chosen, "__name__", type(chosen).__name__))
    _load_packages()
    if not isinstance(chosen, str) or chosen not in _CRITERIA:
        hint = suggestion(chosen, _CRITERIA)
        raise OptionError(f"unknown criterion {chosen!r}.{hint} Choose one of {', '.join(names())}.")
    return _CRITERIA[chosen]


def names(within: Collection[str] | None = None) -> list[str]:
    """Return the names of all criteria, sorted.

    Args:
        within: only criteria that need nothing but these.
    """
    _load_packages()
    return sorted(n for n, c in _CRITERIA.items() if within is None or c.needs <= set(within))


def registered() -> dict[str, Criterion]:
    """Return all criteria by name, sorted."""
    return {name: _CRITERIA[name] for name in names()}
