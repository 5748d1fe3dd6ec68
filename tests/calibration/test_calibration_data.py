from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from spa.calibration.data import Calibration, Images, read_data
from spa.errors import PlanError
from spa.running.runtime import load_session, run

MODELS = Path(__file__).parents[2] / "models"
TRAIN = MODELS / "digits_train.npz"
F, F16, I32, I64, STR = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT32, TensorProto.INT64, TensorProto.STRING


def interface(**inputs: Any) -> onnx.ModelProto:
    """A model of which only the interface matters: name=(type, shape)."""
    values = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()]
    return helper.make_model(helper.make_graph([], "g", values, []))


DIGITS = interface(input=(F, ["batch", 1, 8, 8]))
VECTOR = interface(x=(F, ["n", 3]))
TWO = interface(x=(F, ["n", 3]), ids=(I64, ["n", "length"]))
FIXED = interface(x=(F, [4, 3]))


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def rows(count: int, start: int = 0) -> np.ndarray:
    """Samples of three values that all are the sample's number."""
    return np.repeat(np.arange(start, start + count, dtype=np.float32)[:, None], 3, axis=1)


def numbers(read: Calibration, name: str = "x") -> list[int]:
    return [int(row[0]) for batch in read.batches for row in batch[name]]


def refusal(data: Any, model: onnx.ModelProto = VECTOR, **options: Any) -> str:
    with pytest.raises(PlanError) as caught:
        read_data(data, model, **options)
    return str(caught.value)


# --- what is taken ---


def test_digits_are_sampled_by_seed_and_run() -> None:
    model = onnx.load(MODELS / "digits_resnet.onnx")
    read = read_data(str(TRAIN), model, samples=100)
    assert (read.samples, read.source, read.notes) == (100, str(TRAIN), ())
    assert [len(batch["input"]) for batch in read.batches] == [64, 36]
    session = load_session(model)
    logits = np.concatenate([run(session, batch)[0] for batch in read.batches])
    assert read.labels is not None and (logits.argmax(1) == read.labels).mean() > 0.9
    again, other = (read_data(TRAIN, model, samples=100, seed=seed).labels for seed in (0, 1))
    assert np.array_equal(again, read.labels) and not np.array_equal(other, read.labels)


def test_none_takes_all_in_order() -> None:
    read = read_data(TRAIN, DIGITS, samples=None)
    with np.load(TRAIN) as file:
        assert np.array_equal(np.concatenate([batch["input"] for batch in read.batches]), file["input"])
        assert np.array_equal(read.labels, file["label"])


def test_npz_with_one_array_of_any_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=rows(5), classes=np.arange(5))
    read = read_data(tmp_path / "a.npz", VECTOR, labels="classes")
    assert numbers(read) == [0, 1, 2, 3, 4] and read.labels is not None and read.labels.tolist() == [0, 1, 2, 3, 4]


def test_a_label_name_that_is_an_input_is_the_input() -> None:
    read = read_data({"y": rows(3)}, interface(y=(F, ["n", 3])))
    assert read.labels is None and numbers(read, "y") == [0, 1, 2]


def test_npy(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", rows(5))
    assert numbers(read_data(tmp_path / "a.npy", VECTOR)) == [0, 1, 2, 3, 4]


def test_dict_and_array_and_two_inputs() -> None:
    assert read_data(rows(40), VECTOR).notes == ()
    read = read_data({"ids": np.ones((5, 7), np.int32), "x": rows(5).astype(float), "label": np.arange(5)}, TWO)
    assert [batch["x"].shape for batch in read.batches] == [(5, 3)]
    assert read.batches[0]["ids"].dtype == np.int64 and read.batches[0]["x"].dtype == np.float32


def test_lossless_casts() -> None:
    assert read_data(np.array([[1], [2]]), interface(i=(I32, ["n", 1]))).batches[0]["i"].dtype == np.int32
    assert read_data(rows(2), interface(h=(F16, ["n", 3]))).batches[0]["h"].dtype == np.float16


def test_few_samples_are_noted() -> None:
    assert read_data(rows(31), VECTOR).notes == ("31 samples are few: the fit will be damped. Give 32 or more",)


def test_fixed_batch_drops_the_remainder() -> None:
    read = read_data(rows(35), FIXED)
    assert [len(batch["x"]) for batch in read.batches] == [4] * 8
    assert read.samples == 32
    assert read.notes == ("3 of 35 samples were dropped: the model takes batches of exactly 4",)


def test_minus_one_stands_for_an_open_axis() -> None:
    read = read_data(rows(5), interface(x=(F, [-1, -1])))
    assert [len(batch["x"]) for batch in read.batches] == [5]


def test_iterable_is_not_consumed_further() -> None:
    drawn = []

    def loader() -> Iterator[Any]:
        buffer = zeros(4, 3)  # ... used again and again
        for i in range(100):
            drawn.append(i)
            buffer[:] = rows(4, 4 * i)
            yield [buffer, np.arange(4) + 4 * i]

    read = read_data(loader(), VECTOR, samples=10)
    assert drawn == [0, 1, 2]
    assert numbers(read) == list(range(10)) and read.labels is not None and read.labels.tolist() == list(range(10))
    assert [len(batch["x"]) for batch in read.batches] == [10]


def test_iterable_of_dicts_arrays_samples_and_array_likes() -> None:
    class Like:
        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
            return rows(2)

    assert numbers(read_data([{"x": rows(2)}, {"x": rows(2)}], VECTOR)) == [0, 1, 0, 1]
    assert numbers(read_data([rows(2), Like(), (Like(),)], VECTOR)) == [0, 1] * 3
    read = read_data([(row, i) for i, row in enumerate(rows(3))], VECTOR)
    assert numbers(read) == [0, 1, 2] and read.labels is not None and read.labels.tolist() == [0, 1, 2]


def test_torch_loader() -> None:
    torch = pytest.importorskip("torch")
    data = torch.utils.data.TensorDataset(torch.from_numpy(rows(6)), torch.arange(6))
    read = read_data(torch.utils.data.DataLoader(data, batch_size=4), VECTOR)
    assert numbers(read) == list(range(6)) and read.labels is not None and read.labels.tolist() == list(range(6))


def test_samples_of_other_lengths_stay_apart() -> None:
    items = [{"x": rows(1, i), "ids": np.ones((1, length), np.int64)} for i, length in enumerate((2, 2, 5))]
    read = read_data(items, TWO)
    assert [batch["ids"].shape for batch in read.batches] == [(2, 2), (1, 5)] and numbers(read) == [0, 1, 2]


def test_folder_of_arrays(tmp_path: Path) -> None:
    np.save(tmp_path / "b.npy", rows(3, 10))
    np.save(tmp_path / "a.npy", rows(1)[0])
    np.savez(tmp_path / "c.npz", x=rows(2, 20))
    (tmp_path / "notes.txt").write_text("ignored")
    assert numbers(read_data(tmp_path, VECTOR)) == [0, 10, 11, 12, 20, 21]
    assert read_data(tmp_path, VECTOR, samples=2).samples == 2


def test_folder_of_npz_with_labels(tmp_path: Path) -> None:
    for i in range(3):
        np.savez(tmp_path / f"{i}.npz", x=rows(1, i)[0], ids=np.ones(4, np.int64), label=i)
    read = read_data(tmp_path, TWO)
    assert numbers(read) == [0, 1, 2] and read.labels is not None and read.labels.tolist() == [0, 1, 2]


# --- images ---

COLOUR = interface(x=(F, ["n", 3, 4, 6]))


def save_images(folder: Path) -> None:
    """Images of one colour in two sizes."""
    Image.new("RGB", (12, 8), (255, 0, 51)).save(folder / "a.png")
    Image.new("L", (6, 20), 255).save(folder / "b.bmp")


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (["n", 3, 4, 6], (2, 3, 4, 6)),
        (["n", 4, 6, 3], (2, 4, 6, 3)),
        (["n", 1, 5, 5], (2, 1, 5, 5)),
        (["n", 3, "height", "width"], (2, 3, 32, 32)),
    ],
)
def test_images(tmp_path: Path, shape: list[Any], expected: tuple[int, ...]) -> None:
    save_images(tmp_path)
    model = interface(x=(F, shape))
    (batch,) = read_data(tmp_path, model).batches
    assert batch["x"].shape == expected and batch["x"].dtype == np.float32
    if 3 not in shape:
        assert np.allclose(batch["x"][1], (1 - 0.5) / 0.25)
        return
    colours = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    pixels = batch["x"] if shape[3] == 3 else batch["x"].transpose(0, 2, 3, 1)
    assert np.allclose(pixels[0], colours, atol=1e-5)
    (plain,) = read_data(tmp_path, model, images_as=Images([0, 0, 0], [1, 1, 1]), samples=2).batches
    assert plain["x"].max() == 1 and plain["x"].min() == 0


def test_images_are_cropped_in_the_centre(tmp_path: Path) -> None:
    save_images(tmp_path)

    for path in tmp_path.iterdir():
        path.unlink()
    pixels = np.zeros((4, 12), np.uint8)
    pixels[:, 4:8] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (batch,) = read_data(tmp_path, interface(x=(F, ["n", 1, 4, 4])), images_as=Images([0], [1])).batches
    assert (batch["x"] == 1).all()


def test_broken_image(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no image")
    assert f"{tmp_path / 'a.jpg'}: it cannot be read as an image" in refusal(tmp_path, COLOUR)


def test_images_for_another_model(tmp_path: Path) -> None:
    save_images(tmp_path)
    assert "does not take one float image with 1 or 3 channels (inputs: 'x' float [n, 3])" in refusal(tmp_path)


def test_images_have_no_named_labels(tmp_path: Path) -> None:
    save_images(tmp_path)
    assert refusal(tmp_path, COLOUR, labels="c").startswith("labels 'c': images have no named arrays.")


def test_mean_and_std_must_fit(tmp_path: Path) -> None:
    save_images(tmp_path)
    assert (
        refusal(tmp_path, COLOUR, images_as=Images(mean=[0.5]))
        == "mean: [0.5] does not fit. Give 3 numbers, one per channel."
    )
    assert refusal(tmp_path, COLOUR, images_as=Images(std=[1, 0, 1])).startswith(
        "std: [1.0, 0.0, 1.0] is not positive."
    )
    assert refusal(rows(3), images_as=Images(mean=[0, 0, 0])).startswith(
        "mean and std: the data is no folder of images."
    )


def test_mean_and_a_folder_of_arrays(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", rows(3))
    assert refusal(tmp_path, images_as=Images(mean=[0.5])).startswith(f"mean and std: {tmp_path} holds arrays.")
    assert refusal(tmp_path, images_as=Images(value_range=(0, 1))).startswith(f"range: {tmp_path} holds arrays.")
    assert refusal(rows(3), images_as=Images(value_range=(0, 1))).startswith("range: the data is no folder of images.")


def test_images_get_the_range_that_is_given(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 51], [102, 255]], np.uint8)).save(tmp_path / "a.png")
    grey = interface(x=(F, ["n", 1, 2, 2]))
    read = read_data(tmp_path, grey, images_as=Images(value_range=(-10, 245)))
    assert np.allclose(read.batches[0]["x"].reshape(2, 2), [[-10, 41], [92, 245]], atol=1e-4)
    assert "scaled to -10..245, as --range says" in read.notes[0]


# --- files and folders that are refused ---


def test_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    assert refusal(path) == f"{path}: there is no such file or folder. Check the path."


def test_unknown_suffix(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("1,2")
    assert "the suffix '.csv' is unknown. Give an .npz or .npy file, or a folder." in refusal(tmp_path / "a.csv")


@pytest.mark.parametrize("content", [b"", b"words", b"PK\x03\x04 cut off"])
@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_not_an_npz(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    assert f"{path}: numpy cannot read it as an {suffix} file" in refusal(path)


def test_objects_in_an_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.array([None, 1]))
    assert "without objects" in refusal(tmp_path / "a.npz")


def test_npy_and_npz_swapped(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", rows(3))
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    assert "it is not an npz file, but a single array. Rename it to .npy." in refusal(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", rows(3))
    (tmp_path / "b.npz").rename(tmp_path / "b.npy")
    assert "it is not an npy file, but an npz archive. Rename it to .npz." in refusal(tmp_path / "b.npy")


def test_empty_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path).startswith(f"{tmp_path}: the folder holds no files.")


def test_folder_without_anything_usable(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    assert "none of its 1 files can be used (such as a.txt). Give files that end in .npy, .npz, .png" in refusal(
        tmp_path
    )


def test_folder_of_npy_for_two_inputs(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", rows(3))
    assert "an .npy file holds one array, but the model takes 'x', 'ids'." in refusal(tmp_path, TWO)


def test_folder_of_arrays_and_images(tmp_path: Path) -> None:
    save_images(tmp_path)
    np.save(tmp_path / "c.npy", rows(3))
    assert "it holds both arrays (c.npy) and images (a.png)." in refusal(tmp_path, COLOUR)


def test_labels_in_some_files_only(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=rows(1), y=np.arange(1))
    np.savez(tmp_path / "b.npz", x=rows(1))
    assert refusal(tmp_path) == f"{tmp_path}: 1 of its 2 parts have labels. Give all or none."


# --- arrays that are refused ---


def test_missing_input() -> None:
    assert refusal({"a": rows(3)}) == (
        "The data: 'x' is missing (expected 'x', got 'a'). Name the arrays like the model's inputs."
    )


def test_extra_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=rows(3), mask=rows(3), size=rows(3))
    assert "'mask', 'size' are not inputs of the model (expected 'x')." in refusal(tmp_path / "a.npz")
    assert "'labels' is not an input" in refusal({"x": rows(1), "label": [0], "labels": [0]})


def test_one_array_for_two_inputs() -> None:
    assert refusal(rows(3), TWO).startswith("The data: it is one array, but the model takes 'x', 'ids'.")


def test_rank() -> None:
    assert refusal(zeros(5, 8, 8), DIGITS) == (
        "Input 'input' of the data: it has 3 axes [5, 8, 8], expected 4 [batch, 1, 8, 8]. Reshape it."
    )


def test_fixed_size() -> None:
    assert "Input 'input' of the data: axis 2 has size 7, expected 8 (shape [5, 1, 7, 8], expected" in refusal(
        zeros(5, 1, 7, 8), DIGITS
    )


def test_empty_axis() -> None:
    assert "axis 1 has size 0" in refusal({"x": rows(2), "ids": np.ones((2, 0), np.int64)}, TWO)


def test_dtype() -> None:
    assert refusal(np.ones((2, 3), np.int64)) == (
        "Input 'x' of the data: its dtype is int64, expected float32. Cast it to float32."
    )
    assert "dtype is float32, expected int64" in refusal({"x": rows(2), "ids": rows(2)}, TWO)


def test_bytes_must_be_normalised() -> None:
    assert "its dtype is uint8, expected float32. Normalise it first" in refusal(np.ones((2, 3), np.uint8))


def test_integers_out_of_range() -> None:
    message = refusal(np.array([[0], [2**40]]), interface(i=(I32, ["n", 1])))
    assert "its values 0..1099511627776 do not fit into int32." in message


def test_floats_out_of_range() -> None:
    assert "1 of 3 values are too large for float32." in refusal(np.array([[0, 1, 1e300]]))


def test_nan_and_inf() -> None:
    array = rows(4)
    array[1, 2], array[3, 0] = np.nan, -np.inf
    assert refusal(array).startswith("Input 'x' of the data: 2 of 12 values are nan or inf.")


def test_nan_beyond_the_chosen_samples_is_found() -> None:
    array = rows(100)
    array[::2] = np.nan
    assert "150 of 300 values are nan" in refusal(array, samples=1)


def test_differing_numbers_of_samples() -> None:
    message = refusal({"x": rows(2), "ids": np.ones((3, 1), np.int64)}, TWO)
    assert message == (
        "The data: its arrays differ in the number of samples ('x' 2 along axis 0, 'ids' 3 along axis 0). "
        "Give each as many, along that axis."
    )


def test_zero_samples(tmp_path: Path) -> None:
    assert refusal(rows(0)) == "An array: it holds no samples. Give one at least."
    assert refusal([]) == "An iterable: it holds no samples. Give one at least."


def test_labels_of_wrong_length() -> None:
    message = refusal({"x": rows(3), "y": np.arange(4)})
    assert message == "The labels of the data: there are 4 for 3 samples. Give one class per sample."


def test_labels_that_are_no_integers() -> None:
    assert "their dtype is float32, expected integers." in refusal({"x": rows(3), "y": zeros(3)})
    assert "they have 2 axes [3, 2], expected 1." in refusal([(rows(3), np.zeros((3, 2), int))])


def test_labels_by_a_wrong_name() -> None:
    assert "labels 'c': the data has no such array (it has 'x')." in refusal({"x": rows(3)}, labels="c")
    assert "labels 'x': this is an input of the model." in refusal({"x": rows(3)}, labels="x")
    assert "labels 'c': the data has no named arrays." in refusal(rows(3), labels="c")


def test_labels_given_twice() -> None:
    assert "it has labels twice, as 'y' and in a pair." in refusal([({"x": rows(1), "y": [0]}, [0])])


# --- iterables, options and models that are refused ---


@pytest.mark.parametrize("data", [None, 3, b"bytes"])
def test_not_iterable(data: Any) -> None:
    assert f"data: a {type(data).__name__} cannot be read." in refusal(data)


def test_tuple_of_three() -> None:
    assert "Item 0 of the data: it is a tuple of 3, expected" in refusal([(rows(1), rows(1), rows(1))])


def test_item_that_does_not_fit() -> None:
    assert "Input 'x' of item 1 of the data: axis 1 has size 2, expected 3" in refusal([rows(2), zeros(2, 2)])


def test_ragged_item() -> None:
    assert "Input 'x' of item 0 of the data: numpy makes no array of a list" in refusal([[[1.0], [1.0, 2.0]]])


def test_fewer_samples_than_a_fixed_batch() -> None:
    message = refusal(rows(3), FIXED)
    assert message.startswith("An array: its 3 samples fill no batch, the model takes batches of exactly 4.")
    assert refusal(rows(9), FIXED, samples=3).startswith("samples: 3 were asked for, the model takes batches of")


def test_counts_must_be_positive() -> None:
    assert refusal(rows(3), samples=0) == "samples: 0 is not positive. Give 1 or more."


def test_models_that_cannot_be_fed() -> None:
    assert "it has no inputs" in refusal(rows(3), interface())
    assert "Input 's': arrays cannot hold its type tensor(string)." in refusal(rows(3), interface(s=(STR, ["n"])))
    assert "Input 's': it declares no axes" in refusal(rows(3), interface(s=(F, [])))


def test_samples_are_held_out_of_what_fits_see() -> None:
    x = np.arange(100, dtype=np.float32)[:, None].repeat(4, 1)
    y = np.arange(100)
    model = interface(x=(F, ["n", 4]))
    fit = read_data({"x": x, "y": y}, model, samples=64, hold_out=True)
    assert fit.held_out is not None
    assert (fit.samples, fit.held_out.samples) == (64, 36)  # labels: all that is left
    parts = [np.concatenate([b["x"][:, 0] for b in part.batches]) for part in (fit, fit.held_out)]
    assert sorted(np.concatenate(parts)) == list(range(100))
    for part, values in zip((fit, fit.held_out), parts, strict=True):
        assert part.labels is not None
        assert (part.labels == values).all()
    unlabelled = read_data({"x": x}, model, samples=64, hold_out=True)
    assert unlabelled.held_out is not None
    assert (unlabelled.samples, unlabelled.held_out.samples) == (64, 16)
    few = read_data({"x": x[:20]}, model, samples=64, hold_out=True)
    assert few.held_out is not None
    assert (few.samples, few.held_out.samples) == (15, 5)
    assert read_data({"x": x[:6]}, model, samples=64, hold_out=True).held_out is None
    assert read_data({"x": x}, model, samples=64).held_out is None


# --- inputs that show little ---


def test_samples_that_differ_by_rounding_alone_are_the_same() -> None:
    base = np.linspace(-3, 3, 12, dtype=np.float32).reshape(4, 3)[:1].repeat(5, axis=0)
    noisy = base + np.float32(1e-7) * np.arange(5, dtype=np.float32)[:, None]
    assert "is the same in all samples" in refusal({"x": noisy})
    assert read_data({"x": base + np.float32(2e-5) * np.arange(5, dtype=np.float32)[:, None]}, VECTOR).samples == 5


@pytest.mark.parametrize("last", [False, True])
def test_silent_channels_are_named(last: bool) -> None:
    values = np.random.default_rng(0).random((40, 4, 9, 9), np.float32)
    shape = ["n", 4, 9, 9]
    if last:
        values, shape = np.moveaxis(values, 1, -1), ["n", 9, 9, 4]
    model = interface(x=(F, shape))
    assert read_data({"x": values}, model).notes == ()
    channels = values if not last else np.moveaxis(values, -1, 1)
    channels[:, 2], channels[:, 0] = 0.5, 0
    (note,) = read_data({"x": values}, model).notes
    assert note.startswith("channels 0, 2 of input 'x' hold the same value in all samples")


def test_rows_without_ink_are_no_silent_channels() -> None:
    values = np.random.default_rng(0).random((40, 9, 9, 1), np.float32)
    values[:, 0] = 0
    assert read_data({"x": values}, interface(x=(F, ["n", 9, 9, 1]))).notes == ()
