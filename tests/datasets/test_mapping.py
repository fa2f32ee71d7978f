"""Label mappings: the challenge's own form, and no code from a file is ever run."""

import os
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brainenc.datasets.mapping import read_mapping, write_mapping
from brainenc.errors import DataError

PLACES = {0: "Unknown", 1: "OPA", 2: "PPA", 3: "RSC"}


def test_what_is_written_reads_back_and_is_the_challenge_s_form(tmp_path):
    path = tmp_path / "mapping_floc-places.npy"
    write_mapping(path, PLACES)
    assert read_mapping(path) == PLACES
    raw = np.load(path, allow_pickle=True)
    assert raw.shape == ()
    assert raw.dtype == object
    assert raw.item() == PLACES


def test_numpy_scalars_as_labels_and_names_are_read(tmp_path):
    path = tmp_path / "m.npy"
    np.save(path, np.array({np.int64(k): np.str_(v) for k, v in PLACES.items()}, dtype=object))
    assert read_mapping(path) == PLACES


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("home", [b"numpy._core", b"numpy.core"])
def test_pickles_of_older_numpy_are_read(tmp_path, protocol, home):
    path = tmp_path / "m.npy"
    if protocol < 4:  # lengths are not part of the text there, so that the module's name can be exchanged
        data = pickle.dumps(np.array(PLACES, dtype=object), protocol=protocol).replace(b"numpy._core", home)
    else:
        data = pickle.dumps(np.array(PLACES, dtype=object), protocol=protocol)
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        file.write(data)
    assert read_mapping(path) == PLACES


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_asks_for_anything_else_is_refused_and_not_run(tmp_path):
    trap = tmp_path / "trap"
    np.save(tmp_path / "m.npy", np.array({0: Evil(trap)}, dtype=object))
    with pytest.raises(DataError, match=r"it asks for .*mkdir"):
        read_mapping(tmp_path / "m.npy")
    assert not trap.exists()


@pytest.mark.parametrize(
    "value", [np.arange(3), np.array("text"), np.array([{0: "a"}], dtype=object), np.array([1], dtype=object)]
)
def test_other_arrays_are_no_mappings(tmp_path, value):
    np.save(tmp_path / "m.npy", value)
    with pytest.raises(DataError, match="not a label mapping"):
        read_mapping(tmp_path / "m.npy")


@given(cut=st.integers(0, 400), flip=st.integers(0, 400), bit=st.integers(0, 7))
def test_damaged_files_are_refused_or_read_as_a_mapping(tmp_path_factory, cut, flip, bit):
    """Whatever bytes are damaged, the outcome is a mapping or a DataError, never another exception."""
    path = tmp_path_factory.mktemp("m") / "m.npy"
    write_mapping(path, PLACES)
    data = bytearray(path.read_bytes())
    data[flip % len(data)] ^= 1 << bit
    path.write_bytes(data[: max(cut, 1)])
    try:
        mapping = read_mapping(path)
    except DataError:
        return
    assert all(isinstance(k, int) and isinstance(v, str) for k, v in mapping.items())
