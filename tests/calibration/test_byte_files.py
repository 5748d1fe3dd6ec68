"""Made-up files for networks that read bytes: text, tables, pictures, archives and programs, with padding behind them."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tarfile
import zipfile

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

import spa
from spa.calibration import byte_files as made
from spa.calibration.synthetic import Synthesiser, synthesise

I32, F = TensorProto.INT32, TensorProto.FLOAT


def reader_of_bytes(values: int, how: str = "Equal", length: int = 64, element: int = I32) -> onnx.ModelProto:
    """A one-hot code of bytes as jax2tf writes it, by OneHot, or a table; then a layer, a maximum and an output."""
    rng = np.random.default_rng(0)
    arrays = {
        "w": rng.standard_normal((values, 32)).astype(np.float32),
        "v": rng.standard_normal((32, 5)).astype(np.float32),
        "iota": np.arange(values, dtype=np.int32)[None, None],
        "last": np.array([-1]),
        "depth": np.array(values),
        "off_on": np.array([0, 1], np.float32),
    }
    coded = {
        "Equal": [
            helper.make_node("Unsqueeze", ["bytes", "last"], ["u"]),
            helper.make_node("Equal", ["u", "iota"], ["e"]),
            helper.make_node("Cast", ["e"], ["h"], to=F),
            helper.make_node("MatMul", ["h", "w"], ["x"]),
        ],
        "OneHot": [
            helper.make_node("Cast", ["bytes"], ["i"], to=TensorProto.INT64),
            helper.make_node("OneHot", ["i", "depth", "off_on"], ["h"]),
            helper.make_node("MatMul", ["h", "w"], ["x"]),
        ],
        "Gather": [helper.make_node("Gather", ["w", "bytes"], ["x"])],
    }[how]
    nodes = [
        *coded,
        helper.make_node("ReduceMax", ["x"], ["s"], axes=[1], keepdims=0),
        helper.make_node("Relu", ["s"], ["a"]),
        helper.make_node("MatMul", ["a", "v"], ["y"]),
    ]
    inputs = [helper.make_tensor_value_info("bytes", element, ["N", length])]
    outputs = [helper.make_tensor_value_info("y", F, ["N", 5])]
    constants = [onnx.numpy_helper.from_array(a, n) for n, a in arrays.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)


def several(make, count: int = 40, size: int = 3000) -> list[bytes]:
    rng = np.random.default_rng(0)
    return [make(size, rng) for _ in range(count)]


@pytest.mark.parametrize("how", ["Equal", "OneHot", "Gather"])
def test_inputs_with_as_many_values_as_bytes_get_files(how):
    windows = np.concatenate([b["bytes"] for b in synthesise(reader_of_bytes(257, how), 128)])
    assert windows.shape == (128, 64) and windows.dtype == np.int32
    assert windows.max() == 256, "short files are padded"
    text = (windows[:, :32] < 128).all(axis=1)  # random bytes: one in four billion
    assert 0.3 < text.mean() < 0.95


def test_padding_is_behind_the_beginning_or_between_the_beginning_and_the_end():
    windows = made.byte_files(400, 256, 257, np.random.default_rng(1))
    padding = windows == 256
    runs = (np.diff(padding.astype(int), prepend=0, append=0) == 1).sum(axis=1)
    assert set(runs) == {0, 1}
    assert (padding[:, -1] & (runs == 1)).any() and (~padding[:, -1] & (runs == 1)).any()
    assert not padding[:, 0].any()


def test_without_a_value_for_padding_bytes_are_bytes():
    windows = made.byte_files(64, 128, 256, np.random.default_rng(0))
    assert windows.max() <= 255 and windows.min() == 0


@pytest.mark.parametrize("values", [255, 300, 20])
def test_other_categories_keep_their_whole_range(values):
    ids = synthesise(reader_of_bytes(values), 64)[0]["bytes"]
    assert ids.min() == 0 and ids.max() == values - 1
    assert abs(ids.mean() / values - 0.5) < 0.05


def test_windows_of_few_bytes_are_no_files():
    ids = synthesise(reader_of_bytes(257, length=16), 64)[0]["bytes"]
    assert abs(ids.mean() / 257 - 0.5) < 0.05


def test_the_same_seed_gives_the_same_files_and_another_one_others():
    first, again, other = (made.byte_files(32, 512, 257, np.random.default_rng(s)) for s in (0, 0, 1))
    assert (first == again).all() and (first != other).any(axis=1).all()


def test_files_are_what_their_libraries_read():
    for data in several(made._picture):
        Image.open(io.BytesIO(data)).load()
    rows = [list(csv.reader(io.StringIO(d.decode()), delimiter=",")) for d in several(made._table)]
    assert all(len(r) > 5 for r in rows)
    loaded = [json.loads(d) for d in several(made._structured) if d[:1] in b"[{" and d[:5] != b'{"id"']
    assert len(loaded) > 10
    for data in several(made._archive):
        file = io.BytesIO(data)
        if data[:2] == b"PK":
            with zipfile.ZipFile(file) as archive:
                assert archive.namelist()
        else:
            with tarfile.open(fileobj=file) as tar:
                assert tar.getnames()
    packed = [d for d in several(made._packed) if d[:3] == b"\x1f\x8b\x08"]
    assert packed and all(gzip.decompress(d) for d in packed)
    assert {d[:2] for d in several(made._program)} == {b"\x7fE", b"MZ"}
    assert all(d.startswith(b"%PDF") and d.endswith(b"%%EOF\n") for d in several(made._document))


def test_source_differs_in_its_names_and_keeps_its_keywords():
    rng = np.random.default_rng(0)
    renamed = [made._renamed("import counter; return counter + counter", rng) for _ in range(50)]
    assert len(set(renamed)) > 5
    for text in renamed:
        _, first, _, second, _, third = text.replace(";", "").split()
        assert text.startswith("import") and "return" in text and first == second == third


def test_the_report_says_that_bytes_are_those_of_files():
    result = spa.prune(reader_of_bytes(257), ratio=0.3, samples=8, insist=True)
    assert any(note.startswith("bytes (bytes)") for note in result.report.notes)
    assert Synthesiser(reader_of_bytes(20)).notes == ()
