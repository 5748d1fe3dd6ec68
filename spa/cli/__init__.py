"""The command line: commands in ``commands`` and ``steering``, made of the options in ``options``."""

from __future__ import annotations

from spa.cli import (
    _collector,  # noqa: F401 # imported first, for its effect on what follows
    steering,  # noqa: F401 # its commands join those of the next
)
from spa.cli.commands import app, main

__all__ = ["app", "main"]
