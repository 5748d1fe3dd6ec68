"""Record the plan and the bytes of many prunings, and compare two records: what a refactoring must not change.

    PYTHONPATH=. python benchmarks/record.py before.json
    PYTHONPATH=. python benchmarks/record.py after.json --against before.json

Every shipped network with every criterion, and every builder of the zoo with criteria of each kind. A record is only
comparable with one of the same machine and versions: linear algebra rounds differently elsewhere.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
from onnx import ModelProto

import spa
from models.builders import ZOO

MODELS = Path(__file__).resolve().parent.parent / "models"
DATA = MODELS / "digits_train.npz"
CRITERIA = """
obspa wanda flap activation_l2 l1 l2 bn_scale fpgm lamp random snip taylor fisher crop grasp gate zero
""".split()
LEARNT = 128  # inputs; fewer for the zoo
FURTHER: dict[str, dict[str, Any]] = {
    "no data": {"samples": 128},
    "isomorphic": {"criterion": "l2", "ranking": "isomorphic"},
    "uniform": {"criterion": "l1", "ranking": "uniform", "round_to": 1},
    "auto": {"criterion": "l2", "ratio": "auto"},
    "params": {"criterion": "l2", "of": "params", "norm": "max", "agg": "l2"},
    "channels": {"criterion": "fpgm", "of": "channels", "norm": "standardise", "agg": "max", "min_width": 4},
    "distortion": {"max_distortion": 0.05, "data": str(DATA), "samples": LEARNT},
    "cross": {"criterion": "l2", "cross_norm": True},
    "bias": {"criterion": "l2", "reconstruct": "bias", "data": str(DATA), "samples": LEARNT},
    "full": {"criterion": "fpgm", "reconstruct": "full", "data": str(DATA), "samples": LEARNT},
    "isomorphic obspa": {"ranking": "isomorphic", "data": str(DATA), "samples": LEARNT},
    "equal": {"criterion": "l2", "equal": ["heads"], "round_to": 1, "ratio": 0.2},
}
ZOO_CRITERIA = ("l2", "fpgm", "obspa", "wanda", "zero")


def cases() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Yield a name, a model and the options of each pruning."""
    for path in sorted(MODELS.glob("*.onnx")):
        for criterion in CRITERIA:
            options = {"ratio": 0.3, "criterion": criterion, "data": str(DATA), "samples": LEARNT}
            yield f"{path.stem} {criterion}", path, options
        for name, options in FURTHER.items():
            implied = {} if "max_distortion" in options else {"ratio": 0.3}
            yield f"{path.stem} {name}", path, implied | options
    for name in sorted(ZOO):
        model = ZOO[name]()
        for criterion in ZOO_CRITERIA:
            yield f"{name} {criterion}", model, {"ratio": 0.2, "criterion": criterion, "samples": 16, "round_to": 1}


def written(model: ModelProto) -> bytes:
    """Return the bytes of a model without the source paths that PyTorch's exporter writes, which name the checkout."""
    copy = ModelProto()
    copy.CopyFrom(model)
    for node in copy.graph.node:
        kept = [m for m in node.metadata_props if m.key != "pkg.torch.onnx.stack_trace"]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    return copy.SerializeToString(deterministic=True)


def digest(content: bytes) -> str:
    """Return a short hash."""
    return hashlib.sha256(content).hexdigest()[:16]


def recorded(model: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Prune once; return hashes of plan and bytes, or the message of the refusal."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = spa.prune(model, **options)
    except spa.SpaError as error:
        return {"refused": f"{type(error).__name__}: {error}"}
    except Exception as error:  # a finding, recorded like any other; the rest of the record goes on
        return {"failed": f"{type(error).__name__}: {error}"}
    changes = {k: v for k, v in (result.report.calibration or {}).items() if k in ("before", "after", "accuracy")}
    return {
        "plan": digest(result.plan.to_json().encode()),
        "bytes": digest(written(result.model)),
        "macs": result.report.after.macs,
        "changes": changes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    before = json.loads(arguments.against.read_text())["cases"] if arguments.against else {}
    found: dict[str, Any] = {}
    differing = []
    start = time.perf_counter()
    for name, model, options in cases():
        if arguments.only not in name:
            continue
        found[name] = recorded(model, options)
        if name in before and before[name] != found[name]:
            differing.append(name)
            print(f"DIFFERS {name}\n  {before[name]}\n  {found[name]}", flush=True)
    record = {"environment": common.machine(), "cases": found}
    arguments.output.write_text(json.dumps(record, indent=1, default=str) + "\n")
    seconds = time.perf_counter() - start
    print(f"{len(found)} prunings in {seconds:.0f} s, {len(differing)} of {len(before)} differ")
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
