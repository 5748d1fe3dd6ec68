"""The documentation's examples run, and print what the pages say they print.

The blocks of a page run in order, in one folder and one namespace: ``python`` is executed, and every line of ``console``
that starts with ``$ spa`` is a call of the command line. A ``text`` block that follows at once is the expected output, in
which ``...`` stands for anything; ``<!-- figures vary -->`` above it lets any number stand for any other. ``<!-- not run:
reason -->`` above a block keeps it from running. Blocks that import a framework run where it is installed.
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import io
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from spa.criteria import registry
from spa.request import criterion_names

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FRAMEWORKS = {"torch": "onnxscript", "keras": "tf2onnx", "tensorflow": "tf2onnx", "jax": "jax2onnx", "flax": "jax2onnx"}
PAGES = sorted(p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md") if "decisions" not in p.parts)
SLOW = ("guides/from-keras.md", "guides/from-jax.md")
_BLOCK = re.compile(
    r"(?:<!-- (?:not run: (?P<reason>.+?)|(?P<vary>figures vary)) -->\n)?^```(?P<language>\w+)\n(?P<source>.*?)^```$",
    re.M | re.S,
)


@dataclass(frozen=True)
class Block:
    """One block of code of a page, and what it is to print."""

    language: str
    source: str
    line: int
    expected: str | None = None
    figures_vary: bool = False


def blocks(text: str) -> Iterator[Block]:
    """The blocks of a page that run."""
    found = list(_BLOCK.finditer(text))
    for at, match in enumerate(found):
        if match["language"] not in ("python", "console") or match["reason"]:
            continue
        after = found[at + 1] if at + 1 < len(found) else None
        follows = after is not None and after["language"] == "text" and not text[match.end() : after.start()].strip()
        line = text.count("\n", 0, match.start("source")) + 1
        expected = after["source"] if after is not None and follows else None
        vary = expected is not None and after is not None and after["vary"] is not None
        yield Block(match["language"], match["source"], line, expected, vary)


def missing(source: str) -> str | None:
    """A framework that Python code imports and that is not installed, or None."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    needed = sorted({FRAMEWORKS[n] for n in names & FRAMEWORKS.keys()} | (names & FRAMEWORKS.keys()))
    return next((n for n in needed if find_spec(n) is None), None)


def run_python(block: Block, page: str, namespace: dict[str, Any]) -> str:
    """What a block prints; lines of a traceback are the page's."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile("\n" * (block.line - 1) + block.source, str(DOCS / page), "exec"), namespace)
    return printed.getvalue()


def run_console(block: Block, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the calls of a block print on either stream, with the exit code where it is none of success."""
    from spa import cli
    from spa.cli import bars

    monkeypatch.setattr(bars, "SECONDS_PER_LINE", float("inf"))  # how long a command takes is not the page's
    printed = io.StringIO()
    source = block.source.replace("\\\n", " ")
    for line in (line[2:] for line in source.splitlines() if line.startswith("$ ")):
        assert line.startswith("spa "), f"line {block.line}: only calls of spa run; mark others with 'not run'"
        monkeypatch.setattr(sys, "argv", shlex.split(line, comments=True))
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                cli.main()
            except SystemExit as stop:
                if stop.code:
                    printed.write(f"exit code {stop.code}\n")
    return printed.getvalue()


def agrees(expected: str, actual: str, figures_vary: bool = False) -> bool:
    """Whether an output is as a page shows it; the width of lines does not matter, and ``...`` is anything."""
    if figures_vary:
        expected, actual = (re.sub(r"\d[\d.,]*", "0", text) for text in (expected, actual))
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    return doctest.OutputChecker().check_output(expected, actual, flags)


def cases() -> list[Any]:
    return [pytest.param(page, marks=pytest.mark.slow if page in SLOW else ()) for page in PAGES]


# TensorFlow 2.21 and tf2onnx 1.17 call what numpy 2 deprecates, and protobuf types without __module__.
@pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning")
@pytest.mark.parametrize("page", cases())
def test_the_examples_of_a_page_do_what_it_says(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = list(blocks((DOCS / page).read_text(encoding="utf-8")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    criterion_names()  # registers obspa and zero: what registers while a page runs goes with the page, and for good
    monkeypatch.setattr(registry, "_CRITERIA", dict(registry._CRITERIA))
    if found:
        (tmp_path / "models").mkdir()
        for file in (*(ROOT / "models").glob("*.onnx"), *(ROOT / "models").glob("*.npz")):
            shutil.copy(file, tmp_path / "models")
    namespace: dict[str, Any] = {"__name__": "snippet"}
    for block in found:
        if block.language == "python" and (framework := missing(block.source)):
            pytest.skip(f"line {block.line} needs {framework}, which is not installed; what is before it ran")
        run = run_python(block, page, namespace) if block.language == "python" else run_console(block, monkeypatch)
        if block.language == "console" and block.expected is None:
            assert "exit code" not in run, f"line {block.line}: {run}"
        if block.expected is not None:
            assert agrees(block.expected, run, block.figures_vary), f"line {block.line} printed:\n{run}"


def test_a_wrong_output_and_a_failing_command_are_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = "```python\nprint(1 + 1)\n```\n\n```text\n3\n```\n\n<!-- not run: it is old -->\n```python\nraise\n```\n"
    (only,) = blocks(page)
    assert only.expected == "3\n"
    assert not agrees(only.expected, run_python(only, "page.md", {}))
    assert agrees("...2\n", run_python(only, "page.md", {}))
    assert agrees(only.expected, "5\n", figures_vary=True)
    assert not agrees(only.expected, "five\n", figures_vary=True)
    monkeypatch.chdir(tmp_path)
    assert "exit code 6" in run_console(Block("console", "$ spa inspect missing.onnx\n", 1), monkeypatch)
