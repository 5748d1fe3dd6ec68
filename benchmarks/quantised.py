"""Pruning before and after static quantisation to int8, beside quantising alone, on real public networks.

    python benchmarks/quantised.py --networks DIR [--only direction,detector] [--ratio 0.3] [--samples 128]

DIR is that of `real.py`, which installs the packages that carry the networks. Of each network there are five files:
dense, pruned (`spa prune`, obspa, on real inputs, no training step), both of them quantised by onnxruntime's
`quantize_static` (QDQ, per channel, 7-bit weights where the processor lacks VNNI) on the same inputs, and the quantised
dense one pruned. All take turns in onnxruntime, and are scored on test inputs that share nothing with those of
calibration. Rows that are not run are kept from earlier results.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import common

CONVOLUTIONAL = ("direction", "crepe", "onet", "crnn", "detector")
FORMS = ("dense", "pruned", "int8", "pruned, int8", "int8, pruned")
PER_CHANNEL = 13  # the first opset whose DequantizeLinear has an axis
BUSY = 4.0  # the load average from which on times say nothing
SECONDS = 3.0  # of timing each network


def files_of(folder: Path, name: str) -> dict[str, Path]:
    """Return where the files that are made of a network lie."""
    return {form: folder / "quantised" / f"{name}_{form.replace(', ', '_')}.onnx" for form in FORMS[1:]}


def make(folder: str, name: str, ratio: float, samples: int) -> dict[str, Any]:
    """Make the files of a network in this process, and score them."""
    import numpy as np
    from real_networks import NETWORKS
    from real_networks.base import CALIBRATION, TEST, Place

    import spa

    network, place = NETWORKS[name], Place(Path(folder))
    dense = network.find(place)
    inputs, tests = network.inputs(place, CALIBRATION, samples), network.inputs(place, TEST, network.tests)
    with tempfile.TemporaryDirectory() as scratch:
        files = {"dense": dense} | files_of(place.site, name)
        files["pruned"].parent.mkdir(exist_ok=True)
        data = Path(scratch) / "inputs.npz"
        np.savez(data, **inputs.feeds)
        result = spa.prune(str(dense), ratio=ratio, data=str(data))
        result.save(files["pruned"])
        for source in ("dense", "pruned"):
            quantised = files["int8" if source == "dense" else "pruned, int8"]
            quantise(files[source], quantised, inputs.batches(), Path(scratch))
        spa.prune(str(files["int8"]), ratio=ratio, data=str(data)).save(files["int8, pruned"])
        outputs = {form: network.run(file, tests) for form, file in files.items()}
        scores = {form: network.score(tests, outputs["dense"], outputs[form]) for form in FORMS}
    return {"scores": scores, "reached": result.report.reached}


def measure(folder: str, name: str) -> dict[str, Any]:
    """Time the files of a network in turns; alone, so that it can be repeated when nothing else runs."""
    from real_networks import NETWORKS
    from real_networks.base import Place

    import spa

    files = {"dense": NETWORKS[name].find(Place(Path(folder)))} | files_of(Path(folder), name)
    found = spa.bench([str(files[form]) for form in FORMS], seconds=SECONDS, threads=1, isolate_memory=False)
    return {
        "ms": {form: entry.p10_ms for form, entry in zip(FORMS, found.models, strict=True)},
        "bytes": {form: entry.file_bytes for form, entry in zip(FORMS, found.models, strict=True)},
        "inputs": {n: list(s) for n, s in found.inputs[0].items()},
        "load": common.load(),
    }


def quantise(source: Path, target: Path, batches: list[dict[str, Any]], scratch: Path) -> None:
    """Quantise a file statically, as onnxruntime's documentation says: prepared, then calibrated by the extremes."""
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import CalibrationDataReader
    from onnxruntime.quantization.shape_inference import quant_pre_process

    import spa

    class Reader(CalibrationDataReader):
        """The calibration inputs, one batch after the other."""

        def __init__(self) -> None:
            self.left = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.left, None)

    newer, prepared = scratch / "newer.onnx", scratch / "prepared.onnx"
    opset = next(
        o.version for o in onnx.load(source, load_external_data=False).opset_import if o.domain in ("", "ai.onnx")
    )
    spa.export(str(source), "onnx", str(newer), opset=max(opset, PER_CHANNEL))
    quant_pre_process(str(newer), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(target),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=not has_vnni(),
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def has_vnni() -> bool:
    """Return whether the processor multiplies bytes without saturation."""
    info = Path("/proc/cpuinfo")
    return "vnni" in info.read_text() if info.exists() else False


# -- the table -------------------------------------------------------------------------------------------


def lines(key: str, row: Mapping[str, Any]) -> Iterator[list[object]]:
    """Yield a network's rows of cells, one for each file."""
    if row["status"] != "ok":
        yield [f"{row['title']}: {row['metric']}", "", f"{row['status']}: {row['reason']}", "", "", "", ""]
        return
    data = row["data"]
    busy = data["load"] > BUSY
    for form in (f for f in FORMS if f in data["scores"]):
        ms, size = data["ms"], data["bytes"]
        yield [
            f"{row['title']}: {row['metric']}" if form == "dense" else "",
            form,
            " / ".join(f"{v:.1f}" if v > 1.5 else f"{v:.3f}" for v in data["scores"][form].values()),
            "busy" if busy else f"{ms[form]:.3f}",
            "" if busy else f"{ms['dense'] / ms[form]:.2f}",
            f"{size[form] / 1e6:.2f}",
            f"{size['dense'] / size[form]:.2f}",
        ]


def page(data: Mapping[str, Any]) -> str:
    """Return results/quantised.md."""
    header = ["network: metric", "file", "score", "ms", "times faster", "MB", "times smaller"]
    rows = [line for key, row in sorted(data["rows"].items()) for line in lines(key, row)]
    vnni = "has" if data["vnni"] else "lacks"
    part, count = f"{data['ratio']:.0%}", data["samples"]
    return f"""# Pruned, then quantised

Made by `benchmarks/quantised.py`: `spa prune` ({part} of the MACs, obspa, {count} real inputs, no training step), then
onnxruntime's static quantisation to int8 on the same inputs, beside each alone, and the other way round. Scores are on
test inputs that share nothing with those of calibration; two figures in a cell are two scores of `real.py`.
Milliseconds: what a tenth of the runs stay below, all files in turns, one sample, one thread. The processor {vnni}
instructions for dot products of bytes (VNNI), which decides what int8 gains. "busy": other programs took the cores;
`--time-again` fills these in.

{common.table(header, rows)}

{common.describe(data["machine"])}
"""


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", type=Path, required=True, help="folder of the packages that carry the networks")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(CONVOLUTIONAL))
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=1200, help="limit of one network")
    parser.add_argument("--time-again", action="store_true", help="time the files of an earlier run alone")
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    return parser.parse_args()


def made(name: str, before: Mapping[str, Any] | None, chosen: argparse.Namespace) -> dict[str, Any]:
    """Make a network's files, or take those of an earlier run; then time them."""
    limits = {"timeout": chosen.seconds, "cores": common.THREADS}
    folder = str(chosen.networks)
    row: dict[str, Any] = dict(before or {})
    if not chosen.time_again or row.get("status") != "ok":
        arguments = ("make", folder, name, str(chosen.ratio), str(chosen.samples))
        row = common.python("quantised.py", *arguments, **limits).to_dict()
    if row["status"] == "ok":
        timed = common.python("quantised.py", "measure", folder, name, **limits)
        row |= {"data": row["data"] | timed.data} if timed.ok else {"status": timed.status, "reason": timed.reason}
    return row


def main() -> None:
    """Measure, and write the table."""
    if sys.argv[1:2] == ["make"]:
        folder, name, ratio, samples = sys.argv[2:]
        common.answer(make(folder, name, float(ratio), int(samples)))
        return
    if sys.argv[1:2] == ["measure"]:
        common.answer(measure(*sys.argv[2:]))
        return
    chosen = options()
    known = common.python("real_worker.py", "list").data
    data = common.previous("quantised", chosen.results)
    same = (data.get("ratio"), data.get("samples")) == (chosen.ratio, chosen.samples)
    data = {
        "machine": common.machine(),
        "vnni": has_vnni(),
        "ratio": chosen.ratio,
        "samples": chosen.samples,
        "rows": data["rows"] if same else {},
    }
    for name in chosen.only:
        data["rows"][name] = row = known[name] | made(name, data["rows"].get(name), chosen)
        print(json.dumps(row), flush=True)
        common.write("quantised", page(data), data, chosen.results)


if __name__ == "__main__":
    main()
