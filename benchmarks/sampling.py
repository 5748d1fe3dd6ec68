"""Sampling of what the main thread does, every few milliseconds by another one; needs Python 3.11 (columns of code).

C code that releases Python's lock (BLAS, onnxruntime, copies by numpy) is seen while it runs. C code that holds it
delays the sampler, and is seen when it returns, still at its own call; each look is therefore worth the time since
the last one.
"""

from __future__ import annotations

import ast
import linecache
import resource
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

INTERVAL = 0.005  # seconds
PACKAGE = Path(__file__).resolve().parent.parent / "spa"
_SESSION = "onnxruntime_inference_collection.py"
_PRODUCTS = ("matmul", "dot")


class Sampler:
    """A context that counts the seconds that the main thread spends by kind of work and by line.

    Attributes:
        kinds: seconds by "BLAS and LAPACK", "onnxruntime, runs", "onnxruntime, sessions" and "the rest".
        lines: seconds by (kind, line of this package, the expression there).
        peak: the largest resident set that was seen, MB (10^6 bytes), the part of it that lies in mapped files (the
            kernel can take it back), and the line where that was.
    """

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.lines: Counter[tuple[str, str, str]] = Counter()
        self.peak: tuple[float, float, str] = (0.0, 0.0, "")
        self._main = threading.main_thread().ident or 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._end.set()
        self._thread.join()

    def to_dict(self, most: int = 30) -> dict[str, Any]:
        """Return the seconds by kind, and the lines that took longest."""
        lines = [[*key, round(seconds, 3)] for key, seconds in self.lines.most_common(most)]
        peak = dict(zip(("MB", "MB in files", "line"), self.peak, strict=True))
        return {"kinds": {k: round(s, 3) for k, s in self.kinds.most_common()}, "lines": lines, "peak": peak}

    def _look(self) -> None:
        last = time.perf_counter()
        while not self._end.wait(INTERVAL):
            frame = sys._current_frames().get(self._main)
            now = time.perf_counter()
            if frame is not None:
                kind, place, expression = _classified(frame)
                self.kinds[kind] += now - last
                self.lines[kind, place, expression] += now - last
                self.peak = max(self.peak, (*_resident(), f"{place} {expression}"))
            del frame
            last = now


def _resident() -> tuple[float, float]:
    """Return the resident set and the part of it that lies in files or shared memory, MB (Linux)."""
    fields = Path("/proc/self/statm").read_bytes().split()
    whole, shared = (int(f) * resource.getpagesize() / 1e6 for f in fields[1:3])
    return whole, shared


def _classified(innermost: FrameType) -> tuple[str, str, str]:
    """Return the kind of work, the innermost line of this package, and the expression that it is at."""
    frames = list(_outwards(innermost))
    own = next((f for f in frames if PACKAGE in Path(f.f_code.co_filename).parents), frames[-1])
    path = Path(own.f_code.co_filename)
    place = f"{path.relative_to(PACKAGE.parent) if PACKAGE in path.parents else path.name}:{own.f_lineno}"
    return _kind(frames), place, _expression(own)


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _kind(frames: list[FrameType]) -> str:
    for frame in frames:
        if frame.f_code.co_filename.endswith(_SESSION):
            return "onnxruntime, runs" if frame.f_code.co_name == "run" else "onnxruntime, sessions"
    numeric = "numpy/linalg" in frames[0].f_code.co_filename or _is_product(_expression(frames[0]))
    return "BLAS and LAPACK" if numeric else "the rest"


@cache
def _is_product(expression: str) -> bool:
    """Return whether the last operation of an expression is a product of matrices."""
    try:
        tree = ast.parse(expression, mode="eval").body
    except SyntaxError:  # a statement
        return False
    if isinstance(tree, ast.Call):
        return getattr(tree.func, "attr", getattr(tree.func, "id", "")) in _PRODUCTS
    return isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.MatMult)


def _expression(frame: FrameType) -> str:
    """Return the source of the expression that a frame is at, on one line."""
    code = frame.f_code
    first, last, start, end = list(code.co_positions())[frame.f_lasti // 2]
    if first is None or last is None:
        return ""
    text = [linecache.getline(code.co_filename, n).rstrip("\n") for n in range(first, last + 1)]
    text[-1] = text[-1][:end]
    text[0] = text[0][start:]
    return " ".join(part.strip() for part in text)
