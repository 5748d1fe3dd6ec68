"""The command line: commands in :mod:`spa.cli.app`, what their options are made of in :mod:`spa.cli.options`."""

from __future__ import annotations

from spa.cli.app import app, main

__all__ = ["app", "main"]
