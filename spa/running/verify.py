"""The comparison of two models: their interfaces, and their outputs on the same inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypedDict, Unpack

import numpy as np
import onnxruntime as ort

from spa.errors import UnsupportedError
from spa.running.feeds import first_run
from spa.running.runtime import Model, TensorSpec, input_specs, load_session, model_name, output_specs, run

__all__ = ["OutputDifference", "VerifyReport", "verify"]

# Outputs of the first model beyond this are not kept while the second runs; both sessions stay open instead.
_KEEP_BYTES = 256 * 2**20
# Differences are taken in float64 over pieces of this many elements.
_PIECE = 2**20


@dataclass(frozen=True)
class OutputDifference:
    """One output of two models, over all seeds.

    Attributes:
        name: the output's name.
        shape_a: its shape in the first model, at the first seed where the shapes differ, else at the first
            seed.
        shape_b: its shape in the second model.
        dtype_a: its numpy type in the first model.
        dtype_b: its numpy type in the second model.
        max_abs_diff: the largest ``|a - b|``; infinite where one is NaN or infinite and the other is not
            that; None if the shapes differ or the elements are strings.
        relative_l2: ``‖a - b‖ / ‖a‖`` over the finite elements, infinite as above; None as above.
        cosine: ``a·b / (‖a‖ ‖b‖)`` over the finite elements, 1 if both are zero there; None as above.
        nan_a: NaNs in the first model's output.
        nan_b: NaNs in the second model's output.
        equal: whether ``|a - b| <= atol + rtol·|a|`` everywhere, with the same shape and type; NaN equals
            NaN. None if no tolerance was given.
    """

    name: str
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]
    dtype_a: str
    dtype_b: str
    max_abs_diff: float | None
    relative_l2: float | None
    cosine: float | None
    nan_a: int
    nan_b: int
    equal: bool | None


@dataclass(frozen=True)
class VerifyReport:
    """The findings of ``verify``.

    Attributes:
        same_interface: whether inputs and outputs agree in names, order, types and shapes.
        interface: where they do not, one sentence each; ``a`` is the first model and ``b`` the second.
        outputs: one entry per output that both have; empty if the second cannot take the first's inputs.
        equal: whether the interface is the same and every output is equal under the tolerances; None if none
            was given.
        seeds: the seeds of the inputs.
        inputs: the shapes of the inputs that were fed.
        atol: the absolute tolerance, if one was given.
        rtol: the relative tolerance, if one was given.
    """

    same_interface: bool
    interface: tuple[str, ...]
    outputs: tuple[OutputDifference, ...]
    equal: bool | None
    seeds: tuple[int, ...]
    inputs: Mapping[str, tuple[int, ...]]
    atol: float | None
    rtol: float | None

    @property
    def max_abs_diff(self) -> float | None:
        """The largest difference of any output; None if none could be compared."""
        return max((o.max_abs_diff for o in self.outputs if o.max_abs_diff is not None), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Convert the report to plain data for ``json.dumps``.

        Returns:
            A dictionary; numbers that JSON lacks are the strings "Infinity" and "NaN", which Python's ``float``
            reads and which no comparison mistakes for a small number.
        """
        return _plain({**asdict(self), "max_abs_diff": self.max_abs_diff})


class InputOptions(TypedDict, total=False):
    """The keyword arguments of :func:`verify` that say what is fed; :class:`_Inputs` holds their defaults."""

    seeds: int
    seed: int
    sizes: Mapping[str, int] | None
    batch: int | None
    feeds: Sequence[Mapping[str, np.ndarray]] | None


def verify(
    a: Model,
    b: Model,
    *,
    atol: float | None = None,
    rtol: float | None = None,
    threads: int = 2,
    **inputs: Unpack[InputOptions],
) -> VerifyReport:
    """Compare two models on the same seeded inputs, in onnxruntime with its graph optimisations off.

    A different interface is a finding, not an error. Outputs are compared by name. A dynamic axis that only
    one model has dynamic gets the other's size. One session is open at a time, unless the outputs are large.

    Args:
        a: the reference: a path, the bytes of a file, or a parsed model.
        b: what is compared with it.
        atol: absolute tolerance. With ``rtol`` alone it is 0; with neither, nothing is called equal or not.
        rtol: tolerance relative to the first model's elements.
        threads: threads of onnxruntime.
        **inputs: what is fed: ``seeds``, how many inputs to try (3); ``seed``, the first seed, which the others
            follow (0); ``sizes`` of dynamic axes, by the axis' name or by ``input[axis]``; ``batch``, the size of
            dynamic batch axes; ``feeds``, inputs to use in place of seeded ones, the others are then ignored.

    Returns:
        The interface's differences and each output's distances.

    Raises:
        ModelError: a model cannot be loaded, or does not run on any inputs tried.
        UnsupportedError: an input is of a type for which no values can be made up, or an output is no tensor.
        PlanError: ``sizes`` names no dynamic axis.
    """
    options = _Inputs(**inputs)
    reference = _Reference(a, model_name(a, "the first model"), threads, options)
    name_b = model_name(b, "the second model")
    session = load_session(b, threads=threads, name=name_b)
    inputs_b, outputs_b = input_specs(session), output_specs(session)
    interface = [*_compare_inputs(reference.inputs, inputs_b), *_compare_outputs(reference.outputs, outputs_b)]
    tolerance = None if atol is None and rtol is None else (atol or 0.0, rtol or 0.0)
    outputs: tuple[OutputDifference, ...] = ()
    used: Mapping[str, np.ndarray] = {}
    if _takes(reference.inputs, inputs_b):
        narrowed = _narrow(reference.inputs, inputs_b)
        if options.feeds is None and narrowed != reference.inputs:
            reference = _Reference(a, reference.name, threads, options, narrowed)
        used = reference.makers[0]()
        outputs = _compare_runs(reference, session, name_b, tolerance)
    interface += _compare_shapes(outputs)
    return VerifyReport(
        same_interface=not interface,
        interface=tuple(interface),
        outputs=outputs,
        equal=None if tolerance is None else not interface and bool(outputs) and all(o.equal for o in outputs),
        seeds=options.all_seeds,
        inputs={name: tuple(array.shape) for name, array in used.items()},
        atol=atol,
        rtol=rtol,
    )


# -- running -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """The inputs to feed; see :func:`verify`."""

    seeds: int = 3
    seed: int = 0
    sizes: Mapping[str, int] | None = None
    batch: int | None = None
    feeds: Sequence[Mapping[str, np.ndarray]] | None = None

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"seeds is {self.seeds}. Give at least 1.")

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The seeds of the inputs; none if inputs were given."""
        return tuple(range(self.seed, self.seed + self.seeds)) if self.feeds is None else ()


class _Reference:
    """The first model's side: what it is fed, and what it answers.

    Its session is closed once every answer is known, unless the answers are large: then it stays open and
    each is computed when it is asked for. Inputs are made anew for each run, so that one set is in memory.
    """

    def __init__(
        self, model: Model, name: str, threads: int, options: _Inputs, specs: Sequence[TensorSpec] | None = None
    ) -> None:
        session = load_session(model, threads=threads, name=name)
        self.name = name
        self.inputs, self.outputs = input_specs(session), output_specs(session)
        self.makers: list[Callable[[], Mapping[str, np.ndarray]]]
        if options.feeds is None:
            recipe, first = first_run(
                session,
                seed=options.all_seeds[0],
                batch=options.batch,
                sizes=options.sizes,
                model=model,
                name=name,
                specs=specs,
            )
            self.makers = [partial(recipe.feeds, seed) for seed in options.all_seeds]
        else:
            self.makers = [partial(dict, arrays) for arrays in options.feeds]
            first = run(session, self.makers[0](), name=name)
        self._session: ort.InferenceSession | None = session
        self._kept: list[list[Any]] = []
        if sum(leaf.nbytes for value in first for leaf in _leaves(value)) * len(self.makers) <= _KEEP_BYTES:
            self._kept = [first, *(run(session, make(), name=name) for make in self.makers[1:])]
            self._session = None

    def answers(self) -> Iterator[tuple[Mapping[str, np.ndarray], list[Any]]]:
        """Yield each run's inputs and outputs."""
        for at, make in enumerate(self.makers):
            arrays = make()
            yield (
                arrays,
                self._kept[at] if self._session is None else run(self._session, arrays, name=self.name),
            )


def _compare_runs(
    reference: _Reference, session: ort.InferenceSession, name: str, tolerance: tuple[float, float] | None
) -> tuple[OutputDifference, ...]:
    wanted = {spec.name for spec in input_specs(session)}
    places_b = {spec.name: at for at, spec in enumerate(output_specs(session))}
    common = [
        (at, places_b[spec.name], _Difference(spec.name, tolerance))
        for at, spec in enumerate(reference.outputs)
        if spec.name in places_b
    ]
    if not common:
        return ()
    for arrays, values_a in reference.answers():
        values_b = run(session, {key: array for key, array in arrays.items() if key in wanted}, name=name)
        for at_a, at_b, difference in common:
            difference.add(values_a[at_a], values_b[at_b])
            values_a[at_a] = values_b[at_b] = None  # The next output's temporaries take its memory.
    return tuple(difference.result() for *_, difference in common)


# -- the interface -------------------------------------------------------------------------------------------


def _compare_names(kind: str, a: Sequence[TensorSpec], b: Sequence[TensorSpec]) -> Iterator[str]:
    names_a, names_b = [spec.name for spec in a], [spec.name for spec in b]
    yield from (f"{kind} '{name}' of a is missing in b." for name in names_a if name not in names_b)
    yield from (f"{kind} '{name}' of b is not in a." for name in names_b if name not in names_a)
    if names_a != names_b and sorted(names_a) == sorted(names_b):
        yield f"{kind}s are in the order {', '.join(names_a)} in a and {', '.join(names_b)} in b."


def _compare_inputs(a: Sequence[TensorSpec], b: Sequence[TensorSpec]) -> Iterator[str]:
    yield from _compare_names("Input", a, b)
    for one, other in _pairs(a, b):
        yield from _compare_types("Input", one, other)
        if len(one.shape) != len(other.shape):
            continue
        for axis, (size_a, size_b) in enumerate(zip(one.shape, other.shape, strict=True)):
            # How a dynamic axis is called is no difference: nothing is fed by that name.
            if isinstance(size_a, int) != isinstance(size_b, int):
                yield f"Input '{one.name}': axis {axis} is {_say(size_a)} in a and {_say(size_b)} in b."


def _compare_outputs(a: Sequence[TensorSpec], b: Sequence[TensorSpec]) -> Iterator[str]:
    # A declared output shape may be less precise than what comes out; what comes out is compared after the
    # runs.
    yield from _compare_names("Output", a, b)
    for one, other in _pairs(a, b):
        yield from _compare_types("Output", one, other)


def _compare_shapes(outputs: Sequence[OutputDifference]) -> Iterator[str]:
    for output in outputs:
        if output.shape_a != output.shape_b:
            yield (
                f"Output '{output.name}': the same inputs give shape {list(output.shape_a)} in a "
                f"and {list(output.shape_b)} in b."
            )


def _compare_types(kind: str, one: TensorSpec, other: TensorSpec) -> Iterator[str]:
    if one.type != other.type:
        yield f"{kind} '{one.name}': its type is {one.type} in a and {other.type} in b."
    if kind == "Input" and len(one.shape) != len(other.shape):
        yield f"{kind} '{one.name}': it has {len(one.shape)} axes in a and {len(other.shape)} in b."
    for axis, (size_a, size_b) in enumerate(zip(one.shape, other.shape, strict=False)):
        if isinstance(size_a, int) and isinstance(size_b, int) and size_a != size_b:
            yield f"{kind} '{one.name}': axis {axis} is {_say(size_a)} in a and {_say(size_b)} in b."


def _pairs(a: Sequence[TensorSpec], b: Sequence[TensorSpec]) -> Iterator[tuple[TensorSpec, TensorSpec]]:
    others = {spec.name: spec for spec in b}
    yield from ((spec, others[spec.name]) for spec in a if spec.name in others)


def _say(size: int | str | None) -> str:
    if isinstance(size, int):
        return f"fixed at {size}"
    return f"dynamic ('{size}')" if size else "dynamic"


def _takes(a: Sequence[TensorSpec], b: Sequence[TensorSpec]) -> bool:
    """Return whether the second model can be fed what the first is fed, but for inputs that it lacks."""
    return {spec.name for spec in b} <= {spec.name for spec in a} and all(
        one.type == other.type
        and len(one.shape) == len(other.shape)
        and all(
            size_a == size_b
            for size_a, size_b in zip(one.shape, other.shape, strict=True)
            if isinstance(size_a, int) and isinstance(size_b, int)
        )
        for one, other in _pairs(a, b)
    )


def _narrow(a: Sequence[TensorSpec], b: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """Narrow the first model's inputs to the sizes that the second fixes; a named axis is fixed everywhere."""
    fixed: dict[int | str, int] = {}
    shapes = {spec.name: list(spec.shape) for spec in a}
    for one, other in _pairs(a, b):
        for axis, (size_a, size_b) in enumerate(zip(one.shape, other.shape, strict=True)):
            if not isinstance(size_a, int) and isinstance(size_b, int):
                shapes[one.name][axis] = size_b
                if size_a:
                    fixed[size_a] = size_b
    return tuple(
        replace(spec, shape=tuple(fixed.get(size, size) if size else size for size in shapes[spec.name])) for spec in a
    )


# -- the outputs ---------------------------------------------------------------------------------------------


class _Difference:
    """Sums over the runs, from which one output's distances follow."""

    def __init__(self, name: str, tolerance: tuple[float, float] | None) -> None:
        self.name, self.tolerance = name, tolerance
        self.shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None
        self.dtypes = ("", "")
        self.comparable, self.within = True, True
        self.largest = self.squares = self.squares_a = self.squares_b = self.dot = 0.0
        self.nan_a = self.nan_b = 0

    def add(self, value_a: Any, value_b: Any) -> None:
        """Take in one run's values."""
        leaves_a, leaves_b = _leaves(value_a), _leaves(value_b)
        shapes = _shape(value_a, leaves_a), _shape(value_b, leaves_b)
        if self.shapes is None or (shapes[0] != shapes[1] and self.shapes[0] == self.shapes[1]):
            self.shapes = shapes
        dtypes = tuple(" ".join(dict.fromkeys(str(leaf.dtype) for leaf in leaves)) for leaves in (leaves_a, leaves_b))
        self.dtypes = (dtypes[0], dtypes[1])
        self.within &= dtypes[0] == dtypes[1]
        if len(leaves_a) != len(leaves_b) or any(x.shape != y.shape for x, y in zip(leaves_a, leaves_b, strict=True)):
            self.comparable = self.within = False
            return
        for x, y in zip(leaves_a, leaves_b, strict=True):
            if x.dtype.kind in "OUS" or y.dtype.kind in "OUS":
                self.comparable = False
                self.within &= bool(np.array_equal(x, y))
                continue
            flat_x, flat_y = x.reshape(-1), y.reshape(-1)
            for start in range(0, x.size, _PIECE):
                self._add_piece(flat_x[start : start + _PIECE], flat_y[start : start + _PIECE])

    def _add_piece(self, piece_a: np.ndarray, piece_b: np.ndarray) -> None:
        x, y = piece_a.astype(np.float64), piece_b.astype(np.float64)
        nan_x, nan_y = np.isnan(x), np.isnan(y)
        self.nan_a += int(nan_x.sum())
        self.nan_b += int(nan_y.sum())
        finite = np.isfinite(x) & np.isfinite(y)
        if not finite.all():
            alike = finite | (nan_x & nan_y) | (x == y)
            if not alike.all():
                self.largest = self.squares = math.inf
                self.within = False
            x, y = x[finite], y[finite]
        difference = np.abs(x - y)
        if piece_a.dtype.kind in "iu" and piece_a.dtype == piece_b.dtype and piece_a.dtype.itemsize == 8:
            # Above 2^53 neighbours fall together in float64.
            difference = np.maximum(difference, piece_a != piece_b)
        self.largest = max(self.largest, float(difference.max(initial=0.0)))
        with np.errstate(over="ignore"):  # float64 outputs near its limit: the square is infinite, and said so.
            self.squares += float(difference @ difference)
            self.squares_a += float(x @ x)
            self.squares_b += float(y @ y)
            self.dot += float(x @ y)
        if self.tolerance is not None:
            atol, rtol = self.tolerance
            self.within &= bool(np.all(difference <= atol + rtol * np.abs(x)))

    def result(self) -> OutputDifference:
        """Compute the distances over all that was added."""
        shape_a, shape_b = self.shapes or ((), ())
        return OutputDifference(
            name=self.name,
            shape_a=shape_a,
            shape_b=shape_b,
            dtype_a=self.dtypes[0],
            dtype_b=self.dtypes[1],
            max_abs_diff=self.largest if self.comparable else None,
            relative_l2=self._relative() if self.comparable else None,
            cosine=self._cosine() if self.comparable else None,
            nan_a=self.nan_a,
            nan_b=self.nan_b,
            equal=None if self.tolerance is None else self.within,
        )

    def _relative(self) -> float:
        if self.squares_a == 0:
            return 0.0 if self.squares == 0 else math.inf
        return math.sqrt(self.squares) / math.sqrt(self.squares_a)

    def _cosine(self) -> float:
        if self.squares_a == 0 or self.squares_b == 0:
            return float(self.squares_a == self.squares_b)
        # Rounding may put it beyond one.
        return max(-1.0, min(1.0, self.dot / (math.sqrt(self.squares_a) * math.sqrt(self.squares_b))))


def _leaves(value: Any) -> list[np.ndarray]:
    """List the arrays of an output: one, or a sequence's, or none of an absent optional."""
    if value is None:
        return []
    if isinstance(value, list):
        return [leaf for item in value for leaf in _leaves(item)]
    if isinstance(value, dict):
        raise UnsupportedError("An output is a map (ZipMap), which is not compared. Export the model without it.")
    return [np.asarray(value)]


def _shape(value: Any, leaves: Sequence[np.ndarray]) -> tuple[int, ...]:
    """Return an array's shape; a sequence's is its length."""
    return (len(leaves),) if isinstance(value, list) else tuple(leaves[0].shape) if leaves else ()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
