"""PyTorch's files: TorchScript archives, exported programs, checkpoints and safetensors.

Pickles can run any code; they are read only as far as PyTorch's ``weights_only`` goes, unless the user trusts the file.
TorchScript archives hold programs, too, but in a language of their own, which is read without Python's pickle.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from spa.errors import ModelError, PlanError, SpaError, UnreadableError

Factory = str | Callable[[], nn.Module]
_CONTAINERS = ("state_dict", "model_state_dict", "model", "module", "net", "params")


def read(path: Path, factory: Factory | None, trust: bool) -> tuple[nn.Module | torch.export.ExportedProgram, str]:
    """Read the network in a file; return a note, too, on how it was read (empty for nothing).

    Args:
        path: a TorchScript archive, an exported program, a checkpoint or a safetensors file.
        factory: makes the network that a checkpoint's weights belong to.
        trust: whether the file may run code of its own while it is read.

    Raises:
        ModelError: the file is missing, broken, does not fit the factory's network, or needs trust.
        PlanError: a checkpoint without a factory.
    """
    if not path.is_file():
        raise UnreadableError(f"cannot read {str(path)!r}: there is no such file. Check the path.")
    kind = _kind(path)
    if kind == "TorchScript":
        return _attempt(path, partial(torch.jit.load, str(path), map_location="cpu")), ""
    if kind == "exported program":
        with contextlib.nullcontext() if trust else _weights_only():
            return _attempt(path, partial(torch.export.load, str(path))), ""
    content = _safetensors(path) if kind == "safetensors" else _unpickled(path, trust)
    return assembled(content, factory, repr(str(path)))


def assembled(content: Any, factory: Factory | None, name: str) -> tuple[nn.Module, str]:
    """Load a checkpoint's weights into the factory's network; return a note, too, on their names (empty for nothing).

    Args:
        content: a state_dict, or what a training script put around it.
        factory: makes the network; needs no arguments.
        name: what messages call the checkpoint.

    Raises:
        ModelError: there are no weights, or they do not fit.
        PlanError: there is no factory, or it makes no network.
    """
    weights = _weights(content, name)
    if isinstance(weights, nn.Module):
        return weights, ""
    if factory is None:
        raise PlanError(
            f"{name} holds weights, but not the network that they belong to. "
            "Pass factory='package.module:function', which makes it."
        )
    module = _made(factory)
    state, note = _fitting(weights, module)
    try:
        missing, unexpected = module.load_state_dict(state, strict=False)
    except RuntimeError as error:
        reasons = str(error).strip().splitlines()
        raise ModelError(
            f"{name} does not fit the factory's network: {reasons[min(1, len(reasons) - 1)].strip()}"
        ) from error
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    for keys, what in ((missing, "lacks"), (unexpected, "has, beyond the factory's network,")):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ModelError(f"{name} {what} {', '.join(keys[:3])}{more}. Choose the factory that it was saved from.")
    return module, note


def _kind(path: Path) -> str:
    if path.suffix == ".safetensors":
        return "safetensors"
    if not zipfile.is_zipfile(path):
        return "checkpoint"
    with zipfile.ZipFile(path) as archive:
        names = [name.partition("/")[2] or name for name in archive.namelist()]
    if any(name == "archive_format" or name.startswith("serialized_exported_program") for name in names):
        return "exported program"
    return "TorchScript" if "constants.pkl" in names else "checkpoint"


def _attempt(path: Path, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (
        OSError,
        RuntimeError,
        ValueError,
        KeyError,
        EOFError,
        AttributeError,
        ImportError,
        AssertionError,
    ) as error:
        raise ModelError(f"cannot read {str(path)!r}: {_line(error)} Save or copy it again.") from error
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{str(path)!r} holds Python objects besides tensors, and reading these may run any code ({_line(error)}) "
            "Save the state_dict alone, or pass trust=True if you trust the file."
        ) from error


def _line(error: Exception) -> str:
    """Return the exception in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = next((line for line in lines if "Unsupported" in line or "GLOBAL" in line), lines[0] if lines else "")
    return f"{said or type(error).__name__}"[:200].rstrip(". ") + "."


def _unpickled(path: Path, trust: bool) -> Any:
    return _attempt(path, partial(torch.load, str(path), map_location="cpu", weights_only=not trust))


def _safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise SpaError(f"reading {str(path)!r} needs safetensors: pip install safetensors.") from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ModelError(f"cannot read {str(path)!r}: {_line(error)} Save or copy it again.") from error


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """Keep ``torch.export.load`` from its fallback, which is to unpickle anything."""
    load = torch.load

    def safe(*args: Any, **options: Any) -> Any:
        return load(*args, **{**options, "weights_only": True})

    with patch.object(torch, "load", safe):
        yield


def _weights(content: Any, name: str) -> Mapping[str, torch.Tensor] | nn.Module:
    if isinstance(content, nn.Module) or _is_state(content):
        return content
    if isinstance(content, Mapping):
        for key in _CONTAINERS:
            if isinstance(content.get(key), nn.Module) or _is_state(content.get(key)):
                return content[key]
        said = f"its entries are {', '.join(map(str, list(content)[:6]))}"
    else:
        said = f"it holds a {type(content).__name__}"
    raise ModelError(f"{name} has no state_dict: {said}. Save model.state_dict() with torch.save.")


def _is_state(content: Any) -> bool:
    return isinstance(content, Mapping) and bool(content) and all(torch.is_tensor(v) for v in content.values())


def _made(factory: Factory) -> nn.Module:
    """Return the network that the factory makes."""
    name = factory if isinstance(factory, str) else getattr(factory, "__name__", "factory")
    make = _imported(factory) if isinstance(factory, str) else factory
    try:
        module = make()
    except Exception as error:  # the user's own code
        raise PlanError(
            f"factory {name}: {type(error).__name__}: {_line(error)} It is called without arguments."
        ) from error
    if not isinstance(module, nn.Module):
        raise PlanError(f"factory {name} makes a {type(module).__name__}, not an nn.Module. Name one that does.")
    return module


def _imported(factory: str) -> Callable[[], Any]:
    """Import what ``package.module:name`` stands for; the working directory is searched, too."""
    place, _, path = factory.partition(":")
    if not place or not path:
        raise PlanError(f"factory {factory!r} is not of the form package.module:function. Write it so.")
    sys.path.insert(0, os.getcwd())
    try:
        target: Any = importlib.import_module(place)
        for part in path.split("."):
            target = getattr(target, part)
    except (ImportError, AttributeError) as error:
        raise PlanError(f"factory {factory!r}: {_line(error)} Check the name and the working directory.") from error
    finally:
        sys.path.remove(os.getcwd())
    return target


def _fitting(state: Mapping[str, torch.Tensor], module: nn.Module) -> tuple[Mapping[str, torch.Tensor], str]:
    """Name weights as the module does: wrappers (DataParallel, Lightning, torch.compile) put a prefix before."""
    own = module.state_dict().keys()
    prefix = next(iter(state)).partition(".")[0] + "."
    if own & state.keys() or not all(key.startswith(prefix) for key in state):
        return state, ""
    return {k.removeprefix(prefix): v for k, v in state.items()}, f"the checkpoint's prefix {prefix!r} was removed"
