"""Tasks in processes and on clusters: the same results, whoever does them, and clear errors where nobody can."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg.lapack  # noqa: F401 # whose pool of threads a limit can then find
from threadpoolctl import threadpool_info, threadpool_limits

from spa.errors import OptionError, PlanError, SpaError, UnsupportedError
from spa.running import tasks
from spa.running.tasks import ALONE, DIED, RETRIES, Workers
from tests.clusters import CLUSTERS, dask_cluster

ITEMS = [np.arange(n + 3.0) for n in range(5)]
TWO = Workers(jobs=2)


def moments(shared: np.ndarray, item: np.ndarray) -> tuple[bytes, set[int], bool, int]:
    threads = {p["num_threads"] for p in threadpool_info() if p["user_api"] == "blas"}
    return (shared[: len(item)] @ item).tobytes(), threads, item.flags.writeable, os.getpid()


def dies(folder: Path, item: int) -> int:
    with (folder / str(item)).open("a") as file:
        file.write(".")
    if item == 2 and len((folder / "2").read_text()) <= (1 if (folder / "once").exists() else 9):
        os.kill(os.getpid(), signal.SIGKILL)
    return item * item


def refuses(shared: str, item: int) -> int:
    if item == 1:
        raise PlanError(f"{shared} cannot be done. Leave it.")
    return item


def test_one_job_is_done_here_and_lazily() -> None:
    drawn: list[int] = []
    items = (drawn.append(n) or n for n in range(3))  # type: ignore[func-returns-value]
    results = ALONE.each(lambda shared, item: shared + item, 10, items, 1)
    assert next(results) == (0, 10) and drawn == [0]
    assert list(results) == [(1, 11), (2, 12)]


def check_any_worker(workers: Workers) -> None:
    """Workers must give what this process gives, with its number of threads, from arrays that are mapped."""
    shared = np.random.default_rng(0).standard_normal(97)
    with threadpool_limits(3, "blas"):
        found = dict(workers.each(moments, shared, iter(ITEMS), 3))
    assert [found[n][0] for n in range(5)] == [moments(shared, item)[0] for item in ITEMS]
    for _, threads, writeable, process in found.values():
        assert threads == {3} and not writeable and process != os.getpid()


def check_deaths(workers: Workers, folder: Path) -> None:
    """A task whose worker dies must be done again; one that kills each worker must end in an error."""
    (folder / "once").touch()
    assert dict(workers.each(dies, folder, range(4), 1)) == {n: n * n for n in range(4)}
    assert len((folder / "2").read_text()) == 2
    (folder / "once").unlink()
    with pytest.raises(SpaError) as error:
        list(workers.each(dies, folder, range(4), 1))
    assert str(error.value) == DIED
    assert len((folder / "2").read_text()) <= 2 + RETRIES + 1


def check_refusal(workers: Workers) -> None:
    with pytest.raises(PlanError, match="this cannot be done"):
        list(workers.each(refuses, "this", range(3), 1))


@pytest.mark.slow
def test_processes_of_this_machine(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    workers = Workers(jobs=2, folder=work)
    check_any_worker(workers)
    check_deaths(workers, tmp_path)
    check_refusal(workers)
    assert not list(work.iterdir())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the clusters' packages, whose workers are killed
@pytest.mark.parametrize("cluster", CLUSTERS)
def test_clusters(cluster: str, tmp_path: Path) -> None:
    with CLUSTERS[cluster]() as workers:
        assert workers.count() == 2
        check_any_worker(workers)
        check_refusal(workers)
        check_deaths(workers, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_cluster_of_one_core_is_refused_and_nothing_is_done_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "RESTART_SECONDS", 0.5)
    with (
        dask_cluster(workers=1) as workers,
        pytest.raises(OptionError, match="has 1 cores, and joblib works on two or more"),
    ):
        list(workers.each(refuses, "this", [0], 1))


@pytest.mark.parametrize("backend", ["dask", "ray"])
def test_a_cluster_that_cannot_be_reached_is_said_within_seconds(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", pickle)
    monkeypatch.setitem(sys.modules, "ray", pickle)  # anything that is there: nobody asks it
    workers = Workers(backend=backend, scheduler="tcp://127.0.0.1:1")
    start = time.monotonic()
    for attempt in (workers.check, workers.count, lambda: list(workers.each(refuses, "this", [0], 1))):
        with pytest.raises(OptionError, match=r"the cluster at 'tcp://127.0.0.1:1' cannot be reached: .*Start it"):
            attempt()
    assert time.monotonic() - start < 10
    for address in ("nonsense", "tcp://host", "tcp://host:port"):
        with pytest.raises(OptionError, match=f"scheduler is '{address}'. Give an address"):
            Workers(backend=backend, scheduler=address).check()


def test_a_missing_package_and_a_missing_folder_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'spa-onnx\[dask\]'"):
        Workers(backend="dask", scheduler="tcp://127.0.0.1:1").check()
    Workers(folder=tmp_path / "new").check()
    assert (tmp_path / "new").is_dir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none" / "new", tmp_path / "file"):
        with pytest.raises(OptionError, match=r"work is .*, which is no folder and cannot be made one"):
            Workers(folder=path).check()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tasks.write_value(tmp_path / "shared", (refuses, 1, "this"))
    for number in range(3):
        tasks.write_value(tmp_path / f"item{number}", number)
    return tmp_path


def test_a_worker_does_a_task_from_file_to_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = ("another machine", 1)
    assert [tasks._work(folder, n, elsewhere) for n in range(3)] == [0, 1, 2]
    assert tasks.read_value(folder / "answer2") == (True, 2)
    done, error = tasks.read_value(folder / "answer1")
    assert not done and isinstance(error, PlanError)
    assert tasks._work(folder, 7, elsewhere) == tasks._UNSEEN
    assert tasks._work(folder, 0, tasks._process()) == tasks._HERE
    tasks._work(folder, 0, elsewhere)
    assert tasks._work(folder, 0, elsewhere) == tasks._FATAL


def test_what_no_other_process_can_be_given_is_said(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"cannot be given to other processes: .*generator"):
        list(TWO.each(refuses, (n for n in range(3)), [1], 1))


def test_workers_that_do_not_see_the_folder_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def parallel(**options: Any) -> Any:
        return lambda given: (tasks._UNSEEN for _ in given)

    monkeypatch.setattr("joblib.Parallel", parallel)
    with pytest.raises(OptionError, match="Give work a folder that all machines of the cluster see"):
        list(Workers(jobs=2, folder=tmp_path).each(refuses, "this", [0], 1))
    assert not list(tmp_path.iterdir())
