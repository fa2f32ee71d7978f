"""Shard formats: the contract, and other people's readers."""

import os

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brainenc.errors import UnknownName
from brainenc.featurestore.dtypes import storage_dtype
from brainenc.featurestore.formats import FORMATS, ShardSpec, shard_format
from brainenc.featurestore.formats.arrow import ArrowFormat
from brainenc.featurestore.formats.npy import NpyFormat
from brainenc.featurestore.testing import NOTE, FormatContract, write_shard

dtypes = st.sampled_from(["float16", "float32", "bfloat16"])
shapes = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)


class TestArrow(FormatContract):
    @pytest.fixture
    def form(self):
        return ArrowFormat()


class TestNpy(FormatContract):
    @pytest.fixture
    def form(self):
        return NpyFormat()


@given(rows=st.integers(0, 300), row_shape=shapes, dtype=dtypes, note=st.binary(max_size=300))
def test_pyarrow_accepts_every_arrow_shard_and_copies_nothing(rows, row_shape, dtype, note):
    """Validated in full; as a file and as a stream; the column is at the data offset."""
    spec, form = ShardSpec(rows=rows, row_shape=row_shape, dtype=dtype), ArrowFormat()
    data = np.random.default_rng(rows).integers(0, 256, spec.data_bytes, np.uint8)
    raw = form.head(spec) + data.tobytes() + form.tail(spec, note)
    want = data.view(storage_dtype(dtype)).reshape(rows, *row_shape)

    reader = pa.ipc.open_file(pa.BufferReader(raw))
    batch = reader.get_batch(0)
    batch.validate(full=True)

    column = batch.column(0)
    assert reader.num_record_batches == 1
    assert column.type == pa.fixed_shape_tensor(pa.from_numpy_dtype(storage_dtype(dtype)), row_shape)
    if rows:
        np.testing.assert_array_equal(column.to_numpy_ndarray(), want)
        assert column.storage.buffers()[-1].address - pa.py_buffer(raw).address == len(form.head(spec))
    assert pa.ipc.open_stream(pa.BufferReader(raw[8:])).read_all().num_rows == rows
    assert form.note(raw[-form.tail_bytes(raw[-64:]) :]) == note


@given(rows=st.integers(0, 300), row_shape=shapes, dtype=dtypes)
def test_numpy_accepts_every_npy_shard(tmp_path_factory, rows, row_shape, dtype):
    """Read and mapped, with the note behind the data unnoticed."""
    spec, form = ShardSpec(rows=rows, row_shape=row_shape, dtype=dtype), NpyFormat()
    data = np.random.default_rng(rows).integers(0, 256, spec.data_bytes, np.uint8)
    path = tmp_path_factory.mktemp("npy") / "shard.npy"
    path.write_bytes(form.head(spec) + data.tobytes() + form.tail(spec, NOTE))
    want = data.view(storage_dtype(dtype)).reshape(rows, *row_shape)

    np.testing.assert_array_equal(np.load(path), want)
    if rows:
        np.testing.assert_array_equal(np.load(path, mmap_mode="r"), want)


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_polars_reads_an_arrow_shard(tmp_path, dtype):
    """As an array column of the row's values."""
    spec = ShardSpec(rows=5, row_shape=(3, 4), dtype=dtype)
    path, rows, _ = write_shard(ArrowFormat(), spec, tmp_path)

    frame = pl.read_ipc(path)

    column = frame["features"]
    storage = column.ext.storage() if hasattr(column, "ext") and isinstance(column.dtype, pl.BaseExtension) else column
    np.testing.assert_array_equal(storage.to_numpy().reshape(rows.shape), rows)


def test_duckdb_reads_float32_through_pyarrow(tmp_path):
    """Half floats it does not know."""
    spec = ShardSpec(rows=5, row_shape=(3, 4), dtype="float32")
    path, rows, _ = write_shard(ArrowFormat(), spec, tmp_path)
    shards = pa.ipc.open_file(pa.memory_map(str(path))).read_all()

    assert shards.num_rows == 5
    found = duckdb.sql("select features[2] as second from shards").fetchnumpy()["second"]

    np.testing.assert_array_equal(found, rows[:, 0, 1])


@pytest.mark.parametrize("form", FORMATS.values(), ids=list(FORMATS))
def test_more_than_four_gibibytes_and_two_to_the_31_values(tmp_path, form):
    """Framed around a hole, so that the test takes no disk: the last row is where it should be."""
    spec = ShardSpec(rows=2**21 + 3, row_shape=(1025,), dtype="float16")
    assert spec.data_bytes > 4 << 30
    assert spec.rows * spec.row_elements > 2**31
    last = np.arange(1025).astype(np.float16)
    head, path = form.head(spec), tmp_path / f"big.{form.suffix}"
    with open(path, "wb") as file:
        file.write(head)
        file.seek(len(head) + spec.data_bytes - spec.row_bytes)
        file.write(last.tobytes() + form.tail(spec, NOTE))

    if form.suffix == "npy":
        rows = np.load(path, mmap_mode="r")
    else:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        rows = table.column(0).chunk(0).to_numpy_ndarray()

    assert rows.shape == (spec.rows, 1025)
    np.testing.assert_array_equal(rows[-1], last)
    assert not rows[0].any()
    assert os.stat(path).st_blocks * 512 < 1 << 20


def test_an_unknown_format_is_named_with_those_there_are():
    with pytest.raises(UnknownName, match=r"'parquet'.*arrow, npy"):
        shard_format("parquet")
