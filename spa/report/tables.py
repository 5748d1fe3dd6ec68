"""The options of a request and the criteria as Markdown tables, for README and the documentation."""

from __future__ import annotations

import spa.obspa.criterion
import spa.zero.criterion  # noqa: F401 # both register a criterion
from spa.criteria import registered
from spa.request import options
from spa.request.option import default_of, flag_of


def options_table() -> str:
    """Return the options that the command line takes.

    >>> next(line for line in options_table().splitlines() if "--seed" in line)
    '| `--seed` | the seed of everything random | 0 |'
    """
    rows = ["| option of `prune` | meaning | default |", "| --- | --- | --- |"]
    for _, about in options():
        if about.metadata["kind"].on_file:
            rows.append(f"| `{flag_of(about)}` | {about.metadata['help']} | {default_of(about)} |")
    return "\n".join(rows) + "\n"


def criteria_table() -> str:
    """Return the registered criteria: what each scores, what it needs beside weights, and its source.

    >>> criteria_table().splitlines()[0]
    '| criterion | what it scores | needs beside weights | source |'
    """
    rows = ["| criterion | what it scores | needs beside weights | source |", "| --- | --- | --- | --- |"]
    for name, criterion in registered().items():
        needs = ", ".join(sorted(need.replace("_", " ") for need in criterion.needs - {"weights"}))
        rows.append(f"| `{name}` | {criterion.summary.rstrip('.')} | {needs} | {criterion.source} |")
    return "\n".join(rows) + "\n"
