"""Writing and sealing shards, receipts, commits; many writers at once."""

import itertools
import multiprocessing
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brainenc.errors import CorruptData, ShardSealed, StoreError, UsageError, ValueNotStorable
from brainenc.featurestore import commit, open_store
from brainenc.featurestore.collection import Collection
from brainenc.featurestore.dtypes import logical_dtype, to_storage
from brainenc.featurestore.places.local import LocalPlace
from brainenc.featurestore.recovery import verify
from brainenc.featurestore.schema import Manifest
from tests.featurestore.making import KEY, fill, make_collection, tree, values


def shard_files(folder, key=KEY):
    return sorted(p.name for p in (folder / key).iterdir() if p.name.startswith((".", "shard")))


class TestShardWriter:
    def test_nothing_is_seen_before_the_seal_and_nothing_is_left_after_an_abort(self, tmp_path):
        collection = make_collection(tmp_path)
        with collection.shard_writer(0) as writer:
            writer.append(values(3))
            assert writer.written == 3
            assert not list((tmp_path / KEY).glob("shard-*"))
        assert shard_files(tmp_path) == []
        assert collection.sealed() == frozenset()

    def test_a_sealed_shard_is_never_written_again(self, tmp_path):
        collection = make_collection(tmp_path)
        fill(collection, values(23), shards=[2])
        before = tree(tmp_path)
        with pytest.raises(ShardSealed, match="shard 2"):
            collection.shard_writer(2)
        assert tree(tmp_path) == before

    def test_the_receipt_describes_the_file(self, tmp_path):
        collection, rows = make_collection(tmp_path, row_shape=(600, 100), rows_per_shard=20), values(23, (600, 100))
        fill(collection, rows, environment={"torch": "2.9", "device": "cpu"})
        path = tmp_path / KEY / "shard-00001.arrow"
        receipt = collection.receipt(1)
        assert (receipt.shard, receipt.rows, receipt.bytes) == (1, 3, path.stat().st_size)
        assert receipt.data_offset % 64 == 0
        assert receipt.note.block_rows == -(-(1 << 20) // 120000)
        assert len(receipt.blocks) == 1
        assert len(collection.receipt(0).blocks) == 3
        assert receipt.environment == {"torch": "2.9", "device": "cpu"}
        assert receipt.content_hashes == ("14", "15", "16")
        found = np.fromfile(path, "<f2", 3 * 60000, offset=receipt.data_offset).reshape(3, 600, 100)
        np.testing.assert_array_equal(found, rows[20:])

    def test_the_checksum_of_the_whole_is_what_others_compute(self, tmp_path):
        import xxhash

        collection = make_collection(tmp_path)
        fill(collection, values(23))
        raw = (tmp_path / KEY / "shard-00000.arrow").read_bytes()
        assert collection.receipt(0).checksum == xxhash.xxh3_128_hexdigest(raw)

    def test_rows_left_out_on_purpose_are_zero_and_recorded(self, tmp_path):
        collection, rows = make_collection(tmp_path), values(23)
        rows[6] = np.inf
        with collection.shard_writer(1) as writer:
            writer.append(rows[5:9], missing=[1])
            writer.append(rows[9:10])
            receipt = writer.seal()
        assert receipt.missing == (6,)
        assert collection.commit().shards[0].missing == (6,)
        assert np.isinf(rows[6]).all()

    @pytest.mark.parametrize(
        ("rows", "missing", "said"),
        [(values(6), (), "6 came"), (values(2, (4, 5)), (), r"\(4, 6\) are wanted"), (values(24)[0], (), "are wanted"),
         (values(2), (2,), "within a batch of 2")],
    )  # fmt: skip
    def test_wrong_rows_are_refused(self, tmp_path, rows, missing, said):
        with make_collection(tmp_path).shard_writer(0) as writer, pytest.raises(UsageError, match=said):
            writer.append(rows, missing=missing)

    def test_a_shard_with_rows_lacking_cannot_be_sealed(self, tmp_path):
        with make_collection(tmp_path).shard_writer(0) as writer:
            writer.append(values(4))
            with pytest.raises(StoreError, match="4 of 5 rows"):
                writer.seal()

    def test_a_closed_writer_takes_nothing(self, tmp_path):
        writer = make_collection(tmp_path).shard_writer(0)
        writer.abort()
        writer.abort()
        with pytest.raises(UsageError, match="closed"):
            writer.append(values(1))

    def test_there_is_no_shard_beyond_the_last(self, tmp_path):
        with pytest.raises(UsageError, match=r"no shard 5.*5 shards"):
            make_collection(tmp_path).shard_writer(5)

    def test_space_is_claimed_before_the_first_row(self, tmp_path):
        """A disk that fills up is found before the work, and a hole is never left to be filled."""
        collection = make_collection(tmp_path, row_shape=(1000,))
        with collection.shard_writer(0):
            (partial,) = (tmp_path / KEY).glob(".*.partial")
            assert partial.stat().st_blocks * 512 >= 5 * 2000

    @settings(max_examples=30)
    @given(
        n=st.integers(1, 40), per_shard=st.integers(1, 12), dtype=st.sampled_from(["float16", "float32", "bfloat16"]),
        row_shape=st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
        form=st.sampled_from(["arrow", "npy"]), sizes=st.lists(st.integers(1, 9), min_size=1), seed=st.integers(0, 99),
    )  # fmt: skip
    def test_whatever_the_batches_shapes_and_dtypes_rows_come_back(
        self, tmp_path_factory, n, per_shard, dtype, row_shape, form, sizes, seed
    ):
        collection = make_collection(tmp_path_factory.mktemp("store"), n, row_shape=row_shape, dtype=dtype,
                                     rows_per_shard=per_shard, format=form)  # fmt: skip
        rows = values(n, row_shape, seed)
        for shard in range(collection.n_shards):
            mine, step = rows[collection.rows(shard).start : collection.rows(shard).stop], itertools.cycle(sizes)
            with collection.shard_writer(shard) as writer:
                while writer.written < len(mine):
                    writer.append(mine[writer.written : writer.written + next(step)])
                receipt = writer.seal()
            assert receipt == collection.inspect(shard) == collection.receipt(shard)
        collection.commit()
        view = collection.view()
        assert view.dtype == logical_dtype(dtype)
        np.testing.assert_array_equal(view[:].astype(np.float32), rows)


class TestValues:
    @pytest.mark.parametrize(
        ("dtype", "limit"), [("float16", 65504.0), ("float32", 3.4028234e38), ("bfloat16", 3.38e38)]
    )
    def test_the_largest_value_is_stored_and_the_next_refused(self, dtype, limit):
        rows = np.full((2, 3), limit)
        assert np.isfinite(to_storage(rows, dtype).view(logical_dtype(dtype)).astype(np.float64)).all()
        rows[1, 2] = -limit * 1.01
        with pytest.raises(ValueNotStorable, match=f"row 1 holds -.*{dtype}"):
            to_storage(rows, dtype)

    @pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
    def test_an_infinity_is_refused_in_every_dtype_and_nan_is_kept(self, dtype):
        rows = np.zeros((3, 500000), np.float32)
        rows[0, 7] = np.nan
        assert np.isnan(to_storage(rows, dtype).view(logical_dtype(dtype))[0, 7].astype(np.float32))
        rows[2, -1] = -np.inf
        with pytest.raises(ValueNotStorable, match=r"row 2 holds -inf.*overflowed"):
            to_storage(rows, dtype)

    @pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
    @pytest.mark.parametrize("shape", [(3, 700000), (40, 200, 300)])
    def test_large_batches_are_converted_alike(self, dtype, shape):
        """In parallel, and of any memory order."""
        rows = np.random.default_rng(0).normal(size=shape)
        want = rows.astype(logical_dtype(dtype))
        for batch in (rows, np.asfortranarray(rows), rows[::-1][::-1]):
            got = to_storage(batch, dtype)
            assert got.flags.c_contiguous
            np.testing.assert_array_equal(got.view(logical_dtype(dtype)), want)
        rows[-1].flat[-1] = 1e300
        with pytest.raises(ValueNotStorable, match=f"row {shape[0] - 1} holds 1e"):
            to_storage(rows, dtype)

    def test_what_has_the_dtype_already_is_not_copied(self):
        rows = np.ones((2, 3), np.float16)
        assert np.shares_memory(to_storage(rows, "float16"), rows)


class TestAdoption:
    def test_a_whole_shard_without_a_receipt_gets_the_same_one_again(self, tmp_path):
        collection = make_collection(tmp_path)
        fill(collection, values(23))
        before = tree(tmp_path)
        (tmp_path / KEY / "shard-00003.json").unlink()
        assert collection.sealed() == frozenset(range(5))
        assert tree(tmp_path) == before

    def test_one_that_does_not_verify_is_removed(self, tmp_path):
        collection = make_collection(tmp_path)
        fill(collection, values(23), shards=[3])
        path = tmp_path / KEY / "shard-00003.arrow"
        raw = bytearray(path.read_bytes())
        raw[-400] ^= 1
        path.write_bytes(raw)
        path.with_suffix(".json").unlink()
        assert collection.sealed() == frozenset()
        assert shard_files(tmp_path) == []

    @pytest.mark.parametrize("other", [{"identity": {"weights": "other"}}, {"n": 22}])
    def test_one_of_another_collection_is_not_taken(self, tmp_path, other):
        mine, theirs = make_collection(tmp_path / "a"), make_collection(tmp_path / "b", **other)
        fill(theirs, values(23), shards=[1])
        source = tmp_path / "b" / KEY / "shard-00001.arrow"
        source.rename(tmp_path / "a" / KEY / "shard-00001.arrow")
        assert mine.sealed() == frozenset()

    def test_one_under_another_number_is_not_taken(self, tmp_path):
        collection = make_collection(tmp_path)
        fill(collection, values(23), shards=[1])
        (tmp_path / KEY / "shard-00001.arrow").rename(tmp_path / KEY / "shard-00002.arrow")
        with pytest.raises(CorruptData, match="is not shard 2 of this collection, but shard 1 of this one"):
            collection.inspect(2)


class TestCommit:
    def test_a_broken_receipt_is_made_again_from_its_shard(self, tmp_path):
        collection = make_collection(tmp_path)
        fill(collection, values(23))
        before = tree(tmp_path)
        path = tmp_path / KEY / "shard-00002.json"
        path.write_bytes(path.read_bytes()[:-30])
        assert len(collection.commit().shards) == 5
        assert before.items() <= tree(tmp_path).items()

    def test_a_broken_receipt_of_a_broken_shard_is_not_committed(self, tmp_path):
        collection = make_collection(tmp_path)
        fill(collection, values(23))
        for suffix in ("json", "arrow"):
            path = tmp_path / KEY / f"shard-00002.{suffix}"
            path.write_bytes(path.read_bytes()[:-30])
        assert [entry.shard for entry in collection.commit().shards] == [0, 1, 3, 4]
        assert collection.sealed() == {0, 1, 3, 4}

    def test_commits_are_numbered_and_nothing_new_is_no_commit(self, tmp_path):
        collection, rows = make_collection(tmp_path), values(23)
        fill(collection, rows, shards=[4])
        first = collection.commit()
        collection.commit()
        fill(collection, rows, shards=[0])
        second = collection.commit()
        assert [entry.shard for entry in first.shards] == [4]
        assert [entry.shard for entry in second.shards] == [0, 4]
        assert commit.numbers(collection.place, KEY) == [1, 2, 3]

    def test_the_transaction_follows_from_the_content(self, tmp_path):
        ids = []
        for name, order in (("a", [0, 1, 2, 3, 4]), ("b", [3, 0, 4, 2, 1])):
            collection = make_collection(tmp_path / name)
            for shard in order:
                fill(collection, values(23), shards=[shard])
                manifest = collection.commit()
            ids.append(manifest.transaction)
        assert ids[0] == ids[1]

    def test_a_torn_manifest_is_passed_over_and_its_number_not_used_again(self, tmp_path):
        collection, rows = make_collection(tmp_path), values(23)
        fill(collection, rows, shards=[0])
        collection.commit()
        (tmp_path / KEY / "manifest-000003.json").write_bytes(b'{"kind":"manifest","version":1')
        assert [entry.shard for entry in collection.manifest().shards] == [0]
        fill(collection, rows, shards=[1])
        collection.commit()
        assert commit.latest(collection.place, KEY).number == 4

    def test_only_torn_manifests_are_an_error(self, tmp_path):
        make_collection(tmp_path)
        (tmp_path / KEY / "manifest-000001.json").write_bytes(b"")
        with pytest.raises(CorruptData, match="manifest-000001"):
            open_store(tmp_path).collection(KEY)

    def test_drivers_at_once_lose_nothing(self, tmp_path):
        collection, rows = make_collection(tmp_path, n=24, rows_per_shard=1), values(24)

        def drive(part):
            mine = pickle.loads(pickle.dumps(collection))
            for shard in part:
                fill(mine, rows, shards=[shard])
                mine.commit()

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(drive, np.array_split(np.arange(24), 4)))
        assert [entry.shard for entry in collection.manifest().shards] == list(range(24))
        numbers = commit.numbers(collection.place, KEY)
        assert numbers == list(range(1, len(numbers) + 1))

    def test_a_commit_that_comes_in_between_is_built_upon(self, tmp_path):
        """Another driver commits after the current manifest was read, and before the next one is written."""
        collection, rows = make_collection(tmp_path), values(23)
        fill(collection, rows, shards=[0])
        others = []

        def change(manifest):
            if not others:
                fill(collection, rows, shards=[4])
                others.append(collection.commit())
            (entry,) = [one for one in others[0].shards if one.shard == 0]
            shards = {one.shard: one for one in (*manifest.shards, entry)}
            return replace(manifest, shards=tuple(shards[n] for n in sorted(shards)))

        commit.advance(collection.place, KEY, change)

        assert [entry.shard for entry in collection.manifest().shards] == [0, 4]

    @pytest.mark.parametrize("claimed_fresh", [True, False])
    def test_a_stale_listing_costs_one_try_and_not_all(self, tmp_path, monkeypatch, claimed_fresh):
        """As a network file system shows it for up to a minute, to drivers on several machines."""
        collection, rows = make_collection(tmp_path), values(23)
        for shard in range(2):
            fill(collection, rows, shards=[shard])
            collection.commit()
        fill(collection, rows, shards=[2])
        place = Stale(tmp_path)
        place.can = replace(LocalPlace.can, fresh_listing=claimed_fresh)
        monkeypatch.setattr(commit, "_TRIES", 2)
        Collection(place, KEY, collection.spec).commit()
        current = commit.latest(collection.place, KEY)
        assert current.number == 4
        assert [entry.shard for entry in current.manifest.shards] == [0, 1, 2]

    def test_a_manifest_that_was_removed_since_it_was_listed_is_passed_over(self, tmp_path, monkeypatch):
        collection = make_collection(tmp_path)
        monkeypatch.setattr(commit, "_listed", lambda place, key: [1, 2])
        assert commit.latest(collection.place, KEY).number == 1


class Stale(LocalPlace):
    """Lists no manifest but the first."""

    def list(self, prefix=""):
        return (entry for entry in super().list(prefix) if "manifest-" not in entry.name or "000001" in entry.name)


def _write_everything(folder, n, per_shard, order, results):
    collection = make_collection(folder, n, rows_per_shard=per_shard)
    rows, lost = values(n), 0
    for shard in order:
        try:
            fill(collection, rows, shards=[shard])
        except ShardSealed:
            lost += 1
    collection.commit()
    results.put(lost)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("writers", [2, 16])
def test_writers_given_all_the_work_end_with_each_row_once(tmp_path, writers):
    """In processes of their own, all writing every shard, in different orders."""
    n, per_shard = 48, 6
    alone = make_collection(tmp_path / "alone", n, rows_per_shard=per_shard)
    fill(alone, values(n))
    alone.commit()
    context = multiprocessing.get_context("fork")
    results, rng = context.SimpleQueue(), np.random.default_rng(0)
    orders = [rng.permutation(8).tolist() for _ in range(writers)]
    processes = [
        context.Process(target=_write_everything, args=(tmp_path / "many", n, per_shard, order, results))
        for order in orders
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)

    assert [process.exitcode for process in processes] == [0] * writers
    many = {name: data for name, data in tree(tmp_path / "many").items() if "manifest" not in name}
    assert many == {name: data for name, data in tree(tmp_path / "alone").items() if "manifest" not in name}
    ideal = sum(entry.bytes for entry in alone.manifest().shards)
    shards = sum(len(data) for name, data in many.items() if name.endswith(".arrow") and "shard" in name)
    assert shards <= 1.01 * ideal
    assert open_store(tmp_path / "many").collection(KEY).manifest() == alone.manifest()


def test_of_two_writers_of_one_shard_the_first_to_publish_wins(tmp_path):
    """And the loser is told the winner's receipt, with no copy left behind."""
    collection, rows = make_collection(tmp_path), values(23)
    first = collection.shard_writer(0, environment={"who": "first"})
    second = collection.shard_writer(0, environment={"who": "second"})
    for writer in (first, second):
        writer.append(rows[:5])
    won, lost = second.seal(), first.seal()
    assert won == lost
    assert won.environment == {"who": "second"}
    assert shard_files(tmp_path) == ["shard-00000.arrow", "shard-00000.json"]


def test_a_shard_that_was_published_without_receipt_beside_a_writer_is_adopted_by_it(tmp_path):
    collection, rows = make_collection(tmp_path), values(23)
    late = collection.shard_writer(0, environment={"who": "late"})
    late.append(rows[:5])
    fill(collection, rows, shards=[0], environment={"who": "early"})
    os.unlink(tmp_path / KEY / "shard-00000.json")
    assert late.seal().environment == {"who": "early"}


def test_a_broken_shard_in_the_way_is_replaced(tmp_path):
    collection, rows = make_collection(tmp_path), values(23)
    writer = collection.shard_writer(0)
    writer.append(rows[:5])
    (tmp_path / KEY / "shard-00000.arrow").write_bytes(b"half a shard")
    receipt = writer.seal()
    assert collection.inspect(0) == receipt


def test_a_collection_pickles_as_its_address(tmp_path):
    collection = make_collection(tmp_path)
    again = pickle.loads(pickle.dumps(collection))
    fill(again, values(23))
    assert collection.sealed() == frozenset(range(5))


class TestStrangeReceipts:
    """Whole in themselves, but of another shard or another collection."""

    @pytest.fixture(params=["another shard's", "another collection's"])
    def swapped(self, tmp_path, request):
        """A sealed, uncommitted collection with a wrong receipt in place of shard 1's."""
        collection = make_collection(tmp_path / "store")
        fill(collection, values(23))
        other = make_collection(tmp_path / "other", identity={"layer": 7})
        fill(other, values(23, seed=3))
        folder, shard = ("store", 2) if request.param == "another shard's" else ("other", 1)
        wrong = (tmp_path / folder / KEY / f"shard-{shard:05d}.json").read_bytes()
        (tmp_path / "store" / KEY / "shard-00001.json").write_bytes(wrong)
        return collection

    def test_are_not_read(self, swapped):
        with pytest.raises(CorruptData, match=r"shard-00001\.json is not shard 1 of this collection"):
            swapped.receipt(1)

    def test_are_made_again_from_their_shards_before_a_commit(self, swapped):
        manifest = swapped.commit()
        assert [entry.shard for entry in manifest.shards] == [0, 1, 2, 3, 4]
        assert swapped.receipt(1) == swapped.inspect(1)
        np.testing.assert_array_equal(swapped.view()[:], values(23))

    def test_are_not_committed_without_a_shard(self, swapped):
        os.unlink(swapped.place.root / KEY / "shard-00001.arrow")
        assert [entry.shard for entry in swapped.commit().shards] == [0, 2, 3, 4]
        assert swapped.sealed() == {0, 2, 3, 4}

    def test_give_way_to_the_writer_of_the_shard(self, swapped):
        (swapped.place.root / KEY / "shard-00001.arrow").unlink()
        wrong = (swapped.place.root / KEY / "shard-00001.json").read_bytes()
        (swapped.place.root / KEY / "shard-00001.json").unlink()
        with swapped.shard_writer(1) as writer:
            (swapped.place.root / KEY / "shard-00001.json").write_bytes(wrong)
            writer.append(values(23)[5:10])
            assert writer.seal() == swapped.inspect(1) == swapped.receipt(1)


@pytest.mark.parametrize("change", [
    lambda entries: [*entries, entries[-1]],
    lambda entries: entries[::-1],
    lambda entries: [*entries, replace(entries[-1], shard=5)],
    lambda entries: [replace(entries[0], rows=4), *entries[1:]],
    lambda entries: [replace(entries[0], missing=(5,)), *entries[1:]],
    lambda entries: [replace(entries[0], data_offset=-64), *entries[1:]],
    lambda entries: [replace(entries[0], data_offset=10**9), *entries[1:]],
], ids=["twice", "out of order", "out of range", "rows", "missing", "negative offset", "offset"])  # fmt: skip
def test_a_manifest_whose_shards_cannot_be_is_corrupt(tmp_path, change):
    collection = make_collection(tmp_path)
    fill(collection, values(23))
    good = collection.commit()
    bad = Manifest(spec=good.spec, shards=tuple(change(list(good.shards))))
    with pytest.raises(CorruptData, match="where"):
        Manifest.from_bytes(bad.to_bytes(), "where")


def test_a_receipt_under_an_odd_name_counts_for_nothing(tmp_path):
    collection = make_collection(tmp_path)
    fill(collection, values(23), shards=[0])
    os.rename(tmp_path / KEY / "shard-00000.json", tmp_path / KEY / "shard-000000.json")
    assert collection.found() == (frozenset(), frozenset({0}))


class TestGoingOn:
    """What a resumed run believes: receipts that can be read and go with the file beside them."""

    @pytest.fixture(params=["committed", "uncommitted"])
    def collection(self, tmp_path, request):
        collection = make_collection(tmp_path / "store")
        fill(collection, values(23))
        if request.param == "committed":
            collection.commit()
        return collection

    @staticmethod
    def damage(collection, how):
        folder = collection.place.root / KEY
        receipt, shard = folder / "shard-00002.json", folder / "shard-00002.arrow"
        if how == "torn receipt":
            receipt.write_bytes(receipt.read_bytes()[:-30])
        elif how == "empty receipt":
            receipt.write_bytes(b"")
        elif how == "another shard's receipt":
            receipt.write_bytes((folder / "shard-00001.json").read_bytes())
        elif how == "shard cut short":
            shard.write_bytes(shard.read_bytes()[:-30])
        elif how == "shard gone":
            shard.unlink()
        else:
            receipt.write_bytes(b"{}")
            shard.write_bytes(shard.read_bytes()[:-30])

    @pytest.mark.parametrize("how", ["torn receipt", "empty receipt", "another shard's receipt"])
    def test_a_bad_receipt_of_a_whole_shard_is_made_again(self, collection, how):
        before = tree(collection.place.root)
        self.damage(collection, how)
        assert collection.sealed() == frozenset(range(5))
        assert tree(collection.place.root) == before

    @pytest.mark.parametrize("how", ["shard cut short", "shard gone", "both broken"])
    def test_a_receipt_without_its_shard_counts_for_nothing(self, collection, how):
        self.damage(collection, how)
        assert collection.sealed() == {0, 1, 3, 4}
        assert "shard-00002" not in " ".join(tree(collection.place.root))
        fill(collection, values(23), shards=[2], environment={"torch": "3"})
        collection.commit()
        assert verify(open_store(collection.place.root)).whole
        np.testing.assert_array_equal(collection.view()[:], values(23))

    def test_no_rows_of_the_others_are_read(self, collection, monkeypatch):
        read, real = [], Collection.inspect
        monkeypatch.setattr(Collection, "inspect", lambda self, n, **how: (read.append(n), real(self, n, **how))[1])
        self.damage(collection, "torn receipt")
        collection.sealed()
        assert read == [2]
