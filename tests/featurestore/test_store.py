"""Opening, listing, creating: the store as a whole."""

import pickle

import numpy as np
import pytest

from brainenc.cli.main import run
from brainenc.errors import (
    CorruptData,
    DataError,
    KeyNotFound,
    NotAStore,
    ProvenanceMismatch,
    StimuliChanged,
    UnknownName,
    UsageError,
    ValueNotStorable,
)
from brainenc.featurestore import Stimulus, StimulusSet, open_store
from brainenc.featurestore.documents import write_document
from tests.featurestore.making import KEY, fill, ids, make_collection, make_view, stimuli, tree, values


def test_a_store_is_made_only_when_asked(tmp_path):
    with pytest.raises(NotAStore):
        open_store(tmp_path / "store")
    open_store(tmp_path / "store", create=True)
    assert open_store(tmp_path / "store").keys() == []


def test_a_folder_without_store_file_is_no_store(tmp_path):
    with pytest.raises(NotAStore, match=r"store\.json"):
        open_store(tmp_path)


def test_a_newer_store_is_refused(tmp_path):
    (tmp_path / "store.json").write_bytes(write_document("store", {"version": 99}))
    with pytest.raises(NotAStore, match=r"version 99.*newer brainenc"):
        open_store(tmp_path)


def test_a_torn_store_file_is_corrupt(tmp_path):
    open_store(tmp_path, create=True)
    (tmp_path / "store.json").write_text("{")
    with pytest.raises(CorruptData, match="torn"):
        open_store(tmp_path)


def test_keys_and_stimulus_sets_are_listed(tmp_path):
    make_collection(tmp_path, key="b-train/x/1.q")
    make_collection(tmp_path, key="a-train/x/layer4.2.token")
    store = open_store(tmp_path)
    assert store.keys() == ["a-train/x/layer4.2.token", "b-train/x/1.q"]
    assert store.stimuli_names() == ["a-train", "b-train"]
    assert "b-train/x/1.q" in store
    assert "b-train/x/2.q" not in store


def test_an_unknown_key_is_answered_with_those_there_are(tmp_path):
    make_collection(tmp_path)
    with pytest.raises(KeyNotFound, match=f"'a/b/c.d'.*{KEY}"):
        open_store(tmp_path)["a/b/c.d"]


@pytest.mark.parametrize("key", ["", "a", "a/b", "a/b/c", "a/b/.q", "a/b/1.", "a/b/c/1.q", "../b/1.q", "a b/c/1.q"])
def test_what_is_no_key_is_refused(tmp_path, key):
    with pytest.raises(UsageError):
        open_store(tmp_path, create=True).collection(key)


def test_a_store_pickles_as_its_address(tmp_path):
    make_collection(tmp_path)
    again = pickle.loads(pickle.dumps(open_store(tmp_path)))
    assert again.url == str(tmp_path)
    assert again.keys() == [KEY]


class TestStimuli:
    def test_the_same_set_may_come_again(self, tmp_path):
        store = open_store(tmp_path, create=True)
        assert store.add_stimuli(stimuli(5)) == store.add_stimuli(stimuli(5)) == store.stimuli("subj01-train")
        assert store.stimuli("subj01-train")[3] == Stimulus("nsd-00003", "images/nsd-00003.png", 103, "3")

    @pytest.mark.parametrize(
        ("change", "said"),
        [(lambda s: s[:4], "1 gone (nsd-00004)"), (lambda s: [*s, Stimulus("x")], "1 new (x)"),
         (lambda s: [*s[:4], Stimulus("nsd-00004", "images/nsd-00004.png", 1, "4")], "1 changed (nsd-00004)"),
         (lambda s: s[::-1], "the order of rows differs")],
    )  # fmt: skip
    def test_another_set_of_the_same_name_is_refused_with_the_difference(self, tmp_path, change, said):
        store = open_store(tmp_path, create=True)
        store.add_stimuli(stimuli(5))
        with pytest.raises(StimuliChanged) as caught:
            store.add_stimuli(StimulusSet("subj01-train", change(list(stimuli(5)))))
        assert said in str(caught.value)
        assert store.stimuli("subj01-train") == stimuli(5)

    def test_an_id_twice_is_refused(self):
        with pytest.raises(DataError, match="'b' twice"):
            StimulusSet.from_ids("s", ["a", "b", "c", "b"])

    def test_an_unknown_set_is_answered_with_those_there_are(self, tmp_path):
        store = open_store(tmp_path, create=True)
        store.add_stimuli(stimuli(2))
        with pytest.raises(UnknownName, match=r"'other'.*subj01-train"):
            store.stimuli("other")

    def test_a_changed_table_is_found(self, tmp_path):
        open_store(tmp_path, create=True).add_stimuli(stimuli(5))
        path = tmp_path / "subj01-train" / "stimuli.arrow"
        path.write_bytes(path.read_bytes().replace(b"nsd-00003", b"nsd-00009"))
        with pytest.raises(CorruptData, match="changed"):
            open_store(tmp_path).stimuli("subj01-train")


class TestCreate:
    def test_another_provenance_is_refused_with_both_sides(self, tmp_path):
        make_collection(tmp_path, identity={"weights": "abc", "preprocessing": {"version": 1, "size": 434}})
        with pytest.raises(ProvenanceMismatch) as caught:
            make_collection(tmp_path, identity={"weights": "abc", "preprocessing": {"version": 2, "size": 434}})
        assert caught.value.differences == {"preprocessing.version": (1, 2)}
        assert "stored 1, wanted 2" in str(caught.value)

    @pytest.mark.parametrize("other", [{"dtype": "float32"}, {"row_shape": (6, 4)}])
    def test_dtype_and_row_shape_are_part_of_it(self, tmp_path, other):
        make_collection(tmp_path)
        with pytest.raises(ProvenanceMismatch, match=next(iter(other))):
            make_collection(tmp_path, **other)

    def test_shard_size_and_format_are_the_first_creators(self, tmp_path):
        make_collection(tmp_path, rows_per_shard=5)
        second = make_collection(tmp_path, rows_per_shard=7, format="npy")
        assert (second.rows_per_shard, second.spec.format, second.n_shards) == (5, "arrow", 5)
        assert [len(second.rows(shard)) for shard in range(5)] == [5, 5, 5, 5, 3]

    def test_it_wants_its_stimuli_first(self, tmp_path):
        store = open_store(tmp_path, create=True)
        with pytest.raises(UnknownName, match="stimulus set"):
            store.create_collection(KEY, identity={}, rows_per_shard=1, row_shape=(1,), dtype="float16")

    def test_tuples_in_the_identity_are_the_same_as_lists(self, tmp_path):
        make_collection(tmp_path, identity={"grid": (31, 31)})
        assert make_collection(tmp_path, identity={"grid": [31, 31]}).identity == {"grid": [31, 31]}

    @pytest.mark.parametrize("bad", [{"x": float("nan")}, {"x": np.zeros(2)}])
    def test_an_identity_is_plain_json(self, tmp_path, bad):
        with pytest.raises(UsageError, match="plain JSON"):
            make_collection(tmp_path, identity=bad)

    @pytest.mark.parametrize("bad", [{"dtype": "float64"}, {"format": "parquet"}])
    def test_unknown_dtypes_and_formats_are_refused(self, tmp_path, bad):
        with pytest.raises(UnknownName):
            make_collection(tmp_path, **bad)

    def test_two_to_the_31_values_in_a_shard_must_be_allowed(self, tmp_path):
        big = {"n": 2, "rows_per_shard": 2, "row_shape": (2**30,)}
        with pytest.raises(UsageError, match="allow_64bit"):
            make_collection(tmp_path, **big)
        assert make_collection(tmp_path, **big, allow_64bit=True).n_shards == 1


class TestWriter:
    """``store.writer``: features made elsewhere."""

    @pytest.mark.parametrize("batch", [1, 4, 7, 23])
    def test_batches_of_any_size_become_the_same_store(self, tmp_path, batch):
        rows = values(23, (3, 2))
        stores = []
        for name, size in (("a", batch), ("b", 5)):
            with open_store(tmp_path / name, create=True).writer(
                "mine/resnet50/layer4.token", ids=ids(23), row_shape=(3, 2), rows_per_shard=5
            ) as writer:
                for start in range(0, 23, size):
                    writer.append(rows[start : start + size])
            stores.append(tree(tmp_path / name))
        assert stores[0] == stores[1]
        np.testing.assert_array_equal(open_store(tmp_path / "a")["mine/resnet50/layer4.token"][:], rows)

    def test_after_an_error_the_same_rows_again_complete_it(self, tmp_path):
        rows, store = values(23), open_store(tmp_path, create=True)
        arguments = {"ids": ids(23), "row_shape": (4, 6), "rows_per_shard": 5}
        writer = store.writer(KEY, **arguments)
        writer.append(rows[:13])
        writer.__exit__(RuntimeError, RuntimeError("the caller's own"), None)
        sealed = {name: data for name, data in tree(tmp_path).items() if "shard" in name}
        with store.writer(KEY, **arguments) as writer:
            writer.append(rows)
        assert len(sealed) == 4
        assert sealed.items() <= tree(tmp_path).items()
        np.testing.assert_array_equal(store[KEY][:], rows)

    def test_too_few_and_too_many_rows_are_said(self, tmp_path):
        store = open_store(tmp_path, create=True)
        with pytest.raises(UsageError, match="12 of 13 rows"), store.writer(KEY, ids=ids(13), row_shape=(2,)) as writer:
            writer.append(values(12, (2,)))
        with pytest.raises(UsageError, match="14 rows came for 13"):
            store.writer(KEY, ids=ids(13), row_shape=(2,)).append(values(14, (2,)))

    def test_a_value_that_does_not_fit_names_its_stimulus_and_the_way_out(self, tmp_path):
        rows = values(13, (2,))
        rows[7, 1] = 70000
        store = open_store(tmp_path, create=True)
        with pytest.raises(ValueNotStorable, match=r"'nsd-00007' \(row 7 .* holds 70000.*bfloat16 or float32"):
            store.writer(KEY, ids=ids(13), row_shape=(2,)).append(rows)
        assert not list(tmp_path.rglob("shard-*"))
        with store.writer("subj01-train/dinov2-mini/4.q", ids=ids(13), row_shape=(2,), dtype="bfloat16") as writer:
            writer.append(rows)
        assert float(store["subj01-train/dinov2-mini/4.q"][7, 1]) == pytest.approx(70000, rel=0.01)


def test_an_interrupted_and_resumed_store_is_byte_equal_to_an_undisturbed_one(tmp_path):
    rows = values(23)
    calm, torn = make_collection(tmp_path / "calm"), make_collection(tmp_path / "torn")
    fill(calm, rows)
    calm.commit()
    fill(torn, rows, shards=[3, 1])
    with torn.shard_writer(0) as writer:
        writer.append(rows[:2])
    resumed = make_collection(tmp_path / "torn", rows_per_shard=9)
    fill(resumed, rows, shards=sorted(set(range(5)) - resumed.sealed()))
    resumed.commit()
    assert tree(tmp_path / "calm") == tree(tmp_path / "torn")


def test_a_store_by_its_file_url(tmp_path, capsys):
    """Written, committed, read, verified and copied, as by its folder; spaces and all."""
    folder, copy = tmp_path / "my store", tmp_path / "a copy"
    url, target = folder.as_uri(), copy.as_uri()
    assert url.startswith("file:///")
    assert "%20" in url
    _, rows = make_view(url)
    assert (folder / KEY / "shard-00004.json").is_file()
    store = open_store(url)
    assert store.keys() == [KEY]
    np.testing.assert_array_equal(store[KEY][:], rows)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(store))[KEY].gather([22, 3]), rows[[22, 3]])
    assert run(["store", "verify", url]) == 0
    assert run(["store", "cp", url, target]) == 0
    assert run(["store", "verify", target]) == 0
    assert "5 shards" in capsys.readouterr().out
    np.testing.assert_array_equal(open_store(target)[KEY][:], rows)
    shards = {name: data for name, data in tree(folder).items() if "manifest" not in name}
    assert {name: data for name, data in tree(copy).items() if "manifest" not in name} == shards
    with pytest.raises(NotAStore, match="nowhere"):
        open_store((tmp_path / "nowhere").as_uri())
