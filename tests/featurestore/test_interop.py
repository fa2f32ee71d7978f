"""Features in and out of plain NumPy files, torch and Ray."""

import pickle

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from brainenc.errors import (
    DataError,
    KeyNotFound,
    MissingRow,
    NoSpace,
    ProvenanceMismatch,
    UsageError,
    ValueNotStorable,
)
from brainenc.featurestore import Stimulus, StimulusSet, open_store
from brainenc.featurestore.exports import adeli_note, export_adeli, export_folder, export_npy
from brainenc.featurestore.imports import import_adeli, import_images, import_npy
from brainenc.featurestore.interop import as_tensor, to_ray, torch_dataset

TRAIN, TEST = "subj01-train/dinov2-base/11.q", "subj01-test/dinov2-base/11.q"


def random(shape, dtype=np.float16, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def add(store, key, features, dtype="float16", rows_per_shard=4):
    name = key.partition("/")[0]
    with store.writer(
        key, ids=[f"{name}-{n}" for n in range(len(features))], row_shape=features.shape[1:], dtype=dtype,
        rows_per_shard=rows_per_shard,
    ) as writer:  # fmt: skip
        writer.append(features)


@pytest.fixture
def store(tmp_path):
    made = open_store(tmp_path / "store", create=True)
    add(made, TRAIN, random((10, 962, 8)))
    add(made, TEST, random((3, 962, 8), seed=1))
    add(made, "subj01-train/clip/last.token", random((10, 257, 512), seed=2))
    add(made, "subj01-test/clip/last.token", random((3, 257, 512), seed=3))
    return made


class TestExport:
    def test_the_layout_that_the_published_loader_reads(self, store, tmp_path):
        made = export_adeli(store, TRAIN, tmp_path / "out", clip_key="subj01-train/clip/last.token")
        train = np.load(tmp_path / "out/dinov2_q_last/01/train.npy", mmap_mode="r")
        assert (train.shape, train.dtype, train.flags.c_contiguous) == ((10, 962, 8), np.float32, True)
        assert np.array_equal(train, random((10, 962, 8)).astype(np.float32))
        assert np.array_equal(np.load(tmp_path / "out/dinov2_q_last/01/synt.npy"), random((3, 962, 8), seed=1))
        assert np.load(tmp_path / "out/clip_vit_512/01/train.npy").shape == (10, 257, 512)
        assert np.load(tmp_path / "out/clip_vit_512/01/synt.npy").shape == (3, 257, 512)
        assert len(made) == 4
        assert "clip_vit_512" not in adeli_note(made)

    def test_it_says_that_the_old_default_loader_wants_both(self, store, tmp_path):
        made = export_adeli(store, TRAIN, tmp_path / "out", subject=7)
        assert (tmp_path / "out/dinov2_q_last/07/synt.npy").exists()
        assert "opens clip_vit_512/ as well as dinov2_q_last/" in adeli_note(made)
        assert "(962, 8)" in adeli_note(made)

    def test_what_the_loader_could_not_use_is_refused_before_anything_is_written(self, store, tmp_path):
        add(store, "subj01-train/dinov2-base/11.k", random((10, 3, 2)))
        add(store, "subj01-test/dinov2-base/11.k", random((3, 3, 2)))
        with pytest.raises(UsageError, match="holds q features"):
            export_adeli(store, "subj01-train/dinov2-base/11.k", tmp_path / "out")
        with pytest.raises(UsageError, match="width 512"):
            export_adeli(store, TRAIN, tmp_path / "out", clip_key=TRAIN)
        add(store, "mine/dinov2-base/11.q", random((10, 3, 2)))
        with pytest.raises(UsageError, match="--subject"):
            export_adeli(store, "mine/dinov2-base/11.q", tmp_path / "out")
        with pytest.raises(UsageError, match="--test"):
            export_adeli(store, "mine/dinov2-base/11.q", tmp_path / "out", subject=1)
        assert not (tmp_path / "out").exists()

    def test_a_file_of_ours_is_left_alone_and_another_is_not_overwritten(self, store, tmp_path):
        path = tmp_path / "a.npy"
        assert not export_npy(store[TRAIN], path).there
        before = path.stat().st_mtime_ns
        assert export_npy(store[TRAIN], path).there
        assert path.stat().st_mtime_ns == before
        np.save(path, np.zeros((10, 962, 8), np.float32))
        with pytest.raises(UsageError, match="Nothing is overwritten"):
            export_npy(store[TRAIN], path)

    def test_an_interrupted_export_leaves_nothing_under_the_name(self, store, tmp_path):
        def stop(done, total):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            export_npy(store[TRAIN], tmp_path / "out/a.npy", progress=stop)
        assert list((tmp_path / "out").iterdir()) == []

    def test_a_full_disk_is_found_before_the_work(self, store, tmp_path, monkeypatch):
        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.posix_fallocate", full)
        with pytest.raises(NoSpace, match="make space and run the same command again"):
            export_npy(store[TRAIN], tmp_path / "out/a.npy")
        assert list((tmp_path / "out").iterdir()) == []

    def test_a_missing_row_is_named(self, tmp_path):
        store = open_store(tmp_path / "s", create=True)
        store.add_stimuli(StimulusSet.from_ids("s", ["a", "b"]))
        collection = store.create_collection("s/n/1.q", identity={}, rows_per_shard=2, row_shape=(2,), dtype="float32")
        with collection.shard_writer(0) as writer:
            writer.append(np.ones((2, 2)), missing=[1])
            writer.seal()
        collection.commit()
        with pytest.raises(MissingRow, match="'b'"):
            export_npy(store["s/n/1.q"], tmp_path / "a.npy")

    def test_the_plain_layout_keeps_dtype_and_ids(self, store, tmp_path):
        export_folder(store, [TEST], tmp_path / "out")
        assert np.load(tmp_path / f"out/{TEST}.npy").dtype == np.float16
        assert (tmp_path / "out/subj01-test/ids.txt").read_text().splitlines() == store[TEST].ids

    def test_ids_that_were_cut_are_refused_and_not_trusted(self, store, tmp_path):
        export_folder(store, [TEST], tmp_path / "out")
        ids = tmp_path / "out/subj01-test/ids.txt"
        whole = ids.read_bytes()
        ids.write_bytes(whole[:-9])
        with pytest.raises(UsageError, match=r"ids.txt is there already, with other stimulus ids \(3; wanted 3\)"):
            export_folder(store, [TEST], tmp_path / "out")
        ids.unlink()
        export_folder(store, [TEST], tmp_path / "out")
        assert ids.read_bytes() == whole

    def test_ids_come_last_and_whole(self, store, tmp_path):
        def stop_in_the_second(done, total):
            if (tmp_path / f"out/{TRAIN}.npy").exists():
                raise KeyboardInterrupt

        keys = [TRAIN, "subj01-train/clip/last.token"]
        with pytest.raises(KeyboardInterrupt):
            export_folder(store, keys, tmp_path / "out", progress=stop_in_the_second)
        assert not (tmp_path / "out/subj01-train/ids.txt").exists()
        export_folder(store, keys, tmp_path / "out")
        assert (tmp_path / "out/subj01-train/ids.txt").read_text().splitlines() == store[TRAIN].ids
        assert [path.name for path in (tmp_path / "out/subj01-train").glob(".*")] == [], "nothing half-written is left"

    def test_bfloat16_goes_out_as_float32(self, tmp_path):
        store = open_store(tmp_path / "s", create=True)
        add(store, "s/n/1.q", random((5, 3)), dtype="bfloat16")
        made = export_npy(store["s/n/1.q"], tmp_path / "a.npy", dtype=None)
        assert made.dtype == "float32"
        assert np.array_equal(np.load(tmp_path / "a.npy"), store["s/n/1.q"][:].astype(np.float32))


class TestImport:
    def test_what_was_exported_comes_back(self, store, tmp_path):
        export_adeli(store, TRAIN, tmp_path / "out")
        again = open_store(tmp_path / "again", create=True)
        ids = {"train": store[TRAIN].ids, "test": store[TEST].ids}
        for folder in ("out/dinov2_q_last/01", "out/dinov2_q_last"):
            views = import_adeli(again, tmp_path / folder, ids=ids, dtype="float16")
        assert [view.key for view in views] == [TRAIN, TEST]
        for key in (TRAIN, TEST):
            assert np.array_equal(again[key][:], store[key][:])
            assert again[key].ids == store[key].ids

    @settings(max_examples=20, deadline=None)
    @given(
        rows=hnp.arrays(
            np.float32,
            hnp.array_shapes(min_dims=2, max_dims=3, max_side=7),
            elements=st.floats(-60000, 60000, width=16),
        )
    )
    def test_any_array_of_rows_survives_the_round_trip(self, tmp_path_factory, rows):
        folder = tmp_path_factory.mktemp("round")
        np.save(folder / "a.npy", rows)
        store = open_store(folder / "store", create=True)
        view = import_npy(store, "s/n/1.q", folder / "a.npy")
        assert view.dtype == np.float32
        export_npy(view, folder / "b.npy")
        assert np.array_equal(np.load(folder / "b.npy"), rows)

    def test_the_ids_of_a_set_that_is_there_are_taken(self, store, tmp_path):
        np.save(tmp_path / "a.npy", random((10, 4)))
        assert import_npy(store, "subj01-train/mine/x.y", tmp_path / "a.npy").ids == store[TRAIN].ids

    def test_a_set_of_which_more_than_ids_is_known_may_be_there(self, tmp_path):
        store = open_store(tmp_path / "s", create=True)
        store.add_stimuli(StimulusSet("s", [Stimulus("a", "/x/a.png", 10, "1"), Stimulus("b", "/x/b.png", 11, "2")]))
        np.save(tmp_path / "a.npy", random((2, 4)))
        assert import_npy(store, "s/mine/x.y", tmp_path / "a.npy", ids=["a", "b"]).ids == ["a", "b"]
        with pytest.raises(DataError, match="differ from row 1 on"):
            import_npy(store, "s/mine/x.z", tmp_path / "a.npy", ids=["a", "c"])

    def test_ids_beside_the_file_are_found_and_numbers_stand_in(self, store, tmp_path):
        export_folder(store, [TEST], tmp_path / "out")
        again = open_store(tmp_path / "again", create=True)
        assert import_npy(again, TEST, tmp_path / f"out/{TEST}.npy").ids == store[TEST].ids
        np.save(tmp_path / "a.npy", random((2, 4)))
        assert import_npy(again, "s/n/1.q", tmp_path / "a.npy").ids == ["row-000000", "row-000001"]

    def test_one_file_an_image(self, tmp_path):
        folder = tmp_path / "images"
        for name in ("train-0002_nsd-00021", "train-0001_nsd-00013", "deep/other"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            np.save(folder / f"{name}.npy", random((4, 3), seed=len(name)))
        view = import_images(open_store(tmp_path / "s", create=True), "s/n/1.q", folder)
        assert view.ids == ["deep/other", "nsd-00013", "nsd-00021"]
        assert np.array_equal(view[0], random((4, 3), seed=len("deep/other")))
        assert view.dtype == np.float16

    def test_an_interrupted_import_goes_on(self, tmp_path):
        np.save(tmp_path / "a.npy", random((6, 4), np.float32))
        store = open_store(tmp_path / "s", create=True)

        def stop(done, total):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            import_npy(store, "s/n/1.q", tmp_path / "a.npy", progress=stop)
        assert np.array_equal(import_npy(store, "s/n/1.q", tmp_path / "a.npy")[:], random((6, 4), np.float32))

    def test_what_is_no_array_of_rows_is_refused(self, tmp_path):
        store = open_store(tmp_path / "s", create=True)
        np.save(tmp_path / "int.npy", np.zeros((3, 2), int))
        np.save(tmp_path / "flat.npy", np.zeros(3))
        np.save(tmp_path / "pickle.npy", np.array([{"a": 1}]), allow_pickle=True)
        (tmp_path / "torn.npy").write_bytes(b"\x93NUMPY\x01\x00")
        for name in ("int", "flat", "pickle", "torn", "absent"):
            with pytest.raises(DataError, match=f"{name}.npy"):
                import_npy(store, "s/n/1.q", tmp_path / f"{name}.npy")
        assert store.keys() == []

    def test_wrong_numbers_of_ids_shapes_and_values_are_refused(self, tmp_path):
        store = open_store(tmp_path / "s", create=True)
        np.save(tmp_path / "a.npy", np.full((3, 2), 1e9, np.float32))
        with pytest.raises(DataError, match="3 rows, but there are 2"):
            import_npy(store, "s/n/1.q", tmp_path / "a.npy", ids=["a", "b"])
        with pytest.raises(ValueNotStorable, match="bfloat16 or float32"):
            import_npy(store, "s/n/1.q", tmp_path / "a.npy", dtype="float16")
        import_npy(store, "s/n/2.q", tmp_path / "a.npy")
        np.save(tmp_path / "b.npy", np.zeros((3, 5), np.float32))
        with pytest.raises(ProvenanceMismatch, match="row_shape"):
            import_npy(store, "s/n/2.q", tmp_path / "b.npy")
        for name, shape in (("x", 2), ("y", 3)):
            (tmp_path / "images").mkdir(exist_ok=True)
            np.save(tmp_path / f"images/{name}.npy", np.zeros(shape, np.float32))
        with pytest.raises(DataError, match=r"y.npy has the shape \(3,\)"):
            import_images(store, "i/n/1.q", tmp_path / "images")
        with pytest.raises(DataError, match="no folder such as"):
            import_adeli(store, tmp_path)
        with pytest.raises(DataError, match=r"no .npy files"):
            import_images(store, "i/n/1.q", tmp_path / "store")


class TestTorch:
    def test_a_row_is_the_mapped_memory_itself(self, store):
        view = store[TRAIN]
        tensor = torch_dataset(view)[3]
        row = view[3]
        assert tensor.shape == (962, 8)
        assert np.array_equal(tensor.numpy(), row)
        assert tensor.data_ptr() == row.ctypes.data
        del row
        view.release()
        assert np.array_equal(tensor.numpy(), random((10, 962, 8))[3]), "the tensor keeps its memory alive"

    def test_batches_by_a_loader_with_targets_and_transform(self, store):
        import torch
        from torch.utils.data import DataLoader, Dataset

        targets = np.arange(10, dtype=np.float32)
        dataset = torch_dataset(store[TRAIN], targets, transform=torch.Tensor.float)
        assert isinstance(dataset, Dataset)
        seen = torch.zeros(10, 962, 8)
        for features, target in DataLoader(dataset, batch_size=4, shuffle=True):
            assert features.dtype == torch.float32
            seen[target.long()] = features
        assert np.array_equal(seen.numpy(), random((10, 962, 8)).astype(np.float32))

    def test_workers_open_the_store_themselves(self, store):
        from torch.utils.data import DataLoader

        again = pickle.loads(pickle.dumps(torch_dataset(store[TRAIN], range(10))))
        loader = DataLoader(again, batch_size=5, num_workers=1, multiprocessing_context="fork")
        got = np.concatenate([features.numpy() for features, _ in loader])
        assert np.array_equal(got, random((10, 962, 8)))

    def test_bfloat16_is_native(self, tmp_path):
        import torch

        store = open_store(tmp_path / "s", create=True)
        add(store, "s/n/1.q", random((5, 3)), dtype="bfloat16")
        tensor = torch_dataset(store["s/n/1.q"])[2]
        assert tensor.dtype == torch.bfloat16
        assert np.array_equal(tensor.float().numpy(), store["s/n/1.q"][2].astype(np.float32))
        assert as_tensor(np.zeros((2, 0), ml_dtypes.bfloat16)).shape == (2, 0)

    def test_targets_must_fit(self, store):
        with pytest.raises(DataError, match="10 rows, but there are 3 targets"):
            torch_dataset(store[TRAIN], [1, 2, 3])


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
class TestRay:
    def test_rows_with_their_ids(self, store):
        table = store.to_ray(TRAIN, rows_per_block=3)
        rows = sorted(table.take_all(), key=lambda row: row["row"])
        assert [row["id"] for row in rows] == store[TRAIN].ids
        assert np.array_equal(np.stack([row["features"] for row in rows]), random((10, 962, 8)))

    def test_missing_rows_are_left_out(self, tmp_path):
        store = open_store(tmp_path / "s", create=True)
        store.add_stimuli(StimulusSet.from_ids("s", ["a", "b", "c"]))
        collection = store.create_collection("s/n/1.q", identity={}, rows_per_shard=3, row_shape=(2,), dtype="bfloat16")
        with collection.shard_writer(0) as writer:
            writer.append(np.ones((3, 2)), missing=[1])
            writer.seal()
        collection.commit()
        rows = to_ray(store["s/n/1.q"]).take_all()
        assert sorted(row["id"] for row in rows) == ["a", "c"]
        assert rows[0]["features"].dtype == np.float32


def test_an_unknown_collection_is_said(store, tmp_path):
    with pytest.raises(KeyNotFound):
        export_adeli(store, "subj02-train/dinov2-base/11.q", tmp_path / "out")
