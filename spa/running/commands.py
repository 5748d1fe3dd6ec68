"""Commands of users in processes of their own: their end, their limit of time, and the number that they print."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spa.errors import MetricError, printable

MODEL = "{model}"  # stands for the model's path in a command
SHOWN = 2000  # characters of output in a message
READ = 1 << 20  # bytes of output that are searched for a number
NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|nan|inf(?:inity)?)\b", re.IGNORECASE
)


@dataclass(frozen=True)
class Role:
    """The part that a command plays, for messages.

    Attributes:
        name: such as "the metric".
        slow: the remedy where it takes too long.
    """

    name: str
    slow: str


def by_command(command: str, model: Path, seconds: float, role: Role) -> Any:
    """Run a command on a model and return what it prints: JSON, or the last number.

    Args:
        command: with ``{model}`` in it, which becomes the path; no shell reads it.
        model: the file.
        seconds: the limit.
        role: what messages call it.

    Raises:
        MetricError: it cannot be started, fails, takes too long, or prints no number; the message ends with its output.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise MetricError(f"{role.name} {command!r} is no command: {error}. Check its quotation marks.") from error
    printed = run_command([word.replace(MODEL, str(model)) for word in words], command, seconds, role)
    value = printed_value(printed)
    if value is None:
        raise MetricError(f"{role.name} {command!r} prints no number. Print one, or JSON, last.{quoted(printed)}")
    return value


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


def run_command(command: Sequence[str], name: str, seconds: float, role: Role) -> str:
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
            raise MetricError(f"{role.name} {name!r} cannot be started: {reason}. Check the command.") from error
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
    said = quoted(f"{printed}\n{complaints}".strip())
    if code is None:
        raise MetricError(f"{role.name} {name!r} has not come to an end after {seconds:g} s. {role.slow}{said}")
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
    raise MetricError(f"{role.name} {name!r} {how}. Run it on the model by hand.{said}")


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


def quoted(text: str) -> str:
    """Return the end of what was printed, as the end of a message; a sentence where it is nothing."""
    text = text.strip()
    if not text:
        return " It printed nothing."
    start = "…" if len(text) > SHOWN else ""
    return f" It printed:\n{start}{printable(text[-SHOWN:])}"
