"""Clusters on this machine, for tests; those that are not installed are skipped."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from spa.errors import OptionError
from spa.running.tasks import Workers

RAY_PORT = 6397


@contextmanager
def dask_cluster(workers: int = 2) -> Iterator[Workers]:
    """Run a cluster of Dask, of one core each."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None) as cluster:
        yield Workers(backend="dask", scheduler=cluster.scheduler_address)


@contextmanager
def ray_cluster() -> Iterator[Workers]:
    """Run a cluster of Ray with two cores."""
    pytest.importorskip("ray")
    program = str(Path(sys.executable).parent / "ray")
    options = [f"--port={RAY_PORT}", "--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats"]
    started = subprocess.Popen([program, "start", "--head", *options, "--block"], stdout=subprocess.DEVNULL)
    workers = Workers(backend="ray", scheduler=f"tcp://127.0.0.1:{RAY_PORT}")
    try:
        for _ in range(60):
            try:
                workers.check()
                break
            except OptionError:
                time.sleep(0.5)
        time.sleep(2)  # from the port to the node
        yield workers
    finally:
        started.terminate()
        started.wait(60)


def by_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tasks of several jobs run here, from file to file as in processes, which take seconds to start."""
    from spa.running import tasks

    monkeypatch.setattr(tasks, "_process", object)  # each call another one
    monkeypatch.setattr("joblib.Parallel", lambda **_: lambda given: (f(*args) for f, args, _ in given))


CLUSTERS: dict[str, Callable[[], AbstractContextManager[Workers]]] = {"dask": dask_cluster, "ray": ray_cluster}
