"""Metrics in processes of their own: what is read from them, and how each failure is told."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from spa.errors import MetricError
from spa.running.commands import printed_value
from spa.steering.child import by_command, by_function

PYTHON = f"'{sys.executable}' -c"
FILE = Path("some folder") / "model.onnx"


@pytest.mark.parametrize(
    ("printed", "value"),
    [
        ("97.5", 97.5),
        ("epoch 3\ntop-1 accuracy: 97.5 %\n", 97.5),
        ("loss=-1.5e-3", -0.0015),
        ('log\n{"top1": 97, "n": 5}\n', {"top1": 97, "n": 5}),
        ('{\n "top1": 97\n}\n', {"top1": 97}),
        ("v2 ready", None),  # 2 belongs to a word
        ("finan", None),
        ("", None),
        ("true", None),
    ],
)
def test_the_number_is_the_last_one_that_is_printed(printed: str, value: object) -> None:
    assert printed_value(printed) == value


def test_a_command_gets_the_path_as_one_argument_and_no_shell() -> None:
    code = 'import sys; print(sys.argv[1] == "some folder/model.onnx;$HOME", len(sys.argv))'
    assert by_command(f"{PYTHON} '{code}' '{{model}};$HOME'", FILE, 20) == 2


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("print(1); raise ValueError(7)", ("failed with exit code 1", "ValueError: 7")),
        ("print(1); import os; os.kill(os.getpid(), 9)", ("was killed by SIGKILL", "It printed:\n1")),
        ("pass", ("prints no number", "It printed nothing")),
        ("print(3, flush=True); import time; time.sleep(60)", ("not come to an end after 0.5 s", "It printed:\n3")),
    ],
)
def test_each_failure_says_what_happened_and_what_was_printed(code: str, words: tuple[str, ...]) -> None:
    with pytest.raises(MetricError) as failure:
        by_command(f'{PYTHON} "{code}" {{model}}', FILE, 0.5 if "sleep" in code else 20)
    assert all(word in str(failure.value) for word in words)


def test_a_command_that_is_none_is_named() -> None:
    with pytest.raises(MetricError, match="'no-such-program x' cannot be started: No such file"):
        by_command("no-such-program x", FILE, 20)
    with pytest.raises(MetricError, match="is no command: No closing quotation"):
        by_command("python 'x", FILE, 20)


@pytest.mark.skipif(sys.platform == "win32", reason="process groups are POSIX's")
def test_what_a_command_started_is_killed_with_it(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    grandchild = f"sh -c 'echo $$ > {mark}; exec sleep 60' & wait"
    (tmp_path / "metric.sh").write_text(grandchild, encoding="utf-8")
    with pytest.raises(MetricError, match="not come to an end"):
        by_command(f"sh {tmp_path / 'metric.sh'} {{model}}", FILE, 1)
    pid = int(mark.read_text())
    for _ in range(100):  # until init has reaped it
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.02)
    pytest.fail("the grandchild lives")


def test_a_function_of_a_module_runs_in_a_fresh_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "import os, sys\nimport numpy as np\n"
        "def good(path):\n    print('noise 5')\n    return {'top1': np.float32(0.5), 'pid': os.getpid(), 'set': 'test'}\n"
        "def bad(path):\n    print('before'); raise KeyError(path)\n"
        "def leaves(path):\n    sys.exit(0)\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    found = by_function("mine:good", FILE, 20)
    assert found["top1"] == 0.5 and found["pid"] != os.getpid() and found["set"] == "'test'"
    with pytest.raises(MetricError, match=r"(?s)'mine:bad' failed with exit code 1.*before.*KeyError.*model.onnx"):
        by_function("mine:bad", FILE, 20)
    with pytest.raises(MetricError, match="ended its process before it returned"):
        by_function("mine:leaves", FILE, 20)
    with pytest.raises(MetricError, match="No module named 'nobody'"):
        by_function("nobody:f", FILE, 20)
