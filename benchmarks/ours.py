"""Run SPA on one file, in this process, and hand the figures to the parent (`common.answer`).

    python benchmarks/ours.py prune FILE [--out FILE] [--round-to N]
    python benchmarks/ours.py analyze FILE
    python benchmarks/ours.py exact FILE
    python benchmarks/ours.py bench FILE [FILE ...]
    python benchmarks/ours.py obspa FILE [--data DIR or FILE.npz] [--samples N]

Everything that depends on SPA's interface is in this file.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
from peers import RATIO, Stopwatch

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray

_OPTIONS: dict[str, Any] = {"ratio": RATIO, "of": "channels", "ranking": "uniform", "criterion": "l2"}


def command(path: Path, out: Path) -> list[str]:
    """Return the command line that prunes a file as `prune` here does, as a whole process."""
    options = [part for key, value in _OPTIONS.items() for part in (f"--{key}", str(value))]
    return [
        sys.executable,
        "-m",
        "spa.cli",
        "prune",
        str(path),
        "-o",
        str(out),
        *options,
        "--round-to",
        "1",
        "--cross-norm",
    ]


def prune(path: Path, out: Path | None, round_to: int) -> dict[str, Any]:
    """Halve every group, normalisation crossings included, and return counts and seconds.

    "prune" is everything from the path to the pruned model in memory; "save" writes and verifies it.
    """
    watch = Stopwatch()
    from spa import prune as run  # the package imports its parts on first use

    watch.lap("import")
    result = run(path, **_OPTIONS, round_to=round_to, cross_norm=True)
    watch.lap("prune")
    if out:
        result.save(out)
        watch.lap("save")
    import counting

    counts = {"before": counting.parameters(path), "after": counting.parameters(result.model)}
    report = result.report.to_dict()
    kept = {key: report[key] for key in ("requested", "reached", "notes", "seconds")}
    macs = {"macs before": report["before"]["macs"], "macs after": report["after"]["macs"]}
    return counts | macs | {"seconds": watch.seconds, "report": kept}


def analyze(path: Path) -> dict[str, Any]:
    """Analyse a file twice; the second time shows the cost without first-use costs."""
    watch = Stopwatch()
    from spa import analyze as run

    watch.lap("import")
    run(path)
    watch.lap("analysis")
    run(path)
    watch.lap("analysis again")
    return {"seconds": watch.seconds}


def exact(path: Path) -> dict[str, Any]:
    """Prune the groups that cross no normalisation and compare with the masked original.

    Only there the two must be equal: removing channels under a normalisation changes its statistics.
    """
    import spa

    result = spa.prune(path, **_OPTIONS, round_to=1, cross_norm=False)
    return {"error": _oracle_error(result)}


def _oracle_error(result: Any) -> float:
    """Return the largest difference between the pruned and the masked original, relative to its size."""
    from spa.surgery.masking import masked

    expected, got = _run(masked(result.analysis, result.plan)), _run(result.model)
    return float(abs(got - expected).max() / abs(expected).max())


def _run(model: onnx.ModelProto) -> NDArray[np.float32]:
    """Return the output on two seeded random images, unoptimised: onnxruntime's Pad fusion is wrong."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = common.THREADS
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0]
    shape = [side if isinstance(side, int) else 2 for side in entry.shape]
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    (y,) = session.run(None, {entry.name: x})
    return y


def bench(paths: list[Path], seconds: float) -> dict[str, Any]:
    """Time models in onnxruntime, alternating."""
    from spa.running.bench import bench as run

    data = run(paths, seconds=seconds, threads=common.THREADS).to_dict()
    for entry in data["models"]:
        entry["name"] = Path(entry["name"]).name  # results name no folders of this machine
    return data


def obspa(path: Path, folder: Path | None, samples: int) -> dict[str, Any]:
    """Remove half of the MACs by optimal brain surgery, and say where the time goes.

    Args:
        path: the network.
        folder: of CIFAR-10's images (see `accuracy.py`), or a file of arrays, or None to have inputs made up.
        samples: how many of them.
    """
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "20")  # as the command line does
    watch = Stopwatch()
    import onnxruntime  # noqa: F401 - its import is not the pruner's time
    from sampling import Sampler

    from spa import prune as run

    data: Any = None
    if folder and folder.is_file():
        data = folder
    elif folder:
        from accuracy import images

        data = {"image": images(folder)[0][:samples]}
    watch.lap("import")
    with Sampler() as sampler:
        result = run(  # random weights are no worse for a change that would be refused
            path, ratio=RATIO, data=data, samples=samples, round_to=1, threads=common.THREADS, insist=True
        )
    watch.lap("prune")
    cpu, memory = time.process_time(), result.report.memory
    report = result.report.to_dict()
    kept = {key: report[key] for key in ("reached", "calibration", "notes", "seconds")}
    if folder is not None:  # of this machine alone
        kept["calibration"] |= {"source": folder.name}
    return {
        "seconds": watch.seconds,
        "cpu seconds": cpu,
        "memory": memory,
        "report": kept,
        "samples": sampler.to_dict(),
        "dense pass": _pass_seconds(path, report["calibration"]["inputs"], report["calibration"]["samples"]),
    }


def _pass_seconds(path: Path, shapes: dict[str, list[int]], samples: int) -> float:
    """Return the seconds of one dense pass over as many inputs as calibrated, in batches of the shapes that did.

    Token ids are zeros: which they are does not change the time.
    """
    import numpy as np

    from spa.running.runtime import input_specs, load_session, run

    session = load_session(str(path), optimise=True, threads=common.THREADS)
    rng = np.random.default_rng(0)
    feeds = {}
    for spec in input_specs(session):
        shape = shapes[spec.name]
        whole = "int" in spec.type
        feeds[spec.name] = np.zeros(shape, np.int64) if whole else rng.standard_normal(shape, np.float32)
    run(session, feeds)
    batches = -(-samples // max(shape[0] for shape in shapes.values()))
    watch = Stopwatch()
    for _ in range(batches):
        run(session, feeds)
    watch.lap("pass")
    return watch.seconds["pass"]


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("task", choices=("prune", "analyze", "exact", "bench", "obspa"))
    parser.add_argument("paths", type=Path, nargs="+")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--round-to", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=4.0, help="bench: time for each model")
    parser.add_argument("--data", type=Path, help="obspa: folder of CIFAR-10's images; without it, inputs are made up")
    parser.add_argument("--samples", type=int, default=512, help="obspa: how many inputs")
    options = parser.parse_args()
    if options.task == "bench":
        common.answer(bench(options.paths, options.seconds))
    elif options.task == "obspa":
        common.answer(obspa(options.paths[0], options.data, options.samples))
    elif options.task == "prune":
        common.answer(prune(options.paths[0], options.out, options.round_to))
    else:
        common.answer({"analyze": analyze, "exact": exact}[options.task](options.paths[0]))


if __name__ == "__main__":
    main()
