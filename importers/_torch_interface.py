"""A PyTorch network as a function from tensors to tensors: example inputs, names, open axes."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from spa.errors import ModelError, PlanError, SpaError
from spa.frameworks.torch import arguments

_OPERATOR = re.compile(r"(?<=\()[Oo]ccurred when translating [\w:]+(?=\))")
#: By axis, its name and what ``torch.export`` is told of it.
Axes = Mapping[int, tuple[str, Any]]


@dataclass(frozen=True)
class Example:
    """Example inputs.

    Attributes:
        arguments: the arguments of ``forward`` by name.
        names: of the tensors among them.
        tensors: these, on the network's device.
        fill: gives the positional and keyword arguments with other tensors in place of these.
        call: what messages call the network.
    """

    arguments: Mapping[str, Any]
    names: tuple[str, ...]
    tensors: tuple[torch.Tensor, ...]
    fill: Callable[[Sequence[torch.Tensor]], tuple[Any, Any]] = field(repr=False)
    call: str

    @classmethod
    def of(cls, module: nn.Module, call_arguments: tuple[tuple[Any, ...], dict[str, Any]] | None) -> Example:
        """Take example inputs for a module.

        Args:
            module: the network.
            call_arguments: positional and keyword arguments.

        Raises:
            PlanError: there are none, or the arguments are not those of ``forward``.
        """
        signature = _signature(module)
        call = f"{getattr(module, 'original_name', type(module).__name__)}.forward({_shown(signature)})"
        if call_arguments is None:
            raise PlanError(
                f"{call} needs example inputs. Pass example_inputs=torch.randn(1, 3, 224, 224), say: a tensor, "
                "a tuple, or a dict of keyword arguments."
            )
        args, kwargs = call_arguments
        arguments: dict[str, Any] = {f"input_{i}": value for i, value in enumerate(args)} | kwargs
        if signature is not None:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError as error:
                raise PlanError(
                    f"the example inputs do not fit {call}: {error}. Pass a tuple of all of them, or a dict by name."
                ) from error
            arguments = _by_name(bound)
            kwargs = {name: kwargs[name] for name in arguments if name in kwargs}
        device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
        names = [
            f"{name}.{path}" if path else name
            for name, value in arguments.items()
            for path, leaf in _leaves(value)
            if torch.is_tensor(leaf)
        ]
        leaves, spec = pytree.tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if torch.is_tensor(leaf)]

        def fill(tensors: Sequence[torch.Tensor]) -> tuple[Any, Any]:
            filled = dict(zip(places, tensors, strict=True))
            return pytree.tree_unflatten([filled.get(i, leaf) for i, leaf in enumerate(leaves)], spec)

        tensors = tuple(leaves[i].detach().to(device) for i in places)
        return cls(arguments, distinct(names, module.state_dict()), tensors, fill, call)


@dataclass(frozen=True)
class Run:
    """The network's own outputs on some inputs."""

    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[tuple[str, torch.Tensor], ...]

    @classmethod
    def of(cls, module: nn.Module, example: Example, tensors: Sequence[torch.Tensor]) -> Run:
        """Run the network on copies of the inputs, since it may write to them."""
        args, kwargs = example.fill([t.clone() for t in tensors])
        return cls(tuple(tensors), tuple((name, t.detach().clone()) for name, t in _named(module(*args, **kwargs))))

    @classmethod
    def first(cls, module: nn.Module, example: Example) -> Run:
        """Run the network on the example inputs.

        Raises:
            PlanError: it does not take them.
            ModelError: it returns no tensor.
        """
        try:
            first = cls.of(module, example, example.tensors)
        except Exception as error:  # the user's own code
            shapes = ", ".join(
                f"{name}: {str(t.dtype).removeprefix('torch.')} {list(t.shape)}"
                for name, t in zip(example.names, example.tensors, strict=True)
            )
            raise PlanError(f"{example.call} fails on the example inputs ({shapes}): {reason(error)}") from error
        if not first.outputs:
            raise ModelError(f"{example.call} returns no tensor. Let it return tensors, or containers of them.")
        return first


class Flat(nn.Module):
    """A module that takes and returns tensors only: both exporters understand it, whatever the module returns."""

    def __init__(self, module: nn.Module, example: Example, outputs: Collection[str]) -> None:
        super().__init__()
        self.module = module
        self.training = False
        self._fill = example.fill
        self._outputs = outputs

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the module's outputs of these names; while tracing, sizes look like tensors, too."""
        args, kwargs = self._fill(tensors)
        return tuple(tensor for name, tensor in _named(self.module(*args, **kwargs)) if name in self._outputs)


def split(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Split a tensor, a tuple or a dict into positional and keyword arguments; arrays become tensors, None stays."""
    if example_inputs is None:
        return None
    return pytree.tree_map(
        lambda leaf: torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf, arguments(example_inputs)
    )


def distinct(names: Iterable[str], taken: Iterable[str]) -> tuple[str, ...]:
    """Return the names, with a number behind those that are taken."""
    used = set(taken)
    free_names = []
    for name in names:
        free, count = name, 1
        while free in used:
            count += 1
            free = f"{name}_{count}"
        used.add(free)
        free_names.append(free)
    return tuple(free_names)


def reason(error: BaseException) -> str:
    """Return an exception in one line: what this package says of it, or the first line of its innermost cause.

    Of what the TorchScript exporter adds, the operator stays, and where to ask PyTorch for it goes.
    """
    while error.__cause__ is not None and not isinstance(error, SpaError):
        error = error.__cause__
    if isinstance(error, SpaError):
        return str(error)
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()] or [""]
    line = lines[min(1, len(lines) - 1)] if lines[0].startswith("Constraints violated") else lines[0]
    line = line.partition(" Please feel free to request support")[0]
    operator = _OPERATOR.search("" if _OPERATOR.search(line) else str(error))
    translated = f" ({operator[0]})" if operator else ""
    return f"{type(error).__name__}: {line[:200]}".rstrip(":. ") + f"{translated}."


def batch_axes(example: Example) -> tuple[Axes, ...]:
    """Return the first axis of each input where it is as long as the first input's, as ``batch``."""
    size = next((t.shape[0] for t in example.tensors if t.ndim), None)
    batch = ("batch", torch.export.Dim("batch"))
    return tuple({0: batch} if t.ndim and t.shape[0] == size else {} for t in example.tensors)


def given_axes(example: Example, dynamic_shapes: Any) -> tuple[Axes, ...]:
    """Open axes as the user states them, tensor by tensor.

    Raises:
        PlanError: the statement does not fit the arguments.
    """
    if isinstance(dynamic_shapes, Mapping):
        unknown = dynamic_shapes.keys() - example.arguments.keys()
        if unknown:
            known = ", ".join(example.arguments)
            raise PlanError(
                f"dynamic_shapes names {sorted(unknown)[0]!r}; the arguments given are {known}. Name these."
            )
        specs = [dynamic_shapes.get(name) for name in example.arguments]
    else:
        specs = list(dynamic_shapes)
        if len(specs) != len(example.arguments):
            raise PlanError(
                f"dynamic_shapes has {len(specs)} entries for {len(example.arguments)} arguments. Give one for each, "
                "or a dict."
            )
    dims: dict[str, Any] = {}
    axes_of_tensors = [
        axes
        for (name, value), spec in zip(example.arguments.items(), specs, strict=True)
        for axes in _spelled_out(name, value, spec, dims)
    ]
    return tuple(axes_of_tensors)


def resized(module: nn.Module, example: Example, axes: Sequence[Axes]) -> Run | None:
    """Run the network with all open axes longer by one, or else shorter by one; return None if it takes neither."""
    for step in (1, -1):
        if step < 0 and any(
            t.shape[axis] < 3 for t, open_ in zip(example.tensors, axes, strict=True) for axis in open_
        ):
            continue
        tensors = [_resized(t, open_, step) for t, open_ in zip(example.tensors, axes, strict=True)]
        try:
            return Run.of(module, example, tensors)
        except Exception:  # the user's own code, which need not take other sizes
            continue
    return None


def single(module: nn.Module, example: Example, axes: Sequence[Axes]) -> list[Run]:
    """Run the network with all open axes of size one, at which networks like to do something else."""
    pairs = zip(example.tensors, axes, strict=True)
    tensors = [t[tuple(slice(0, 1 if a in open_ else None) for a in range(t.ndim))] for t, open_ in pairs]
    try:
        return [Run.of(module, example, tensors)]
    except Exception:  # the user's own code, which need not take this size
        return []


def _signature(module: nn.Module) -> inspect.Signature | None:
    """Return the signature of ``forward``; None where it is not known."""
    schema = getattr(module.forward, "schema", None)  # of a TorchScript method
    if schema is None:
        try:
            return inspect.signature(module.forward)
        except (TypeError, ValueError):
            return None
    kind, empty = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    defaults = {a.name: a.default_value if a.has_default_value() else empty for a in schema.arguments[1:]}
    return inspect.Signature([inspect.Parameter(name, kind, default=value) for name, value in defaults.items()])


def _shown(signature: inspect.Signature | None) -> str:
    """Return the first arguments' names."""
    if signature is None:
        return "..."
    shown = list(signature.parameters)
    return ", ".join(shown if len(shown) <= 4 else [*shown[:4], "..."])


def _by_name(bound: inspect.BoundArguments) -> dict[str, Any]:
    """Return arguments by name, those of ``**kwargs`` under their own."""
    arguments: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        if bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= value
        else:
            arguments[name] = value
    return arguments


def _leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yield each leaf of nested containers and dataclasses, with its path, such as ``0.key``."""
    for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
        steps = [str(getattr(p, "key", getattr(p, "idx", getattr(p, "name", p)))) for p in path]
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            fields = {f.name: getattr(leaf, f.name) for f in dataclasses.fields(leaf)}
            yield from ((".".join([*steps, rest]), inner) for rest, inner in _leaves(fields))
        else:
            yield ".".join(steps), leaf


def _named(result: Any) -> list[tuple[str, torch.Tensor]]:
    """Return the tensors among a network's outputs: ``output``, ``output_0`` of a tuple, or a dict's keys."""
    tensors = [(path, leaf) for path, leaf in _leaves(result) if torch.is_tensor(leaf)]
    return [(path if path and not path[0].isdigit() else f"output_{path}".rstrip("_"), leaf) for path, leaf in tensors]


def _spelled_out(name: str, value: Any, spec: Any, dims: dict[str, Any]) -> Iterator[Axes]:
    """Yield the open axes of each tensor in an argument."""
    if torch.is_tensor(value):
        yield _open_axes(name, value, spec, dims)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _spelled_out(f"{name}.{key}", item, spec.get(key) if spec else None, dims)
    elif isinstance(value, list | tuple):
        if spec is not None and len(spec) != len(value):
            raise PlanError(
                f"dynamic_shapes has {len(spec)} entries for the {len(value)} of {name!r}. Give one for each."
            )
        for at, item in enumerate(value):
            yield from _spelled_out(f"{name}.{at}", item, spec[at] if spec else None, dims)
    else:
        yield from ({} for _, leaf in _leaves(value) if torch.is_tensor(leaf))


def _open_axes(name: str, tensor: torch.Tensor, spec: Any, dims: dict[str, Any]) -> Axes:
    axes = {}
    for axis, dim in spec.items() if isinstance(spec, Mapping) else enumerate(spec or ()):
        if dim is None or isinstance(dim, int) or dim is torch.export.Dim.STATIC:
            continue
        if not -tensor.ndim <= axis < tensor.ndim:
            raise PlanError(
                f"dynamic_shapes opens axis {axis} of {name!r}, which has {tensor.ndim} axes. Choose one of them."
            )
        axis %= tensor.ndim
        if isinstance(dim, str):
            if not dim.isidentifier():
                raise PlanError(
                    f"dynamic_shapes calls an axis of {name!r} {dim!r}. Use letters, digits and underscores."
                )
            axes[axis] = (dim, dims.setdefault(dim, torch.export.Dim(dim)))
        else:
            axes[axis] = (getattr(dim, "__name__", f"{name}_{axis}"), dim)
    return axes


def _resized(tensor: torch.Tensor, axes: Iterable[int], step: int) -> torch.Tensor:
    """Make axes longer by one (the first slice again, mirrored along another axis) or shorter by one."""
    for axis in axes:
        if step < 0:
            tensor = tensor.narrow(axis, 0, tensor.shape[axis] - 1)
        else:
            slice_ = tensor.narrow(axis, 0, 1)
            other = tensor.ndim - 1 if axis != tensor.ndim - 1 else 0
            tensor = torch.cat([tensor, slice_.flip(other)], axis)
    return tensor
