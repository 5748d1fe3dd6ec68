"""The reference pages, made from the code when the site is built, so that they cannot fall behind it.

`mkdocs.yml` names this file as a hook. Each function below returns the Markdown of one page.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

HERE = Path(__file__).parent
# Exit codes that no exception stands for; the others are read from the classes of spa.errors.
OTHER_CODES = {
    0: ("done", ""),
    130: ("Interrupted. No half-written file is left.", ""),
}
REMEDIES = {
    2: "`spa COMMAND --help`",
    1: "Choose another place for the output; for `spa verify` and `spa prove`, look at what they printed",
    3: "Ask for less, or lift a constraint that the message names",
    4: "Check the file, or the inputs, that the message names",
    5: "See [Read a refusal](../guides/read-a-refusal.md)",
    6: "Check the path that the message names",
    7: "Run the metric by hand on the model, and look at its output, which the message ends with",
    70: "Please report it with the model or its architecture",
}


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to those in the folder (an event of MkDocs)."""
    from mkdocs.structure.files import File

    for name, make in PAGES.items():
        files.append(File.generated(config, f"reference/{name}.md", content=make()))
    return files


def api() -> str:
    """List everything that `import spa` makes public, errors last."""
    import spa

    names = [name for name in spa.__all__ if not name.startswith("_")]
    kinds = {name: getattr(spa, name) for name in names}
    errors = [n for n, v in kinds.items() if inspect.isclass(v) and issubclass(v, BaseException)]
    classes = [n for n, v in kinds.items() if inspect.isclass(v) and n not in errors]
    functions = [n for n in names if n not in errors and n not in classes]
    parts = [
        "# Python",
        "Everything public is in `spa`. The package is typed, and imports nothing heavy until it is used.",
    ]
    for title, found in (("Functions", functions), ("Classes", classes), ("Errors", errors)):
        parts.append(f"## {title}")
        parts += [_object(f"spa.{name}", level=3) for name in found]
    return "\n\n".join(parts) + "\n"


def room(name: str) -> str:
    """Write the page of a package for researchers: its own docstring, then each of its modules."""
    package = import_module(name)
    parts = [f"# {name}", "For research and extensions; these names may change between minor versions."]
    parts.append(_object(name, level=2))
    modules = sorted(m.name for m in iter_modules(package.__path__) if not m.name.startswith("_"))
    parts += [_object(f"{name}.{module}", level=2) for module in modules]
    return "\n\n".join(parts) + "\n"


def _object(name: str, level: int) -> str:
    return f"::: {name}\n    options:\n      heading_level: {level}"


def cli() -> str:
    """List the program's commands, each with its arguments and options."""
    program = _program()
    about = re.split(r"\s*Exit codes:", str(program.help or ""))[0]
    parts = ["# Command line", about, "Exit codes have [a page of their own](exit-codes.md)."]
    parts.append(_parameters("spa", program.params))
    for name, command in program.commands.items():
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        usage = " ".join(["spa", name, *(_metavar(p) for p in arguments), "[OPTIONS]"])
        parts += [
            f"## spa {name}",
            str(command.help or ""),
            f"```console\n$ {usage}\n```",
            _parameters(name, command.params),
        ]
    return "\n\n".join(part for part in parts if part) + "\n"


def options() -> str:
    """Return the options of `spa prune`: the fields of a request, then what concerns files and the terminal alone."""
    from spa.request import options as fields
    from spa.request.option import default_of, flag_of

    parts = [
        "# Options of prune",
        "An option is a flag of `spa prune`, a keyword of `spa.prune`, and a key in a file for `--config`, under the heading of "
        "its table: `[goal]`, `[scoring]` and so on. `spa.Request` holds them all.",
    ]
    sections: dict[str, list[tuple[str, str, str, str]]] = {}
    for section, about in fields():
        flag = f"`{flag_of(about)}`" if about.metadata["kind"].on_file else ""
        default = default_of(about)
        default = f"`{default}`" if default and "`" not in default else default
        row = (flag, f"`{about.name}`", _cell(about.metadata["help"]), default)
        sections.setdefault(section, []).append(row)
    known = {about.name for _, about in fields()}
    for section, rows in sections.items():
        parts += [f"## {section}", _table(("option", "in Python", "meaning", "default"), rows)]
    command = _program().commands["prune"]
    own = [p for p in command.params if p.param_type_name == "option" and p.name not in known]
    rows = [(_spelling(p), _text(p.help), _default(p)) for p in own]
    parts += ["## On the command line alone", _table(("option", "meaning", "default"), rows)]
    return "\n\n".join(parts)


def criteria() -> str:
    """Return the table of criteria, then the room's own documentation."""
    from spa.report.tables import criteria_table

    first, _, rest = room("spa.criteria").partition("\n\n")
    return f"{first}\n\n{criteria_table()}\n{rest}"


def exit_codes() -> str:
    """List what the command line returns, read from the classes of errors."""
    from spa import errors

    codes: dict[int, tuple[str, str]] = dict(OTHER_CODES)
    for name in errors.__all__:
        error = getattr(errors, name)
        if "exit_code" in vars(error):
            codes[error.exit_code] = (
                _text(inspect.getdoc(error) or "").split(". ")[0].rstrip(".") + f" (`{_public(name)}`).",
                "",
            )
    codes[1] = (
        "An output cannot or must not be written (`spa.SpaError`). `spa verify`: the interfaces differ, or the outputs by more than "
        "`--atol` or `--rtol`, where given. `spa prove`: pruned and masked network differ. `spa doctor`: something is wrong.",
        "",
    )
    rows = [
        (str(code), _sentence(text), remedy or REMEDIES.get(code, "")) for code, (text, remedy) in sorted(codes.items())
    ]
    return (
        "# Exit codes\n\nOn failure, one message goes to standard error and nothing is left half-written. In Python, the same "
        "messages are exceptions; all derive from `spa.SpaError`, whose `exit_code` is the number below. With `--json` the "
        'message is JSON on standard output: `{"error": {"kind": …, "message": …, "exit_code": …}}`.\n\n'
        + _table(("code", "meaning", "what to do"), rows)
    )


def _public(error: str) -> str:
    """Return the name that users import an error by."""
    import spa

    return f"spa.{error}" if error in spa.__all__ else f"spa.errors.{error}"


def operators() -> str:
    """List operators with a rule, and those that are listed as unsupported, each with its reason."""
    from spa import rules

    supported, barriers = rules.supported(), rules.barriers()
    laws: dict[str, list[str]] = {}
    for key, rule in supported.items():
        laws.setdefault(_law(rule), []).append(key)
    rows = [(", ".join(f"`{key}`" for key in keys), law) for law, keys in laws.items()]
    reasons: dict[str, list[str]] = {}
    for key, reason in barriers.items():
        reasons.setdefault(reason, []).append(key)
    refused = [(", ".join(f"`{key}`" for key in keys), reason) for reason, keys in sorted(reasons.items())]
    return (
        "# Operators\n\n"
        f"{len(supported)} operators have a rule. {len(barriers)} more are listed as unsupported, with the reason that "
        "reports print. Any other operator is a barrier, too: what it touches stays whole. One line teaches SPA an operator "
        "of your own: [Write a rule](../guides/write-a-rule.md).\n\n"
        "## With a rule\n\n"
        + _table(("operators", "law"), rows)
        + "\n## Listed as unsupported\n\n"
        + _table(("operators", "reason"), refused)
    )


def decisions() -> str:
    """List the decision records, by number."""
    lines = []
    for path in sorted((HERE / "decisions").glob("[0-9]*.md")):
        title = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        number, _, rest = title.partition(". ")
        lines.append(f"{int(number)}. [{rest}](../decisions/{path.name})")
    text = "\n".join(lines)
    return (
        f"# Decisions\n\nWhy things are as they are: one page each, with context, decision and consequence.\n\n{text}\n"
    )


def _program() -> Any:
    import typer.main

    from spa.cli import app

    return typer.main.get_command(app)


def _python_names() -> set[str]:
    """Return the keyword arguments of `spa.prune`: its own, or those of the request that it builds."""
    import spa

    names = set(inspect.signature(spa.prune).parameters)
    request = getattr(spa, "Request", None)
    return names | set(getattr(request, "__dataclass_fields__", ()))


def _parameters(name: str, parameters: Iterable[Any]) -> str:
    shown = [p for p in parameters if not getattr(p, "hidden", False) and p.name != "help"]
    rows = [(_spelling(p), _text(p.help), _default(p)) for p in shown]
    return _table((f"of `{name}`", "meaning", "default"), rows) if rows else ""


def _spelling(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{_metavar(parameter)}`"
    return ", ".join(f"`{o}`" for o in (*parameter.opts, *parameter.secondary_opts))


def _metavar(parameter: Any) -> str:
    name = (parameter.metavar or parameter.name or "").upper()
    return f"{name}..." if parameter.nargs == -1 else name


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    if parameter.default is None or parameter.default is False or not parameter.show_default:
        return ""
    return f"`{parameter.default}`"


def _law(rule: Any) -> str:
    """Return the notation of a rule where it is one line, else the first sentence of its docstring."""
    if notation := getattr(rule, "notation", None):
        return f"`{_cell(notation)}`"
    text = _text(inspect.getdoc(getattr(rule, "func", rule)) or "")
    return _sentence(re.split(r"\s*(?:Spec:|(?<=\.)\s)", text)[0])


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(" .") + "." if text else ""


def _text(text: str | None) -> str:
    """Return running text without line breaks and Sphinx roles."""
    plain = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text or "")
    return _cell(re.sub(r"\s+", " ", plain.replace("``", "`")).strip())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    def lines() -> Iterator[str]:
        yield "| " + " | ".join(header) + " |"
        yield "| " + " | ".join("---" for _ in header) + " |"
        for row in rows:
            yield "| " + " | ".join(row) + " |"

    return "\n".join(lines()) + "\n"


PAGES = {
    "api": api,
    "cli": cli,
    "options": options,
    "exit-codes": exit_codes,
    "operators": operators,
    "algebra": lambda: room("spa.algebra"),
    "coupling": lambda: room("spa.coupling"),
    "criteria": criteria,
    "decisions": decisions,
}
