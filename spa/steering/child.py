"""Metrics that run in a process of their own: a command, or a function of a module in a fresh interpreter.

What they print is kept in files, since a pipe that a grandchild holds open would never end. A process that takes too
long is killed with all that it started.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from spa.errors import MetricError
from spa.model.writing import draft_folder
from spa.running import commands
from spa.running.commands import Role, quoted, run_command

ROLE = Role("the metric", "Give it longer (--evaluate-seconds), or fewer samples.")
_SERVE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from spa.steering.child import serve; serve(*sys.argv[2:])"
)


def by_command(command: str, model: Path, seconds: float) -> Any:
    """Run a command on a model and return what it prints: JSON, or the last number.

    Raises:
        MetricError: it cannot be started, fails, takes too long, or prints no number; the message ends with its output.
    """
    return commands.by_command(command, model, seconds, ROLE)


def by_function(name: str, model: Path, seconds: float) -> Any:
    """Call ``module:function`` on a model's path in a fresh interpreter, and return what it returns.

    Args:
        name: of the function; modules of the working folder are found, too.
        model: the file.
        seconds: the limit.

    Raises:
        MetricError: it cannot be imported, raises, takes too long, or returns what is no number; the message ends with
            its output.
    """
    with draft_folder(Path(tempfile.gettempdir())) as folder:
        answer = folder / "answer.json"
        paths = ["", *(path for path in sys.path if path)]
        command = [sys.executable, "-c", _SERVE, json.dumps(paths), name, str(model), str(answer)]
        printed = run_command(command, name, seconds, ROLE)
        if not answer.exists():
            raise MetricError(f"the metric {name!r} ended its process before it returned.{quoted(printed)}")
        return json.loads(answer.read_text(encoding="utf-8"))


def serve(name: str, model: str, answer: str) -> None:
    """Call ``module:function`` on a model, and write what it returns to a file; for :func:`by_function` alone."""
    from importlib import import_module

    module, _, attribute = name.partition(":")
    value = numbers_in(getattr(import_module(module), attribute)(model))
    Path(answer).write_text(json.dumps(value), encoding="utf-8")


def numbers_in(value: Any) -> Any:
    """Return a number as a float, and a mapping of such by name; anything else by what it looks like, for a message.

    >>> numbers_in({"top1": 97, "set": "test"})
    {'top1': 97.0, 'set': "'test'"}
    """
    if isinstance(value, Mapping):
        return {str(key): numbers_in(item) for key, item in value.items()}
    if not isinstance(value, str | bytes | bool) and value is not None:
        with suppress(TypeError, ValueError, RuntimeError, IndexError):  # of numpy, of frameworks' tensors
            return float(value)
    return repr(value)[:200]
