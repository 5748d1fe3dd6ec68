"""The shape of the house, read from the sources: rooms, the arrows between them, and the size of functions.

An arrow is an import, wherever it stands: a lazy one inside a function, or a module's name in a string, couples two
rooms as much as one at the top of a file. A package that loads its own files with ``iter_modules`` is their registry;
these arrows are not drawn.

The sources are read, not run. What only running them would tell is not seen: a module's or an attribute's name that is
computed (``import_module(name)``, ``getattr(io, "_" + name)``), and code in a string (``exec``).
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"spa": "spa", "importers": "spa.importers", "exporters": "spa.exporters"}
FRAMEWORKS = {"torch", "tensorflow", "tf2onnx", "keras", "jax", "jaxlib", "jax2onnx", "flax", "equinox", "openvino"}
FACADE = "spa"
LAZY_NODES = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda

# From the ground up: a room imports rooms of the lines above its own. Modules that are named nowhere are the top.
LEVELS = [
    "_version errors progress",
    "extras",
    "model",
    "algebra",
    "rules",
    "coupling",
    "running",
    "surgery",
    "calibration",
    "criteria",
    "zero",
    "obspa",
    "widths",
    "steering",
    "request",
    "inputs",
    "report",
    "frameworks",
    "importers",
    "exporters",
]
RANK = {room: rank for rank, line in enumerate(LEVELS) for room in line.split()}
TOP = len(LEVELS)

# Names that a lower room takes from a higher one for the type checker alone, and why.
UPWARD_TYPES = {
    ("exporters", "spa.api.Result"): "an exporter is handed what pruning gives",
}
# What exporters take from importers: a rebuilt model is converted again, to be compared with what it came from.
CONVERSIONS = {"spa.importers.tensorflow.convert", "spa.importers.tensorflow.weight_sources"}

MEASURED = ("spa", "importers", "exporters", "models", "benchmarks", "examples")
LONGEST, MOST_PARAMETERS, MOST_TOP_MODULES = 60, 8, 12
# The public function, whose options are the request's.
EXEMPT = {("spa/api.py", "prune", "parameters")}


# -- reading the sources ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arrow:
    """An import of a module, or of a name in it (empty: of the module itself)."""

    source: str
    target: str
    name: str
    line: int
    types_only: bool = False

    @property
    def full(self) -> str:
        return f"{self.target}.{self.name}" if self.name else self.target

    def __str__(self) -> str:
        return f"{self.source}, line {self.line}: {self.full}"


@dataclass(frozen=True)
class Module:
    """A module's name and tree; ``package`` is what relative imports start from."""

    name: str
    package: str
    tree: ast.Module


Modules = Mapping[str, Module]


def read(root: Path) -> dict[str, Module]:
    """All modules under their installed names."""
    modules = {}
    for folder, package in PACKAGES.items():
        for file in sorted((root / folder).rglob("*.py")):
            parts = [package, *file.relative_to(root / folder).with_suffix("").parts]
            is_package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if is_package else parts)
            above = name if is_package else name.rpartition(".")[0]
            modules[name] = Module(name, above, ast.parse(file.read_text("utf-8")))
    return modules


def unpackaged(root: Path) -> list[str]:
    """The folders of sources without ``__init__.py``: Python would import them as packages that nothing here reads."""
    folders = {file.parent for folder in PACKAGES for file in (root / folder).rglob("*.py")}
    bare = {f for f in folders if not (f / "__init__.py").exists()}
    return sorted(f.relative_to(root).as_posix() for f in bare)


def is_types_only(node: ast.AST) -> bool:
    """Whether a statement's body is for the type checker alone: ``if TYPE_CHECKING:`` and nothing more or less."""
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def statements(tree: ast.AST) -> Iterator[tuple[ast.AST, bool]]:
    """All nodes of a tree, and whether each is for the type checker alone."""
    waiting: list[tuple[ast.AST, bool]] = [(tree, False)]
    while waiting:
        node, types_only = waiting.pop()
        yield node, types_only
        for field, value in ast.iter_fields(node):
            guard = field == "body" and is_types_only(node)
            children = value if isinstance(value, list) else [value]
            waiting += [(child, types_only or guard) for child in children if isinstance(child, ast.AST)]


def called(node: ast.AST) -> str:
    """The last name of what a call calls, ``import_module`` of ``importlib.import_module(...)``; else nothing."""
    return ast.unparse(node.func).rpartition(".")[2] if isinstance(node, ast.Call) else ""


def prose_of(tree: ast.Module) -> set[ast.AST]:
    """The strings that name no module: docstrings, of attributes, too, and the groups of entry points."""
    lines = {n.value for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and called(n) == "entry_points"]
    return lines | {k.value for n in calls for k in n.keywords if k.arg == "group"}


def absolute(name: str | None, level: int, package: str) -> str:
    """The dotted name of a relative one."""
    base = package.split(".")[: len(package.split(".")) - level + 1] if level else []
    return ".".join([*base, *filter(None, [name])])


def module_in_call(node: ast.AST, package: str) -> str | None:
    """The module that ``import_module("...")`` or ``__import__("...")`` imports, if its name is there to read."""
    if not isinstance(node, ast.Call) or called(node) not in ("import_module", "__import__"):
        return None
    named = [*node.args[:1], *(k.value for k in node.keywords if k.arg == "name")]
    if not named or not isinstance(named[0], ast.Constant) or not isinstance(named[0].value, str):
        return None
    name = named[0].value
    level = len(name) - len(name.lstrip("."))
    bases = [*node.args[1:2], *(k.value for k in node.keywords if k.arg == "package")]
    base = bases[0].value if bases and isinstance(bases[0], ast.Constant) else package  # else it is `__package__`
    return absolute(name[level:], level, str(base))


def imported(node: ast.AST, package: str) -> list[str]:
    """The dotted names that a node imports, or names in a string."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = absolute(node.module, node.level, package)
        return [f"{base}.{alias.name}" for alias in node.names]
    if (name := module_in_call(node, package)) is not None:
        return [name]
    if (
        isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch(r"spa(\.\w+)+(:\w+)?", node.value)
    ):
        return [node.value.replace(":", ".")]
    return []


def named_in_calls(module: Module) -> set[ast.AST]:
    """The strings by which calls import a module: the calls are drawn."""
    calls = [n for n in ast.walk(module.tree) if module_in_call(n, module.package) is not None]
    return {c for n in calls for c in ast.walk(n) if isinstance(c, ast.Constant)}


def arrows(modules: Modules) -> list[Arrow]:
    """Every import of one module of the house by another, the façade's own left out: it may name anything lazily."""
    drawn = []
    for module in modules.values():
        prose = prose_of(module.tree) | named_in_calls(module)
        for node, types_only in statements(module.tree):
            for full in imported(node, module.package) if node not in prose else ():
                parts = full.split(".")
                lengths = (n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in modules)
                shortest = 2 if isinstance(node, ast.Constant) else 1  # "spa.layout" in a string is a key of metadata
                if (cut := next(lengths, 0)) >= shortest:
                    target, name = ".".join(parts[:cut]), ".".join(parts[cut:])
                    drawn.append(Arrow(module.name, target, name, getattr(node, "lineno", 0), types_only))
    return [a for a in drawn if a.source not in (FACADE, a.target)]


def room_of(module: str) -> str:
    """The package of ``spa`` that a module is in; a top module is a room of its own."""
    return module.split(".")[1] if "." in module else module


def rank_of(module: str) -> int:
    return RANK.get(room_of(module), TOP)


def circles(edges: Iterable[tuple[str, str]]) -> list[list[str]]:
    graph = nx.DiGraph((a, b) for a, b in edges if a != b)
    return sorted(sorted(c) for c in nx.strongly_connected_components(graph) if len(c) > 1)


# -- the rules -------------------------------------------------------------------------------------------------------


def against_the_order(drawn: Iterable[Arrow]) -> list[str]:
    """The arrows that point to a higher room, or to one beside theirs."""
    wrong = []
    for a in drawn:
        here, there = rank_of(a.source), rank_of(a.target)
        beside = here == there < TOP and room_of(a.source) != room_of(a.target)
        listed = a.types_only and (room_of(a.source), a.full) in UPWARD_TYPES
        if (here < there or beside) and not listed:
            wrong.append(str(a))
    return wrong


def private_imports(drawn: Iterable[Arrow]) -> list[str]:
    """The arrows that take an underscored module or name out of another room; ``_version`` is the package's own."""
    return [
        str(a)
        for a in drawn
        if room_of(a.source) != room_of(a.target) and re.search(r"\._(?!_)", a.full) and a.target != "spa._version"
    ]


def modules_by_name(module: Module, modules: Modules) -> dict[str, str]:
    """The names by which a module's code knows modules of the house, dotted ones too, and the modules' own names."""
    known = {}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):  # `import spa.model.io` makes spa.model.io, and spa.model too, known in full
            for alias in node.names:
                parts = alias.name.split(".")
                fulls = [".".join(parts[: n + 1]) for n in range(len(parts))]
                known |= {alias.asname: alias.name} if alias.asname else {f: f for f in fulls}
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node.module, node.level, module.package)
            known |= {alias.asname or alias.name: f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Assign) and (full := module_in_call(node.value, module.package)):
            known |= {ast.unparse(target): full for target in node.targets}
    return {name: full for name, full in known.items() if full in modules}


def module_of(node: ast.expr, known: Mapping[str, str], module: Module, modules: Modules) -> str | None:
    """The module of the house that an expression is, by the names that are known: ``io``, ``spa.model.io``."""
    if (full := module_in_call(node, module.package)) is not None:
        return full if full in modules else None
    text = ast.unparse(node)
    if text in known:
        return known[text]
    if isinstance(node, ast.Attribute) and (parent := module_of(node.value, known, module, modules)):
        return f"{parent}.{node.attr}" if f"{parent}.{node.attr}" in modules else None
    return None


def private_attributes(modules: Modules) -> list[str]:
    """Where an underscored attribute of another room's module is used, however the module is called."""
    wrong = []
    for module in modules.values():
        known = modules_by_name(module, modules)
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute):
                owner, name = node.value, node.attr
            elif (
                isinstance(node, ast.Call)
                and called(node) in ("getattr", "setattr", "hasattr", "delattr")
                and len(node.args) > 1
                and isinstance(node.args[1], ast.Constant)
            ):
                owner, name = node.args[0], str(node.args[1].value)
            else:
                continue
            if not re.match(r"_(?!_)", name):
                continue
            full = module_of(owner, known, module, modules)
            if full and room_of(full) != room_of(module.name) and f"{full}.{name}" != "spa._version":
                wrong.append(f"{module.name}, line {node.lineno}: {full}.{name}")
    return wrong


def oversized(path: str, tree: ast.Module) -> Iterator[tuple[tuple[str, str, str], int]]:
    """The functions of a file with too many lines or parameters; ``self`` and ``cls`` do not count."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            listed = [*node.args.posonlyargs, *node.args.args]
            bound = bool(listed) and listed[0].arg in ("self", "cls")
            parameters = len(listed) + len(node.args.kwonlyargs) - bound
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > LONGEST:
                yield (path, node.name, "lines"), lines
            if parameters > MOST_PARAMETERS:
                yield (path, node.name, "parameters"), parameters


def frameworks_at_import(module: Module) -> list[str]:
    """The frameworks that importing a module imports: at its top, outside of functions."""
    inside = {n for f in ast.walk(module.tree) if isinstance(f, LAZY_NODES) for n in ast.walk(f)}
    return [
        f"{module.name}: {full}"
        for node, types_only in statements(module.tree)
        if node not in inside and not types_only
        for full in imported(node, module.package)
        if full.partition(".")[0] in FRAMEWORKS
    ]


# -- the house -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def modules() -> dict[str, Module]:
    return read(ROOT)


@pytest.fixture(scope="module")
def drawn(modules: Modules) -> list[Arrow]:
    return arrows(modules)


def test_no_modules_import_each_other_in_a_circle(drawn: list[Arrow]) -> None:
    assert circles((a.source, a.target) for a in drawn if not a.types_only) == []


def test_no_rooms_import_each_other_in_a_circle(drawn: list[Arrow]) -> None:
    assert circles((room_of(a.source), room_of(a.target)) for a in drawn if not a.types_only) == []


def test_arrows_point_down(drawn: list[Arrow]) -> None:
    assert against_the_order(drawn) == []


def test_every_listed_type_is_named_by_the_room_that_it_is_listed_for(drawn: list[Arrow]) -> None:
    assert UPWARD_TYPES.keys() <= {(room_of(a.source), a.full) for a in drawn if a.types_only}


def test_every_room_has_its_place_and_a_docstring(modules: Modules) -> None:
    folders = {room_of(m.name) for m in modules.values() if m.name == m.package and m.name != FACADE}
    assert folders <= RANK.keys() | {"cli"}  # the one package at the top
    rooms = [m for m in modules.values() if m.name == m.package]
    assert [m.name for m in rooms if not ast.get_docstring(m.tree)] == []


def test_every_folder_of_sources_is_a_package() -> None:
    assert unpackaged(ROOT) == []


def test_nothing_inside_imports_from_the_facade(drawn: list[Arrow]) -> None:
    assert [str(a) for a in drawn if a.target == FACADE] == []


def test_at_most_a_dozen_modules_stand_at_the_top() -> None:
    top = [f.stem for f in (ROOT / "spa").glob("*.py") if f.stem != "__init__"]
    assert len(top) <= MOST_TOP_MODULES, top


def test_no_room_takes_what_is_private_to_another(modules: Modules, drawn: list[Arrow]) -> None:
    assert private_imports(drawn) + private_attributes(modules) == []


def test_the_two_doors_meet_in_frameworks(drawn: list[Arrow]) -> None:
    across = {a.full for a in drawn if (room_of(a.source), room_of(a.target)) == ("exporters", "importers")}
    assert across == CONVERSIONS
    below = {room_of(a.target) for a in drawn if room_of(a.source) == "frameworks"} - {"frameworks"}
    assert below <= {"errors", "extras", "model", "running"}


def test_importing_the_core_imports_no_framework(modules: Modules) -> None:
    core = [m for m in modules.values() if room_of(m.name) not in ("importers", "exporters")]
    assert [found for m in core for found in frameworks_at_import(m)] == []


def test_functions_are_small() -> None:
    files = [file for folder in MEASURED for file in sorted((ROOT / folder).rglob("*.py"))]
    sizes: dict[tuple[str, str, str], int] = {}
    for file in files:
        sizes |= oversized(file.relative_to(ROOT).as_posix(), ast.parse(file.read_text("utf-8")))
    assert {k: n for k, n in sizes.items() if k not in EXEMPT} == {}


# -- the rules bite --------------------------------------------------------------------------------------------------


def made(**sources: str) -> dict[str, Module]:
    """Modules of ``spa`` by name (``__`` for a dot, so that ``model__io`` is ``spa.model.io``)."""
    modules = {FACADE: Module(FACADE, FACADE, ast.parse(""))}
    for key, source in sources.items():
        name = "spa." + key.replace("__", ".")
        modules[name] = Module(name, name.rpartition(".")[0], ast.parse(source))
    return modules


LAZY = "def f():\n    from spa.report.text import line\n"
GUARDED = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from spa.report.text import line\n"


@pytest.mark.parametrize(
    "source",
    [
        "from spa.report.text import line",
        "import spa.report.text",
        "from ..report.text import line",
        "from ..report import text",
        LAZY,
        GUARDED,
        'import_module("spa.report.text")',
        'importlib.import_module(name="spa.report.text")',
        'import_module("..report.text", __package__)',
        'import_module(".text", "spa.report")',
        'import_module(".text", package="spa.report")',
        'text = __import__("spa.report.text")',
        'HOMES = {"line": "spa.report.text:line"}',
    ],
)
def test_an_arrow_upwards_is_found_however_it_is_written(source: str) -> None:
    drawn = arrows(made(model__io=source, report__text=""))
    assert len(against_the_order(drawn)) == 1


def test_an_arrow_to_a_room_beside_is_found() -> None:
    drawn = arrows(made(progress="from spa.errors import SpaError", errors=""))
    assert against_the_order(drawn) == ["spa.progress, line 1: spa.errors.SpaError"]


def test_prose_and_arrows_downwards_are_no_fault() -> None:
    modules = made(report__text='"""spa.api"""\nfrom spa.model.io import load\n"""spa.api"""', model__io="", api="")
    assert against_the_order(arrows(modules)) == []


def test_lazy_circles_are_found_and_those_of_types_are_none() -> None:
    lazy = arrows(made(model__io=LAZY, report__text="from spa.model.io import load"))
    assert circles((a.source, a.target) for a in lazy if not a.types_only) == [["spa.model.io", "spa.report.text"]]
    assert circles((room_of(a.source), room_of(a.target)) for a in lazy) == [["model", "report"]]
    typed = arrows(made(model__io=GUARDED, report__text="from spa.model.io import load"))
    assert circles((a.source, a.target) for a in typed if not a.types_only) == []


def test_what_is_private_to_a_room_is_found() -> None:
    names = arrows(
        made(
            report__text="from spa.model.io import _load\nfrom spa.model._raw import raw", model__io="", model___raw=""
        )
    )
    assert len(private_imports(names)) == 2
    modules = made(report__text="from spa.model import io\nio._load()\nio.load()", model__io="")
    assert private_attributes(modules) == ["spa.report.text, line 2: spa.model.io._load"]
    own = made(report__text="from spa.report.html import _page", report__html="")
    assert private_imports(arrows(own)) == []


@pytest.mark.parametrize(
    "source",
    [
        "from spa.model import io as mio\nmio._load()",
        "import spa.model.io as mio\nmio._load()",
        "from spa import model\nmodel.io._load()",
        "import spa.model.io\nspa.model.io._load()",
        'from spa.model import io\ngetattr(io, "_load")()',
        'io = import_module("spa.model.io")\nio._load()',
        'import_module("..model.io", __package__)._load()',
    ],
)
def test_a_private_attribute_is_found_however_its_module_is_called(source: str) -> None:
    modules = made(report__text=source, model__io="", model="")
    line = source.count("\n") + 1
    assert private_attributes(modules) == [f"spa.report.text, line {line}: spa.model.io._load"]


def test_attributes_of_what_is_no_module_are_no_fault() -> None:
    source = 'from spa.model import io\nio.load()._x\nself._io\ngetattr(io, "__name__")\nio.__name__'
    assert private_attributes(made(report__text=source, model__io="")) == []


@pytest.mark.parametrize("guard", ["not TYPE_CHECKING", "True or TYPE_CHECKING", "MY_TYPE_CHECKING", "x.TYPE_CHECKING"])
def test_a_guard_that_runs_is_none(guard: str) -> None:
    source = GUARDED.replace("if TYPE_CHECKING", f"if {guard}")
    assert [a.types_only for a in arrows(made(model__io=source, report__text=""))] == [False]


@pytest.mark.parametrize("guard", ["TYPE_CHECKING", "typing.TYPE_CHECKING"])
def test_only_the_body_of_the_guard_is_for_the_type_checker(guard: str) -> None:
    source = f"if {guard}:\n    from spa.report.text import line\nelse:\n    import spa.report.text\n"
    assert [a.types_only for a in arrows(made(model__io=source, report__text=""))].count(True) == 1


def test_groups_are_those_of_entry_points() -> None:
    modules = made(model__io='entry_points(group="spa.report")\nmetadata.entry_points(group="spa.report")', report="")
    assert arrows(modules) == []
    modules = made(model__io='load(group="spa.report")', report="")
    assert [a.full for a in arrows(modules)] == ["spa.report"]


def test_a_folder_that_is_no_package_is_found(tmp_path: Path) -> None:
    for name in ("spa/__init__.py", "spa/model/io.py", "importers/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("", encoding="utf-8")
    assert unpackaged(tmp_path) == ["spa/model"]


def test_names_of_the_facade_are_found() -> None:
    for source in ("import spa", "from spa import prune", "def f():\n    import spa", 'import_module("spa")'):
        assert [a.target for a in arrows(made(report__text=source))] == [FACADE]
    assert [a.target for a in arrows(made(api="from spa import report", report=""))] == ["spa.report"]


def test_large_functions_are_found() -> None:
    wide = f"def f(self, {', '.join(f'a{i}' for i in range(8))}, *, key): ..."
    tall = "def g():\n" + "    pass\n" * LONGEST
    fits = f"def h(self, {', '.join(f'a{i}' for i in range(8))}):\n" + "    pass\n" * (LONGEST - 1)
    found = dict(oversized("x.py", ast.parse(f"{wide}\n{tall}\n{fits}")))
    assert found == {("x.py", "f", "parameters"): 9, ("x.py", "g", "lines"): LONGEST + 1}


def test_frameworks_at_the_top_of_a_file_are_found() -> None:
    lazy = "def f():\n    import torch\n"
    typed = "if TYPE_CHECKING:\n    import jax\n"
    assert frameworks_at_import(Module("spa.x", "spa", ast.parse(lazy + typed))) == []
    assert frameworks_at_import(Module("spa.x", "spa", ast.parse("from torch import nn"))) == ["spa.x: torch.nn"]
    for source in ('import_module("torch")', 'x = importlib.import_module("torch")', '__import__("torch")'):
        assert frameworks_at_import(Module("spa.x", "spa", ast.parse(source))) == ["spa.x: torch"]
        assert frameworks_at_import(Module("spa.x", "spa", ast.parse(f"def f():\n    {source}"))) == []


def test_what_is_installed_is_every_package_and_its_data() -> None:
    """An editable installation finds what ``pyproject.toml`` does not name; a user's does not."""
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {name: _folder(name, tools["package-dir"]) for name in tools["packages"]}
    there = {path.parent for top in PACKAGES for path in (ROOT / top).rglob("__init__.py")}
    assert set(folders.values()) == there
    data = {
        file
        for name, patterns in tools["package-data"].items()
        for glob in patterns
        for file in folders[name].glob(glob)
    }
    others = {
        path
        for top in PACKAGES
        for path in (ROOT / top).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc", ".md")
    }
    assert data == others


def _folder(package: str, directories: Mapping[str, str]) -> Path:
    """Where a package's sources stand: below the longest of its parents that ``package-dir`` names."""
    parent = max((known for known in directories if f"{package}.".startswith(f"{known}.")), key=len)
    return ROOT.joinpath(directories[parent], *package[len(parent) :].split(".")[1:])
