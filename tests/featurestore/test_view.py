"""Reading: slices, batches, selections, other processes, bounded maps."""

import multiprocessing
import pickle
import threading

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brainenc.errors import CorruptData, Incomplete, MissingRow, UnknownName, UsageError
from brainenc.featurestore import open_store, sources
from tests.featurestore.making import KEY, fill, ids, make_collection, make_view, sum_of_rows, values


@pytest.fixture(scope="module")
def viewed(tmp_path_factory):
    return make_view(tmp_path_factory.mktemp("store"), 103, row_shape=(7, 16), rows_per_shard=10)


class TestSlices:
    def test_within_a_shard_nothing_is_copied(self, viewed):
        view, rows = viewed
        got = view[12:18]
        np.testing.assert_array_equal(got, rows[12:18])
        assert np.shares_memory(got, view[13])
        assert not got.flags.writeable
        assert view[12].shape == (7, 16)

    @given(start=st.integers(-110, 110), stop=st.integers(-110, 110), step=st.sampled_from([None, 1, 2, -1, 7]))
    def test_every_slice_is_numpys(self, viewed, start, stop, step):
        view, rows = viewed
        np.testing.assert_array_equal(view[start:stop:step], rows[start:stop:step])

    def test_inner_indices_take_only_their_part(self, viewed):
        view, rows = viewed
        np.testing.assert_array_equal(view[:, 0], rows[:, 0])
        np.testing.assert_array_equal(view[5, 2:4], rows[5, 2:4])
        np.testing.assert_array_equal(view[8:22, 1, ::2], rows[8:22, 1, ::2])
        assert view[3:3, 0].shape == (0, 16)

    def test_numpy_and_iteration(self, viewed):
        view, rows = viewed
        np.testing.assert_array_equal(np.asarray(view), rows)
        np.testing.assert_array_equal(np.stack(list(view)), rows)
        assert np.asarray(view, dtype=np.float32).dtype == np.float32
        assert len(view) == 103
        assert view.shape == (103, 7, 16)
        assert view.nbytes == 103 * 7 * 16 * 2


class TestGather:
    @given(indices=st.lists(st.integers(-103, 102), max_size=60), threads=st.integers(1, 4))
    def test_any_rows_in_any_order(self, viewed, indices, threads):
        view, rows = viewed
        want = rows[indices] if indices else rows[:0]
        np.testing.assert_array_equal(view.gather(indices, threads=threads), want)
        np.testing.assert_array_equal(view.verified().gather(indices), want)

    def test_long_rows_go_by_plain_reads_and_short_ones_by_maps_alike(self, tmp_path):
        view, rows = make_view(tmp_path, 9, row_shape=(40000,), rows_per_shard=4)
        order = [8, 0, 0, 1, 2, 3, 4, 7, -1]
        np.testing.assert_array_equal(view.gather(order, threads=3), rows[order])
        assert not view._source._maps

    def test_into_the_callers_buffer(self, viewed):
        view, rows = viewed
        out = np.empty((3, 7, 16), np.float16)
        assert view.gather([1, 2, 50], out=out) is out
        np.testing.assert_array_equal(out, rows[[1, 2, 50]])
        tensor = torch.empty(3, 7, 16, dtype=torch.float16)
        assert view.gather([1, 2, 50], out=tensor) is tensor
        np.testing.assert_array_equal(tensor.numpy(), out)

    def test_bfloat16_into_numpy_and_torch(self, tmp_path):
        view, rows = make_view(tmp_path, dtype="bfloat16")
        assert view.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(view.gather([3, 4]).astype(np.float32), rows[[3, 4]])
        tensor = torch.empty(2, 4, 6, dtype=torch.bfloat16)
        view.gather([3, 4], out=tensor)
        np.testing.assert_array_equal(tensor.float().numpy(), rows[[3, 4]])

    @pytest.mark.parametrize(
        "out",
        [np.empty((2, 7, 16), np.float16), np.empty((3, 7, 16), np.float32),
         np.empty((3, 16, 7), np.float16).swapaxes(1, 2),
         torch.empty(3, 7, 16), torch.empty(3, 7, 16, dtype=torch.float16, device="meta")],
        ids=["rows", "dtype", "order", "torch", "device"],
    )  # fmt: skip
    def test_a_buffer_that_does_not_fit_is_refused(self, viewed, out):
        with pytest.raises(UsageError, match="`out`"):
            viewed[0].gather([1, 2, 3], out=out)

    def test_a_mask_chooses_rows(self, viewed):
        view, rows = viewed
        mask = np.arange(103) % 3 == 0
        np.testing.assert_array_equal(view[mask], rows[mask])
        with pytest.raises(IndexError, match="mask"):
            view[mask[:50]]

    @pytest.mark.parametrize("bad", [[103], [-104], [1.5], [[1]], 103])
    def test_a_row_that_is_not_there_is_an_index_error(self, viewed, bad):
        with pytest.raises(IndexError):
            viewed[0][bad]

    def test_prefetching_changes_nothing(self, viewed):
        view, rows = viewed
        order = np.random.default_rng(0).permutation(103)
        view.prefetch(order)
        np.testing.assert_array_equal(view.gather(order), rows[order])
        checked = view.verified()
        checked.prefetch(order)
        np.testing.assert_array_equal(checked.gather(order), rows[order])


class TestSelect:
    def test_by_id_and_by_row_and_again(self, viewed):
        view, rows = viewed
        chosen = view.select(ids=["nsd-00090", "nsd-00003", "nsd-00011"])
        np.testing.assert_array_equal(chosen[:], rows[[90, 3, 11]])
        assert chosen.ids == ["nsd-00090", "nsd-00003", "nsd-00011"]
        np.testing.assert_array_equal(chosen.select(rows=[-1, 0])[:], rows[[11, 90]])
        np.testing.assert_array_equal(chosen.select(ids=["nsd-00003"])[0], rows[3])
        assert chosen.shape == (3, 7, 16)

    def test_an_unknown_id_is_named(self, viewed):
        with pytest.raises(UnknownName, match="nsd-99999"):
            viewed[0].select(ids=["nsd-00001", "nsd-99999"])
        with pytest.raises(UnknownName, match="nsd-00001"):
            viewed[0].select(rows=[5]).select(ids=["nsd-00001"])

    def test_ids_or_rows(self, viewed):
        with pytest.raises(UsageError):
            viewed[0].select()


class TestWhatIsNotThere:
    def test_a_row_left_out_is_named_and_masked(self, tmp_path):
        collection, rows = make_collection(tmp_path), values(23)
        fill(collection, rows, shards=[0, 2, 3, 4])
        with collection.shard_writer(1) as writer:
            writer.append(rows[5:10], missing=[2])
            writer.seal()
        collection.commit()
        view = collection.view()
        assert np.flatnonzero(~view.present).tolist() == [7]
        for read in (lambda: view[7], lambda: view[5:9], lambda: view.gather([1, 7]), lambda: np.asarray(view)):
            with pytest.raises(MissingRow, match="nsd-00007"):
                read()
        np.testing.assert_array_equal(view[view.present], rows[np.arange(23) != 7])

    def test_a_row_not_extracted_yet_is_another_matter(self, tmp_path):
        collection, rows = make_collection(tmp_path), values(23)
        fill(collection, rows, shards=[0, 3])
        collection.commit()
        view = collection.view()
        assert view.shape == (23, 4, 6)
        assert view.present.sum() == 10
        with pytest.raises(Incomplete, match="10 of 23 rows"):
            view[7]

    def test_a_view_shows_its_commit_and_a_new_one_the_next(self, tmp_path):
        collection, rows = make_collection(tmp_path), values(23)
        fill(collection, rows, shards=[0])
        collection.commit()
        old = open_store(tmp_path)[KEY]
        fill(collection, rows, shards=[1])
        collection.commit()
        assert old.present.sum() == pickle.loads(pickle.dumps(old)).present.sum() == 5
        assert open_store(tmp_path)[KEY].present.sum() == 10

    def test_a_shard_that_is_gone_or_cut_is_said_with_the_way_out(self, tmp_path):
        view, _ = make_view(tmp_path, row_shape=(30000,))
        (tmp_path / KEY / "shard-00001.arrow").unlink()
        path = tmp_path / KEY / "shard-00002.arrow"
        path.write_bytes(path.read_bytes()[:100000])
        for rows in ([6], [13]):
            with pytest.raises(CorruptData, match="store repair"):
                view.gather(rows)
        with pytest.raises(CorruptData, match="was cut"):
            view[13]

    def test_a_flipped_bit_is_seen_by_verified_reads(self, tmp_path):
        view, rows = make_view(tmp_path)
        path = tmp_path / KEY / "shard-00001.arrow"
        raw = bytearray(path.read_bytes())
        raw[700] ^= 4
        path.write_bytes(raw)
        with pytest.raises(CorruptData, match=r"shard-00001.*do not match"):
            view.verified().gather([6])
        np.testing.assert_array_equal(view.verified()[0:5], rows[0:5])


class TestProcesses:
    def test_it_pickles_as_an_address(self, viewed):
        view, rows = viewed
        for one, want in ((view, rows), (view.select(rows=[4, 2]), rows[[4, 2]]), (view.verified(), rows)):
            data = pickle.dumps(one)
            assert len(data) < 2000
            np.testing.assert_array_equal(pickle.loads(data)[:], want)

    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
    @pytest.mark.parametrize("method", ["fork", "spawn"])
    def test_it_is_safe_in_children_while_the_parent_reads(self, viewed, method):
        """Forked with its locks held and its threads running, or pickled to a fresh interpreter."""
        view, _ = viewed
        stop = threading.Event()

        def keep_reading():
            while not stop.is_set():
                view.gather([1, 50, 99], threads=2)
                view.release()

        thread = threading.Thread(target=keep_reading)
        thread.start()
        try:
            context = multiprocessing.get_context(method)
            results = context.SimpleQueue()
            children = [
                context.Process(target=sum_of_rows, args=(view, results)) for _ in range(3 if method == "fork" else 1)
            ]
            for child in children:
                child.start()
            sums = [results.get() for _ in children]
            for child in children:
                child.join(30)
        finally:
            stop.set()
            thread.join()

        assert {child.exitcode for child in children} == {0}
        assert set(sums) == {float(view[:].astype(np.float64).sum())}

    def test_threads_share_a_view(self, viewed):
        view, rows = viewed
        failures = []

        def read(seed):
            rng = np.random.default_rng(seed)
            for _ in range(30):
                order = rng.integers(0, 103, 20)
                if not np.array_equal(view.gather(order, threads=2), rows[order]):
                    failures.append(seed)
                view.prefetch(order)
                if seed == 0:
                    view.release()

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures


class TestMaps:
    def test_maps_stay_within_their_budget(self, tmp_path, monkeypatch):
        view, rows = make_view(tmp_path, 60, row_shape=(1024,), rows_per_shard=2)
        size = view._manifest.shards[0].bytes
        monkeypatch.setattr(sources, "MAP_BUDGET", 3 * size)
        kept = view[0:2]
        for _ in range(2):
            for row in range(60):
                np.testing.assert_array_equal(view[row], rows[row])
                assert view._source._mapped <= 3 * size
                assert _mapped_bytes(tmp_path) <= 4 * (size + 4096)
        np.testing.assert_array_equal(kept, rows[0:2])

    def test_release_gives_everything_back_and_reading_goes_on(self, tmp_path):
        view, rows = make_view(tmp_path)
        kept = view[3]
        view.gather([1, 7])
        view.release()
        np.testing.assert_array_equal(kept, rows[3])
        del kept
        assert _mapped_bytes(tmp_path) == 0
        np.testing.assert_array_equal(view[:], rows)

    def test_files_stay_few(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sources, "_OPEN_FILES", 4)
        view, rows = make_view(tmp_path, 60, row_shape=(20000,), rows_per_shard=2)
        np.testing.assert_array_equal(view.gather(np.arange(60), threads=3), rows)
        assert len(view._source._files) <= 4


def _mapped_bytes(folder):
    total = 0
    with open("/proc/self/maps") as maps:
        for line in maps:
            if str(folder) in line:
                start, end = (int(part, 16) for part in line.split()[0].split("-"))
                total += end - start
    return total


@settings(max_examples=20)
@given(n=st.integers(1, 30), per_shard=st.integers(1, 10), data=st.data())
def test_a_store_of_everything_serves_every_subject(tmp_path_factory, n, per_shard, data):
    """One set of all stimuli; each subject's view is by id."""
    view, rows = make_view(tmp_path_factory.mktemp("nsd"), n, rows_per_shard=per_shard, key="nsd/b/1.q")
    chosen = data.draw(st.lists(st.sampled_from(range(n)), min_size=1, max_size=20))
    subject = view.select(ids=[ids(n)[row] for row in chosen])
    np.testing.assert_array_equal(subject[:], rows[chosen])
