"""The reference pages that are made from the code say what the code says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

import spa
from spa import errors, rules

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gen_reference", DOCS / "gen_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_name_of_the_package_is_documented(reference: ModuleType) -> None:
    documented = set(re.findall(r"^::: spa\.(\w+)$", reference.api(), re.M))
    assert documented == {name for name in spa.__all__ if not name.startswith("_")}


def test_every_command_and_option_is_listed_with_its_default(reference: ModuleType) -> None:
    page = reference.cli()
    for command in ("prune", "prove", "inspect", "verify", "bench", "export", "convert"):
        assert f"## spa {command}\n" in page
    assert re.search(r"^\| `--output`, `-o` \| [^|]+ \| required \|$", page, re.M)
    assert re.search(r"^\|  \| `gradients` \| [^|]+ \|  \|$", reference.options(), re.M)
    assert re.search(r"^\| `obspa` \| [^|]+ \| inputs \| [^|]+ \|$", reference.criteria(), re.M)
    assert re.search(r"^\| `--samples` \| `samples` \| [^|]+ \| `512` \|$", reference.options(), re.M)
    assert re.search(r"^\| `--plan-out` \| [^|]+ \|  \|$", reference.options(), re.M)


def test_every_exit_code_has_a_line(reference: ModuleType) -> None:
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", reference.exit_codes(), re.M)}
    raised = {getattr(errors, name).exit_code for name in errors.__all__}
    assert codes == raised | {0, 2, 130}


def test_every_operator_is_listed_once(reference: ModuleType) -> None:
    with_rule, _, without = reference.operators().partition("## Listed as unsupported")
    found = re.findall(
        r"`([\w.:]+)`", "\n".join(line.split(" | ")[0] for line in with_rule.splitlines() if "|" in line)
    )
    assert sorted(found) == sorted(rules.supported())
    found = re.findall(r"`([\w.:]+)`", "\n".join(line.split(" | ")[0] for line in without.splitlines() if "|" in line))
    assert sorted(found) == sorted(rules.barriers())


def test_every_decision_record_is_in_the_list(reference: ModuleType) -> None:
    linked = re.findall(r"\(\.\./decisions/([^)]+)\)", reference.decisions())
    assert linked == sorted(p.name for p in (DOCS / "decisions").glob("*.md"))
