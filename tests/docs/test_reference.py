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


def load(name: str) -> ModuleType:
    """A module of the folder of the documentation, which is no package."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    return load("gen_reference")


@pytest.fixture(scope="module")
def roles() -> ModuleType:
    pytest.importorskip("griffe", reason="griffe comes with the extra docs")
    return load("griffe_roles")


def test_every_public_name_of_the_package_is_documented(reference: ModuleType) -> None:
    documented = set(re.findall(r"^::: spa\.(\w+)$", reference.api(), re.M))
    assert documented == {name for name in spa.__all__ if not name.startswith("_")}


def test_every_command_and_option_is_listed_with_its_default(reference: ModuleType) -> None:
    page = reference.cli()
    for command in (
        "prune",
        "prove",
        "inspect",
        "verify",
        "bench",
        "export",
        "convert",
        "sweep",
        "sensitivity",
        "doctor",
        "layers",
    ):
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


DOCSTRING = """Add one.

>>> one = [
...     1]
>>> one
[1]

Args:
    x: a number.

        >>> x[0][1]
        Traceback (most recent call last):
        TypeError: [0][1]
    y: another, `>>>` in text.

```python
>>> not_a_doctest

>>> still
```

>>> last"""
FENCED = """Add one.

```pycon
>>> one = [
...     1]
>>> one
[1]
```

Args:
    x: a number.

        ```pycon
        >>> x[0][1]
        Traceback (most recent call last):
        TypeError: [0][1]
        ```
    y: another, `>>>` in text.

```python
>>> not_a_doctest

>>> still
```

```pycon
>>> last
```"""


def test_doctests_become_fenced_blocks_where_they_stand(roles: ModuleType) -> None:
    assert roles.fence_doctests(DOCSTRING) == FENCED
    assert roles.fence_doctests(FENCED) == FENCED


def test_every_example_of_the_reference_is_a_block_of_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Build the site strictly, as CI does, and read its pages."""
    pytest.importorskip("mkdocstrings", reason="MkDocs comes with the extra docs")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    monkeypatch.chdir(DOCS.parent)
    build(load_config("mkdocs.yml", strict=True, site_dir=str(tmp_path)))
    for page in ("api", "algebra", "coupling", "criteria"):
        html = (tmp_path / "reference" / page / "index.html").read_text(encoding="utf-8")
        assert "<blockquote>" not in html
        assert "&gt;&gt;&gt;" not in re.sub(r"<pre.*?</pre>", "", html, flags=re.S)
        assert '<span class="gp">&gt;&gt;&gt;' in html
