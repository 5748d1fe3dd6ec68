"""Pruned weights in the user's own module: same class, same forward code, smaller tensors."""

from __future__ import annotations

import copy
import linecache
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from spa.errors import UnsupportedError
from spa.exporters.pytorch.check import difference, feeds_of, outputs_of, reference, tolerance
from spa.exporters.pytorch.following import follow
from spa.exporters.pytorch.operators import tensor
from spa.exporters.pytorch.parts import SIDES, parts_of, restate_parts, weight_of
from spa.exporters.pytorch.saving import remember
from spa.exporters.pytorch.sizes import Cut, NarrowError, Queries, restate
from spa.frameworks.reasons import refuse_lost_branches
from spa.frameworks.torch import arguments, array, copied
from spa.model.graph import Graph
from spa.widths.equal import cuts as axis_cuts

if TYPE_CHECKING:
    from onnx import ModelProto

    from spa.algebra.axes import Dim, Kept
    from spa.api import Result
    from spa.coupling.analysis import Analysis, Group

REMEDY = "Take sizes from the tensors instead, or use graph_module, which needs no forward code."
MOST_ATTEMPTS = 32  # groups that are kept whole, one after the other
WORTH_IT = 0.5  # of the parameters that pruning removed must be gone from a class that stays wider
AT_ROOT = "Or pass equal= with the layers that the code makes equally wide, ignore= with the one before a written size."
BIASED = {"Conv": 2, "ConvTranspose": 2, "Gemm": 2}  # the operand that is the bias


Masks = dict["Dim", np.ndarray]  # kept indices


@dataclass(frozen=True)
class _Entry:
    """A parameter or buffer: the module that has it, and as what."""

    owner: nn.Module
    leaf: str

    @property
    def value(self) -> Tensor:
        return getattr(self.owner, self.leaf)


def write_back(module: nn.Module, result: Result, names: Mapping[str, str], example_inputs: Any) -> nn.Module:
    """Copy the user's module with the pruned weights, and check it against the pruned ONNX model.

    Sizes that modules of ``torch.nn`` keep as attributes (``out_channels``, ``groups``, ``hidden_size`` ...) and counts
    of attention heads under their usual names follow the weights. Parameters that are one tensor stay one. Where scores
    are divided by the root of the pruned size of a query, the queries make up for it: the ONNX model's scale stays.
    Parts whose code has sizes written into it stay wider, with zeros in place of what went.

    Args:
        module: what was imported; not changed.
        result: what pruning gave.
        names: state_dict keys by initializer, as the importer found them.
        example_inputs: what the module is called with: a tensor, a tuple of arguments, or a mapping of keywords.

    Returns:
        A module of the same class, in the same mode.

    Raises:
        UnsupportedError: the module cannot take these widths, or so few of them that less than half of the parameters
            would go that pruning removed; the message says which part of it, and why.
    """
    return fitted(module, result, names, example_inputs)[0]


def fitted(
    module: nn.Module, result: Result, names: Mapping[str, str], example_inputs: Any
) -> tuple[nn.Module, tuple[str, ...]]:
    """Do as :func:`write_back`, and say which parts are wider than pruning left them, and why."""
    refuse_lost_branches(result.report.gone, type(module).__name__)
    feeds = feeds_of(result.model, example_inputs)
    wanted = reference(result.model, result.source.base, feeds)
    masks = result.plan.masks(result.analysis)
    wide: Masks = masks
    findings: dict[type, NarrowError] = {}
    tries: dict[type, int] = {}  # of classes whose own numbers follow the axes that the graph cuts
    while True:
        try:
            weights = _Weights.of(result, names, masks, wide)
            small = _attempt(module, weights, result.model, example_inputs, wanted, tries)
            break
        except NarrowError as finding:
            for error in (finding, finding.__cause__):  # else their frames would hold on to the copy that failed
                traceback.clear_frames(error.__traceback__ if error is not None else None)
            classes = _classes(module, finding.path)
            fewest = min(tries.get(c, 0) for c in classes)
            tries |= {c: min(fewest, len(SIDES)) + 1 for c in classes if tries.get(c, 0) == fewest}
            if fewest < len(SIDES) and axis_cuts(result.analysis):
                continue
            if not finding.path:
                found = _attempt_at_root(module, result, names, (masks, wide), example_inputs, wanted)
                if found is None:
                    raise
                small = found
                findings.setdefault(type(module), finding)
                break
            wider = _widened(module, finding.path, result, names, wide)
            if wider is None:
                raise
            wide = wider
            findings.setdefault(type(module.get_submodule(finding.path)), finding)
    gone = result.report.before.params - result.report.after.params
    if findings and _count(module) - _count(small) < WORTH_IT * gone:
        raise next(iter(findings.values()))
    follow(module, small)
    return small, tuple(_told(module, finding) for finding in findings.values())


def _classes(module: nn.Module, path: str) -> set[type]:
    """Return the classes of a module and of those around it."""
    steps = path.split(".") if path else []
    return {type(module.get_submodule(".".join(steps[:n]))) for n in range(len(steps) + 1)}


def _attempt(
    module: nn.Module,
    weights: _Weights,
    model: ModelProto,
    example_inputs: Any,
    wanted: Sequence[np.ndarray],
    tries: Mapping[type, int] | None = None,
) -> nn.Module:
    """Make a narrower copy, and compare it with the pruned ONNX model."""
    small, cuts, guessed, queries = _narrowed(module, weights)
    if tries:
        sides = {c: SIDES[(n - 1) % len(SIDES)] for c, n in tries.items()}  # after the last the first again
        restate_parts(small, sides, parts_of(weights.analysis, weights.wide, weights.names))
    _verify(small, guessed, queries, model, example_inputs, wanted)
    remember(module, small, cuts)
    return small


def _narrowed(module: nn.Module, weights: _Weights) -> tuple[nn.Module, dict[str, Cut], list[str], list[Queries]]:
    """Make a copy with other weights and the sizes that follow; return it, the cuts, and what :func:`restate` found."""
    small = copied(module)
    entries = _entries(small)
    cuts = dict(_exchange(entries, weights))
    _add_biases(entries, weights)
    return small, cuts, *restate(small, cuts)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# -- parts that stay wide ----------------------------------------------------------------------------------------


def _widened(module: nn.Module, path: str, result: Result, names: Mapping[str, str], wide: Masks) -> Masks | None:
    """Keep more indices, as zeros, for all modules of the class at ``path``.

    1. As many for all groups of a module that were equally large: code has one size for what it takes apart.
    2. All of the groups that these modules have for themselves.
    3. All of those that they share.

    None where it is the whole network, or where they are whole already.
    """
    if not path:
        return None
    keys = {group: [names[p.tensor] for p in group.places if p.tensor in names] for group in result.analysis.groups}
    cut = {group: found for group, found in keys.items() if group.dim in wide and not wide[group.dim].all()}
    insides = [f"{each}." for each in _alike(module, path)]
    touching = [[g for g in keys if g.dim in wide and any(k.startswith(i) for k in keys[g])] for i in insides]
    if (level := _levelled(touching, wide)) is not None:  # Case 1
        return level
    here = {group: [key.startswith(tuple(insides)) for key in found] for group, found in cut.items()}
    whole = [g for g, found in here.items() if found and all(found)]  # Case 2
    whole = whole or [g for g, found in here.items() if any(found)]  # Case 3
    return {**wide, **{g.dim: np.ones(g.size, bool) for g in whole}} if whole else None


def _attempt_at_root(
    module: nn.Module,
    result: Result,
    names: Mapping[str, str],
    masks: tuple[Masks, Masks],
    example_inputs: Any,
    wanted: Sequence[np.ndarray],
) -> nn.Module | None:
    """Make a narrower copy where the outermost forward has sizes written into it, or ties some that the graph does not.

    1. As many channels for all groups that were equally large: code makes one like another (``zeros_like``).
    2. All of one group alone: one size is written down (``view(-1, 256)``).

    Args:
        module: what was imported.
        result: what pruning gave.
        names: state_dict keys by initializer.
        masks: kept indices, and those that the module shall have.
        example_inputs: what the module is called with.
        wanted: the pruned ONNX model's outputs on them.

    Returns:
        The first copy that gives the wanted outputs, or None.
    """
    kept, wide = masks
    cut = [g for g in result.analysis.groups if g.dim in wide and not wide[g.dim].all()]
    attempts = [{**wide, group.dim: np.ones(group.size, bool)} for group in cut[:MOST_ATTEMPTS]]  # Case 2
    if (level := _levelled([cut], wide)) is not None:  # Case 1
        attempts.insert(0, level)
    for attempt in attempts:
        try:
            return _attempt(module, _Weights.of(result, names, kept, attempt), result.model, example_inputs, wanted)
        except NarrowError as finding:
            for error in (finding, finding.__cause__):
                traceback.clear_frames(error.__traceback__ if error is not None else None)
    return None


def _levelled(modules: Sequence[Sequence[Group]], wide: Masks) -> Masks | None:
    """Keep within each module as many indices for all groups of a size; return None where that is so."""
    level = dict(wide)
    changed = True
    while changed:
        changed = False
        for groups in modules:
            for size in {g.size for g in groups}:
                dims = [g.dim for g in groups if g.size == size]
                most = max(int(level[d].sum()) for d in dims)
                for dim in dims:
                    if (lacking := most - int(level[dim].sum())) > 0:
                        level[dim] = level[dim].copy()
                        level[dim][np.flatnonzero(~level[dim])[:lacking]] = True
                        changed = True
    return level if any((level[d] != wide[d]).any() for d in wide) else None


def _alike(module: nn.Module, path: str) -> list[str]:
    """Return where modules of the same class are as at a path."""
    kind = type(module.get_submodule(path))
    return [each for each, m in module.named_modules() if type(m) is kind]


def _told(module: nn.Module, finding: NarrowError) -> str:
    """Return notes on a class that is wider than pruning left it."""
    alike = _alike(module, finding.path)
    kind = type(module.get_submodule(finding.path)).__name__
    where = f"{finding.path} and {len(alike) - 1} more" if len(alike) > 1 else finding.path or "the outermost module"
    hint = "" if finding.path else f" {AT_ROOT}"
    return f"{kind} ({where}) is wider than pruning left it, with zeros in place of what went. {finding}{hint}"


# -- weights -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Weights:
    """The pruned weights.

    Attributes:
        analysis: of the dense model.
        pruned: the pruned one.
        names: state_dict keys by initializer.
        kept: what pruning left.
        wide: what the module shall have; what is in it beyond ``kept`` is zero.
    """

    analysis: Analysis
    pruned: Graph
    names: Mapping[str, str]
    kept: Kept
    wide: Kept

    @classmethod
    def of(cls, result: Result, names: Mapping[str, str], masks: Masks, wide: Masks) -> _Weights:
        analysis, pruned = result.analysis, Graph(result.model, result.source.base)
        return cls(analysis, pruned, names, analysis.kept(masks), analysis.kept(wide))


def _entries(module: nn.Module) -> dict[str, _Entry]:
    """Return all parameters and buffers by state_dict key, tied ones under each of their keys."""
    entries = {}
    for path, owner in module.named_modules(remove_duplicate=False):
        for leaf in (*owner._parameters, *owner._buffers):
            entries[f"{path}.{leaf}" if path else leaf] = _Entry(owner, leaf)
    return entries


def _exchange(entries: Mapping[str, _Entry], weights: _Weights) -> Iterator[tuple[str, Cut]]:
    """Put the pruned tensors in place of the dense ones; return what was cut from each, by key."""
    old = {key: entry.value for key, entry in entries.items() if entry.value is not None}
    same: dict[int, list[_Entry]] = {}
    for key, value in old.items():
        same.setdefault(id(value), []).append(entries[key])
    dense, named = weights.analysis.graph, weights.names
    unsaved = _unsaved(old, dense, named)
    for name, key in {**named, **unsaved}.items():
        if name not in dense.constants:
            continue
        if key not in old:
            raise UnsupportedError(f"initializer {name!r} is called {key!r}, which the module lacks. Import it again.")
        order = _order(dense.array(name), array(old[key]))
        if order is None and name in unsaved:  # a buffer of which the exporter has made something else
            continue
        if order is None:
            raise UnsupportedError(
                f"initializer {name!r} holds other values than the module's {key!r}, shape {list(old[key].shape)}: the "
                "exporter changed it. Export without optimisation (optimize=False, do_constant_folding=False)."
            )
        new, left = _pruned(weights, name)
        _put(same[id(old[key])], new.transpose(order), old[key])
        yield key, Cut(tuple(old[key].shape), {order.index(axis): indices for axis, indices in left.items()})


def _unsaved(old: Mapping[str, Tensor], dense: Graph, named: Mapping[str, str]) -> dict[str, str]:
    """Return by constant the keys of buffers that no state_dict has.

    1. One exporter calls constants by these keys.
    2. The other numbers them: buffers of the same values, in the modules' order, are constants in the nodes' order.
    """
    taken = set(named.values())
    found = {key: key for key in old if key in dense.constants.keys() - named.keys() - taken}  # Case 1
    buffers: dict[Any, list[str]] = {}
    for key, value in old.items():
        if key not in taken and key not in found and not isinstance(value, nn.Parameter) and value.numel() > 1:
            buffers.setdefault(_identity(array(value)), []).append(key)
    shapes, constants = {shape for shape, _ in buffers}, dict[Any, list[str]]()
    for name in dict.fromkeys(n for node in dense.nodes for n in node.inputs if n in dense.constants):
        if name not in named and name not in found and tuple(dense.constants[name].dims) in shapes:
            constants.setdefault(_identity(dense.array(name)), []).append(name)
    pairs = ((constants.get(k, []), keys) for k, keys in buffers.items())  # Case 2
    return found | {n: k for names, keys in pairs if len(names) == len(keys) for n, k in zip(names, keys, strict=True)}


def _identity(value: np.ndarray) -> tuple[tuple[int, ...], bytes]:
    return value.shape, np.ascontiguousarray(value).tobytes()


def _pruned(weights: _Weights, name: str) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Return a constant as the module shall have it, and the kept indices of the axes that were cut.

    Uses of a small constant are pruned each by itself: where each reads another part of it (the gates of an LSTM), the
    graph has a copy for each, which lacks indices of that part alone. One parameter lacks those of all.
    """
    analysis, pruned = weights.analysis, weights.pruned
    dense = analysis.graph
    whole = dense.array(name).copy()
    masks = [np.ones(n, bool) for n in whole.shape]
    wide = [np.ones(n, bool) for n in whole.shape]
    seen = np.zeros(whole.shape, bool)
    for node, operand in dense.users.get(name, ()):
        axes = analysis.uses.get((name, -1, 0)) or analysis.uses.get((name, node.index, operand))
        twin = pruned.producer.get(next(o for o in node.outputs if o))
        if axes is None or twin is None or twin.inputs[operand] not in pruned.constants:
            continue
        mine = [weights.kept.mask(e) for e in axes]
        place = _grid(mine)
        value = pruned.array(twin.inputs[operand])
        if not np.array_equal(whole[place][seen[place]], value[seen[place]]):
            raise UnsupportedError(
                f"initializer {name!r} has become several with different values. Prune with reconstruct='none', or use "
                "graph_module."
            )
        whole[place], seen[place] = value, True
        masks = [m & other for m, other in zip(masks, mine, strict=True)]
        wide = [m & weights.wide.mask(e) for m, e in zip(wide, axes, strict=True)]
    left = {axis: np.flatnonzero(m) for axis, m in enumerate(wide) if not m.all()}
    result = np.zeros_like(whole)
    result[_grid(masks)] = whole[_grid(masks)]
    return result[_grid(wide)], left


def _grid(masks: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Return what indexes the kept part of an array."""
    return np.ix_(*(np.flatnonzero(m) for m in masks))


def _order(stored: np.ndarray, wanted: np.ndarray) -> tuple[int, ...] | None:
    """Return the order of axes in which an initializer holds a parameter: exporters transpose the weights of Linear."""
    for order in permutations(range(stored.ndim)):
        turned = stored.transpose(order)
        if turned.shape == wanted.shape and np.array_equal(turned, wanted):
            return order
    return None


def _put(places: Sequence[_Entry], value: np.ndarray, old: Tensor) -> None:
    """Replace a tensor in all its places; a parameter becomes one again, of which there is one."""
    new = tensor(np.ascontiguousarray(value).reshape(value.shape)).to(old)  # numbers have no axes, and get one
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    for entry in places:
        setattr(entry.owner, entry.leaf, new)


def _add_biases(entries: Mapping[str, _Entry], weights: _Weights) -> None:
    """Give layers the biases that reconstruction has added to them."""
    dense, pruned = weights.analysis.graph, weights.pruned
    for node in pruned.nodes:
        for place, name in enumerate(node.inputs):
            if name not in pruned.initializers or name in dense.constants or not name.endswith("_bias"):
                continue
            twin = dense.producer[next(o for o in node.outputs if o)]
            entry = entries.get(weights.names.get(weight_of(dense, twin.inputs[1]), ""))
            if entry is None or BIASED.get(node.op) != place or getattr(entry.owner, "bias", 0) is not None:
                raise UnsupportedError(
                    f"{node.label}: reconstruction gave it the bias {name!r}, for which the module has no place. Build "
                    "the layer with bias=True, or prune with reconstruct='none'."
                )
            channels = weights.analysis.axes[twin.outputs[0]][1]
            left, wide = weights.kept.mask(channels), weights.wide.mask(channels)
            bias = np.zeros(wide.sum(), np.float64)
            bias[left[wide]] = pruned.array(name)
            entry.owner.bias = nn.Parameter(tensor(bias).to(entry.value))


# -- checking ----------------------------------------------------------------------------------------------------


def _verify(
    module: nn.Module,
    guessed: Sequence[str],
    queries: Sequence[Queries],
    model: ModelProto,
    example_inputs: Any,
    wanted: Sequence[np.ndarray],
) -> None:
    """Compare with the pruned ONNX model; of the queries as they are and scaled, what is nearer stays."""
    off, got = _off(module, example_inputs, wanted)
    if queries:
        before = copy.deepcopy(module.state_dict())
        for each in queries:
            each.scale(each.ratio**0.5)
        scaled = _off(module, example_inputs, wanted)
        if scaled[0] < off:
            off, got = scaled
        else:
            module.load_state_dict(before)
    if not off <= tolerance(model):
        shapes = f"shapes {[list(g.shape) for g in got]} and {[list(w.shape) for w in wanted]}"
        gap = f"by {off:.2g} of the largest value" if np.isfinite(off) else shapes
        raise NarrowError(
            f"{type(module).__name__} with the pruned weights and the pruned ONNX model differ: {gap}. A size or a "
            f"scale is written into its forward code. {REMEDY}",
            guessed[0] if guessed else "",
        )


def _off(module: nn.Module, example_inputs: Any, wanted: Sequence[np.ndarray]) -> tuple[float, list[np.ndarray]]:
    """Return how far a module's outputs are from those wanted, and the outputs.

    Raises:
        NarrowError: it does not run with its new sizes.
    """
    args, kwargs = arguments(example_inputs)
    try:
        got = outputs_of(module, args, kwargs)
    except Exception as error:  # whatever the user's code raises on sizes that it does not expect
        raise _refusal(module, error) from error
    return difference(got, wanted), got


def _refusal(module: nn.Module, error: Exception) -> NarrowError:
    """Say which line of the user's forward code failed, in which module, and why."""
    frames = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__) if _is_users(frame)]
    reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    if not frames:
        what = f"{type(module).__name__} does not run with the pruned weights: {reason}."
        return NarrowError(f"{what} {REMEDY}", "")
    frame, line = frames[-1]
    code = frame.f_code
    source = linecache.getline(code.co_filename, line).strip()
    inner = next((m for f, _ in reversed(frames) if isinstance(m := _first_argument(f), nn.Module)), module)
    path = next((name for name, m in module.named_modules() if m is inner), "")
    what = f"{type(inner).__name__}.{code.co_name}" + (f" ({path})" if path else "")
    place = f"{what}, line {line} of {Path(code.co_filename).name}"
    where = f"{place}: {source!r} works only with the sizes before pruning ({reason})."
    remedy = f"Take sizes from the tensors instead, leave it whole (ignore=['{path}.*']), or use graph_module."
    return NarrowError(f"{where} {remedy if path else REMEDY}", path)


def _first_argument(frame: FrameType) -> object:
    """Return what a method was called on, whatever its code calls that (``self``, as a rule)."""
    return frame.f_locals.get(frame.f_code.co_varnames[0]) if frame.f_code.co_argcount else None


def _is_users(frame: FrameType) -> bool:
    """Tell whether a frame is neither PyTorch's nor this package's."""
    file = Path(frame.f_code.co_filename)
    ours = (Path(torch.__file__).parent, Path(__file__).parent)
    return not any(folder in file.parents for folder in ours)
