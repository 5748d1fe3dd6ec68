"""Threads change no result, no order, and end where one of them fails."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

import spa
from spa.api import prune_file
from spa.model import io, workers
from spa.model.workers import in_threads
from spa.request import Request


def test_results_keep_their_order_and_the_first_failure_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "cores", lambda: 3)
    assert in_threads(lambda n: n * n, range(50), workers.WORTH) == [n * n for n in range(50)]
    done = []

    def fail(n: int) -> None:
        done.append(n)
        time.sleep(0.002)  # else all may be done before the first failure is heard of
        raise ValueError(n)

    with pytest.raises(ValueError, match=r"^0$"):
        in_threads(fail, range(5000), workers.WORTH)
    assert len(done) < 5000


def test_little_work_stays_in_its_thread() -> None:
    assert set(in_threads(lambda _: threading.get_ident(), range(9), 10)) == {threading.get_ident()}


@pytest.mark.parametrize("count", [1, 2, 4])
def test_plans_and_bytes_do_not_depend_on_threads(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path("models/digits_resnet.onnx")
    request = Request.of(criterion="l2", ratio=0.3)
    expected = spa.prune(source, request=request)
    expected.save(tmp_path / "o.onnx")
    monkeypatch.setattr(workers, "WORTH", 0)
    monkeypatch.setattr(workers, "cores", lambda: count)
    monkeypatch.setattr(io, "LAZY_FILE", 0)
    monkeypatch.setattr(io, "LAZY_WEIGHT", 600)
    found = prune_file(source, request)
    found.save(tmp_path / "p.onnx")
    assert found.plan == expected.plan
    assert (tmp_path / "p.onnx").read_bytes() == (tmp_path / "o.onnx").read_bytes()
