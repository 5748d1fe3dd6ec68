"""Requests in TOML files: a file of their own, or ``[tool.spa]`` of a ``pyproject.toml``."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import Field
from pathlib import Path
from typing import Any

from spa.errors import OptionError, nearest, suggestion
from spa.request.option import FILE

OWN, SHARED = "spa.toml", "pyproject.toml"
Sections = Mapping[str, Mapping[str, Field[Any]]]


def read(path: Path, sections: Sections) -> dict[str, Any]:
    """Read options by name from a file; paths become relative to its folder.

    Args:
        path: the file; of a ``pyproject.toml`` the tables below ``[tool.spa]`` count.
        sections: the options by section and name.

    Raises:
        UnreadableError: the file is not there or cannot be opened.
        OptionError: it is no TOML, or holds what is no option.
    """
    from spa.model.files import read_bytes  # with onnx, which a command line without a file can do without

    name = os.fspath(path)
    try:
        content = tomllib.loads(read_bytes(path, "the request").decode("utf-8-sig"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise OptionError(f"cannot read the request {name!r}: {error}.") from error
    if path.name == SHARED:
        content = _tool(content)
        if content is None:
            raise OptionError(f"{name!r} has no [tool.spa]. Add it, or name another file.")
    given: dict[str, Any] = {}
    for section, values in content.items():
        if section not in sections or not isinstance(values, dict):
            raise OptionError(f"{name!r}: {section!r} is no section. {_instead(section, sections)}")
        for key, value in values.items():
            about = sections[section].get(key)
            if about is None or not about.metadata["kind"].on_file:
                raise OptionError(f"{name!r}: [{section}] has no option {key!r}. {_where(key, sections)}")
            is_path = about.metadata["kind"] is FILE and isinstance(value, str)
            given[key] = str(path.parent / value) if is_path else value
    return given


def found_in(folder: Path) -> Path | None:
    """Return the file of a folder that holds a request: ``spa.toml``, or ``pyproject.toml`` with ``[tool.spa]``."""
    if (folder / OWN).is_file():
        return folder / OWN
    try:
        content = tomllib.loads((folder / SHARED).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):  # of somebody else's file
        return None
    return None if _tool(content) is None else folder / SHARED


def _tool(content: Mapping[str, Any]) -> Any:
    tool = content.get("tool")
    found = tool.get("spa") if isinstance(tool, dict) else None
    return found if isinstance(found, dict) else None


def _instead(section: str, sections: Sections) -> str:
    """Return what to do about a table that is no section, or an option that stands in none."""
    if any(section in known for known in sections.values()):
        return _where(section, sections)
    return suggestion(section, sections).strip() or f"Use {', '.join(f'[{known}]' for known in sections)}."


def _where(name: str, sections: Sections) -> str:
    """Return what to do about an option that a section does not have."""
    homes = {n: home for home, known in sections.items() for n, f in known.items() if f.metadata["kind"].on_file}
    if name in homes:
        return f"It belongs to [{homes[name]}]."
    near = _by_flag(name, sections) or nearest(name, homes)
    return "Leave it out." if near is None else f"Did you mean {near!r} in [{homes[near]}]?"


def _by_flag(flag: str, sections: Sections) -> str | None:
    """Return the option that has another name on the command line."""
    fields: Iterable[Field[Any]] = (f for known in sections.values() for f in known.values())
    return next((f.name for f in fields if f.metadata["flag"] == flag), None)
