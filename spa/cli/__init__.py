"""The command line: commands in :mod:`spa.cli.commands`, what their options are made of in :mod:`spa.cli.options`."""

from __future__ import annotations

from spa.cli.commands import app, main

__all__ = ["app", "main"]
