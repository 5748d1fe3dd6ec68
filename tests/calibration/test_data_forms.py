"""Data as users have it: states, scalars, lengths that differ, loaders, tables, images, functions of their own."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from spa.calibration import batches
from spa.calibration.data import Calibration, Images, read_data
from spa.errors import PlanError

F, I64 = TensorProto.FLOAT, TensorProto.INT64


def interface(**inputs: Any) -> onnx.ModelProto:
    """A model of which only the interface matters: name=(type, shape)."""
    values = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()]
    return helper.make_model(helper.make_graph([], "g", values, []))


VECTOR = interface(x=(F, ["n", 3]))
CELL = interface(state=(F, [2, "batch", 5]), x=(F, ["batch", 3]), rate=(I64, []))
STATIC = interface(x=(F, [1, 3]), h=(F, [2, 1, 5]), sr=(I64, []))
TEXT = interface(ids=(I64, ["n", "length"]), mask=(I64, ["n", "length"]))


def rows(count: int, width: int = 3, start: int = 0) -> np.ndarray:
    """Samples of which all values are the sample's number."""
    return np.repeat(np.arange(start, start + count, dtype=np.float32)[:, None], width, axis=1)


def states(count: int) -> np.ndarray:
    """States (layers, samples, 5): ten times the layer plus the sample."""
    return np.arange(2)[:, None, None] * 10 + rows(count, 5)[None]


def refusal(data: Any, model: onnx.ModelProto = VECTOR, **options: Any) -> str:
    with pytest.raises(PlanError) as caught:
        read_data(data, model, **options)
    return str(caught.value)


def belongs_together(read: Calibration, state: str) -> bool:
    """Whether each sample kept its state."""
    pairs = [(batch["x"][:, 0], batch[state][:, :, 0]) for batch in read.batches]
    return all((s[0] == x).all() and (s[1] == x + 10).all() for x, s in pairs)


# --- axes of samples ---


@pytest.mark.parametrize("samples", [None, 7])
def test_samples_of_a_state_lie_along_its_second_axis(samples: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "MAX_SAMPLES", 4)
    read = read_data({"x": rows(9), "state": states(9).astype("f4"), "rate": 16000}, CELL, samples=samples)
    assert read.samples == (samples or 9)
    assert read.batches[0]["state"].shape == (2, 4, 5)
    assert belongs_together(read, "state")
    assert all(b["rate"].shape == () and b["rate"] == 16000 for b in read.batches)
    assert next(iter(read.batches[0])) == "x"  # whose length is the number of samples


def test_a_state_in_the_wrong_layout_is_refused_with_the_axis() -> None:
    message = refusal({"x": rows(9), "state": states(9).transpose(1, 0, 2).astype("f4"), "rate": 1}, CELL)
    assert message == (
        "Input 'state' of the data: axis 0 has size 9, expected 2 (shape [9, 2, 5], expected [2, batch, 5]; samples lie "
        "along axis 1). Move the axis of the samples there: numpy.moveaxis(array, 0, 1)."
    )


@pytest.mark.parametrize("stacked", [False, True])
def test_a_fixed_batch_of_one_is_fed_sample_by_sample(stacked: bool) -> None:
    data = {"x": rows(4), "h": states(4).astype("f4"), "sr": np.full(4, 8000)}
    if stacked:  # feeds of a batch of one each, along a new axis
        data |= {"x": data["x"][:, None], "h": np.moveaxis(data["h"], 1, 0)[:, :, None]}
    read = read_data(data, STATIC)
    assert [(b["x"].shape, b["h"].shape) for b in read.batches] == [((1, 3), (2, 1, 5))] * 4
    assert belongs_together(read, "h") and read.batches[0]["sr"] == 8000
    feeds = [{"x": rows(1, start=i), "h": states(4)[:, i : i + 1].astype("f4"), "sr": np.int64(8000)} for i in range(4)]
    assert belongs_together(read_data(feeds, STATIC), "h")


def test_a_scalar_that_differs_between_samples_is_refused() -> None:
    message = refusal({"x": rows(4), "state": states(4).astype("f4"), "rate": np.arange(4)}, CELL)
    assert "Input 'rate' of the data: it has 1 axes [4], expected 0 []; all samples share it." in message


def test_pieces_that_share_other_values_stay_apart() -> None:
    feeds = [{"x": rows(2), "state": states(2).astype("f4"), "rate": rate} for rate in (8, 8, 16)]
    read = read_data(feeds, CELL)
    assert [(len(b["x"]), int(b["rate"])) for b in read.batches] == [(4, 8), (2, 16)]


def test_feeds_of_the_right_shapes_are_taken_as_they_are() -> None:
    model = interface(image=(F, ["n", 3]), boxes=(F, ["count", 4]))
    feeds = [{"image": rows(1, start=i), "boxes": rows(5 + i, 4)} for i in range(3)]
    read = read_data(feeds, model)
    assert [b["boxes"].shape for b in read.batches] == [(5, 4), (6, 4), (7, 4)]
    assert read.samples == 3


SEQUENCE = interface(frames=(F, ["length", 3]), h=(F, [1, 1, 5]))


def test_a_model_that_takes_one_sample_at_a_time_is_fed_so() -> None:
    """A sequence without an axis for samples: cutting it into batches would cut it short."""
    state = np.zeros((1, 1, 5), np.float32)
    stacked = {"frames": np.stack([rows(7, start=i) for i in range(4)]), "h": state, "y": [0, 1, 2, 3]}
    lists = {"frames": [rows(5 + i) for i in range(4)], "h": state}
    feeds = [{"frames": rows(7, start=i), "h": state} for i in range(4)]
    for data in (stacked, lists, feeds):
        read = read_data(data, SEQUENCE)
        assert read.samples == len(read.batches) == 4
        assert all(b["frames"].ndim == 2 and b["h"].shape == (1, 1, 5) for b in read.batches)
    assert read_data(stacked, SEQUENCE).labels is not None
    assert read_data({"frames": rows(70), "h": state}, SEQUENCE).samples == 1


# --- lengths that differ ---


@pytest.mark.parametrize("kind", [list, "objects"])
def test_lists_of_different_lengths(kind: Any) -> None:
    lengths = (4, 2, 4)
    ids = [np.full(n, i) for i, n in enumerate(lengths)]
    masks = [np.ones(n, int) for n in lengths]
    if kind == "objects":
        ids, masks = np.array(ids, object), np.array(masks, object)
    read = read_data({"ids": ids, "mask": masks, "label": [0, 1, 2]}, TEXT)
    assert [b["ids"][:, 0].tolist() for b in read.batches] == [[0, 2], [1]]
    assert read.labels is not None and read.labels.tolist() == [0, 2, 1]


def test_lists_that_differ_in_number_are_refused() -> None:
    message = refusal({"ids": [np.ones(2, int), np.ones(3, int)], "mask": np.ones((3, 3), int)}, TEXT)
    assert message == "The lists of the data differ in the number of samples ('ids' 2, 'mask' 3). Give each as many."


def test_lengths_that_a_model_does_not_take_are_refused_by_sample() -> None:
    message = refusal({"x": [np.ones(3, "f4"), np.ones(2, "f4")]}, VECTOR)
    assert message.startswith("Input 'x' of sample 1 of the data: axis 1 has size 2, expected 3")


def test_many_shapes_are_said() -> None:
    read = read_data([{"ids": np.full((1, n), n), "mask": np.ones((1, n), int)} for n in range(1, 36)], TEXT)
    assert read.notes == ("the samples have 35 different shapes, and run in as many batches; like ones run faster",)


# --- loaders and tables ---


def test_tuples_are_the_inputs_in_order() -> None:
    ids, mask = np.arange(8).reshape(2, 4), np.ones((2, 4), int)
    for item in ((ids, mask), [ids, mask], (ids, mask, np.arange(2)), [ids, mask, np.arange(2)]):
        read = read_data([item, item], TEXT)
        assert read.samples == 4 and (read.labels is None) == (len(item) == 2)


def test_mappings_that_are_no_dicts() -> None:
    assert read_data(UserDict(ids=np.arange(8).reshape(2, 4), mask=np.ones((2, 4), int)), TEXT).samples == 2


class Table:
    """A dataset with columns, as Hugging Face's are; it holds lists."""

    column_names = ("text", "ids", "mask", "label")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"text": f"row {index}", "ids": [index] * 3, "mask": [1, 1, 0], "label": index % 2}


def test_columns_that_are_inputs_are_taken_and_others_named() -> None:
    read = read_data(Table(), TEXT, samples=33)
    assert (read.samples, read.source) == (33, "a table of 40 rows")
    assert read.notes == ("columns 'text' of the data are no inputs and were left out",)
    numbers = np.concatenate([b["ids"][:, 0] for b in read.batches])
    assert read.labels is not None and (read.labels == numbers % 2).all()
    assert numbers.tolist() != list(range(33)) and numbers.tolist() == sorted(numbers)  # a choice of all rows, in order


class Rows:
    """A dataset with columns that can only be gone through, from the first row on."""

    column_names = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(Table())


def test_a_table_without_numbers_is_read_from_its_first_row() -> None:
    read = read_data(Rows(), TEXT, samples=33)
    assert np.concatenate([b["ids"][:, 0] for b in read.batches]).tolist() == list(range(33))
    assert (read.source, read.notes) == ("a table", ("columns 'text' of the data are no inputs and were left out",))


def test_tensors_with_gradients_and_of_sixteen_bits() -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.arange(6.0).reshape(2, 3).requires_grad_()
    for given in (tensor, tensor.to(torch.bfloat16)):
        assert np.array_equal(read_data([(given, torch.arange(2))], VECTOR).batches[0]["x"], tensor.detach().numpy())


# --- functions of the user's own ---


def test_preprocess_makes_inputs_of_items_rows_and_samples(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(5))
    widen = lambda number: np.repeat(np.float32(number), 3)  # noqa: E731 # as users write it
    for data in (range(5), np.arange(5), tmp_path / "a.npy"):
        assert np.array_equal(read_data(data, VECTOR, preprocess=widen).batches[0]["x"], rows(5))
    table = {"number": np.arange(5), "label": np.arange(5)}
    read = read_data(table, VECTOR, preprocess=lambda row: (widen(row["number"]), row["label"]))
    assert read.labels is not None and read.labels.tolist() == list(range(5))
    read = read_data(Table(), VECTOR, preprocess=lambda row: widen(row["ids"][0]))
    assert read.notes == ()


def test_an_exception_in_preprocess_names_the_sample() -> None:
    def picky(number: int) -> np.ndarray:
        if number == 3:
            raise KeyError("pixels")
        return np.repeat(np.float32(number), 3)

    assert refusal(range(5), preprocess=picky) == (
        "Item 3 of the data: preprocess raised KeyError: 'pixels'. Mend it, or remove the sample."
    )
    assert "Sample 3 of the data: preprocess raised" in refusal(np.arange(5), preprocess=picky)


# --- images ---


def save_image(path: Path, width: int, height: int, value: int = 255) -> None:
    from PIL import Image as image

    image.new("RGB", (width, height), (value, 0, 0)).save(path)


def test_open_sizes_are_the_median_of_the_images_and_said(tmp_path: Path) -> None:
    for number, size in enumerate(((64, 100), (130, 90), (120, 500))):
        save_image(tmp_path / f"{number}.png", *size, value=90 * number)
    read = read_data(tmp_path, interface(x=(F, ["n", 3, "height", "width"])))
    assert read.batches[0]["x"].shape == (3, 3, 96, 128)  # of 100, 90, 500 rows and 64, 130, 120 columns
    assert read.notes[0] == (
        "images were resized to 96x128 (rows x columns), since the model leaves the size open; scaled to 0..1, less mean "
        "0.485, 0.456, 0.406, over std 0.229, 0.224, 0.225 (--mean and --std, if it took others)"
    )
    sizes = Images(sizes={"height": 48, "x[3]": 40})
    assert read_data(tmp_path, interface(x=(F, ["n", 3, "height", None])), images_as=sizes).batches[0]["x"].shape == (
        (3, 3, 48, 40)
    )


def test_lines_keep_their_proportions_where_one_side_is_open(tmp_path: Path) -> None:
    for number, width in enumerate((205, 50, 208)):
        save_image(tmp_path / f"{number}.png", width, 24, 90 * number)
    read = read_data(tmp_path, interface(x=(F, ["n", 3, 48, "width"])))
    assert [b["x"].shape for b in read.batches] == [(2, 3, 48, 416), (1, 3, 48, 96)]
    assert read.notes[0].startswith("images were resized to 48 rows, the other side in proportion, in steps of 32;")


def test_fixed_sizes_are_covered_and_said(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", 8, 4)
    save_image(tmp_path / "b.png", 8, 4, 100)
    read = read_data(tmp_path, interface(x=(F, ["n", 3, 4, 4])), images_as=Images(0.5, 0.5))
    assert read.notes[0].startswith(
        "images were resized to cover 4x4 (rows x columns), what sticks out was cut off evenly; scaled to 0..1, less mean "
        "0.5, 0.5, 0.5, over std 0.5, 0.5, 0.5"
    )


def test_preprocess_takes_images(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", 8, 4)
    save_image(tmp_path / "b.png", 8, 4, 100)
    read = read_data(tmp_path, VECTOR, preprocess=lambda image: np.asarray(image, np.float32)[0, 0])
    assert read.batches[0]["x"].tolist() == [[255, 0, 0], [100, 0, 0]]
    assert read.notes[0] == "images are what preprocess made of them"


# --- what is refused ---


def test_samples_that_are_all_the_same_are_refused() -> None:
    assert refusal(np.ones((5, 3), "f4")) == (
        "An array: input 'x' is the same in all samples, from which nothing can be learnt. Give samples that differ."
    )
    data = {"x": rows(4), "state": np.zeros((2, 4, 5), "f4"), "rate": 8}  # a state that is zero is no fault
    assert read_data(data, CELL).samples == 4


def test_classes_that_the_output_lacks_are_refused() -> None:
    model = interface(x=(F, ["n", 3]))
    model.graph.output.append(helper.make_tensor_value_info("logits", F, ["n", 10]))
    assert read_data({"x": rows(3), "y": [0, 9, 5]}, model).samples == 3
    message = refusal({"x": rows(3), "y": [0, 10, 5]}, model)
    assert message == (
        "The labels of the data: class 10 of sample 1 is none of the 10 of output 'logits', 0 to 9. "
        "Number the classes as the model does, or leave the labels out."
    )
    assert "class -1 of sample 2" in refusal({"x": rows(3), "y": [0, 1, -1]}, model)
