"""Break the code on purpose and count how often the tests notice: mutants of the modules that everything rests on.

    pip install cosmic-ray
    python benchmarks/mutation.py [MODULE ...] [--most 40] [--seed 0] [--minutes 5] [--again]

The mutants are cosmic-ray's, one per place and kind (it offers eleven other operators for each ``+``), without those in
annotations, and two kinds that it lacks: a call whose result nobody uses left out, a function that returns nothing
emptied. Each is written into a copy of the repository, and a forked process, which has numpy, onnx, onnxruntime and
pytest imported already, runs the tests that mirror the module until one fails. cosmic-ray's own executor copes with
this repository, too, but starts an interpreter for each mutant; mutmut 3 leaves out decorated functions, which all
transfer functions of ``spa/zero`` are.

Writes ``benchmarks/results/mutation.json`` and ``mutation.md``. The words on survivors are written by hand, in the
former, and carried over; modules that are not asked for stay as they were.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "mutation.json"
_BUDGET = "not every_criterion and not within_one_per_cent and not monotonic and not any_budget and not never_keeps"
_BUDGET_SLOW = "never_keeps or any_budget"  # tests/widths/test_latency.py takes times: not beside other work
_ZERO = "not dense_network and not shipped and not zeros_anywhere and not said_to_be_known"
_FUZZED = "zeros_anywhere and (lstm or shufflenet or grouped)"


@dataclass(frozen=True)
class Tests:
    """The tests that have to notice a module's mutants, as arguments of pytest.

    Attributes:
        first: the tests that mirror the module, without slow ones.
        then: what is run on mutants that survive those.
    """

    first: tuple[str, ...]
    then: tuple[str, ...]


_ALGEBRA = (
    "tests/algebra/test_notation.py",
    "tests/algebra/test_absent_operands.py",
    "tests/algebra/test_output_shapes.py",
)
_RULES = ("tests/rules/test_linear.py", "tests/rules/test_layout.py", "tests/rules/test_attention.py")
_SURGERY = Tests(("tests/surgery/test_surgery.py",), ("tests/surgery/test_oracle.py", *_RULES))
_ZEROS = Tests(("tests/zero", "-k", _ZERO), ("tests/zero", "-k", _FUZZED))
_WIDTHS = Tests(
    ("tests/widths/test_budget.py", "-k", _BUDGET),
    ("tests/widths/test_equal.py", "tests/widths/test_budget.py", "-k", f"test_equal or {_BUDGET_SLOW}"),
)
_READERS = Tests(("tests/obspa",), ())
MODULES: dict[str, Tests] = {
    "spa/algebra/axes.py": Tests(("tests/algebra/test_axes.py",), _RULES),
    "spa/algebra/notation.py": Tests(_ALGEBRA, _RULES),
    "spa/algebra/grammar.py": Tests(_ALGEBRA, _RULES),
    "spa/surgery/apply.py": _SURGERY,
    "spa/surgery/integers.py": _SURGERY,
    "spa/zero/compaction.py": _ZEROS,
    "spa/zero/facts.py": _ZEROS,
    "spa/zero/known.py": _ZEROS,
    "spa/zero/needs.py": _ZEROS,
    "spa/zero/transfer/elements.py": _ZEROS,
    "spa/zero/transfer/layout.py": _ZEROS,
    "spa/zero/transfer/normalisations.py": _ZEROS,
    "spa/zero/transfer/products.py": _ZEROS,
    "spa/zero/transfer/recurrent.py": _ZEROS,
    "spa/zero/transfer/reductions.py": _ZEROS,
    "spa/widths/budget.py": _WIDTHS,
    "spa/widths/ladders.py": _WIDTHS,
    "spa/widths/ranking.py": _WIDTHS,
    "spa/widths/allocation.py": Tests(("tests/widths/test_allocation.py",), ("tests/obspa/test_obspa.py",)),
    "spa/obspa/refit.py": _READERS,
    "spa/obspa/readers/base.py": _READERS,
    "spa/obspa/readers/linear.py": _READERS,
    "spa/obspa/readers/products.py": _READERS,
    "spa/obspa/readers/recurrent.py": _READERS,
    "spa/obspa/readers/tied.py": _READERS,
}
_FAILED = "failed.txt"  # where a forked process leaves the name of the test that failed
COPIED = ("spa", "tests", "models", "importers", "exporters", "pyproject.toml", "benchmarks")


@dataclass(frozen=True)
class Mutant:
    """A changed module.

    Attributes:
        line: the first line that differs, counted from one.
        before: that line; of an emptied function the first in its body.
        after: what stands there instead.
        source: the whole module.
    """

    line: int
    before: str
    after: str
    source: str


def mutants(source: str, seed: int) -> list[Mutant]:
    """Return all mutants of a module, in the order of their lines."""
    found = {m.source: m for m in (*_by_cosmic_ray(source, seed), *_emptied(source)) if m is not None}
    return sorted(found.values(), key=lambda m: (m.line, m.after))


def _by_cosmic_ray(source: str, seed: int) -> Iterator[Mutant | None]:
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    tree, skipped = get_ast(source), _annotations(source)
    choices: dict[tuple[str, tuple[int, int]], list[tuple[str, int]]] = {}
    for name in operator_names():
        operator_class = get_operator(name)
        if operator_class.arguments():
            continue
        places = (p for node in ast_nodes(tree) for p in operator_class().mutation_positions(node))
        for occurrence, (start, _) in enumerate(places):
            if not any(low <= start < high for low, high in skipped):
                choices.setdefault((name.split("_")[0], start), []).append((name, occurrence))
    rng = random.Random(seed)
    for _, offered in sorted(choices.items()):
        name, occurrence = rng.choice(offered)
        yield _mutant(source, mutate_code(source, get_operator(name)(), occurrence))


def _annotations(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Find where annotations begin and end, as (line, column)."""
    found = []
    for node in ast.walk(ast.parse(source)):
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if isinstance(part, ast.expr):
                found.append(((part.lineno, part.col_offset), (part.end_lineno or 0, part.end_col_offset or 0)))
    return found


def _emptied(source: str) -> Iterator[Mutant | None]:
    """Leave out calls whose result nobody uses, and empty functions that return nothing."""
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        body = [node] if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) else []
        if isinstance(node, ast.FunctionDef) and isinstance(node.returns, ast.Constant) and node.returns.value is None:
            body = [s for s in node.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
        if body:
            first, last = body[0].lineno - 1, body[-1].end_lineno or 0
            indent = " " * body[0].col_offset
            yield _mutant(source, "".join([*lines[:first], f"{indent}pass\n", *lines[last:]]))


def _mutant(source: str, changed: str | None) -> Mutant | None:
    if changed is None or changed == source:
        return None
    with contextlib.suppress(SyntaxError):
        compile(changed, "mutant", "exec")
        old, new = source.splitlines(), changed.splitlines()
        at = next(i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b)
        return Mutant(at + 1, old[at].strip(), new[at].strip(), changed)
    return None


def run_tests(copy: Path, tests: tuple[str, ...], limit: float, compiled: bool = False) -> str:
    """Run the tests in a forked process; return ``passed``, ``timed out``, or what failed first.

    Args:
        copy: the folder of the copied repository.
        tests: arguments of pytest.
        limit: seconds after which the process is ended.
        compiled: whether to keep what is compiled; never of a mutant, for a later one could be taken for it.
    """
    child = os.fork()
    if not child:
        _child(copy, tests, compiled)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return "passed" if status == 0 else (copy / _FAILED).read_text(encoding="utf-8")
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timed out"


class _Noting:
    """A plugin of pytest that notes which test failed."""

    def __init__(self, file: Path) -> None:
        self.file = file
        file.write_text("the import", encoding="utf-8")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.file.write_text(report.nodeid, encoding="utf-8")


def _child(copy: Path, tests: tuple[str, ...], compiled: bool) -> None:
    import pytest

    os.setpgrp()
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    sys.dont_write_bytecode = not compiled
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    options = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", "--no-header", "--tb=no"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what is imported already
    code = 1
    try:
        code = int(pytest.main([*options, *tests], plugins=[_Noting(copy / _FAILED)]))
    finally:
        os._exit(code)


def preload() -> None:
    """Import what every test needs, but nothing of ours."""
    import hypothesis
    import networkx
    import numpy
    import onnx.checker
    import onnx.reference
    import onnx.shape_inference
    import onnxruntime
    import pytest

    assert all((hypothesis, networkx, numpy, onnx, onnxruntime, pytest))
    if any(name == "spa" or name.startswith("spa.") for name in sys.modules):
        raise SystemExit("spa is imported already, so that no mutant would be seen.")


def _limit(copy: Path, tests: tuple[str, ...]) -> float:
    """Return the seconds that tests of a mutant may take; they must pass without any mutation."""
    start = time.monotonic()
    if (clean := run_tests(copy, tests, 900, compiled=True)) != "passed":
        raise SystemExit(f"{' '.join(tests)} {clean} without any mutation")
    return 10 + 4 * (time.monotonic() - start)


def tried(
    path: str, most: int, seed: int, copy: Path, minutes: float, again: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Try mutants of a module; return how many it has, how many were tried, and which survived.

    Args:
        path: of the module.
        most: how many of its mutants to try.
        seed: of the choice.
        copy: the folder of the copied repository.
        minutes: after which no new mutant is tried.
        again: what is on record of the module, to try those of its survivors that are not called equivalent.
    """
    source = (copy / path).read_text(encoding="utf-8")
    every = mutants(source, again["seed"] if again else seed)
    survivors: list[dict[str, Any]] = []
    chosen = random.Random(seed).sample(every, min(most, len(every)))
    if again:
        survivors = [s for s in again["survivors"] if s.get("word", "").startswith("equivalent")]
        known = {(m["line"], m["was"], m["became"]) for m in again["survivors"] if m not in survivors}
        chosen = [m for m in every if (m.line, m.before, m.after) in known]
    first, then = (path, *MODULES[path].first), MODULES[path].then  # the module's own examples, too
    limits = {first: _limit(copy, first)}
    print(f"{path}: {len(chosen)} of {len(every)} mutants", flush=True)
    count, end = 0, time.monotonic() + 60 * minutes
    for mutant in chosen:
        if time.monotonic() > end:
            break
        (copy / path).write_text(mutant.source, encoding="utf-8")
        result = run_tests(copy, first, limits[first])
        if result == "passed" and then:
            if then not in limits:
                (copy / path).write_text(source, encoding="utf-8")
                limits[then] = _limit(copy, then)
                (copy / path).write_text(mutant.source, encoding="utf-8")
            result = run_tests(copy, then, limits[then])
        count += 1
        if result == "passed" or again:
            killer = "tests that do not end" if result == "timed out" else result.split("[")[0].split("/")[-1]
            word = {} if result == "passed" else {"word": f"killed now by {killer}"}
            survivors.append({"line": mutant.line, "was": mutant.before, "became": mutant.after} | word)
            print(f"  {path}:{mutant.line}: {mutant.before}  ->  {mutant.after}  {word}", flush=True)
    (copy / path).write_text(source, encoding="utf-8")
    survivors.sort(key=lambda s: (s["line"], s["became"]))
    if again:
        return again | {"survivors": survivors}
    return {"mutants": len(every), "tried": count, "seed": seed, "survivors": survivors}


def _cell(text: str) -> str:
    return "`` " + text.replace("|", "\\|") + " ``"


def report(results: dict[str, Any]) -> str:
    """Write the table of modules, and the survivors of each."""
    lines = [
        "# Mutants of the modules that everything rests on",
        "",
        "By `benchmarks/mutation.py`; its docstring says what is tried and how. The tried are a random",
        "sample, cut short where a module's minutes were over. What has been done about a survivor since is in its",
        "word; where a function was emptied, the line is the first of its body.",
        "",
        "| module | mutants | tried | share | killed | survived | seed |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for path, found in results.items():
        left = len(found["survivors"])
        share = f"{found['tried'] / found['mutants']:.0%}"
        numbers = (found["mutants"], found["tried"], share, found["tried"] - left, left, found["seed"])
        lines.append(f"| `{path}` | " + " | ".join(map(str, numbers)) + " |")
    for path, found in results.items():
        if found["survivors"]:
            lines += ["", f"## {path}", "", "| line | was | became | word |", "| --- | --- | --- | --- |"]
            for m in found["survivors"]:
                lines.append(f"| {m['line']} | {_cell(m['was'])} | {_cell(m['became'])} | {m.get('word', '')} |")
    return "\n".join(lines) + "\n"


def recorded(out: Path) -> dict[str, Any]:
    """Read the results so far, by module."""
    return dict(json.loads(out.read_text(encoding="utf-8"))) if out.exists() else {}


def save(path: str, found: dict[str, Any], out: Path) -> None:
    """Enter a module's results, with the words that are known of its survivors."""
    results = recorded(out)
    words = {(m["was"], m["became"]): m.get("word", "") for m in results.get(path, {}).get("survivors", ())}
    for survivor in found["survivors"]:
        word = words.get((survivor["was"], survivor["became"]), "")
        if "word" not in survivor and word and not word.startswith("killed"):
            survivor["word"] = word
    results = {p: found if p == path else results[p] for p in MODULES if p == path or p in results}
    out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(report(results), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", default=list(MODULES), help="paths of modules; all by default")
    parser.add_argument("--most", type=int, default=40, help="how many mutants of each module to try")
    parser.add_argument("--seed", type=int, default=0, help="of the sample, and of the mutant chosen at each place")
    parser.add_argument("--minutes", type=float, default=5.0, help="of each module, after which no new mutant is tried")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--again", action="store_true", help="try the survivors on record, and say what kills them now")
    asked = parser.parse_args()
    preload()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
            else:
                shutil.copy(ROOT / name, copy / name)
        for path in asked.modules:
            again = recorded(asked.out)[path] if asked.again else None
            save(path, tried(path, asked.most, asked.seed, copy, asked.minutes, again), asked.out)


if __name__ == "__main__":
    main()
