"""Tensors that do not fit into memory lie in a file."""

import gc
import os
import pickle
import sys

import numpy as np
import pytest

from spa.running.live import Live, Shelf


def test_what_exceeds_the_room_is_read_from_a_file() -> None:
    rng = np.random.default_rng(0)
    values = {
        "a": rng.standard_normal((3, 4)).astype(np.float32),
        "b": rng.integers(0, 9, (2, 5)).T,
        "c": np.zeros((0, 3)),
        "d": np.array(7.5, np.float16),
        "e": rng.standard_normal(3) > 0,
    }
    shelf, live = Shelf(room=48), Live({})
    for name, value in values.items():
        live.store(name, value, shelf)
    other = Live(live)
    del live["a"]
    assert set(live) == {"b", "c", "d", "e"}
    assert live.nbytes == 0
    assert other.nbytes == 48
    for name, value in values.items():
        np.testing.assert_array_equal(other[name], value)
        assert (other.shape(name), other.dtype(name)) == (value.shape, value.dtype)
    other["b"][:] = 0
    np.testing.assert_array_equal(other["b"], values["b"])


def test_another_process_gets_the_tensors_of_files_too() -> None:
    live, value = Live({"x": np.ones(3)}), np.arange(12.0).reshape(3, 4)
    live.real = np.array([True, False])
    live.store("y", value, Shelf(room=0))
    other = pickle.loads(pickle.dumps(live))
    assert set(other) == {"x", "y"}
    np.testing.assert_array_equal(other["y"], value)
    np.testing.assert_array_equal(other.real, live.real)


@pytest.mark.skipif(sys.platform != "linux", reason="open files are counted in /proc")
def test_a_file_is_closed_with_the_last_tensor_in_it() -> None:
    before = len(os.listdir("/proc/self/fd"))
    live = Live({})
    shelf = Shelf(room=0)
    for name in "abc":
        live.store(name, np.ones(5), shelf)
    del shelf
    assert len(os.listdir("/proc/self/fd")) == before + 1
    other = Live(live)
    del live
    gc.collect()
    assert other["a"].sum() == 5
    del other
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
