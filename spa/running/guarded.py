"""Foreign kernels in a process of their own, so that a crash, a hang or a lack of memory in them is a message.

onnxruntime and onnx's checker are native code, in which a malformed network can do anything. What is run for the first
time runs in a child process with limits of time and memory. On Linux the child is a fork, which costs milliseconds;
where a fork is not safe (other systems; JAX and TensorFlow, whose threads hold locks) it is a fresh interpreter.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from spa.errors import InvariantError, ModelError, SpaError
from spa.model.writing import draft_folder
from spa.running.memory import available

T = TypeVar("T")

FORK_UNSAFE = frozenset({"jax", "tensorflow"})
SECONDS = 30.0  # for a network of no size
SECONDS_UNKNOWN = 300.0  # where the work of a run is not known
BYTES_PER_SECOND, MACS_PER_SECOND = 2e7, 1e9  # a tenth of what slow machines do
LONGEST = 86_400.0  # seconds; sizes of a malformed model promise any amount of work
SPARE = 2**30  # bytes of address space that no memory stands behind: stacks, arenas, libraries
_FRESH = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); from spa.running.guarded import serve; serve(sys.argv[1])"
)


class ForeignFailure(ModelError):
    """Native code crashed, did not end, or ran out of memory."""


def seconds_for(size: int, macs: float | None) -> float:
    """Return how long a first run may take, far longer than it should.

    Args:
        size: bytes of the model.
        macs: of the run, where they are known.
    """
    work = SECONDS_UNKNOWN if macs is None else SECONDS + macs / MACS_PER_SECOND
    return min(work + size / BYTES_PER_SECOND, LONGEST)


def guarded(function: Callable[..., T], *arguments: Any, name: str, seconds: float) -> T:
    """Call a function of a module in a child process, and return or raise what it returns or raises.

    Args:
        function: what to call; it and its arguments can be pickled.
        arguments: its positional arguments.
        name: what messages call the model that it runs.
        seconds: its limit.

    Raises:
        ForeignFailure: the child crashed, did not end in time, or was killed for want of memory.
    """
    if sys.platform == "linux" and not FORK_UNSAFE & sys.modules.keys():
        process, answer = _forked(function, arguments), b""
        answer, status = _wait(*process, seconds)
    else:
        answer, status = _in_fresh_interpreter(function, arguments, seconds)
    if status is None:
        raise ForeignFailure(
            f"onnxruntime has not come to an end with {name} after {seconds:.0f} s. Check its loops and sizes."
        )
    if not answer:
        cause = signal.Signals(-status).name if status < 0 else f"exit code {status}"
        hint = ", as happens where memory runs out" if status == -signal.SIGKILL else ""
        raise ForeignFailure(f"onnxruntime crashes on {name} ({cause}{hint}). Check the model with onnx.checker.")
    ok, value = pickle.loads(answer)  # of our own child
    if ok:
        return value
    raise _revived(*value)


def _revived(kind: type[SpaError] | None, message: str) -> Exception:
    """Make the exception again that the child raised; what nobody foresaw comes with its traceback as the message."""
    if kind is None:
        return RuntimeError(message)
    error = kind.__new__(kind)
    Exception.__init__(error, message)  # not its own, which would add to the message again
    return error


def _answer(function: Callable[..., Any], arguments: tuple[Any, ...]) -> bytes:
    """Call a function and pickle what comes of it: whether it returned, and what, or the error's class and message."""
    try:
        return pickle.dumps((True, function(*arguments)))
    except SpaError as error:
        return pickle.dumps((False, (type(error), str(error))))
    except MemoryError:
        return pickle.dumps((False, (ForeignFailure, "there is not enough memory to run the model. Make it smaller.")))
    except Exception:
        return pickle.dumps((False, (None, traceback.format_exc())))


def _forked(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[int, int]:
    """Start a fork that calls a function; return its process and the end of the pipe that its answer comes from."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():  # Python warns of forks beside threads: what the child needs takes no locks of ours
        warnings.simplefilter("ignore", DeprecationWarning)
        process = os.fork()
    if process:
        os.close(writing)
        return process, reading
    status = 1
    try:  # the child, which never returns
        os.close(reading)
        _restrict()
        answer = memoryview(_answer(function, arguments))
        while answer:
            answer = answer[os.write(writing, answer) :]
        status = 0
    finally:
        os._exit(status)


def _restrict() -> None:
    """Make this process silent, and bound its memory by what the machine has."""
    gc.freeze()  # a session of the parent's that is garbage here would wait for threads that a fork does not have
    faulthandler.disable()  # a crash is told by the parent
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    room, used = available(), _address_space()
    if room is not None and used is not None:
        import resource

        with suppress(ValueError, OSError):  # a lower limit of the system's stands
            resource.setrlimit(resource.RLIMIT_AS, (used + room + SPARE, resource.RLIM_INFINITY))


def _address_space() -> int | None:
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def _wait(process: int, reading: int, seconds: float) -> tuple[bytes, int | None]:
    """Read a fork's answer until it ends; return it and the exit status, None where the time is over."""
    parts, end, late = [], time.monotonic() + seconds, False
    try:
        while True:
            ready, _, _ = select.select([reading], [], [], max(0.0, end - time.monotonic()))
            late = not ready
            part = b"" if late else os.read(reading, 1 << 20)
            if not part:
                break
            parts.append(part)
    except BaseException:
        late = True
        raise
    finally:
        os.close(reading)
        if late:
            os.kill(process, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return b"".join(parts), None if late else status


def _in_fresh_interpreter(
    function: Callable[..., Any], arguments: tuple[Any, ...], seconds: float
) -> tuple[bytes, int | None]:
    with draft_folder(Path(tempfile.gettempdir())) as folder:
        call = folder / "call"
        call.write_bytes(pickle.dumps((function, arguments)))
        command = [sys.executable, "-c", _FRESH, str(call), json.dumps(sys.path)]
        try:
            done = subprocess.run(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired:
            return b"", None
        answer = folder / "answer"
        if done.returncode > 0 and not answer.exists():
            raise InvariantError(f"the process that runs the model failed: {done.stderr.decode(errors='replace')}")
        return (answer.read_bytes() if answer.exists() else b""), done.returncode


def serve(call: str) -> None:
    """Do in a fresh interpreter what a file says, and write the answer beside it."""
    path = Path(call)
    function, arguments = pickle.loads(path.read_bytes())  # of our own parent
    answer = path.with_name("making")
    answer.write_bytes(_answer(function, arguments))
    answer.rename(path.with_name("answer"))
