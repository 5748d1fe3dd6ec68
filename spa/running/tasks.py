"""Tasks in processes of this machine or on a cluster, by joblib's backends; what they work on goes by file.

No result depends on how many workers there are: each task works with the caller's number of threads, and whoever joins
results does so in the tasks' order.
"""

from __future__ import annotations

import os
import pickle
import socket
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np

from spa.errors import OptionError, SpaError, UnsupportedError
from spa.extras import extra
from spa.running.threads import allowed_threads, exact_threads

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")
BACKENDS = ("loky", "dask", "ray")
PREFIX = ".spa-tasks-"  # of the folders of files
RETRIES = 1  # of tasks whose worker died
REACH_SECONDS = 5.0  # in which a cluster must answer
DIED = (
    f"workers died {RETRIES + 1} times at the same work, as where memory is short. Use fewer jobs or fewer samples, or "
    "look into the workers' logs."
)
WATCH_SECONDS = 1.0
RESTART_SECONDS = 15.0  # in which a cluster must have workers, which it starts anew where they died
# What a task returns whose worker does not see the files, that came back to its caller, or that was begun too often.
_UNSEEN, _HERE, _FATAL = -1, -2, -3
_ONE_AT_A_TIME = threading.Lock()  # the number of threads is the process', and so are shared values


@dataclass(frozen=True)
class Workers:
    """The processes or the cluster that tasks run in.

    Attributes:
        jobs: processes on this machine; 1 is this one.
        backend: ``loky`` for processes on this machine, ``dask`` or ``ray`` for a cluster, of which all workers count.
        scheduler: the cluster's address, ``tcp://host:8786``; of Ray also ``ray://host:10001``.
        folder: where files go that workers read and write; the system's temporary one if None.
    """

    jobs: int = 1
    backend: str = "loky"
    scheduler: str | None = None
    folder: Path | None = None

    @property
    def alone(self) -> bool:
        """True if this process does everything."""
        return self.backend == "loky" and self.jobs == 1

    def check(self) -> None:
        """Make the folder where it is not there, and see whether somebody listens where the cluster should be.

        Raises:
            UnsupportedError: the backend's package is missing.
            OptionError: the folder cannot be made, the scheduler is no address, or nobody answers.
        """
        if self.folder is not None:
            try:
                self.folder.mkdir(exist_ok=True)
            except OSError as error:
                raise OptionError(
                    f"work is {str(self.folder)!r}, which is no folder and cannot be made one: {error.strerror}. "
                    "Choose another place."
                ) from error
        if self.backend == "loky":
            return
        with extra(self.backend):
            __import__("distributed" if self.backend == "dask" else "ray")
        try:
            address = urlsplit(self.scheduler or "")
            place = address.hostname, address.port
        except ValueError:  # a port that is no number
            place = None, None
        if not all(place):
            raise OptionError(f"scheduler is {self.scheduler!r}. Give an address, such as tcp://127.0.0.1:8786.")
        try:
            socket.create_connection(place, REACH_SECONDS).close()
        except OSError as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> OptionError:
        return OptionError(
            f"the cluster at {self.scheduler!r} cannot be reached: {error}. Start it, or leave backend out."
        )

    def count(self) -> int:
        """Return how many tasks run at a time.

        Raises:
            OptionError: the cluster cannot be reached.
        """
        if self.backend == "loky":
            return self.jobs
        with self._connected() as count:
            return count

    def each(
        self, function: Callable[[S, T], R], shared: S, items: Iterable[T], threads: int
    ) -> Iterator[tuple[int, R]]:
        """Apply a function to something shared and each of some items; yield (number of the item, result) as they come.

        Items are drawn in this thread, while workers are at work on those drawn before.

        Args:
            function: a function of a module.
            shared: what all tasks need; workers read it once, and its arrays are mapped: they cannot be written to.
            items: one for each task. In other processes an item is a copy by itself: what it has in common with
                ``shared`` is then two objects.
            threads: of linear algebra, the most that a task uses.

        Raises:
            SpaError: a task's own; or workers die again and again.
            OptionError: the cluster cannot be reached, or does not see the folder.
        """
        if self.alone:
            yield from ((number, function(shared, item)) for number, item in enumerate(items))
            return
        self.check()
        with tempfile.TemporaryDirectory(prefix=PREFIX, dir=self.folder, ignore_cleanup_errors=True) as name:
            folder = Path(name).resolve()
            write_value(folder / "shared", (function, allowed_threads(threads), shared))
            waiting = _Waiting(folder, iter(items))
            for attempt in range(RETRIES + 1):
                try:
                    with self._connected():
                        for number in self._returned(waiting):
                            yield number, waiting.answer(number)
                    return
                except self._deaths() as error:
                    if attempt == RETRIES:
                        raise SpaError(DIED) from error

    def _returned(self, waiting: _Waiting) -> Iterator[int]:
        """Run the tasks that wait; yield their numbers as they are done."""
        from joblib import Parallel, delayed, parallel_config

        yield from waiting.answered()
        tasks = (delayed(_work)(waiting.folder, number, _process()) for number in waiting)
        how = "list" if self.backend == "ray" else "generator_unordered"  # all that Ray's backend knows
        with parallel_config(self.backend, n_jobs=self.jobs if self.backend == "loky" else -1):
            self._await_cores()
            returned = Parallel(return_as=how, pre_dispatch="all", batch_size=1)(tasks)
        try:
            for number in returned:
                if number == _UNSEEN:
                    raise OptionError(
                        f"workers do not see the folder {str(waiting.folder.parent)!r}. Give work a folder that all "
                        "machines of the cluster see."
                    )
                if number == _HERE:
                    raise _LostError
                if number == _FATAL:
                    raise SpaError(DIED)
                yield number
        finally:
            if how != "list":
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message=".*have been cancelled", category=UserWarning)
                    returned.close()

    def _await_cores(self) -> None:
        """Wait until a cluster has two cores: with one, joblib would do the tasks in this process.

        Raises:
            OptionError: it has not.
        """
        from joblib import effective_n_jobs

        deadline = time.monotonic() + RESTART_SECONDS
        while self.backend != "loky" and (cores := effective_n_jobs(-1)) < 2:
            if time.monotonic() > deadline:
                raise OptionError(
                    f"the cluster at {self.scheduler!r} has {cores} cores, and joblib works on two or more. "
                    "Start more workers, or leave backend out."
                )
            time.sleep(0.1)

    @contextmanager
    def _connected(self) -> Iterator[int]:
        """Connect with the cluster in this context, as joblib's backends expect it; give the number of its cores."""
        if self.backend == "loky":
            yield self.jobs
            return
        self.check()
        with _dask(self) if self.backend == "dask" else _ray(self) as count:
            yield count

    def _deaths(self) -> tuple[type[BaseException], ...]:
        """Return the errors that mean that a worker died."""
        if self.backend == "dask":
            from distributed import KilledWorker
            from distributed.client import FutureCancelledError

            return _LostError, KilledWorker, FutureCancelledError
        if self.backend == "ray":
            from ray.exceptions import RayActorError, WorkerCrashedError

            return _LostError, RayActorError, WorkerCrashedError
        return (BrokenExecutor,)


ALONE = Workers()


class _LostError(Exception):
    """A task came back undone."""


def _process() -> tuple[str, int]:
    """Return what tells this process from others."""
    return socket.gethostname(), os.getpid()


@contextmanager
def _dask(workers: Workers) -> Iterator[int]:
    from distributed import Client

    try:
        client = Client(workers.scheduler, timeout=REACH_SECONDS)
    except OSError as error:  # TimeoutError is one
        raise workers._unreachable(error) from error
    done = threading.Event()
    with client:
        threading.Thread(target=_close_where_tasks_failed, args=(client, done), daemon=True).start()
        try:
            yield sum(client.ncores().values())
        finally:
            done.set()


def _close_where_tasks_failed(client: Any, done: threading.Event) -> None:
    """Close a client once Dask gives up a task whose workers died: joblib is not told, and would wait for ever."""
    while not done.wait(WATCH_SECONDS):
        if any(future.status == "error" for future in list(client.futures.values())):
            client.close()
            return


@contextmanager
def _ray(workers: Workers) -> Iterator[int]:
    import ray
    from ray.util.joblib import register_ray

    mine = not ray.is_initialized()
    if mine:
        address = str(workers.scheduler)
        try:
            ray.init(address if address.startswith("ray://") else urlsplit(address).netloc, log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise workers._unreachable(error) from error
    register_ray()
    try:
        yield int(ray.cluster_resources().get("CPU", 0))
    finally:
        if mine:
            ray.shutdown()


class _Waiting:
    """The items of tasks, as files, until there is an answer.

    Args:
        folder: of the files.
        fresh: items that have no file yet.
    """

    def __init__(self, folder: Path, fresh: Iterator[Any]) -> None:
        self.folder = folder
        self._fresh, self._numbers, self._drawn = fresh, dict[int, None](), 0

    def __iter__(self) -> Iterator[int]:
        """Yield the numbers of tasks that were not done: those whose worker died, then fresh ones."""
        yield from list(self._numbers)
        for item in self._fresh:
            number, self._drawn = self._drawn, self._drawn + 1
            write_value(self.folder / f"item{number}", item)
            self._numbers[number] = None
            yield number

    def answered(self) -> list[int]:
        """Return the numbers of tasks that were done before a worker died, but not returned."""
        return [number for number in self._numbers if (self.folder / f"answer{number}").exists()]

    def answer(self, number: int) -> Any:
        """Return what a task found, or raise what it refused."""
        found, value = read_value(self.folder / f"answer{number}")
        for kind in ("item", "begun", "answer"):
            (self.folder / f"{kind}{number}").unlink(missing_ok=True)
        del self._numbers[number]
        if not found:
            raise value
        return value


def _work(folder: Path, number: int, caller: tuple[str, int]) -> int:
    """Do a task in a worker: its item is a file, and so is its answer."""
    if caller == _process():
        return _HERE
    with _ONE_AT_A_TIME:
        return _worked(folder, number)


def _worked(folder: Path, number: int) -> int:
    try:
        function, threads, shared = _shared(folder / "shared")
        item = read_value(folder / f"item{number}")
    except FileNotFoundError:
        return _UNSEEN
    if _begun(folder / f"begun{number}") > RETRIES + 1:
        return _FATAL
    try:
        with exact_threads(threads):
            answer = True, function(shared, item)
    except SpaError as error:
        answer = False, error
    write_value(folder / f"answer{number}", answer)
    return number


def _begun(path: Path) -> int:
    """Count one more beginning of a task; return how many there were."""
    with path.open("ab") as file:
        file.write(b".")
        return file.tell()


def write_value(path: Path, value: Any) -> None:
    """Write a value to a file, its arrays so that they can be mapped."""
    import cloudpickle  # laws hold functions without a name, which pickle does not take
    import joblib

    buffers: list[pickle.PickleBuffer] = []
    try:
        data = cloudpickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        raise UnsupportedError(f"this cannot be given to other processes: {error}. Use one job.") from error
    draft = path.with_suffix(f".{os.getpid()}")
    joblib.dump((data, [np.frombuffer(b.raw(), np.uint8) for b in buffers]), draft)
    draft.replace(path)


def read_value(path: Path) -> Any:
    """Read a value that :func:`write_value` wrote; its arrays stay in the file."""
    import joblib

    data, buffers = joblib.load(path, mmap_mode="r")
    return pickle.loads(data, buffers=buffers)


@lru_cache(maxsize=1)
def _shared(path: Path) -> Any:
    return read_value(path)
