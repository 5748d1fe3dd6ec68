"""The sizes that modules keep as attributes, after their weights have shrunk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isclose
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from spa.errors import UnsupportedError

# What code calls the number of heads, of key-value heads, the size of a head, the width of all heads, and projections.
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead")
SHARED_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads")
HEAD_SIZES = ("head_dim", "head_size", "attention_head_size", "dim_head", "d_head", "d_kv", "key_value_proj_dim")
WIDTHS = ("all_head_size", "inner_dim", "attn_dim", "attention_dim", "split_size")
SHARES = ("num_key_value_groups",)
ROTATED = ("rotary_ndims", "rotary_dim")  # that many dimensions of each head
PARTS = ("width", "split_width")  # of equal parts of a layer
QUERIES = ("q", "q_proj", "query", "to_q", "wq", "q_lin")
TRANSPOSED = "Conv1D"  # of the transformers library: a linear layer whose weights are [inputs, outputs]
KEYS = ("k", "k_proj", "key", "to_k", "wk", "k_lin")
FUSED = ("qkv", "c_attn", "qkv_proj", "to_qkv", "in_proj", "query_key_value", "Wqkv")


class NarrowError(UnsupportedError):
    """A module cannot have the widths of the pruned weights.

    Attributes:
        path: where it is in the network.
    """

    def __init__(self, message: str, path: str) -> None:
        super().__init__(message)
        self.path = path


@dataclass(frozen=True)
class Cut:
    """The cut through a tensor: which indices of it stay.

    Attributes:
        shape: of the dense tensor.
        kept: sorted kept indices by axis; other axes are whole.
    """

    shape: tuple[int, ...]
    kept: Mapping[int, np.ndarray]

    def blocks(self, axis: int, count: int) -> int:
        """Count the equal runs of indices, of ``count``, that still have an index."""
        if axis not in self.kept:
            return count
        return len(np.unique(self.kept[axis] // (self.shape[axis] // count)))


Cuts = Mapping[str, Cut]  # by state_dict key


@dataclass(frozen=True)
class Queries:
    """A projection that makes queries whose size has changed.

    Attributes:
        projection: the layer.
        axis: of its weights, along which they lie.
        rows: how many of its outputs they are; the first.
        ratio: their new size over the former.
    """

    projection: Any
    axis: int
    rows: int
    ratio: float

    def scale(self, factor: float) -> None:
        """Multiply the queries."""
        with torch.no_grad():
            self.projection.weight.narrow(self.axis, 0, self.rows).mul_(factor)
            if isinstance(bias := getattr(self.projection, "bias", None), Tensor):
                bias[: self.rows].mul_(factor)


def restate(module: nn.Module, cuts: Cuts) -> tuple[list[str], list[Queries]]:
    """Set the sizes of all modules from their weights.

    Returns:
        Where modules are whose sizes were recognised by the names or values of their attributes alone, and the
        projections that make queries whose size has changed, and thereby a scale that their code may compute from it.

    Raises:
        NarrowError: a module cannot have these widths.
    """
    guessed: list[str] = []
    queries: list[Queries] = []
    for path, each in module.named_modules():
        own = {key.removeprefix(f"{path}." if path else ""): cut for key, cut in cuts.items() if _owns(path, key)}
        for kind, function in KINDS:
            if isinstance(each, kind):
                function(path, each, own)
                break
        else:
            if type(each).__name__ == TRANSPOSED and hasattr(each, "nf"):
                each.nx, each.nf = each.weight.shape
                continue
            sized, split, heads = _own_sizes(each, own), _splits(each, own), _heads(each, own)
            if sized or split or (own and heads is not None):
                guessed.append(path)
                queries += heads or []
    return guessed, queries


def _owns(path: str, key: str) -> bool:
    return not path or key.startswith(f"{path}.")


def _convolution(path: str, module: Any, cuts: Cuts) -> None:
    if "weight" in cuts:
        module.groups = cuts["weight"].blocks(0, module.groups)
    first, second = module.weight.shape[:2]
    second *= module.groups
    transposed = isinstance(module, _ConvTransposeNd)
    module.in_channels, module.out_channels = (first, second) if transposed else (second, first)


def _linear(path: str, module: Any, cuts: Cuts) -> None:
    module.out_features, module.in_features = module.weight.shape


def _norm(path: str, module: Any, cuts: Cuts) -> None:
    vector = module.weight if module.weight is not None else module.running_mean
    if vector is not None:
        module.num_features = len(vector)


def _group_norm(path: str, module: Any, cuts: Cuts) -> None:
    if module.weight is not None:
        if "weight" in cuts:
            module.num_groups = cuts["weight"].blocks(0, module.num_groups)
        module.num_channels = len(module.weight)


def _layer_norm(path: str, module: Any, cuts: Cuts) -> None:
    if module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)


def _embedding(path: str, module: Any, cuts: Cuts) -> None:
    module.num_embeddings, module.embedding_dim = module.weight.shape


def _prelu(path: str, module: Any, cuts: Cuts) -> None:
    module.num_parameters = module.weight.numel()


def _recurrent(path: str, module: Any, cuts: Cuts) -> None:
    gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
    hidden = {key: w.shape[0] // gates for key, w in module.named_parameters() if key.startswith("weight_hh")}
    if len(set(hidden.values())) > 1:
        widths = ", ".join(f"{key}: {size}" for key, size in hidden.items())
        raise NarrowError(
            f"{type(module).__name__} {path!r} has layers of different widths after pruning ({widths}); PyTorch wants "
            "one. Build it from one module per layer, or use graph_module.",
            path,
        )
    module.hidden_size = next(iter(hidden.values()))
    module.input_size = module.weight_ih_l0.shape[1]
    if module.proj_size:
        module.proj_size = module.weight_hr_l0.shape[0]


def _cell(path: str, module: Any, cuts: Cuts) -> None:
    module.input_size, module.hidden_size = module.weight_ih.shape[1], module.weight_hh.shape[1]


def _attention(path: str, module: Any, cuts: Cuts) -> None:
    packed = module.in_proj_weight is not None
    name, parts = ("in_proj_weight", 3) if packed else ("q_proj_weight", 1)
    rows, width = getattr(module, name).shape
    if rows != parts * width or module.out_proj.weight.shape != (width, width):
        raise NarrowError(
            f"nn.MultiheadAttention {path!r} has {rows} rows of {width} in {name} after pruning; PyTorch wants "
            f"{parts} times as many rows as the embedding has channels. Leave it whole (ignore=['{path}.*']), or use "
            "graph_module.",
            path,
        )
    module.kdim, module.vdim = (w.shape[1] for w in _key_and_value(module, packed))
    if name in cuts and 0 in cuts[name].kept:
        first = cuts[name].kept[0]
        module.num_heads = len(np.unique(first[first < module.embed_dim] // module.head_dim))
    module.embed_dim, module.head_dim = width, width // module.num_heads


def _key_and_value(module: Any, packed: bool) -> tuple[Any, Any]:
    return (module.in_proj_weight,) * 2 if packed else (module.k_proj_weight, module.v_proj_weight)


KINDS: tuple[tuple[Any, Callable[[str, Any, Cuts], None]], ...] = (
    (_ConvNd, _convolution),
    (nn.Linear, _linear),
    (_NormBase, _norm),
    (nn.GroupNorm, _group_norm),
    ((nn.LayerNorm, nn.RMSNorm), _layer_norm),
    ((nn.Embedding, nn.EmbeddingBag), _embedding),
    (nn.PReLU, _prelu),
    (nn.RNNBase, _recurrent),
    (nn.RNNCellBase, _cell),
    (nn.MultiheadAttention, _attention),
)


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers by state_dict key, those that it leaves out and tied ones included."""
    pairs = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return dict(pairs)


# -- sizes in the user's own words -------------------------------------------------------------------------------


def _own_sizes(module: Any, cuts: Cuts) -> bool:
    """Set the numbers of a module that are sizes of its own parameters and buffers; of several new ones it is none."""
    sizes: dict[int, set[int]] = {}
    for cut in (cut for key, cut in cuts.items() if "." not in key):
        for axis, kept in cut.kept.items():
            sizes.setdefault(cut.shape[axis], set()).add(len(kept))
    found = {
        name: next(iter(sizes[value]))
        for name, value in vars(module).items()
        if type(value) is int and len(sizes.get(value, ())) == 1
    }
    for name, new in found.items():
        setattr(module, name, new)
    return bool(found)


def _splits(module: Any, cuts: Cuts) -> bool:
    """Set the sizes of the parts that a module cuts a layer's outputs into.

    1. A list or tuple that adds up to them.
    2. The width of equal parts, under its usual name.
    """
    is_set = False
    new: Any
    layers = [cut for key, cut in cuts.items() if key.count(".") == 1 and key.endswith(".weight") and 0 in cut.kept]
    for name, value in list(vars(module).items()):
        if name in PARTS and type(value) is int and value > 1:
            new = next((n for cut in layers if (n := _part(cut, value)) is not None), value)  # Case 2
        elif isinstance(value, list | tuple) and len(value) > 1 and all(type(n) is int for n in value):
            new = next((_parts(cut, value) for cut in layers if cut.shape[0] == sum(value)), value)  # Case 1
        else:
            continue
        if new != value:
            setattr(module, name, new)
            is_set = True
    return is_set


def _parts(cut: Cut, sizes: Sequence[int]) -> Sequence[int]:
    counts = np.diff(np.searchsorted(cut.kept[0], np.cumsum([0, *sizes])))
    return type(sizes)(int(n) for n in counts)  # type: ignore[call-arg]


def _part(cut: Cut, size: int) -> int | None:
    """Return what is left of each of several equal parts; None where that differs."""
    if cut.shape[0] % size or cut.shape[0] == size:
        return None
    counts = np.bincount(cut.kept[0] // size, minlength=cut.shape[0] // size)
    return int(counts[0]) if (counts == counts[0]).all() else None


@dataclass(frozen=True)
class _Heads:
    """The number and the size of the heads that a projection makes along an axis of its weights, before and after."""

    projection: Any
    axis: int
    count: int
    size: int
    new_count: int
    new_size: int


def _heads(module: Any, cuts: Cuts) -> list[Queries] | None:
    """Set counts and sizes of heads that a module's own code keeps beside its projections; None where it has none."""
    queries = _projected(module, cuts, HEADS, (*QUERIES, *FUSED))
    if queries is None:
        return None
    keys = _projected(module, cuts, SHARED_HEADS, KEYS) or queries
    width, new_width = queries.count * queries.size, queries.new_count * queries.new_size
    for words, old, new in (
        (HEADS, queries.count, queries.new_count),
        (SHARED_HEADS, keys.count, keys.new_count),
        (HEAD_SIZES, queries.size, queries.new_size),
        (WIDTHS, width, new_width),
        (SHARES, queries.count // keys.count, queries.new_count // keys.new_count),
    ):
        for name in words:
            if getattr(module, name, None) == old:
                setattr(module, name, new)
    if queries.new_size == queries.size:
        return []
    for name in ROTATED:
        if isinstance(rotated := getattr(module, name, None), int):
            setattr(module, name, rotated * queries.new_size // queries.size)
    made = Queries(queries.projection, queries.axis, new_width, queries.new_size / queries.size)
    scale = getattr(module, "scale", None)
    if isinstance(scale, float) and isclose(scale, queries.size**-0.5):
        # PyTorch's scaled_dot_product_attention takes it from the size: code that has both ways gives the same in both.
        module.scale = queries.new_size**-0.5
        made.scale(made.ratio**0.5)
        return []
    return [made]


def _projected(module: Any, cuts: Cuts, counts: Sequence[str], projections: Sequence[str]) -> _Heads | None:
    """Return what is left of the heads of the first projection that the module has."""
    for name in projections:
        projection = getattr(module, name, None)
        weight = getattr(projection, "weight", None)
        if weight is None:
            continue
        axis = 1 if type(projection).__name__ == TRANSPOSED else 0
        cut = cuts.get(f"{name}.weight", Cut(tuple(weight.shape), {}))
        width = cut.shape[axis] // (3 if name in FUSED else 1)
        size = _attribute(module, HEAD_SIZES) or width // (_attribute(module, counts) or width)
        if width % size:
            continue
        first = cut.kept.get(axis, np.arange(cut.shape[axis]))
        if name in FUSED:
            first = _queries(first, width, size)
        left = len(np.unique(first // size))
        return _Heads(projection, axis, width // size, size, left, len(first) // left)
    return None


def _queries(kept: np.ndarray, width: int, size: int) -> np.ndarray:
    """Return the queries among the kept outputs of a fused projection, counted among queries alone.

    They come first, or each head has its queries, keys and values side by side. As queries and keys lose the same, it
    is the latter where the first third lost something else than the second.
    """
    lost = [kept[kept // width == third] % width for third in (0, 1)]
    if np.array_equal(*lost):
        return lost[0]
    heads, rest = np.divmod(kept, 3 * size)
    return (heads * size + rest)[rest < size]


def _attribute(module: Any, names: Sequence[str]) -> int | None:
    return next((v for n in names if isinstance(v := getattr(module, n, None), int)), None)
