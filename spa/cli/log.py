"""The library's log on a terminal: what ``-v`` and ``-vv`` show of it."""

from __future__ import annotations

import logging
import sys

from spa.errors import printable

LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)  # without -v, with it, with -vv


class _OnStandardError(logging.Handler):
    """A handler that writes where standard error is at that moment, which a progress bar redirects."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(printable(self.format(record)) + "\n")


def start_logging(verbose: int, quiet: bool = False) -> None:
    """Show records of ``spa`` on standard error.

    Args:
        verbose: how often ``-v`` was given.
        quiet: whether ``-q`` was.
    """
    logger = logging.getLogger("spa")
    for handler in [h for h in logger.handlers if isinstance(h, _OnStandardError)]:
        logger.removeHandler(handler)
    level = logging.ERROR if quiet else LEVELS[min(verbose, len(LEVELS) - 1)]
    handler = _OnStandardError()
    handler.setFormatter(logging.Formatter("spa: %(message)s" if level > logging.DEBUG else "%(name)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(level)
