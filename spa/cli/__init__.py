"""The command line: commands in :mod:`spa.cli.commands`, made of the options in :mod:`spa.cli.options`."""

from __future__ import annotations

from spa.cli import _collector  # noqa: F401 # imported first, for its effect on what follows
from spa.cli.commands import app, main

__all__ = ["app", "main"]
