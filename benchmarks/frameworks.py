"""The same network in PyTorch, Keras and flax, trained there and pruned alike: do the accuracies agree?

    python benchmarks/frameworks.py torch     # first: the other two take its networks over
    python benchmarks/frameworks.py keras     # each in an environment that has the framework
    python benchmarks/frameworks.py flax
    python benchmarks/frameworks.py table     # only writes the table again

Each run writes its part, `frameworks_NAME.json`, and the table `frameworks.md` of the parts that are there. Networks
and training loops are those of `examples/*_loop.py`: one architecture, initialisation (He, uniform), optimiser,
schedule, batch size and split. What a framework draws by itself differs: initial weights, the order of the images.
The weights that PyTorch trained are also put into Keras' and flax' networks, which must then lose the same channels.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, ROOT, describe, machine, table
from onnx import ModelProto, NodeProto

sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "examples"))

import spa  # the checkout must be on the path first
from models.evaluate import accuracy
from spa.importers import Imported

SIDES = {"torch": "torch_loop", "keras": "keras_loop", "flax": "jax_loop"}
TITLES = {"torch": "PyTorch", "keras": "Keras", "flax": "flax"}
FACTORS = (1.5, 2.0, 3.0)
CRITERIA = ("obspa", "l1", "l2", "bn_scale", "fpgm", "lamp", "wanda", "flap", "random")
TUNED, TUNED_FACTOR = ("obspa", "l2"), 2.0
EPOCHS, TUNING = 15, 3
TRANSFERRED = 2  # seeds whose networks go from PyTorch to the others
DEALS = 4000
WORDS = {
    "kernel": "weight",
    "gamma": "weight",
    "scale": "weight",
    "beta": "bias",
    "mean": "running_mean",
    "moving_mean": "running_mean",
    "var": "running_var",
    "moving_variance": "running_var",
}


# -- one framework ---------------------------------------------------------------------------------------


def requests() -> Iterator[tuple[str, float, dict[str, Any]]]:
    """Yield the requests: name, factor by which MACs are divided, and options."""
    for factor in FACTORS:
        yield "obspa, no data", factor, {"criterion": "obspa", "data": None}
        for criterion in CRITERIA:
            yield criterion, factor, {"criterion": criterion}


def pytorch_name(path: str) -> str:
    """Return a parameter's name in PyTorch, by its path in any of the three (``blocks_0_conv1/kernel``)."""
    parts = [p for p in re.findall(r"\w+", path) if p not in ("layers", "value")]
    return ".".join([*"_".join(parts[:-1]).split("_"), WORDS.get(parts[-1], parts[-1])])


def variables(name: str, net: Any) -> dict[str, Any]:
    """Return a network's variables by their names in PyTorch."""
    if name == "torch":
        return {k: v for k, v in net.state_dict().items() if v.ndim}  # no counts of batches
    if name == "keras":
        return {pytorch_name(v.path): v for v in net.variables}
    import jax
    from flax import nnx

    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(net), is_leaf=lambda v: isinstance(v, nnx.Variable))
    return {pytorch_name(jax.tree_util.keystr(path)): v for path, v in leaves}


def take_over(name: str, net: Any, weights: dict[str, np.ndarray]) -> Any:
    """Put PyTorch's weights into a network of Keras or flax, whose kernels are ``HWIO`` and ``IO``."""
    own = variables(name, net)
    if own.keys() != weights.keys():
        raise SystemExit(f"{name}: its parameters are others than PyTorch's: {sorted(own.keys() ^ weights.keys())}")
    for key, value in weights.items():
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
        if name == "keras":
            own[key].assign(value)
        else:
            own[key][...] = value
    return net


class Side:
    """A framework: the network and the training of its example, on its images."""

    def __init__(self, name: str, threads: int) -> None:
        self.name, self.threads = name, threads
        self.example = importlib.import_module(SIDES[name])
        self.x, self.x_test, self.y, self.y_test = self.example.digits()

    def inputs(self) -> Any:
        """Return two images, as the network takes them."""
        if self.name != "torch":
            return self.x[:2]
        import torch

        return torch.from_numpy(self.x[:2])

    def prune(self, model: Any, factor: float, request: dict[str, Any], seed: int, **given: Any) -> spa.Result:
        """Divide the MACs by a factor."""
        options = {"data": self.x, "threads": self.threads, "round_to": 1, "seed": seed} | request | given
        return spa.prune(model, ratio=1 - 1 / factor, **options)

    def measured(self, net: Any, seed: int, order: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
        """Measure accuracy right after each pruning, MACs, and channels of convolutions, in this order if any."""
        imported = spa.convert(net, self.inputs())
        model = in_order(imported, order)
        found = {}
        for name, factor, request in requests():
            result = self.prune(model, factor, request, seed)
            found[f"{factor:g} {name}"] = {
                "accuracy": 100 * accuracy(result.model.SerializeToString(), self.x_test, self.y_test),
                "macs": [result.report.before.macs, result.report.after.macs],
                "kept": kept(result, imported.names),
            }
        return found

    def tuned(self, net: Any, seed: int) -> dict[str, dict[str, float]]:
        """Measure the accuracy of the framework's own pruned network, and after a short training there."""
        found = {}
        for criterion in TUNED:
            result = self.prune(net, TUNED_FACTOR, {"criterion": criterion}, seed, example_inputs=self.inputs())
            small = result.pruned
            before = self.example.accuracy(small, self.x_test, self.y_test)
            small = self.example.train(small, self.x, self.y, TUNING, 1e-3, seed)
            after = self.example.accuracy(small, self.x_test, self.y_test)
            found[f"{TUNED_FACTOR:g} {criterion}"] = {"pruned": before, "tuned": after}
        return found


def kept(result: spa.Result, names: dict[str, str]) -> dict[str, str]:
    """Return the channels that the convolutions keep: by parameter and axis, as bits in hexadecimal."""
    found = {}
    for tensor in result.source.model.graph.initializer:
        if len(tensor.dims) == 4:
            for axis in (0, 1):
                bits = np.ones(tensor.dims[axis], bool)
                chosen = result.plan.parameters.get(tensor.name, {}).get(axis)
                if chosen is not None:
                    bits[:] = False
                    bits[list(chosen)] = True
                found[f"{pytorch_name(names[tensor.name])} {axis}"] = np.packbits(bits).tobytes().hex()
    return found


def in_order(imported: Imported, order: Sequence[str]) -> ModelProto:
    """Return the model with its convolutions in this order, each with the node that reads it: as valid as any other.

    Exporters order parallel branches differently, and `obspa` refits layers in the order in which they come.
    """
    graph = imported.model.graph
    made = {name: node for node in graph.node for name in node.output}
    reader = {name: node for node in reversed(graph.node) for name in node.input}
    weights = {pytorch_name(imported.names[n.input[1]]): n for n in graph.node if n.op_type == "Conv"}
    placed: dict[str, NodeProto] = {}

    def place(node: NodeProto) -> None:
        for name in node.input:
            if name in made and made[name].output[0] not in placed:
                place(made[name])
        placed.setdefault(node.output[0], node)

    for weight in order:
        place(reader[weights[weight].output[0]])
    for node in graph.node:
        place(node)
    model = ModelProto()
    model.CopyFrom(imported.model)
    del model.graph.node[:]
    model.graph.node.extend(placed.values())
    return model


def run(name: str, seeds: int, threads: int, cache: Path, results: Path) -> None:
    """Measure, and write the part after each seed."""
    side = Side(name, threads)
    part: dict[str, Any] = {"about": machine() | {"threads used": threads}, "networks": [], "taken over": []}
    for seed in range(seeds):
        net = side.example.train(side.example.build(seed), side.x, side.y, EPOCHS, 3e-3, seed)
        file = cache / f"torch_{seed}.npz"
        if name == "torch":
            np.savez(file, **{k: v.numpy() for k, v in variables(name, net).items()})
        dense = side.example.accuracy(net, side.x_test, side.y_test)
        pruned = side.measured(net, seed)
        if name != "torch" or seed >= TRANSFERRED:
            for case in pruned.values():
                del case["kept"]  # nothing is compared with it
        part["networks"].append({"dense": dense, "pruned": pruned, "tuned": side.tuned(net, seed)})
        print(name, "seed", seed, f"{dense:.1f}", {k: round(v["accuracy"], 1) for k, v in pruned.items()}, flush=True)
        if name != "torch" and seed < TRANSFERRED:
            with np.load(file) as weights:
                taken = dict(weights)
            same = take_over(name, side.example.build(seed), taken)
            order = [key for key, value in taken.items() if value.ndim == 4]
            part["taken over"].append(side.measured(same, seed, order))
        (results / f"frameworks_{name}.json").write_text(json.dumps(part, indent=1) + "\n", encoding="utf-8")


# -- the table -------------------------------------------------------------------------------------------


def rows(parts: dict[str, Any]) -> dict[tuple[str, str, str], np.ndarray]:
    """Return accuracies [framework seed] by RF, criterion and stage, of the seeds that all parts have."""
    seeds = min(len(part["networks"]) for part in parts.values())
    networks = [part["networks"][:seeds] for part in parts.values()]
    found = {("1", "", "trained"): np.array([[n["dense"] for n in side] for side in networks])}
    first = networks[0][0]
    for key in first["pruned"]:
        values = np.array([[n["pruned"][key]["accuracy"] for n in side] for side in networks])
        found[(*key.split(" ", 1), "pruned")] = values
    for key in first["tuned"]:
        found[(*key.split(" ", 1), "tuned")] = np.array([[n["tuned"][key]["tuned"] for n in side] for side in networks])
    return found


def outside(values: np.ndarray) -> int:
    """Count the rows and pairs of columns whose means of ``[row framework seed]`` are two standard errors apart."""
    means, errors = values.mean(2), values.var(2, ddof=1) / values.shape[2]
    pairs = np.array(list(combinations(range(values.shape[1]), 2)))
    gap = np.abs(means[:, pairs[:, 0]] - means[:, pairs[:, 1]])
    return int((gap > 2 * np.sqrt(errors[:, pairs[:, 0]] + errors[:, pairs[:, 1]])).sum())


def verdict(values: np.ndarray) -> str:
    """Say whether the columns agree, by a permutation test: had the frameworks no part in it, any deal would do.

    Args:
        values: accuracies [row framework seed]. A network is dealt with all its rows, which depend on each other.
    """
    count, sides, seeds = values.shape
    rng, flat = np.random.default_rng(0), values.reshape(count, -1)
    deals = np.array([outside(rng.permutation(flat, axis=1).reshape(values.shape)) for _ in range(DEALS)])
    found = outside(values)
    chance = (1 + (deals >= found).sum()) / (1 + DEALS)
    agree = "agree within noise" if chance > 0.05 else "do NOT agree within noise"
    return (
        f"Of {count * sides * (sides - 1) // 2} differences between two columns, {found} exceed two standard errors; "
        f"the same {sides * seeds} networks dealt to the columns at random give {deals.mean():.1f} on average, and "
        f"{found} or more in {chance:.0%} of {DEALS} deals: **the columns {agree}**."
    )


def exactness(parts: dict[str, Any]) -> str:
    """Say what became of PyTorch's weights in the other frameworks."""
    lines = []
    for name, part in parts.items():
        if name == "torch" or not part["taken over"]:
            continue
        cases = [
            (own["pruned"][key], case)
            for own, taken in zip(parts["torch"]["networks"], part["taken over"], strict=False)
            for key, case in taken.items()
        ]
        same = sum(a["kept"] == b["kept"] and a["macs"] == b["macs"] for a, b in cases)
        gap = max(abs(a["accuracy"] - b["accuracy"]) for a, b in cases)
        lines.append(
            f"{TITLES[name]}: {same} of {len(cases)} prunings keep the same channels as in PyTorch; accuracies differ "
            f"by {gap:.1f} at most."
        )
    return "\n".join(lines)


def text(parts: dict[str, Any]) -> str:
    found = rows(parts)
    cells = [
        [f"{stage}, {criterion}" if criterion else stage, factor]
        + [f"{side.mean():.1f} ± {side.std(ddof=1):.1f}" for side in values]
        for (factor, criterion, stage), values in found.items()
    ]
    seeds = next(iter(found.values())).shape[1]
    back = max(
        abs(case["pruned"] - network["pruned"][key]["accuracy"])
        for part in parts.values()
        for network in part["networks"]
        for key, case in network["tuned"].items()
    )
    about = "\n\n".join(f"{TITLES[name]}: {describe(part['about'])}" for name, part in parts.items())
    return f"""# Three frameworks, one network

The digits ResNet (`examples/torch_loop.py`, `keras_loop.py`, `jax_loop.py`), written and trained in each framework with
{seeds} seeds, {EPOCHS} epochs, and pruned alike: top-1 in per cent on 360 test images right after pruning, and after
{TUNING} epochs of training in the framework (tuned); mean ± standard deviation over the seeds. RF is by how much the
MACs are divided. 512 training images to learn from, or none; global ranking, widths not rounded. One image is 0.3.

{table(["stage", "RF", *(TITLES[name] for name in parts)], cells)}

{verdict(np.stack(list(found.values()))) if len(parts) > 1 and seeds > 1 else ""}

The weights that PyTorch trained (seeds 0 to {TRANSFERRED - 1}), put into the other frameworks' networks, converted, and
pruned with the nodes in PyTorch's order (tf2onnx writes the shortcut first, and `obspa` refits in the order of nodes):

{exactness(parts)}

The pruned network as the framework's own object against the pruned ONNX model: accuracies differ by {back:.1f} at most.

{about}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("side", choices=[*SIDES, "table"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "spa-frameworks")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    if options.side != "table":
        run(options.side, options.seeds, options.threads, options.cache, options.results)
    files = {name: options.results / f"frameworks_{name}.json" for name in SIDES}
    parts = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.exists()}
    (options.results / "frameworks.md").write_text(text(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
