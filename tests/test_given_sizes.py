"""A size that is given holds for MACs, made-up inputs, the check of the file, timing and inspection."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto

import spa
from spa.cli.commands import app
from spa.errors import ModelError, SizeError
from tests.oracle import Net

LENGTH, PADDED = 24, 12  # so many that the length is no product of strides and cells, which would be found


def streaming() -> ModelProto:
    """Frames of 8 with a reflected end, and a state; its head takes sequences of 24 alone, though all are open."""
    net = Net()
    x, state = net.input("sound", ["batch", "length"]), net.input("state", [2, "batch", 5])
    padded = net.node("Pad", x, net.constant(np.array([0, 0, 0, PADDED])), mode="reflect")
    frames = net.node("Unsqueeze", padded, net.constant(np.array([1])))
    h = net.node("Relu", net.conv(frames, 1, 16, (8,), strides=[4], pads=[0, 0]))
    h = net.node("Relu", net.conv(h, 16, 16, (1,)))
    y = net.gemm(net.node("Flatten", h), 16 * ((LENGTH + PADDED - 8) // 4 + 1), 3)
    return net.model(y, net.node("Identity", state))


@pytest.fixture(scope="module")
def result() -> spa.Result:
    return spa.prune(streaming(), ratio=0.3, round_to=1, samples=16, sizes={"length": LENGTH})


def test_without_it_no_guess_fits() -> None:
    with pytest.raises(ModelError, match="Dimension mismatch"):
        spa.analyze(streaming())


def test_it_is_what_costs_are_counted_and_inputs_made_at(result: spa.Result) -> None:
    assert result.report.inputs == {"sound": (2, LENGTH), "state": (2, 2, 5)}
    assert result.report.sizes == {"sound[1]": LENGTH}
    assert result.report.calibration is not None
    # One sample a run, so that states are carried through sixteen of them.
    assert result.report.calibration["inputs"] == {"sound": [1, LENGTH], "state": [2, 1, 5]}


def test_the_file_is_checked_at_it_and_keeps_its_axes_open(result: spa.Result, tmp_path: Path) -> None:
    result.save(tmp_path / "small.onnx")
    shapes = [[d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim]
              for i in onnx.load(tmp_path / "small.onnx").graph.input]  # fmt: skip
    assert shapes == [["batch", "length"], [2, "batch", 5]]
    for batch in (1, 5):  # another batch than any that was walked
        assert spa.verify(streaming(), result.model, sizes={"length": LENGTH}, batch=batch, seeds=1).same_interface
    assert spa.bench(result.model, sizes={"length": LENGTH}, runs=1, isolate_memory=False).inputs[0]["sound"] == (
        (1, LENGTH)
    )


def test_data_of_other_sizes_than_the_counted_ones_are_said() -> None:
    net = Net()
    h = net.node("Relu", net.conv(net.input("x", ["n", 3, "h", "w"]), 3, 16))
    model = net.model(net.node("GlobalAveragePool", net.conv(h, 16, 2)))
    data = np.random.default_rng(0).standard_normal((4, 3, 16, 64)).astype(np.float32)
    said = "MACs are counted at x[2] 64, x[3] 64; the first inputs given have x[2] 16, x[3] 64. --size counts at theirs"
    assert said in spa.prune(model, ratio=0.3, data=data).report.notes
    assert said not in spa.prune(model, ratio=0.3, data=data, sizes={"h": 16}).report.notes


def test_a_size_that_names_no_axis_is_refused_before_any_work() -> None:
    for use in (spa.analyze, spa.prune):
        with pytest.raises(SizeError, match=r"'lenght' is not a dynamic axis\. Did you mean 'length'\?"):
            use(streaming(), sizes={"lenght": 3})


def command(*arguments: object) -> int | str | None:
    """Run a command in this process; return what it ends with."""
    try:
        app([str(a) for a in arguments], standalone_mode=False)
    except SizeError as error:
        return error.exit_code
    return 0


def test_inspect_counts_at_it_and_refuses_other_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(streaming(), tmp_path / "m.onnx")
    assert command("inspect", tmp_path / "m.onnx", "--size", f"length={LENGTH}") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"MACs per sample, counted for sound 2x{LENGTH}, state 2x2x5" in shown
    assert "open axes: batch, length" in shown
    assert command("inspect", tmp_path / "m.onnx", "--size", "len=3") == 2


def test_verify_compares_on_given_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(streaming(), tmp_path / "m.onnx")
    sound = np.random.default_rng(0).standard_normal((7, LENGTH)).astype(np.float32)
    np.savez(tmp_path / "d.npz", sound=sound, state=np.zeros((2, 7, 5), np.float32))
    assert command("verify", tmp_path / "m.onnx", tmp_path / "m.onnx", "--data", tmp_path / "d.npz") == 0
    assert "7x3" in capsys.readouterr().out
