"""Fuzzers: mutants of model files end in a result or one message, and random networks are pruned correctly.

An ordinary run takes seconds; ``SPA_FUZZ_SECONDS=30`` gives the two a minute (CI), ``-m slow`` half an hour,
and ``SPA_FUZZ_FIRST=N`` begins at another seed. A failure names the seed: ``mutant(seed)`` or ``network(seed)``
makes the same file again.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

import spa
from spa.errors import InvariantError, SpaError
from spa.model.alternatives import reunited
from spa.running.feeds import make_feeds
from spa.running.guarded import ForeignFailure, guarded
from spa.running.runtime import load_session
from spa.surgery.proof import TOLERANCE, distance
from tests.fuzz.disguises import disguised
from tests.fuzz.double import equal_in_double
from tests.fuzz.graphs import network
from tests.fuzz.mutants import mutant, seed_models

SECONDS = float(os.environ.get("SPA_FUZZ_SECONDS", "1.5"))
LONG = 1800.0
FIRST = int(os.environ.get("SPA_FUZZ_FIRST", "1000000" if "SPA_FUZZ_SECONDS" in os.environ else "0"))
GOOD = frozenset({"pruned", "refused", "nothing to see"})


def proved(result: spa.Result) -> str:
    """Tell whether a result equals the masked original, where that can be run; double precision decides in doubt."""
    try:
        proof = result.prove(seeds=1)
    except InvariantError:
        raise
    except SpaError:
        return "pruned"
    if not proof.holds and not equal_in_double(result):
        return "wrong output"
    return "nothing to see" if proof.is_empty else "pruned"


def outcome_of_mutant(seed: int) -> str:
    """Prune a mutant, in a child process of the fuzzer's."""
    warnings.simplefilter("ignore")  # a traceback is what counts, not a division by a weight of zero
    criterion = random.Random(seed).choice(["l2", "l2", "obspa"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "m.onnx").write_bytes(mutant(seed))
        expected = ["m.onnx"]
        try:
            result = spa.prune(folder / "m.onnx", criterion=criterion, ratio=0.2, round_to=1, samples=16)
            result.save(folder / "o.onnx")
            found, expected = proved(result), ["m.onnx", "o.onnx"]
        except InvariantError:
            return traceback.format_exc()
        except SpaError as error:
            found = "refused" if len(str(error).splitlines()) == 1 else f"a message of several lines: {error}"
        except Exception:
            return traceback.format_exc()
        left = sorted(f.name for f in folder.iterdir())
        return found if left == expected else f"left over: {left}"


def outcome_of_network(seed: int) -> str:
    """Prune a random network, in this process; every second one is in disguise."""
    model = network(seed)
    onnx.checker.check_model(model, full_check=True)
    model = disguised(model, seed) if seed % 2 else model
    try:
        result = spa.prune(model, criterion="random", seed=seed, ratio=0.3, round_to=1)
        onnx.checker.check_model(result.model, full_check=True)
        feeds = make_feeds(model, seed=seed)
        dense, simple = (load_session(m).run(None, feeds) for m in (model, reunited(result.source.model)))
        if any(distance(a, b) > TOLERANCE for a, b in zip(simple, dense, strict=True)):
            return "simplified to another network"
        return proved(result)
    except InvariantError:
        return traceback.format_exc()
    except SpaError:
        return "refused"


def guarded_outcome(seed: int) -> str:
    try:
        return guarded(outcome_of_mutant, seed, name=f"mutant {seed}", seconds=120)
    except ForeignFailure as error:
        return str(error)


def run(outcome: Callable[[int], str], seconds: float) -> Counter[str]:
    """Try seed after seed; count what came of them, and fail at what is not good."""
    counts: Counter[str] = Counter()
    end, seed = time.monotonic() + seconds, FIRST
    while time.monotonic() < end:
        found = outcome(seed)
        assert found in GOOD, f"seed {seed}: {found}"
        counts[found] += 1
        seed += 1
    return counts


def test_the_models_that_mutants_are_made_of_are_pruned() -> None:
    for name, model in seed_models().items():
        assert proved(spa.prune(model, criterion="l2", ratio=0.2, round_to=1, cross_norm=True)) == "pruned", name


@pytest.mark.parametrize("seconds", [SECONDS, pytest.param(LONG, marks=pytest.mark.slow)])
def test_a_mutant_is_pruned_or_refused(seconds: float) -> None:
    spa.prune(network(0), criterion="l2", ratio=0.1, round_to=1)  # imports once what every child needs
    counts = run(guarded_outcome, seconds)
    assert counts["refused"]


@pytest.mark.parametrize("seconds", [SECONDS, pytest.param(LONG, marks=pytest.mark.slow)])
def test_a_random_network_equals_the_masked_original(seconds: float) -> None:
    counts = run(outcome_of_network, seconds)
    assert counts["pruned"]


def test_a_difference_of_rounding_is_decided_in_double_precision() -> None:
    result = spa.prune(network(1_002_098), criterion="random", seed=1_002_098, ratio=0.3, round_to=1)
    assert not result.prove(seeds=1, tolerance=1e-7).holds
    assert equal_in_double(result)


def test_the_fuzzer_sees_a_wrong_output(monkeypatch: pytest.MonkeyPatch) -> None:
    from spa.surgery import apply as surgery

    right = surgery.conform

    def wrong(model: onnx.ModelProto) -> onnx.ModelProto:
        for tensor in model.graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2:
                tensor.raw_data = bytes(len(tensor.raw_data))
        return right(model)

    monkeypatch.setattr(surgery, "conform", wrong)
    assert "wrong output" in {outcome_of_network(seed) for seed in range(8)}
