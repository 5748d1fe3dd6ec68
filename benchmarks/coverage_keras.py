"""Coverage of networks of keras.applications: into ONNX, pruned, checked, and back into Keras.

    python benchmarks/coverage_keras.py [--only ResNet50 ...]

Thirty per cent of the MACs by L2, random weights, ten classes, small images; every network in a process of its own.
"Exact" is
the distance of the pruned network to the original with the removed channels' readers set to zero, relative to the
output's size. Writes benchmarks/results/coverage_keras.md; networks that are not run keep their rows.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import common

# By name: the side of the square input.
NETWORKS = {
    "ResNet50": 64,
    "ResNet50V2": 64,
    "MobileNet": 64,
    "MobileNetV2": 64,
    "MobileNetV3Small": 64,
    "VGG16": 32,
    "DenseNet121": 64,
    "EfficientNetB0": 64,
    "InceptionV3": 96,
    "Xception": 96,
    "NASNetMobile": 64,
    "ConvNeXtTiny": 64,
}
STEPS = ("import", "prune", "exact", "write back")
PAGE = common.RESULTS / "coverage_keras.md"
FOOT = "<!-- data: "


# -- in the child ----------------------------------------------------------------------------------------------------


def network(name: str) -> Any:
    """Return a network with random weights; normalisations get random statistics, too."""
    import keras
    import numpy as np

    keras.utils.set_random_seed(0)
    side = NETWORKS[name]
    build: Callable[..., Any] = getattr(keras.applications, name)
    model = build(weights=None, input_shape=(side, side, 3), classes=10, classifier_activation=None)
    rng = np.random.default_rng(0)
    for variable in model.variables:
        if variable.dtype == "float32" and len(variable.shape) == 1:
            positive = variable.name in ("gamma", "moving_variance")
            variable.assign(rng.uniform(0.8, 1.2, variable.shape) if positive else rng.normal(0, 0.1, variable.shape))
    return model


def measure(name: str) -> dict[str, Any]:
    """Take one network as far as it goes; the seconds and findings of each step."""
    facts: dict[str, Any] = {}
    try:
        _steps(network(name), facts)
    except Exception as error:  # the table says it
        step = next(s for s in STEPS if s not in facts)
        facts[step] = f"{type(error).__name__}: {error}".splitlines()[0]
    return facts


def _steps(model: Any, facts: dict[str, Any]) -> None:
    import spa
    from spa.exporters.tensorflow import write_back
    from spa.importers.tensorflow import convert

    with _timed(facts, "import"):
        imported = convert(model)
    facts["error"] = imported.error
    with _timed(facts, "prune"):
        result = spa.prune(imported.model, criterion="l2", ratio=0.3, round_to=1)
    facts["parameters"] = [result.report.before.params, result.report.after.params]
    with _timed(facts, "exact"):
        facts["distance"] = _distance(result)
    with _timed(facts, "write back"):
        small = write_back(model, result, imported.names)
    facts["Keras parameters"] = [model.count_params(), small.count_params()]


@contextmanager
def _timed(facts: dict[str, Any], step: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    facts[step] = round(time.perf_counter() - start, 1)


def _distance(result: Any) -> float:
    from spa import verify
    from spa.surgery.masking import masked

    report = verify(masked(result.analysis, result.plan), result.model, seeds=1, batch=2, threads=common.THREADS)
    return max(o.relative_l2 for o in report.outputs)


# -- in the parent ---------------------------------------------------------------------------------------------------


def page(rows: dict[str, dict[str, Any]]) -> str:
    """Return the page, with its data in a comment at the end."""
    cells = []
    for name in NETWORKS:
        if name not in rows:
            continue
        facts = rows[name]
        steps = [f"{facts[s]:.1f} s" if isinstance(facts.get(s), float) else facts.get(s, "") for s in STEPS]
        before, after = facts.get("Keras parameters") or facts.get("parameters") or (0, 0)
        share = f"{before / 1e6:.2f} → {after / 1e6:.2f} M" if before else ""
        small = (f"{facts[key]:.0e}" if key in facts else "" for key in ("error", "distance"))
        cells.append([f"{name} ({NETWORKS[name]})", *steps, *small, share])
    header = ["network", *STEPS, "import error", "distance", "parameters"]
    return "\n\n".join(
        [
            "# Keras applications",
            "Into ONNX, 30 % of the MACs removed by L2, checked against the masked original, and back into Keras, "
            "checked against the pruned ONNX model (else the step fails). Seconds of each step, or why it failed. "
            "Random weights, ten classes, square images. Made by `benchmarks/coverage_keras.py`; timings beside other "
            "work on the machine.",
            common.table(header, cells),
            common.describe(common.machine()),
            f"{FOOT}{json.dumps(rows)} -->",
        ]
    )


def _previous(path: Path) -> dict[str, dict[str, Any]]:
    last = path.read_text().rstrip().splitlines()[-1] if path.exists() else ""
    return json.loads(last.removeprefix(FOOT).removesuffix("-->")) if last.startswith(FOOT) else {}


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--child", choices=list(NETWORKS), help=argparse.SUPPRESS)
    parser.add_argument("--timeout", type=float, default=900, help="seconds for each network")
    options = parser.parse_args()
    if options.child:
        common.answer(measure(options.child))
        return
    rows = _previous(PAGE)
    for name in options.only:
        child = common.python("coverage_keras.py", "--child", name, timeout=options.timeout, cores=common.THREADS)
        rows[name] = child.data or {"import": f"{child.status}: {child.reason}"}
        print(name, rows[name], flush=True)
        PAGE.write_text(page(rows) + "\n")


if __name__ == "__main__":
    main()
