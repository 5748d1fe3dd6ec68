"""The record of what made a flax nnx or equinox module narrower, which the module carries along.

The record is one string of JSON, an attribute of the module: static to JAX, and gone from what is not the same object
(equinox's functions make new ones from the fields alone).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from spa.errors import ModelError, UnsupportedError

if TYPE_CHECKING:
    from spa.exporters.jax_modules import Leaf

ATTRIBUTE = "spa_narrowing"
NO_PLACE = "The module that was pruned is another one: give one of that class, made with the same arguments."


@dataclass(frozen=True)
class Narrowing:
    """The record of a module made narrower.

    Attributes:
        shapes: by path, of each array, as the constructor makes it.
        kept: by path, the kept indices of those axes that lost some.
        biases: by path of a kernel or weight, the size of the bias that its layer has and its constructor does not
            make.
    """

    shapes: Mapping[str, tuple[int, ...]]
    kept: Mapping[str, Mapping[int, list[int]]]
    biases: Mapping[str, int]

    @classmethod
    def carried(cls, module: Any) -> Narrowing | None:
        """Return what a module carries along; None for one that carries nothing."""
        text = getattr(module, ATTRIBUTE, None)
        return None if text is None else cls.read(text)

    @classmethod
    def read(cls, text: str) -> Narrowing:
        """Read the record from JSON.

        Raises:
            ModelError: it is none.
        """
        try:
            plain = json.loads(text)
            return cls(
                shapes={path: tuple(int(n) for n in shape) for path, shape in plain["shapes"].items()},
                kept={p: {int(a): [int(i) for i in k] for a, k in axes.items()} for p, axes in plain["kept"].items()},
                biases={path: int(size) for path, size in plain["biases"].items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"the record of the pruning cannot be read: {error!r}. Save the module again.") from error

    @property
    def text(self) -> str:
        """The record as JSON."""
        kept = {path: {f"{axis}": k for axis, k in axes.items()} for path, axes in self.kept.items()}
        return json.dumps({"shapes": {p: list(s) for p, s in self.shapes.items()}, "kept": kept, "biases": self.biases})

    @classmethod
    def of(cls, leaves: Mapping[str, Leaf], before: Narrowing | None) -> Narrowing:
        """Record what was cut from a module, which may have been pruned before.

        Args:
            leaves: its arrays by path, pruned.
            before: what it carried along.
        """
        shapes = {path: leaf.before for path, leaf in leaves.items()} if before is None else before.shapes
        kept: dict[str, dict[int, list[int]]] = {}
        for path in shapes:
            earlier = {} if before is None else before.kept.get(path, {})
            axes = {}
            for axis, own in enumerate(leaves[path].kept):
                indices = np.asarray(earlier.get(axis, range(shapes[path][axis])))[own]
                if len(indices) < shapes[path][axis]:
                    axes[axis] = [int(i) for i in indices]
            if axes:
                kept[path] = axes
        biases = {path: leaf.bias.size for path, leaf in leaves.items() if leaf.bias is not None}
        for path in () if before is None else before.biases:
            biases[path] = math.prod(leaves[attached(path)].shape)
        return cls(shapes, kept, biases)


def remember(dense: Any, small: Any, leaves: Mapping[str, Leaf]) -> None:
    """Let a pruned module carry along what makes it narrower than a fresh one of its class."""
    carry(small, Narrowing.of(leaves, Narrowing.carried(dense)).text)


def carry(module: Any, text: str) -> None:
    """Give a module its record; equinox's modules are frozen to their users."""
    object.__setattr__(module, ATTRIBUTE, text)


def record_of(module: Any) -> Narrowing:
    """Return what a pruned module carries along.

    Raises:
        UnsupportedError: it carries nothing.
    """
    narrowing = Narrowing.carried(module)
    if narrowing is None:
        raise UnsupportedError(
            f"this {type(module).__name__} carries no record of a pruning. Give what spa.prune(...).pruned is, or its "
            "file of spa.save: equinox's functions make modules without the record."
        )
    return narrowing


def attached(path: str) -> str:
    """Return the path of the bias that belongs to a kernel or weight.

    >>> attached("['first']['kernel'].value"), attached(".first.weight")
    ("['first']['bias'].value", '.first.bias')
    """
    kernel = "['kernel'].value"
    if path.endswith(kernel):
        return path.removesuffix(kernel) + "['bias'].value"
    return f"{path.rpartition('.')[0]}.bias"
