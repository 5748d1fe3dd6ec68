"""The end of a command that fails: one message and a documented exit code, as JSON where the report would be."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

import typer

from spa._version import __version__
from spa.errors import InvariantError, SpaError, printable

# What typer raises for a wrong command line; of late it has a click of its own.
_UsageError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


class Interrupted(SpaError):
    """The user has stopped the program."""

    exit_code = 130

    def __init__(self) -> None:
        super().__init__("interrupted; no half-written file is left")


def run(app: Callable[..., Any]) -> int:
    """Run a program on the command line, and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a name may hold what the terminal has no letter for
    as_json = "--json" in sys.argv[1:]
    try:
        return int(app(standalone_mode=not as_json) or 0)
    except SystemExit as done:  # of typer, which has said why
        return done.code if isinstance(done.code, int) else 1
    except _UsageError as error:
        return _fail("UsageError", error.format_message(), error.exit_code, as_json)
    except SpaError as error:
        return _fail(type(error).__name__, str(error), error.exit_code, as_json)
    except MemoryError:
        message = "there is not enough memory. Ask for fewer --samples, or use a machine with more."
        return _fail("MemoryError", message, SpaError.exit_code, as_json)
    except Exception as error:  # whatever nobody foresaw is a bug of ours, and has its own exit code
        sys.stderr.write(printable(traceback.format_exc()))
        message = f"this is a bug in spa {__version__}. Please report it with the lines above."
        return _fail(type(error).__name__, message, InvariantError.exit_code, as_json)


def _fail(kind: str, message: str, code: int, as_json: bool) -> int:
    """Say why a command failed, on standard error or, as JSON, on standard output; return the exit code."""
    if as_json:
        failure = {"kind": kind, "message": message, "exit_code": code}
        sys.stdout.write(json.dumps({"error": failure}, indent=1) + "\n")
    else:
        said = "" if code in (Interrupted.exit_code, InvariantError.exit_code) else "error: "
        sys.stderr.write(f"spa: {said}{printable(message)}\n")
    return code
