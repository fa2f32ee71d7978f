"""Contracts as tests, for whoever writes a shard format or a place: inherit, say how to make one, run pytest.

class TestMyFormat(FormatContract):
    @pytest.fixture
    def form(self):
        return MyFormat()

class TestMyPlace(PlaceContract):
    @pytest.fixture
    def place(self, tmp_path):
        return MyPlace.open(tmp_path, create=True)

    def raw(self, place, name):          # the bytes of a name, read around the place; None if absent
        ...
"""

from __future__ import annotations

import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from brainenc.errors import CorruptData, UsageError
from brainenc.featurestore.checksums import BlockHasher, rows_per_block
from brainenc.featurestore.dtypes import storage_dtype
from brainenc.featurestore.formats.base import ALIGNMENT, ShardFormat, ShardSpec
from brainenc.featurestore.inspection import LocalBytes, framed, inspect
from brainenc.featurestore.places.base import Place
from brainenc.featurestore.schema import CollectionSpec, Note, Receipt

SPECS = [
    ShardSpec(rows=1, row_shape=(1,), dtype="float32"),
    ShardSpec(rows=7, row_shape=(3, 5), dtype="float16"),
    ShardSpec(rows=64, row_shape=(2, 3, 4), dtype="bfloat16"),
    ShardSpec(rows=1000, row_shape=(768,), dtype="float16"),
]
NOTE = b'{"what":"a note","n":"' + b"0123456789" * 40 + b'"}'


class FormatContract:
    """What every :class:`~brainenc.featurestore.formats.base.ShardFormat` must hold to."""

    @pytest.fixture
    def form(self) -> ShardFormat:
        """The format under test."""
        raise AssertionError("override the fixture `form`")

    @pytest.mark.parametrize("spec", SPECS, ids=str)
    def test_the_head_is_aligned_and_always_the_same(self, form: ShardFormat, spec: ShardSpec) -> None:
        """Its length is the data offset."""
        assert len(form.head(spec)) % ALIGNMENT == 0
        assert form.head(spec) == form.head(spec)

    @pytest.mark.parametrize("spec", SPECS, ids=str)
    def test_the_note_comes_back_from_the_end_of_the_file(self, form: ShardFormat, spec: ShardSpec) -> None:
        """From its last bytes alone."""
        tail = form.tail(spec, NOTE)
        end = (form.head(spec) + tail)[-64:]
        assert form.note(tail[-form.tail_bytes(end) :]) == NOTE
        assert NOTE in tail

    @pytest.mark.parametrize("spec", SPECS, ids=str)
    def test_rows_lie_in_one_region_between_head_and_tail(self, form: ShardFormat, spec: ShardSpec,
                                                          tmp_path: Path) -> None:  # fmt: skip
        """So that any reader of memory can have them by offset alone."""
        path, rows, note = write_shard(form, spec, tmp_path)
        flat = np.memmap(path, storage_dtype(spec.dtype), "r", note.data_offset, (spec.rows, *spec.row_shape))
        np.testing.assert_array_equal(flat, rows)

    @pytest.mark.parametrize("spec", SPECS[:3], ids=str)
    def test_every_cut_and_every_flip_is_found(self, form: ShardFormat, spec: ShardSpec, tmp_path: Path) -> None:
        """Wherever in the file it is: one byte a time over head and tail, a sample of the rows."""
        path, _, note = write_shard(form, spec, tmp_path)
        whole, receipt = path.read_bytes(), _inspect(form, path, spec)
        step = max(1, spec.data_bytes // 50)
        inside = range(note.data_offset, note.data_offset + spec.data_bytes, step)
        for position in [*range(note.data_offset), *inside, *range(note.data_offset + spec.data_bytes, len(whole))]:
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
            with pytest.raises(CorruptData):
                _compare(receipt, _inspect(form, path, spec))
        for position in {*range(0, len(whole), 17), len(whole) - 1}:
            path.write_bytes(whole[:position])
            with pytest.raises(CorruptData):
                _inspect(form, path, spec)
        path.write_bytes(whole + b"\0")
        with pytest.raises(CorruptData):
            _inspect(form, path, spec)


def write_shard(form: ShardFormat, spec: ShardSpec, folder: Path) -> tuple[Path, np.ndarray, Note]:
    """A whole shard of random bits, its rows in the storage dtype, and its note."""
    bits = np.random.default_rng(0).integers(0, 256, spec.data_bytes, np.uint8)
    rows = bits.view(storage_dtype(spec.dtype)).reshape(spec.rows, *spec.row_shape)
    per_block = rows_per_block(spec.row_bytes)
    blocks = BlockHasher(per_block * spec.row_bytes)
    blocks.update(bits.data)
    blank = Note(collection=_collection(form, spec).checksum, shard=0, rows=spec.rows, block_rows=per_block,
                 data_offset=len(form.head(spec)), blocks=tuple(blocks.digests()))  # fmt: skip
    tail, note = framed(form, _collection(form, spec), blank)
    path = folder / f"shard-00000.{form.suffix}"
    path.write_bytes(form.head(spec) + bits.tobytes() + tail)
    return path, rows, note


def _collection(form: ShardFormat, spec: ShardSpec) -> CollectionSpec:
    return CollectionSpec(identity={}, row_shape=spec.row_shape, dtype=spec.dtype, n_rows=spec.rows, stimuli="s",
                          stimuli_checksum="", rows_per_shard=spec.rows, format=form.name)  # fmt: skip


def _inspect(form: ShardFormat, path: Path, spec: ShardSpec) -> Receipt:
    fd = os.open(path, os.O_RDONLY)
    try:
        return inspect(LocalBytes(path, fd), form, _collection(form, spec), 0)
    finally:
        os.close(fd)


def _compare(receipt: Receipt, found: Receipt) -> None:
    if receipt != found:
        raise CorruptData("the receipt speaks of other bytes")


class PlaceContract:
    """What every :class:`~brainenc.featurestore.places.base.Place` must hold to, as far as its capabilities say."""

    @pytest.fixture
    def place(self) -> Place:
        """An empty place."""
        raise AssertionError("override the fixture `place`")

    def raw(self, place: Place, name: str) -> bytes | None:
        """The bytes of a name, had without the place, so that reader and writer cannot agree on one mistake."""
        raise AssertionError("override `raw`")

    def test_what_was_created_is_there(self, place: Place) -> None:
        """Under its name, with its size, whole and in ranges."""
        for data in (b"", b"x", b"\r\n--==0==\r", bytes(range(256)) * 100):
            name = f"a/b/file-{len(data)}.json"
            assert place.create(name, data)
            assert self.raw(place, name) == data
            assert place.size(name) == len(data)
            assert place.read(name) == data
            assert place.read(name, 3, 9) == data[3:9]
            assert place.read(name, len(data), len(data) + 5) == b""

    def test_nothing_is_overwritten(self, place: Place) -> None:
        """The same bytes again are no conflict; others are refused and leave what is there."""
        assert place.create("a/x.json", b"first")
        assert place.create("a/x.json", b"first")
        assert not place.create("a/x.json", b"second")
        assert self.raw(place, "a/x.json") == b"first"

    def test_a_finished_file_gets_its_name_once(self, place: Place) -> None:
        """The loser's copy stays with the loser."""
        first, second = (self._partial(place, "a/s.arrow", data) for data in (b"one", b"other"))
        assert first != second
        assert place.size("a/s.arrow") is None
        assert place.publish(first, "a/s.arrow")
        assert not first.exists()
        assert not place.publish(second, "a/s.arrow")
        assert second.exists()
        assert self.raw(place, "a/s.arrow") == b"one"

    def test_of_many_creators_one_wins(self, place: Place) -> None:
        """Where the place says that it can tell."""
        if not place.can.atomic_create:
            pytest.skip("the place does not promise it")
        contents = [f"writer {i}".encode() for i in range(8)]
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda data: place.create("a/race.json", data), contents))
        assert won.count(True) == 1
        assert self.raw(place, "a/race.json") == contents[won.index(True)]

    def test_listings_show_names_and_sizes_in_order_and_no_partials(self, place: Place) -> None:
        """By any beginning of a name."""
        names = ["b/c/shard-00001.json", "b/c/manifest-000001.json", "b/c/shard-00000.json", "b.json", "b/other.json"]
        for name in names:
            place.create(name, name.encode())
        self._partial(place, "b/c/shard-00009.arrow", b"unfinished")
        assert [(entry.name, entry.size) for entry in place.list()] == [(name, len(name)) for name in sorted(names)]
        assert [entry.name for entry in place.list("b/c/shard-")] == ["b/c/shard-00000.json", "b/c/shard-00001.json"]
        assert [entry.name for entry in place.list("b/c/")] == sorted(n for n in names if n.startswith("b/c/"))
        assert list(place.list("nowhere/")) == []
        assert list(place.folders()) == ["b"]
        assert list(place.folders("b/")) == ["c"]
        assert list(place.folders("nowhere/")) == []

    def test_partials_are_listed_for_whoever_tidies_up(self, place: Place) -> None:
        """By the name they were to get."""
        mine = self._partial(place, "b/c/shard-00009.arrow", b"unfinished")
        assert mine in list(place.partials())
        assert mine in list(place.partials("b/c/"))
        assert mine not in list(place.partials("other/"))

    def test_what_is_deleted_or_never_was_is_absent(self, place: Place) -> None:
        """Deleting twice is fine."""
        place.create("a/x.json", b"x")
        place.delete("a/x.json")
        place.delete("a/x.json")
        assert place.size("a/x.json") is None
        with pytest.raises(FileNotFoundError):
            place.read("a/x.json")
        assert place.create("a/x.json", b"again")

    @pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", "a//b", ".hidden", "a/.x", "a\\b", "a/"])
    def test_no_name_leads_out_of_the_store(self, place: Place, name: str) -> None:
        """Whoever asks."""
        with pytest.raises(UsageError):
            place.read(name)
        with pytest.raises(UsageError):
            place.create(name, b"x")

    def test_it_pickles_as_its_address(self, place: Place) -> None:
        """And opens the same files elsewhere."""
        place.create("a/x.json", b"x")
        again = pickle.loads(pickle.dumps(place))
        assert again.url == place.url
        assert again.read("a/x.json") == b"x"

    def test_where_files_can_be_mapped_or_read_it_says_where(self, place: Place) -> None:
        """And nowhere else."""
        place.create("a/x.json", b"x")
        path = place.local("a/x.json")
        assert (path is not None) == (place.can.mappable or place.can.readable)
        assert path is None or path.read_bytes() == b"x"

    @staticmethod
    def _partial(place: Place, name: str, data: bytes) -> Path:
        path = place.partial(name)
        path.write_bytes(data)
        return path
