"""A crash, a hang and a lack of memory in native code are messages, whichever way the child process is made."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import spa
from spa.errors import InvariantError, ModelError, PlanError
from spa.running import guarded as module
from spa.running.guarded import ForeignFailure, guarded, seconds_for
from spa.running.trial import try_out


@pytest.fixture(params=["fork", "fresh"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "fork" and sys.platform != "linux":
        pytest.skip("forks are used on Linux alone")
    monkeypatch.setattr(module, "FORK_UNSAFE", frozenset({"sys"} if request.param == "fresh" else ()))
    yield request.param


def double(number: int) -> int:
    os.write(1, b"not to be seen\n")
    return 2 * number


def crash(number: int) -> None:
    os.kill(os.getpid(), number)


def leave() -> None:
    os._exit(3)


def wait() -> None:
    time.sleep(60)


def refuse() -> None:
    raise PlanError("too much. Ask for less.")


def stumble() -> None:
    raise InvariantError("odd.")


def slip() -> None:
    raise KeyError("nobody foresaw")


def test_what_comes_back_is_what_the_function_gives(way: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert guarded(double, 21, name="m", seconds=30) == 42
    assert len(guarded(bytes, 10_000_000, name="m", seconds=30)) == 10_000_000  # more than a pipe holds
    assert "not to be seen" not in capfd.readouterr().out


class Waiting:
    """Something whose end waits, in a fork, for threads that are not there, as that of a session does."""

    def __init__(self) -> None:
        self.parent, self.itself = os.getpid(), self  # a cycle, so that only the collector finds it

    def __del__(self) -> None:
        if os.getpid() != self.parent:
            time.sleep(60)


def test_garbage_of_the_parent_is_not_collected_in_a_fork(way: str) -> None:
    gc.disable()
    try:
        Waiting()
        assert guarded(gc.collect, name="m", seconds=10) is not None
    finally:
        gc.enable()


def test_errors_of_ours_come_back_as_they_are(way: str) -> None:
    with pytest.raises(PlanError, match=r"^too much\. Ask for less\.$"):
        guarded(refuse, name="m", seconds=30)
    with pytest.raises(InvariantError) as error:
        guarded(stumble, name="m", seconds=30)
    assert str(error.value).count("please report it") == 1
    with pytest.raises(RuntimeError, match="nobody foresaw"):
        guarded(slip, name="m", seconds=30)


@pytest.mark.skipif(sys.platform == "win32", reason="the platform has no such signals")
def test_a_crash_is_a_message(way: str) -> None:
    with pytest.raises(ForeignFailure, match=r"onnxruntime crashes on m \(SIGSEGV\)"):
        guarded(crash, int(signal.SIGSEGV), name="m", seconds=30)
    with pytest.raises(ForeignFailure, match=r"SIGKILL, as happens where memory runs out"):
        guarded(crash, int(signal.SIGKILL), name="m", seconds=30)


def test_a_hang_is_a_message(way: str) -> None:
    began = time.monotonic()
    with pytest.raises(ForeignFailure, match="not come to an end with m after 1 s"):
        guarded(wait, name="m", seconds=1)
    assert time.monotonic() - began < 10


def test_a_child_that_leaves_without_an_answer_is_no_success() -> None:
    with pytest.raises(ForeignFailure, match="exit code 3"):
        guarded(leave, name="m", seconds=30)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is set on Linux alone")
def test_memory_beyond_what_there_is_is_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "available", lambda: 2**27)
    with pytest.raises(ForeignFailure, match="not enough memory"):
        guarded(bytes, 2**31, name="m", seconds=30)


def test_limits_grow_with_what_is_to_do() -> None:
    assert seconds_for(0, 0) < 60 < seconds_for(0, 1e11) < seconds_for(10**10, 1e11)
    assert seconds_for(0, None) > seconds_for(0, 1e9)


def test_a_limit_of_time_is_one_that_the_system_can_wait_for() -> None:
    assert guarded(double, 3, name="m", seconds=seconds_for(0, 1e300)) == 6


def endless() -> ModelProto:
    """A network beside which a Loop counts to 2^63."""
    rng = np.random.default_rng(0)
    count = helper.make_tensor_value_info("i", TensorProto.INT64, [])
    flag, flag_out = (helper.make_tensor_value_info(n, TensorProto.BOOL, []) for n in ("c", "c2"))
    state, state_out = (helper.make_tensor_value_info(n, TensorProto.FLOAT, []) for n in ("s", "s2"))
    nodes = [helper.make_node("Identity", ["c"], ["c2"]), helper.make_node("Neg", ["s"], ["s2"])]
    body = helper.make_graph(nodes, "body", [count, flag, state], [flag_out, state_out])
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w1"], ["a"]),
            helper.make_node("Relu", ["a"], ["r"]),
            helper.make_node("MatMul", ["r", "w2"], ["y"]),
            helper.make_node("Loop", ["most", "true", "zero"], ["z"], body=body),
        ],
        "endless",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 7])],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 13]),
            helper.make_tensor_value_info("z", TensorProto.FLOAT, []),
        ],
        [
            numpy_helper.from_array(rng.standard_normal((7, 31)).astype(np.float32), "w1"),
            numpy_helper.from_array(rng.standard_normal((31, 13)).astype(np.float32), "w2"),
            numpy_helper.from_array(np.asarray(2**63 - 1), "most"),
            numpy_helper.from_array(np.asarray(True), "true"),
            numpy_helper.from_array(np.asarray(0.5, np.float32), "zero"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("criterion", ["l2", "obspa"])
def test_an_endless_loop_in_a_model_is_a_message_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, criterion: str
) -> None:
    monkeypatch.setattr(module, "SECONDS", 1.0)
    with pytest.raises(ModelError, match="not come to an end"):
        spa.prune(endless(), criterion=criterion, ratio=0.3, round_to=1).save(tmp_path / "o.onnx")
    assert not list(tmp_path.iterdir())


def test_only_crashes_and_hangs_count_in_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    try_out(b"no model")
    monkeypatch.setattr(module, "SECONDS_UNKNOWN", 1.0)
    with pytest.raises(ForeignFailure):
        try_out(endless())
