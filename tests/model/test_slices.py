"""Weights that stay in their files until they are written: the same plans and bytes as with all of them in memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, numpy_helper

import spa
from spa.api import prune_file
from spa.errors import ModelError, SpaError
from spa.model import io
from spa.model.graph import tensor_array
from spa.model.slices import Slices, materialise
from spa.model.wire import Unusual, without_data
from spa.request import Request

MODELS = Path("models")
SHIPPED = sorted(path.name for path in MODELS.glob("*.onnx"))


@pytest.fixture
def lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of any size are large."""
    monkeypatch.setattr(io, "LAZY_FILE", 0)
    monkeypatch.setattr(io, "LAZY_WEIGHT", 600)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def halves(path: Path, target: Path, location: str | None) -> Path:
    """A model's weights as halves, in a file beside it if one is named."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    outside = {"save_as_external_data": True, "location": location, "size_threshold": 64} if location else {}
    onnx.save(model, target, **outside)
    return target


def both(source: Path, folder: Path, request: Request) -> tuple[dict[str, bytes], dict[str, bytes], int]:
    """The files of a pruning in memory and of one that leaves weights in their files, and how many it left."""
    for name in ("memory", "files"):
        (folder / name).mkdir()
    spa.prune(source, request=request).save(folder / "memory" / "o.onnx")
    result = prune_file(source, request)
    result.save(folder / "files" / "o.onnx")
    return contents(folder / "memory"), contents(folder / "files"), len(result.slices)


@pytest.mark.parametrize(("name", "criterion"), [*((name, "l2") for name in SHIPPED), ("digits_vgg.onnx", "fpgm")])
@pytest.mark.usefixtures("lazy")
def test_a_files_own_weights_give_the_same_bytes(name: str, criterion: str, tmp_path: Path) -> None:
    request = Request.of(criterion=criterion, ratio=0.3, round_to=1)
    memory, files, described = both(MODELS / name, tmp_path, request)
    assert described > 2
    assert files == memory


@pytest.mark.parametrize("location", [None, "w.data"])
@pytest.mark.usefixtures("lazy")
def test_halves_and_weights_in_another_file_give_the_same_bytes(location: str | None, tmp_path: Path) -> None:
    source = halves(MODELS / "digits_vgg.onnx", tmp_path / "m.onnx", location)
    memory, files, described = both(source, tmp_path, Request.of(criterion="l2", ratio=0.3, round_to=1))
    assert described > 2
    assert len(files) == (2 if location else 1)
    assert files == memory


@pytest.mark.usefixtures("lazy")
def test_what_runs_the_model_reads_the_weights_into_it() -> None:
    request = Request.of(criterion="wanda", ratio=0.3, samples=8)
    result = prune_file(MODELS / "digits_vgg.onnx", request)
    assert result.source.inside is None
    assert result.slices == {}
    assert result.model == spa.prune(MODELS / "digits_vgg.onnx", request=request).model


@pytest.mark.usefixtures("lazy")
def test_a_file_that_changed_since_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    source = tmp_path / "m.onnx"
    shutil.copy(MODELS / "digits_vgg.onnx", source)
    result = prune_file(source, Request.of(criterion="l2", ratio=0.3))
    data = source.read_bytes()
    source.write_bytes(data[:-7] + b"\0" * 7)
    with pytest.raises(ModelError, match="has changed since it was read"):
        result.save(tmp_path / "o.onnx")
    source.write_bytes(data[: len(data) // 3])
    with pytest.raises(ModelError, match="has become shorter while it was read"):
        result.save(tmp_path / "o.onnx")
    source.unlink()
    with pytest.raises(ModelError, match="cannot read the data file"):
        result.save(tmp_path / "o.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("lazy")
def test_a_full_disk_leaves_the_old_files_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "o.onnx").write_bytes(b"\x08old")
    original, seen = Slices.blocks, 0

    def blocks(self: Slices) -> object:
        nonlocal seen
        seen += 1
        if seen == 3:
            raise OSError(28, "No space left on device")
        return original(self)

    monkeypatch.setattr(Slices, "blocks", blocks)
    with pytest.raises(SpaError, match=r"cannot write '.*o\.onnx': No space left on device"):
        prune_file(MODELS / "digits_vgg.onnx", Request.of(criterion="l2", ratio=0.3)).save(tmp_path / "o.onnx")
    assert contents(tmp_path) == {"o.onnx": b"\x08old"}


def edited(change: Callable[[ModelProto], None]) -> bytes:
    model = onnx.load(MODELS / "digits_vgg.onnx")
    change(model)
    return model.SerializeToString()


def embedded(data: bytes, folder: Path) -> ModelProto:
    """A model read without data, into which the data is read again."""
    (folder / "m.onnx").write_bytes(data)
    model = ModelProto.FromString(without_data(memoryview(data), "m.onnx", 600))
    outside = [t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    assert outside
    assert not any(t.raw_data for t in outside)
    slices = {t.name: Slices.whole(t, folder) for t in outside}
    return materialise(model, {name: s for name, s in slices.items() if s is not None})


def test_a_message_without_data_is_the_message_with_its_data_elsewhere(tmp_path: Path) -> None:
    def change(model: ModelProto) -> None:
        model.metadata_props.add(key="a", value="b")
        model.graph.doc_string = "words"
        model.graph.initializer[0].doc_string = "a weight"
        for tensor in model.graph.initializer:
            tensor.doc_string = tensor.doc_string  # present, as after `materialise`

    data = edited(change)
    assert embedded(data, tmp_path) == ModelProto.FromString(data)


@pytest.mark.parametrize("end", [1, 70, 5000])
def test_bytes_cut_short_are_left_to_the_parser(end: int) -> None:
    data = (MODELS / "digits_vgg.onnx").read_bytes()
    with pytest.raises(Unusual):
        without_data(memoryview(data)[:-end], "m.onnx", 600)


@pytest.mark.parametrize("size", [40, 10**6])
def test_slices_are_those_of_the_array(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spa.model.stored.BLOCK", size)
    monkeypatch.setattr("spa.model.slices.BLOCK", size)
    monkeypatch.setattr("spa.model.slices.rows_at_a_time", lambda shape, item: (min(2, len(shape)), 3))
    values = np.arange(5 * 7 * 11, dtype=np.float32).reshape(5, 7, 11)
    (tmp_path / "d").write_bytes(b"xyz" + values.tobytes())
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=values.shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "d"), ("offset", 3), ("length", values.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    rng = np.random.default_rng(0)
    for axes in [(), (0,), (1,), (2,), (0, 2), (0, 1, 2)]:
        masks = tuple(rng.random(n) < 0.6 if axis in axes else None for axis, n in enumerate(values.shape))
        slices = Slices(tensor=tensor, base=tmp_path, masks=masks)
        expected = values
        for axis, mask in enumerate(masks):
            expected = expected if mask is None else np.compress(mask, expected, axis=axis)
        assert b"".join(bytes(block) for block in slices.blocks()) == expected.tobytes()
        assert (slices.shape, slices.nbytes) == (expected.shape, expected.nbytes)
        np.testing.assert_array_equal(slices.array(), expected)
    assert tensor_array(tensor, tmp_path).shape == values.shape
