"""Coverage of PyTorch networks, imported, pruned and compared: torchvision, timm, transformers.

    python benchmarks/coverage_frameworks.py [--only timm resnet50 ...] [--again] [--seconds 600]

Each network has random weights that matter, and a process of its own with a time and a memory limit. It is imported
(`importers/pytorch.py`), 30 % of its MACs are removed by `spa.prune(criterion="l2")`, and what is left is compared in
onnxruntime with the original network whose removed channels are masked. Results are kept in results/, so the script can
be stopped and goes on where it was; it writes benchmarks/results/coverage_frameworks.md.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.metadata
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
from coverage_networks import build, names

if TYPE_CHECKING:
    from torch import nn

    from spa.api import Result
    from spa.doors import FrameworkModel
    from spa.importers import Imported

Built = tuple["nn.Module", dict[str, Any], dict[str, Any] | None]
NAME = "coverage_frameworks"
RATIO = 0.3
LIMITS: dict[str, Any] = {"memory": 18 * common.GIB, "cores": common.THREADS}
THREADS = 1
TITLES = {"torchscript": "The TorchScript exporter"}
PAGE = common.RESULTS / "coverage_frameworks.md"

# -- measure ---------------------------------------------------------------------------------------------


def measure(name: str, build: Callable[[str], Built] = build) -> dict[str, Any]:
    """Import, prune, compare and write back one network; what is known so far comes with the reason of a failure."""
    import torch

    torch.set_num_threads(THREADS)
    facts: dict[str, Any] = {"stage": "build"}
    traced = name.startswith("torchscript/")
    try:
        module, inputs, shapes = build(name.removeprefix("torchscript/"))
        facts |= {"parameters": _size(module), "stage": "import"}
        imported_model = _imported(module, inputs, {"exporter": "torchscript"} if traced else {}, shapes, facts)
        facts["stage"] = "prune"
        result = _pruned(imported_model, facts)
        facts["stage"] = "compare"
        if "crossed" not in facts:
            facts |= _equation(result)
        facts["stage"] = "write back"
        facts |= _written_back(result)
    except Exception as error:
        return facts | {"reason": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
    return facts | {"stage": "done"}


def _imported(
    module: nn.Module,
    inputs: dict[str, Any],
    options: dict[str, Any],
    shapes: dict[str, Any] | None,
    facts: dict[str, Any],
) -> FrameworkModel:
    """Import the network, with its sequence closed where it cannot be open."""
    from spa.doors import import_model
    from spa.errors import SpaError

    start = time.perf_counter()
    try:
        imported_model = import_model(module, inputs, options | {"dynamic_shapes": shapes})
    except SpaError as error:
        if shapes is None:
            raise
        facts["sequence"] = f"closed: {error}"
        imported_model = import_model(module, inputs, options)
    found = imported_model.imported
    facts |= {"import s": round(time.perf_counter() - start, 1), "how": found.exporter, "notes": found.notes}
    facts |= {"import error": found.error, "axes": _open(found.model), "nodes": len(found.model.graph.node)}
    facts |= _found(module, found)
    return imported_model


def _pruned(imported_model: FrameworkModel, facts: dict[str, Any]) -> Result:
    """Prune as `spa.prune(module, example_inputs=...)` does, across normalisations where nothing goes without."""
    from spa import prune
    from spa.errors import PlanError
    from spa.frameworks.kinds import equal_by_default

    start = time.perf_counter()
    request: dict[str, Any] = {
        "criterion": "l2",
        "ratio": RATIO,
        "equal": equal_by_default("torch", imported_model.source),
    }
    try:
        result = prune(imported_model.imported.model, **request)
    except PlanError as error:
        try:
            result = prune(imported_model.imported.model, **request, cross_norm=True)
        except PlanError:
            raise error from None
        facts["crossed"] = str(error)
    facts |= {"prune s": round(time.perf_counter() - start, 1), "removed": result.report.reached}
    return replace(result, origin=imported_model)


def _written_back(result: Result) -> dict[str, Any]:
    """Tell what `result.pruned` is, how large, and how far its outputs are from the pruned ONNX model's."""
    from spa.errors import SpaError
    from spa.exporters.pytorch import check, to_torch

    assert result.origin is not None
    dense, names, inputs = result.origin.source, result.origin.imported.names, result.origin.example_inputs
    start = time.perf_counter()
    try:
        small, kind, notes = to_torch(result, dense, names, inputs)
    except SpaError as error:
        return {"back": "none", "back why": str(error)}
    facts = {"back": kind, "back s": round(time.perf_counter() - start, 1), "left": _size(small) / _size(dense)}
    assert kind == "graph" or (type(small) is type(dense) and facts["left"] < 1)
    feeds = check.feeds_of(result.model, inputs)
    args, kwargs = check.arguments(inputs) if kind == "module" else ((), {k: _tensor(v) for k, v in feeds.items()})
    wanted = check.reference(result.model, None, feeds)
    facts["back error"] = check.difference(check.outputs_of(small, args, kwargs), wanted)
    return facts | ({"back why": " ".join(notes)} if notes else {})


def _tensor(value: Any) -> Any:
    import torch

    return torch.from_numpy(value)


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _open(model: Any) -> str:
    dims = (d.dim_param for i in model.graph.input for d in i.type.tensor_type.shape.dim)
    return ", ".join(dict.fromkeys(d for d in dims if d))


def _found(module: nn.Module, imported: Imported) -> dict[str, Any]:
    """Count the parameters that are initializers under their own names and with their own values."""
    keys = dict(module.named_parameters(remove_duplicate=False)).keys()
    found = set(imported.names.values()) | imported.aliases.keys()
    return {"keys": len(keys), "found": len(keys & found), "lost": sorted(keys - found)[:5]}


def _equation(result: Result) -> dict[str, float]:
    """Measure how far the pruned network is from the masked original, and that from the dense one, relatively."""
    import numpy as np

    from spa.running.feeds import working_feeds
    from spa.running.runtime import run
    from spa.running.sessions import open_session
    from spa.surgery.masking import masked

    with open_session(result.model) as opened:
        feeds = working_feeds(opened, batch=3)
        got = run(opened, feeds)
    with open_session(masked(result.analysis, result.plan)) as opened:
        expected = run(opened, feeds)
    with open_session(result.source.model) as opened:
        dense = run(opened, feeds)

    def apart(a: list[Any], b: list[Any]) -> float:
        return max(float(np.abs(x - y).max() / (np.abs(y).max() or 1)) for x, y in zip(a, b, strict=True) if y.size)

    return {"error": apart(got, expected), "moved": apart(expected, dense)}


# -- tell ------------------------------------------------------------------------------------------------

HEADER = ["network", "M parameters", "exporter", "open axes", "names", "import error", "import s", "prune s"]
HEADER += ["MACs removed", "prune error", "class kept", "parameters left", "class error", "ok"]
LEGEND = """- *names*: parameters that are initializers under their state_dict names, with their own values.
- *import error*: the largest difference between the network in onnxruntime and in PyTorch, over the output's largest \
value, at several sizes of the open axes.
- *prune error*: the same between the pruned network and the original whose removed channels are masked; *statistics* \
where nothing can go but channels over which a normalisation takes statistics (`cross_norm=True`): then there is no \
such original.
- *class kept*: whether `result.pruned` is of the class that was given; *in part* where parts of it stay as wide as \
they were, with zeros for what went, since their code has sizes written into it; *graph* where it is the ONNX graph as \
a module.
- *parameters left*: in `result.pruned`, of the original's.
- *class error*: the difference between it and the pruned network in onnxruntime."""


def row(name: str, facts: dict[str, Any]) -> list[str]:
    """Return a line of the table."""
    keys = f"{facts['found']} of {facts['keys']}" if "found" in facts else ""
    how = "TorchScript" if "dynamo=False" in facts.get("how", "") else "torch.export" if "how" in facts else ""
    cells = {
        key: f"{facts[key]:{form}}" if key in facts else ""
        for key, form in {
            "import error": ".0e",
            "import s": ".0f",
            "prune s": ".0f",
            "removed": ".0%",
            "error": ".0e",
            "left": ".0%",
            "back error": ".0e",
        }.items()
    }
    if "crossed" in facts:
        cells["error"] = "statistics"
    return [
        name.partition("/")[2],
        f"{facts['parameters'] / 1e6:.1f}" if "parameters" in facts else "",
        how,
        facts.get("axes", "") or ("none" if how else ""),
        keys,
        *(cells[key] for key in ("import error", "import s", "prune s", "removed", "error")),
        kept_class(facts),
        *(cells[key] for key in ("left", "back error")),
        verdict(facts),
    ]


def kept_class(facts: dict[str, Any]) -> str:
    """Say whether the pruned network is of the class that was given."""
    back = facts.get("back", "")
    return back if back != "module" else "in part" if "back why" in facts else "yes"


def verdict(facts: dict[str, Any]) -> str:
    """Say yes where everything went well, else what did not."""
    if facts["stage"] != "done":
        return f"no: {facts['stage']}"
    if facts.get("error", 0) >= 1e-3:
        return "no: differs"
    return "no: write back" if facts.get("back") == "none" else "yes"


def page(cells: dict[str, dict[str, Any]], info: dict[str, Any]) -> str:
    """Return the text of results/coverage_frameworks.md."""
    text = [
        "# Coverage: PyTorch networks",
        "Made by `benchmarks/coverage_frameworks.py`. Each network, with random weights, is imported, "
        f'{RATIO:.0%} of its MACs are removed by `spa.prune(criterion="l2")`, and the result is run, in onnxruntime '
        "and, as `result.pruned`, in PyTorch.",
        LEGEND,
        "Seconds were taken beside other work on the machine.",
        common.describe(info),
    ]
    for library in dict.fromkeys(name.partition("/")[0] for name in names()):
        mine = {name: cells[name] for name in names() if name.startswith(library + "/") and name in cells}
        if mine:
            text += [f"## {TITLES.get(library, library)}", _counts(library, mine)]
            text += [common.table(HEADER, (row(name, facts) for name, facts in mine.items()))]
    known = {name: cells[name] for name in names() if name in cells}
    for title, found in (
        ("What failed, and why", lambda n, f: verdict(f) != "yes" and f"{n}, {verdict(f)[4:]}: {_said(f)}"),
        (
            "What came back as a graph or in part, and why",
            lambda n, f: "back why" in f and f"{n}: {_back(f)}",
        ),
        ("What goes across normalisations alone", lambda n, f: "crossed" in f and f"{n}: {f['crossed']}"),
        ("What importers noted", lambda n, f: _note(f) and f"{n}: {_note(f)}"),
        ("Parameters that ONNX lacks (forward does not read them)", lambda n, f: _lost(f) and f"{n}: {_lost(f)}"),
    ):
        lines = [f"- {line}" for name, facts in known.items() if (line := found(f"`{name}`", facts))]
        if lines:
            text += [f"## {title}", "\n".join(lines)]
    return "\n\n".join(text) + "\n"


def _counts(library: str, cells: dict[str, dict[str, Any]]) -> str:
    """Say how many networks went well."""
    wanted = sum(name.startswith(library + "/") for name in names())
    said = ", ".join(f"{n} {kind}" for kind, n in Counter(map(verdict, cells.values())).most_common())
    backs = Counter(filter(None, map(kept_class, cells.values())))
    return (
        f"{len(cells)} of {wanted} networks tried: {said}. Of {backs.total()} pruned ones, {backs['yes']} kept their "
        f"class, {backs['in part']} kept it with parts as wide as they were, and {backs['graph']} came back as graphs."
    )


def _lost(facts: dict[str, Any]) -> str:
    return ", ".join(facts.get("lost", ()))


def _said(facts: dict[str, Any]) -> str:
    if "reason" in facts:
        short = facts["peak MB"] > 0.9 * LIMITS["memory"] / 1e6
        return re.sub(r"\s+", " ", facts["reason"]) + (
            f" It needs more memory than the {LIMITS['memory'] // common.GIB} GiB that it was given." * short
        )
    return f"pruned and masked outputs differ by {facts['error']:.1e}"


def _back(facts: dict[str, Any]) -> str:
    """Say why the class was not kept, or in part, without the advice."""
    advice = r" Take sizes from the tensors instead.*?graph_module(, which needs no forward code)?\.| What you got is.*"
    return re.sub(advice, "", facts["back why"])


def _note(facts: dict[str, Any]) -> str:
    return " ".join([*facts.get("notes", ()), *([f"sequence {facts['sequence']}"] if "sequence" in facts else [])])


def _machine() -> dict[str, Any]:
    """Describe the machine, with the versions of what the networks come from."""
    info = common.machine()
    info["versions"] |= {name: importlib.metadata.version(name) for name in ("onnxscript", "timm", "transformers")}
    return info


def _write(data: dict[str, Any], results: Path) -> None:
    results.mkdir(parents=True, exist_ok=True)
    for target, text in (
        (results / f"{NAME}.json", json.dumps(data, indent=1) + "\n"),
        (PAGE, page(data["cells"], data["machine"])),
    ):
        partial = target.with_name(target.name + ".partial")
        partial.write_text(text)
        partial.replace(target)


def _measured(name: str, timeout: float) -> dict[str, Any]:
    """Measure a network in a process of its own, and what that process takes."""
    child = common.python("coverage_frameworks.py", "--one", name, **LIMITS | {"timeout": timeout})
    facts = child.data or {"stage": "process", "reason": f"{child.status}: {child.reason}"}
    return facts | {"peak MB": child.peak_mb, "process s": child.seconds, "taken": time.strftime("%Y-%m-%d %H:%M")}


def main() -> None:
    """Measure what is missing, or everything again, the oldest first; write the page after each network."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--one", help="measure this network in this process and hand the figures to the parent")
    parser.add_argument("--only", nargs="*", default=["*"], metavar="PATTERN", help="such as 'timm/*' or 'timm/vit*'")
    parser.add_argument("--again", action="store_true", help="measure what was measured before, too")
    parser.add_argument("--jobs", type=int, default=1, help="networks at a time; they share the same cores")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no network after this time")
    parser.add_argument("--timeout", type=float, default=900, help="for one network, in seconds")
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    options = parser.parse_args()
    if options.one:
        common.answer(measure(options.one))
        return
    start = time.perf_counter()
    data = common.previous(NAME, options.results) or {"machine": _machine(), "cells": {}}
    cells = data["cells"]
    wanted = [
        n for n in names() if any(fnmatch.fnmatch(n, p) for p in options.only) and (options.again or n not in cells)
    ]
    wanted.sort(key=lambda name: cells.get(name, {}).get("taken", "0" if name in cells else ""))

    def work(name: str) -> tuple[str, dict[str, Any] | None]:
        late = time.perf_counter() - start > options.seconds
        return name, None if late else _measured(name, options.timeout)

    with ThreadPoolExecutor(options.jobs) as pool:
        for done in as_completed([pool.submit(work, name) for name in wanted]):
            name, facts = done.result()
            if facts is not None:
                cells[name] = facts
                print(name, verdict(facts), facts.get("reason", ""), facts.get("back", ""), facts.get("back why", ""))
                print(f"    {facts['process s']:.0f} s, {facts['peak MB']:.0f} MB", flush=True)
                _write(data, options.results)
    _write(data, options.results)


if __name__ == "__main__":
    main()
