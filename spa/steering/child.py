"""Metrics that run in a process of their own: a command, or a function of a module in a fresh interpreter.

What they print is kept in files, since a pipe that a grandchild holds open would never end. A process that takes too
long is killed with all that it started.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from spa.errors import MetricError, printable
from spa.model.writing import draft_folder

MODEL = "{model}"  # stands for the model's path in a command
SHOWN = 2000  # characters of output in a message
READ = 1 << 20  # bytes of output that are searched for a number
NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|nan|inf(?:inity)?)\b", re.IGNORECASE
)
_SERVE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from spa.steering.child import serve; serve(*sys.argv[2:])"
)


def by_command(command: str, model: Path, seconds: float) -> Any:
    """Run a command on a model and return what it prints: JSON, or the last number.

    Args:
        command: with ``{model}`` in it, which becomes the path; no shell reads it.
        model: the file.
        seconds: the limit.

    Raises:
        MetricError: it cannot be started, fails, takes too long, or prints no number; the message ends with its output.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise MetricError(f"the metric {command!r} is no command: {error}. Check its quotation marks.") from error
    printed = _run([word.replace(MODEL, str(model)) for word in words], command, seconds)
    value = printed_value(printed)
    if value is None:
        raise MetricError(f"the metric {command!r} prints no number. Print one, or JSON, last.{_quoted(printed)}")
    return value


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
        printed = _run(command, name, seconds)
        if not answer.exists():
            raise MetricError(f"the metric {name!r} ended its process before it returned.{_quoted(printed)}")
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


def printed_value(text: str) -> Any:
    r"""Return the JSON that a text is or ends with, or else its last number; None without one.

    >>> printed_value("loading 3 files\n{\"top1\": 97.5}\n"), printed_value("top-1: 97.5 %"), printed_value("done")
    ({'top1': 97.5}, 97.5, None)
    """
    lines = [line for line in text.splitlines() if line.strip()]
    for candidate in (text, lines[-1] if lines else ""):
        with suppress(ValueError, RecursionError):
            value = json.loads(candidate)
            if isinstance(value, dict | int | float) and not isinstance(value, bool):
                return value
    found = NUMBER.findall(text)
    return float(found[-1]) if found else None


def _run(command: Sequence[str], name: str, seconds: float) -> str:
    """Run a command to its end and return what it prints.

    Raises:
        MetricError: it cannot be started, fails, or takes too long.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            process = subprocess.Popen(
                list(command), stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
            )
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise MetricError(f"the metric {name!r} cannot be started: {reason}. Check the command.") from error
        try:
            code: int | None = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                _kill(process)
        printed, complaints = _tail(out), _tail(err)
    if code == 0:
        return printed
    said = _quoted(f"{printed}\n{complaints}".strip())
    if code is None:
        raise MetricError(
            f"the metric {name!r} has not come to an end after {seconds:g} s. Give it longer "
            f"(--evaluate-seconds), or fewer samples.{said}"
        )
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
    raise MetricError(f"the metric {name!r} {how}. Run it on the model by hand.{said}")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and those that it started."""
    with suppress(OSError):
        if sys.platform == "win32":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(file: Any) -> str:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - READ))
    return file.read().decode(errors="replace")


def _quoted(text: str) -> str:
    """Return the end of what was printed, as the end of a message; a sentence where it is nothing."""
    text = text.strip()
    if not text:
        return " It printed nothing."
    start = "…" if len(text) > SHOWN else ""
    return f" It printed:\n{start}{printable(text[-SHOWN:])}"
