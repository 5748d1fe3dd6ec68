"""Windows of layers compute together what the network computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

import spa
from spa.errors import InvariantError, UnsupportedError
from spa.exporters import checks
from spa.exporters.checks import check
from spa.model import io
from spa.model.graph import Graph
from spa.running import trial, windows
from spa.running.feeds import make_feeds
from spa.running.guarded import ForeignFailure
from spa.running.runtime import load_session, run
from spa.running.windows import run_by_windows
from spa.running.windows import windows as windows_of
from tests.oracle import Net

NAMES = sorted(path.stem for path in Path("models").glob("*.onnx"))


def outside(name: str, folder: Path) -> Path:
    path = folder / f"{name}.onnx"
    onnx.save(onnx.load(f"models/{name}.onnx"), path, save_as_external_data=True, location="d", size_threshold=64)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_windows_compute_what_the_whole_computes(name: str, tmp_path: Path) -> None:
    path = outside(name, tmp_path)
    model = onnx.load(path, load_external_data=False)
    feeds = make_feeds(model)
    expected, view = run(load_session(path), feeds), Graph(model, tmp_path)
    assert len(list(windows_of(view, view.nodes, 20_000))) > 2
    found = run_by_windows(model, tmp_path, feeds, most=20_000)
    for array, reference in zip(found.values(), expected, strict=True):
        np.testing.assert_allclose(array, reference, atol=1e-5 * float(np.abs(reference).max()))


def test_the_operators_of_all_windows_are_those_of_the_network_in_order(tmp_path: Path) -> None:
    graph = Graph(onnx.load(outside("digits_vit", tmp_path), load_external_data=False), tmp_path)
    for most in (0, 5_000, 10**9):
        found = [node.index for nodes in windows_of(graph, graph.nodes, most) for node in nodes]
        assert found == [n.index for n in graph.nodes if n.outputs[0] not in graph.constant_nodes]


def test_a_large_file_is_checked_by_windows_and_the_report_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "WHOLE", 1000)
    path = outside("digits_vgg", tmp_path)
    result = spa.prune(path, criterion="l2", ratio=0.3)
    assert "by windows of layers" in result.report.notes[-1]
    monkeypatch.setattr(checks, "load_session", None)  # of a whole file
    result.save(tmp_path / "o.onnx")
    whole = spa.prune("models/digits_vgg.onnx", criterion="l2", ratio=0.3)
    assert not any("windows" in note for note in whole.report.notes)


def test_a_file_that_runs_neither_by_windows_nor_as_a_whole_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "WHOLE", 1000)
    path = outside("digits_vgg", tmp_path)
    model = onnx.load(path, load_external_data=False)
    weight = next(t for t in model.graph.initializer if len(t.dims) == 2)
    weight.dims[0], weight.dims[1] = weight.dims[1], weight.dims[0]  # which the checker does not notice
    onnx.save(model, tmp_path / "wrong.onnx")
    with pytest.raises(spa.SpaError, match="does not run"):
        check(tmp_path / "wrong.onnx", path)


def sized(shape: list[int], path: Path) -> Path:
    """A network of rows of three channels, which a Reshape sees as `shape` in between."""
    net = Net()
    x = net.input("x", ["n", 3])
    y = net.node("Reshape", net.node("Relu", x), net.constant(np.asarray(shape)))
    onnx.save(net.model(net.matmul(y, shape[-1], 5)), path)
    return path


def test_a_file_that_runs_at_other_sizes_than_its_source_is_refused(tmp_path: Path) -> None:
    """It runs at two samples, which would be tried next, and not at three, at which the source was analysed."""
    source, draft = sized([-1, 3], tmp_path / "source.onnx"), sized([-1, 6], tmp_path / "draft.onnx")
    with pytest.raises(InvariantError, match=r"the model does not run at sizes at which its source does: .*Reshape"):
        check(draft, source, sizes={"n": 3})
    check(draft, source, sizes={"n": 2})
    check(draft, draft, sizes={"n": 3})  # refuses these sizes itself
    check(draft, None, sizes={"n": 3})  # nothing to compare with


def test_large_weights_are_mapped_from_the_file_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path("models/digits_vgg.onnx")
    monkeypatch.setattr(io, "LAZY_FILE", 0)
    monkeypatch.setattr(io, "LAZY_WEIGHT", 600)
    opened: list[Path | None] = []

    def load(model: object, *, folder: Path | None = None, **options: object) -> object:
        opened.append(folder)
        return load_session(model, folder=folder, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(checks, "load_session", load)
    checks._run(path, None, mapped=True)
    checks._run(path, None)
    assert opened == [path.parent, None]


def test_where_onnxruntime_crashes_on_mapped_weights_the_whole_file_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def crash(*arguments: object, **_: object) -> None:
        tried.append(arguments[-1])
        if arguments[-1]:
            raise ForeignFailure("onnxruntime crashes.")

    monkeypatch.setattr(checks, "guarded", crash)
    check(Path("models/digits_vgg.onnx"), None)
    assert tried == [True, False]


def test_a_sequence_between_windows_is_refused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("SequenceConstruct", ["x", "x"], ["s"]),
        helper.make_node("SequenceLength", ["s"], ["n"]),
        helper.make_node("SequenceAt", ["s", "n"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [3]) for n in "xy"]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:])
    model: ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    graph_view = Graph(model, tmp_path)
    with pytest.raises(UnsupportedError, match="'s' is no tensor, so that the network cannot be run by windows"):
        windows._run(graph_view, graph_view.nodes[1:], {"s": [np.zeros(3, np.float32)]}, ["n"], "m")


def test_a_large_model_is_tried_out_by_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "WHOLE", 1000)
    path, opened = outside("digits_vgg", tmp_path), tmp_path / "opened"

    def open_session(*_: object) -> None:
        opened.touch()  # in a child process
        raise spa.SpaError("as a whole")

    monkeypatch.setattr(trial, "open_session", open_session)
    trial.try_out(onnx.load(path, load_external_data=False), base=tmp_path)
    assert not opened.exists()
    trial.try_out(onnx.load(path), base=tmp_path)  # nothing lies outside of this message, but it is as large
    assert not opened.exists()
    monkeypatch.setattr(windows, "WHOLE", 2**28)
    trial.try_out(onnx.load(path, load_external_data=False), base=tmp_path)
    assert opened.exists()
