"""Files are written whole or not at all, and nothing that another model needs is replaced."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import spa
from spa.errors import ModelError, SpaError, UnsupportedError
from spa.model.io import load
from spa.model.writing import JOURNAL, LOCK, PREFIX, REPLACED, data_files, drafts
from spa.request import Request

L2 = Request.of(criterion="l2", ratio=0.3, round_to=1)
UNIX = pytest.mark.skipif(sys.platform == "win32", reason="the platform has no such files")


def network() -> ModelProto:
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
        for name, shape in (("w1", (7, 31)), ("w2", (31, 13)))
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"]),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("MatMul", ["r", "w2"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", s]) for n, s in (("x", 7), ("y", 13))]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def stored(path: Path, location: str | None = None) -> Path:
    """A model file, whose weights lie in another file if one is named."""
    path.parent.mkdir(exist_ok=True)
    outside = {"save_as_external_data": True, "location": location, "size_threshold": 0} if location else {}
    onnx.save(network(), path, **outside)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir())}


# -- what another model needs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("export", [False, True])
def test_the_weights_of_the_source_are_never_replaced(tmp_path: Path, export: bool) -> None:
    source = stored(tmp_path / "model_fp32.onnx", "model.onnx.data")
    before = contents(tmp_path)
    with pytest.raises(SpaError, match=r"model.onnx.data': '.*model_fp32.onnx' keeps its weights there"):
        if export:
            spa.export(source, "onnx", tmp_path / "model.onnx", external=True)
        else:
            spa.prune(source, request=L2).save(tmp_path / "model.onnx")
    assert contents(tmp_path) == before


def test_the_weights_of_a_model_beside_are_never_replaced(tmp_path: Path) -> None:
    stored(tmp_path / "odd_name", "model.onnx.data")  # no suffix tells that it is a model
    source = stored(tmp_path / "in" / "m.onnx", "m.data")
    before = (tmp_path / "model.onnx.data").read_bytes()
    with pytest.raises(SpaError, match="odd_name' keeps its weights there"):
        spa.prune(source, request=L2).save(tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx.data").read_bytes() == before
    assert not (tmp_path / "model.onnx").exists()


def test_the_weights_of_a_model_in_a_folder_above_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    stored(tmp_path / "a.onnx", "weights/b.onnx")
    with pytest.raises(SpaError, match=r"a\.onnx' keeps its weights there"):
        spa.prune(network(), request=L2).save(tmp_path / "weights" / "b.onnx")


def test_a_target_that_holds_weights_of_another_model_is_refused(tmp_path: Path) -> None:
    source = stored(tmp_path / "m.onnx", "m.data")
    with pytest.raises(SpaError, match=r"m\.onnx' keeps its weights there"):
        spa.prune(source, request=L2).save(tmp_path / "m.data")


def test_a_data_file_of_nobody_known_is_refused_and_ones_own_is_replaced(tmp_path: Path) -> None:
    source = stored(tmp_path / "in" / "m.onnx", "m.data")
    target, data = tmp_path / "o.onnx", tmp_path / "o.onnx.data"
    data.write_bytes(b"somebody's")
    with pytest.raises(SpaError, match="it exists and is none of"):
        spa.prune(source, request=L2).save(target)
    assert contents(tmp_path / "in").keys() == {"m.onnx", "m.data"}
    assert data.read_bytes() == b"somebody's"
    data.unlink()
    spa.prune(source, request=L2).save(target)
    first = contents(tmp_path / "in"), data.read_bytes()
    spa.prune(source, request=L2, seed=1).save(target)
    assert (contents(tmp_path / "in"), data.read_bytes()) == first


def test_weights_in_sparse_tensors_subgraphs_and_functions_are_found(tmp_path: Path) -> None:
    def outside(location: str) -> TensorProto:
        tensor = TensorProto(name="t", data_type=1, dims=[1], data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value=location)
        return tensor

    inner = helper.make_graph([helper.make_node("Constant", [], ["c"], value=outside("b"))], "inner", [], [])
    model = network()
    model.graph.sparse_initializer.add().values.CopyFrom(outside("a"))
    model.graph.node.append(helper.make_node("If", ["f"], [], then_branch=inner))
    body = [helper.make_node("Constant", [], ["c"], value=outside("c"))]
    model.functions.append(helper.make_function("f", "F", [], ["c"], body, []))
    model.training_info.add().algorithm.initializer.append(outside("d"))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    assert data_files(tmp_path / "m.onnx") == {tmp_path / name for name in "abcd"}


# -- what is no regular file -------------------------------------------------------------------------------------------


@UNIX
def test_special_files_folders_and_links_are_no_targets(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "link").symlink_to("precious")
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "o.onnx.data").symlink_to("precious")
    source = stored(tmp_path / "in" / "m.onnx", "m.data")
    result = spa.prune(source, request=L2)
    for name, words in {
        "pipe": "a pipe, a device or a socket",
        "folder": "it is a folder",
        "link": "a symbolic link to 'precious'",
        "dangling": "a symbolic link to 'nothing'",
        "circle": "a symbolic link to 'circle'",
        "circle/o.onnx": "its folder does not exist",
        "o.onnx": "o.onnx.data': it is a symbolic link",
    }.items():
        before = {f.name: f.lstat().st_ino for f in tmp_path.iterdir()}
        with pytest.raises(SpaError, match=words):
            result.save(tmp_path / name)
        with pytest.raises(SpaError):
            spa.export(result, "onnx", tmp_path / name)
        assert {f.name: f.lstat().st_ino for f in tmp_path.iterdir()} == before
    assert (tmp_path / "precious").read_bytes() == b"precious"
    with pytest.raises(SpaError, match="cannot write '/dev/null'"):
        result.save("/dev/null")


@UNIX
def test_a_pipe_is_no_model_and_holds_no_data(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelError, match="a pipe, a device or a socket"):
        load(tmp_path / "pipe")
    source = stored(tmp_path / "m.onnx", "m.data")
    (tmp_path / "m.data").unlink()
    os.mkfifo(tmp_path / "m.data")
    with pytest.raises(ModelError, match="no regular file"):
        load(source)


def test_data_in_a_function_is_refused_outside_the_folder_and_read_inside(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    secret = np.random.default_rng(9).standard_normal((31, 7)).astype(np.float32)
    for folder in (tmp_path, tmp_path / "in"):
        secret.tofile(folder / "secret.bin")
    for location in ("../secret.bin", str(tmp_path / "secret.bin"), "secret.bin"):
        tensor = TensorProto(name="k", data_type=1, dims=secret.shape, data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value=location)
        body = [
            helper.make_node("Constant", [], ["k"], value=tensor),
            helper.make_node("Transpose", ["k"], ["kt"], perm=[1, 0]),
            helper.make_node("MatMul", ["X", "kt"], ["Y"]),
        ]
        model = network()
        model.functions.append(helper.make_function("my", "B", ["X"], ["Y"], body, [helper.make_opsetid("", 17)]))
        model.opset_import.append(helper.make_opsetid("my", 1))
        model.graph.node[0].CopyFrom(helper.make_node("B", ["x"], ["a"], domain="my"))
        del model.graph.initializer[0]
        (tmp_path / "in" / "m.onnx").write_bytes(model.SerializeToString())
        if location != "secret.bin":
            with pytest.raises(ModelError, match="outside the model's folder"):
                load(tmp_path / "in" / "m.onnx")
        else:
            assert spa.prune(tmp_path / "in" / "m.onnx", request=L2).report.reached > 0.2


@pytest.mark.parametrize("key", ["offset", "length"])
@pytest.mark.parametrize("value", ["-1", "1e3", "x", "9" * 5000])
def test_places_that_are_no_numbers_are_refused(tmp_path: Path, key: str, value: str) -> None:
    source = stored(tmp_path / "m.onnx", "m.data")
    model = onnx.load(source, load_external_data=False)
    next(e for e in model.graph.initializer[1].external_data if e.key == key).value = value
    source.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="these are no numbers"):
        load(source)


def test_external_data_of_sparse_tensors_is_refused(tmp_path: Path) -> None:
    source = stored(tmp_path / "m.onnx", "m.data")
    model = onnx.load(source, load_external_data=False)
    model.graph.sparse_initializer.add().values.CopyFrom(model.graph.initializer[0])
    source.write_bytes(model.SerializeToString())
    with pytest.raises(UnsupportedError, match="keeps sparse tensors or parts for training in external data"):
        load(source)


def test_weights_that_changed_since_they_were_read_are_not_written(tmp_path: Path) -> None:
    stored(tmp_path / "m.onnx", "m.onnx.data")
    dense = load(tmp_path / "m.onnx")
    (tmp_path / "m.onnx.data").write_bytes(bytes(4096 * 4))
    with pytest.raises(ModelError, match="has changed since it was read"):
        spa.exporters.onnx.write(dense, tmp_path / "o.onnx")
    assert not (tmp_path / "o.onnx").exists()


# -- whole or not at all -----------------------------------------------------------------------------------------------


def test_both_files_appear_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = stored(tmp_path / "in" / "m.onnx", "m.data")
    folder = tmp_path / "out"
    folder.mkdir()
    result = spa.prune(source, request=L2)
    replace = os.replace
    for held in (False, True):  # nothing there, then an older version of both
        before = contents(folder)
        assert bool(before) == held

        def failing(a: Path, b: Path) -> None:
            if b == folder / "o.onnx" and PREFIX in str(a) and REPLACED not in str(a):
                raise OSError(5, "Input/output error")
            replace(a, b)

        monkeypatch.setattr(os, "replace", failing)
        with pytest.raises(SpaError, match="Input/output error"):
            result.save(folder / "o.onnx")
        monkeypatch.setattr(os, "replace", replace)
        assert contents(folder) == before
        spa.export(source, "onnx", folder / "o.onnx", external=True)


KILLED = """
import os, signal, sys
from pathlib import Path
import spa
from spa.request import Request
folder, step = Path(sys.argv[1]), int(sys.argv[2])
result = spa.prune(folder.parent / "in" / "m.onnx", request=Request.of(criterion="l2", ratio=0.3, round_to=1))
replace, count = os.replace, 0
def counted(a, b):
    global count
    if count == step:
        os.kill(os.getpid(), signal.SIGKILL)
    count += 1
    replace(a, b)
os.replace = counted
result.save(folder / "o.onnx")
"""


@UNIX
@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_what_a_kill_leaves_is_taken_back_by_the_next_run(tmp_path: Path, step: int) -> None:
    source = stored(tmp_path / "in" / "m.onnx", "m.data")
    folder = tmp_path / "out"
    folder.mkdir()
    spa.export(source, "onnx", folder / "o.onnx", external=True)
    before = contents(folder)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), str(step)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert any(name.startswith(PREFIX) for name in os.listdir(folder))
    with drafts(folder / "another.onnx"):
        pass
    assert contents(folder) == before


def test_a_draft_of_a_living_run_stays(tmp_path: Path) -> None:
    with drafts(tmp_path / "a.onnx") as first:
        (first.folder / "a.onnx").write_bytes(b"half")
        with drafts(tmp_path / "b.onnx"):
            assert (first.folder / "a.onnx").read_bytes() == b"half"
            assert (first.root / LOCK).exists()
        first.publish(first.folder)
    assert contents(tmp_path) == {"a.onnx": b"half"}


def test_a_file_of_the_users_that_came_after_a_kill_stays(tmp_path: Path) -> None:
    root = tmp_path / f"{PREFIX}x"
    (root / REPLACED).mkdir(parents=True)
    (root / LOCK).touch()
    (root / REPLACED / "o.onnx").write_bytes(b"old")
    (root / JOURNAL).write_text(json.dumps({"o.onnx": 1}), encoding="utf-8")
    (tmp_path / "o.onnx").write_bytes(b"made by the user since")
    with drafts(tmp_path / "another.onnx"):
        pass
    assert contents(tmp_path) == {"o.onnx": b"made by the user since"}


def test_a_folder_that_nothing_came_to_is_removed(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from spa.exporters.pytorch import save

    model = network()
    model.graph.node[1].op_type = "Odd"
    with pytest.raises(SpaError):
        save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_texts_and_model_appear_together_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from spa.api import Result
    from spa.cli.commands import app

    source = stored(tmp_path / "m.onnx")

    def failing(*_: object, **__: object) -> None:
        raise SpaError("cannot write it. Choose another place.")

    monkeypatch.setattr(Result, "save", failing)
    command = ["prune", str(source), "-o", str(tmp_path / "o.onnx"), "--criterion", "l2", "--round-to", "1"]
    texts = ["--plan-out", str(tmp_path / "plan.json"), "--report", str(tmp_path / "page.html")]
    assert isinstance(CliRunner().invoke(app, [*command, *texts]).exception, SpaError)
    assert list(contents(tmp_path)) == ["m.onnx"]
    monkeypatch.undo()
    assert CliRunner().invoke(app, [*command, *texts]).exception is None
    assert list(contents(tmp_path)) == ["m.onnx", "o.onnx", "page.html", "plan.json"]


def test_the_working_folder_may_be_named_by_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(stored(tmp_path / "in" / "m.onnx"), tmp_path / "m.onnx")
    monkeypatch.chdir(tmp_path)
    spa.prune("m.onnx", request=L2).save("o.onnx")
    assert Path("o.onnx").stat().st_size < Path("m.onnx").stat().st_size
