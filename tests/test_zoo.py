"""Every architecture prunes, 30 % of every free group, and matches the masked original.

What stays frozen, and why, is counted in ``frozen.json``; make it anew with ``python -m tests.test_zoo`` and look
at the difference: an entry that is gone is freedom gained.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper

from models.builders import ZOO
from spa.coupling.analysis import couple
from spa.model.bodies import flattened
from spa.model.graph import Graph
from spa.model.io import load
from spa.running.feeds import working_feeds
from spa.running.runtime import load_session
from tests.oracle import check, ungrammatical
from tests.zoo import built

FROZEN = Path(__file__).parent / "frozen.json"
SHIPPED = sorted((Path(__file__).parent.parent / "models").glob("*.onnx"))
LIGHT = sorted((Path(onnx.__file__).parent / "backend" / "test" / "data" / "light").glob("*.onnx"))

# Rounding to integers flips where sums of floats are taken in another order; half precision rounds every product.
TOLERANCE = {"handmade_qdq": 2e-3, "handmade_residual_fp16": 2e-3}

BODIES = ("handmade_if", "handmade_loop", "handmade_scan")
PRUNABLE = sorted(ZOO.keys() - set(BODIES))  # as they are built


@cache
def network(name: str) -> ModelProto:
    """A model as it is analysed: bodies of loops and branches lie flat."""
    model = built(name)
    return flattened(model) or model if name in BODIES else model


def feeds_of(model: ModelProto) -> list[dict[str, np.ndarray]]:
    session = load_session(model)
    return [working_feeds(session, seed=seed, batch=batch) for seed, batch in ((0, 2), (1, 3))]


@pytest.mark.parametrize("name", sorted(ZOO))
def test_every_architecture_prunes_and_matches_the_masked_original(name: str) -> None:
    model = network(name)
    checked = check(model, feeds=feeds_of(model), tolerance=TOLERANCE.get(name, 1e-5))
    assert sum(g.size for g in checked.groups) > 3


@pytest.mark.parametrize("name", ["handmade_qdq", "handmade_qlinear"])
def test_quantised_networks_compute_the_same_on_every_processor(name: str) -> None:
    """Without VNNI two products of uint8 and int8 are summed in 16 bits, which saturates unless weights have 7."""
    tensors = [t for t in built(name).graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1]
    assert len(tensors) == 4
    assert max(np.abs(numpy_helper.to_array(t).astype(int)).max() for t in tensors) * 255 * 2 < 2**15


@pytest.mark.parametrize("name", sorted(ZOO))
def test_every_architecture_still_runs_when_normalisations_are_crossed(name: str) -> None:
    model = network(name)
    check(model, feeds=feeds_of(model), cross=True)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_the_shipped_networks_prune_and_match_the_masked_original(path: Path) -> None:
    model = load(path).model
    check(model, feeds=feeds_of(model))


@pytest.mark.parametrize("path", LIGHT, ids=lambda p: p.stem)
def test_the_light_models_of_onnx_prune_every_free_group(path: Path) -> None:
    model = load(path).model
    small = materialised(model)
    if small is None:  # their weights, once made random, would fill hundreds of megabytes: shapes only
        check(model, cross=True)
        return
    check(small)


def materialised(model: ModelProto, most: int = 8_000_000) -> ModelProto | None:
    """The model with its ConstantOfShape weights made random, or None where they are too large."""
    graph = model.graph
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    fills = [n for n in graph.node if n.op_type == "ConstantOfShape" and n.input[0] in constants]
    shapes = {n.output[0]: tuple(int(v) for v in constants[n.input[0]]) for n in fills}
    if sum(int(np.prod(s)) for s in shapes.values()) > most:
        return None
    copy = ModelProto()
    copy.CopyFrom(model)
    rng = np.random.default_rng(0)
    kept = [n for n in copy.graph.node if n.output[0] not in shapes]
    nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in kept]
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    variances = {n.input[4] for n in nodes if n.op_type == "BatchNormalization"}
    for name, shape in shapes.items():
        value = rng.standard_normal(shape) / np.sqrt(max(np.prod(shape[1:]), 1))
        value = np.abs(value) + 0.5 if name in variances else value
        copy.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
    return copy


def frozen_without_io(model: ModelProto) -> dict[str, str]:
    """Frozen groups that do not simply reach a graph input or output, with the reason."""
    analysis = couple(Graph(model))
    assert ungrammatical(analysis) == []
    return {
        g.name: f"{g.size}: {g.frozen}"
        for g in analysis.groups
        if g.frozen and g.size > 1 and not g.frozen.startswith("graph ")
    }


@pytest.mark.parametrize("name", sorted(ZOO))
def test_what_stays_frozen_is_what_was_counted(name: str) -> None:
    counted = json.loads(FROZEN.read_text(encoding="utf-8"))
    assert frozen_without_io(network(name)) == counted.get(name, {})


def main() -> None:
    found = {name: frozen_without_io(network(name)) for name in sorted(ZOO)}
    text = json.dumps({n: f for n, f in found.items() if f}, indent=1, sort_keys=True)
    FROZEN.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
