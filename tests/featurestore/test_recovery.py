"""Verify finds, repair mends, gc tidies."""

import fcntl
import os
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from brainenc.errors import CorruptData, KeyNotFound
from brainenc.featurestore import open_store
from brainenc.featurestore.recovery import debris, gc, repair, verify
from tests.featurestore.making import KEY, fill, make_collection, tree, values


def whole(folder):
    collection = make_collection(folder)
    fill(collection, values(23))
    collection.commit()
    return open_store(folder)


def flip(path, position, bit=0):
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1 << bit
    path.write_bytes(raw)


def test_a_whole_store_has_no_findings_and_every_byte_was_read(tmp_path):
    store, told = whole(tmp_path), []
    result = verify(store, progress=lambda *at: told.append(at))
    assert result.whole
    assert result.shards == 5
    assert result.bytes == sum(len(d) for n, d in tree(tmp_path).items() if n.endswith(".arrow") and "shard" in n)
    assert told[-1] == (5, 5, result.bytes)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return whole(tmp_path_factory.mktemp("one"))


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(shard=st.integers(0, 4), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_bit_flipped_anywhere_in_a_shard_is_found(one, shard, where, bit):
    path = one.place.root / KEY / f"shard-{shard:05d}.arrow"
    position = int(where * path.stat().st_size)
    flip(path, position, bit)
    try:
        assert [(f.shard, f.cure) for f in verify(one, [KEY]).findings] == [(shard, "drop")]
    finally:
        flip(path, position, bit)


@settings(max_examples=80)
@given(shard=st.integers(0, 4), where=st.floats(0, 1, exclude_max=True))
def test_a_shard_cut_anywhere_is_found(one, shard, where):
    path = one.place.root / KEY / f"shard-{shard:05d}.arrow"
    raw = path.read_bytes()
    path.write_bytes(raw[: int(where * len(raw))])
    try:
        assert [(f.shard, f.cure) for f in verify(one, [KEY]).findings] == [(shard, "drop")]
    finally:
        path.write_bytes(raw)


@settings(max_examples=80)
@example(where=0.99609375, bit=1, name="manifest-000001.json")  # its version, which then reads as that of a newer one
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7),
       name=st.sampled_from(["shard-00002.json", "manifest-000002.json", "manifest-000001.json"]))  # fmt: skip
def test_a_bit_flipped_anywhere_in_a_document_is_found(one, where, bit, name):
    path = one.place.root / KEY / name
    position = int(where * (path.stat().st_size - 1))  # but for the newline at its end
    flip(path, position, bit)
    try:
        findings = verify(one, [KEY]).findings
        assert findings[0].cure == ("receipt" if "shard" in name else "manifest")
        uncommitted = [(shard, "commit") for shard in range(5)] if name == "manifest-000002.json" else []
        assert [(f.shard, f.cure) for f in findings[1:]] == uncommitted
    finally:
        flip(path, position, bit)


DAMAGE = {
    "flipped": lambda d: flip(d / "shard-00001.arrow", 700),
    "cut": lambda d: os.truncate(d / "shard-00001.arrow", 300),
    "empty": lambda d: os.truncate(d / "shard-00001.arrow", 0),
    "gone": lambda d: (d / "shard-00001.arrow").unlink(),
    "both gone": lambda d: [(d / name).unlink() for name in ("shard-00001.arrow", "shard-00001.json")],
    "swapped": lambda d: (d / "shard-00001.arrow").write_bytes((d / "shard-00003.arrow").read_bytes()),
    "receipt torn": lambda d: os.truncate(d / "shard-00001.json", 40),
    "receipt gone": lambda d: (d / "shard-00001.json").unlink(),
    "manifest torn": lambda d: os.truncate(d / "manifest-000002.json", 40),
    "first manifest torn": lambda d: os.truncate(d / "manifest-000001.json", 0),
    "all manifests torn": lambda d: [os.truncate(d / f"manifest-00000{n}.json", 9) for n in (1, 2)],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_after_repair_the_same_extraction_computes_just_what_was_lost(tmp_path, damage):
    store = whole(tmp_path)
    before = tree(tmp_path)
    DAMAGE[damage](tmp_path / KEY)

    found = verify(store).findings
    assert found
    assert {f.key for f in found} == {KEY}
    assert repair(store, found) == []
    hidden = ["has shards but no manifest"] if damage == "all manifests torn" else []
    assert [text in f.problem for f, text in zip(verify(store).findings, hidden, strict=True)] == [True] * len(hidden)

    collection, rows = make_collection(tmp_path), values(23)
    lost = sorted(set(range(5)) - collection.sealed())
    assert lost == ([1] if damage in ("flipped", "cut", "empty", "gone", "both gone", "swapped") else [])
    if lost and damage != "both gone":
        assert len(collection.manifest().shards) == 4
    fill(collection, rows, shards=lost)
    collection.commit()
    assert verify(store).whole
    after = tree(tmp_path)
    assert {n: d for n, d in after.items() if "manifest" not in n} == {
        n: d for n, d in before.items() if "manifest" not in n
    }
    np.testing.assert_array_equal(store[KEY][:], rows)


def test_a_half_written_shard_without_receipt_is_dropped(tmp_path):
    store = whole(tmp_path)
    path = tmp_path / KEY / "shard-00001.arrow"
    collection = store.collection(KEY)
    collection.drop([1])
    path.write_bytes(b"ARROW1\0\0 and then the light went out")
    repair(store, verify(store).findings)
    assert not path.exists()


def test_a_shard_of_a_dead_writer_that_only_lacks_its_receipt_is_no_finding(tmp_path):
    store = whole(tmp_path)
    collection = store.collection(KEY)
    collection.drop([1])
    fill(collection, values(23), shards=[1])
    (tmp_path / KEY / "shard-00001.json").unlink()
    assert verify(store).whole
    assert collection.sealed() == frozenset(range(5))


def test_a_valid_shard_of_another_run_under_this_name_is_found(tmp_path):
    """Whole by itself, with a receipt of its own: the manifest knows better, and the new one is committed."""
    store = whole(tmp_path)
    other = make_collection(tmp_path / "other")
    fill(other, values(23, seed=9))
    for suffix in ("arrow", "json"):
        source = tmp_path / "other" / KEY / f"shard-00001.{suffix}"
        (tmp_path / KEY / f"shard-00001.{suffix}").write_bytes(source.read_bytes())
    findings = verify(store, [KEY]).findings
    assert [(f.shard, f.cure) for f in findings] == [(1, "commit")]
    repair(store, findings)
    assert verify(store, [KEY]).whole


def test_a_changed_stimulus_table_cannot_be_mended_and_is_said(tmp_path):
    store = whole(tmp_path)
    path = tmp_path / "subj01-train" / "stimuli.arrow"
    path.write_bytes(path.read_bytes().replace(b"nsd-00003", b"nsd-00099"))
    findings = verify(store).findings
    assert [(f.key, f.cure) for f in findings] == [("subj01-train", "")]
    assert repair(store, findings) == list(findings)


def test_verify_wants_collections_that_are_there(tmp_path):
    with pytest.raises(KeyNotFound):
        verify(whole(tmp_path), ["a/b/c.d"])


def test_verify_reads_the_disk_and_not_the_memory_of_it(tmp_path, monkeypatch):
    store, advised = whole(tmp_path), []
    real = os.posix_fadvise
    monkeypatch.setattr(os, "posix_fadvise", lambda *call: (advised.append(call[3]), real(*call)))
    verify(store)
    assert advised.count(os.POSIX_FADV_DONTNEED) == 5


class TestManifestOfAnotherCollection:
    @pytest.fixture(params=["another collection", "other shards"])
    def strange(self, tmp_path, request):
        """A whole store, with a whole manifest that is not its own as the newest."""
        store = whole(tmp_path / "store")
        more = {"identity": {"layer": 9}} if request.param == "another collection" else {"rows_per_shard": 4}
        other = make_collection(tmp_path / "other", **more)
        fill(other, values(23, seed=5))
        other.commit()
        newest = tmp_path / "other" / KEY / "manifest-000002.json"
        (tmp_path / "store" / KEY / "manifest-000003.json").write_bytes(newest.read_bytes())
        return store

    def test_readers_and_drivers_pass_it_over(self, strange, caplog):
        np.testing.assert_array_equal(strange[KEY][:], values(23))
        assert "manifest-000003.json is the manifest of another collection" in caplog.text
        assert strange.collection(KEY).sealed() == frozenset(range(5))
        assert len(strange.collection(KEY).commit().shards) == 5

    def test_repair_removes_it_and_nothing_else(self, strange):
        before = tree(strange.place.root)
        findings = verify(strange, [KEY]).findings
        assert [(f.shard, f.cure) for f in findings] == [(None, "manifest")]
        assert "manifest-000003" in findings[0].problem
        assert repair(strange, findings) == []
        del before[f"{KEY}/manifest-000003.json"]
        assert tree(strange.place.root) == before

    def test_it_does_not_speak_for_a_first_manifest_that_is_torn(self, strange):
        os.truncate(strange.place.root / KEY / "manifest-000001.json", 40)
        repair(strange, verify(strange, [KEY]).findings)
        assert verify(strange, [KEY]).whole
        np.testing.assert_array_equal(strange[KEY][:], values(23))


NEWEST_LOST = {
    "flipped": lambda d: flip(d / "manifest-000003.json", 100),
    "deleted": lambda d: (d / "manifest-000003.json").unlink(),
    "an old one above it": lambda d: (d / "manifest-000004.json").write_bytes(
        (d / "manifest-000002.json").read_bytes()
    ),
}


class TestFirstManifest:
    @pytest.fixture(params=["another collection", "other shards", "another stimulus set"])
    def strange(self, tmp_path, request):
        """Bytes of a first manifest that is whole in itself, but not of `whole`."""
        more = {
            "another collection": {"identity": {"layer": 9}}, "other shards": {"rows_per_shard": 4},
            "another stimulus set": {"key": "subj02-train/dinov2-mini/3.q"},
        }[request.param]  # fmt: skip
        other = make_collection(tmp_path / "other", **more)
        return (tmp_path / "other" / other.key / "manifest-000001.json").read_bytes()

    def test_of_another_collection_is_not_believed_and_repair_writes_the_right_one(self, tmp_path, strange):
        store = whole(tmp_path / "store")
        before = tree(store.place.root)
        (store.place.root / KEY / "manifest-000001.json").write_bytes(strange)
        np.testing.assert_array_equal(store[KEY][:], values(23))
        assert store.collection(KEY).sealed() == frozenset(range(5))
        findings = verify(store).findings
        assert [(f.shard, f.cure) for f in findings] == [(None, "manifest")]
        assert "manifest-000001.json is the manifest of another collection" in findings[0].problem
        assert repair(store, findings) == []
        assert tree(store.place.root) == before

    def test_of_another_collection_does_not_cost_the_shards_of_a_run_that_never_committed(self, tmp_path, strange):
        collection = make_collection(tmp_path / "store")
        fill(collection, values(23))
        before, store = tree(tmp_path / "store"), open_store(tmp_path / "store")
        (tmp_path / "store" / KEY / "manifest-000001.json").write_bytes(strange)
        with pytest.raises(CorruptData, match="repair"):
            make_collection(tmp_path / "store")
        findings = verify(store).findings
        assert [(f.shard, f.cure) for f in findings] == [(None, "manifest")]
        assert repair(store, findings) == []
        assert make_collection(tmp_path / "store").sealed() == frozenset(range(5))
        assert tree(tmp_path / "store") == before

    def test_gone_hides_nothing_and_repair_writes_it_again(self, tmp_path):
        store = whole(tmp_path)
        before = tree(tmp_path)
        (tmp_path / KEY / "manifest-000001.json").unlink()
        assert store.keys() == [KEY]
        np.testing.assert_array_equal(store[KEY][:], values(23))
        findings = verify(store).findings
        assert [f.cure for f in findings] == ["manifest"]
        assert "manifest-000001.json is gone" in findings[0].problem
        assert repair(store, findings) == []
        assert tree(tmp_path) == before

    def test_shards_without_any_manifest_are_named_and_the_next_extraction_takes_them_over(self, tmp_path):
        store = whole(tmp_path)
        for number in (1, 2):
            (tmp_path / KEY / f"manifest-00000{number}.json").unlink()
        assert store.keys() == []
        findings = verify(store).findings
        assert [(f.key, f.cure) for f in findings] == [(KEY, "")]
        assert "has shards but no manifest" in findings[0].problem
        assert make_collection(tmp_path).commit() == whole(tmp_path / "undisturbed").collection(KEY).manifest()
        assert verify(store).whole

    def test_of_one_shard_a_strange_receipt_does_not_speak_against_it(self, tmp_path):
        collection, other = make_collection(tmp_path / "a", 4), make_collection(tmp_path / "b", 4, identity={"x": 1})
        for each in (collection, other):
            fill(each, values(4))
        wrong = (tmp_path / "b" / KEY / "shard-00000.json").read_bytes()
        (tmp_path / "a" / KEY / "shard-00000.json").write_bytes(wrong)
        assert make_collection(tmp_path / "a", 4).sealed() == {0}
        assert [entry.shard for entry in collection.commit().shards] == [0]


@pytest.mark.parametrize("damage", NEWEST_LOST)
def test_what_only_the_lost_newest_manifest_listed_is_named_and_comes_back(tmp_path, damage):
    collection, rows = make_collection(tmp_path), values(23)
    for shards in ([0, 1], [2, 3, 4]):
        fill(collection, rows, shards=shards)
        collection.commit()
    papers = {n: d for n, d in tree(tmp_path).items() if "shard" in n}
    NEWEST_LOST[damage](tmp_path / KEY)
    store = open_store(tmp_path)
    assert store[KEY].present.sum() == 10

    findings = verify(store, [KEY]).findings
    lost = [f for f in findings if f.shard is not None]
    assert [(f.shard, f.cure) for f in lost] == [(2, "commit"), (3, "commit"), (4, "commit")]
    assert all(f"shard-0000{f.shard}.arrow is sealed but not committed" in f.problem for f in lost)
    assert repair(store, findings) == []
    assert verify(store, [KEY]).whole
    np.testing.assert_array_equal(store[KEY][:], rows)
    assert {n: d for n, d in tree(tmp_path).items() if "shard" in n} == papers


@pytest.mark.parametrize("inside", [[], ["notes.txt"]], ids=["empty", "with files"])
def test_a_folder_named_like_a_shard_stops_no_repair(tmp_path, inside):
    store = whole(tmp_path)
    folder = tmp_path / KEY / "shard-00001.arrow"
    folder.unlink()
    folder.mkdir()
    for name in inside:
        (folder / name).write_text("somebody's")
    flip(tmp_path / KEY / "shard-00003.arrow", 700)
    findings = verify(store, [KEY]).findings
    assert [(f.shard, f.cure) for f in findings] == [(1, "drop"), (3, "drop")]
    left = repair(store, findings)
    assert ["move it away" in f.problem for f in left] == [True] * len(inside)
    assert [entry.shard for entry in store.collection(KEY).manifest().shards] == [0, 2, 4]
    assert folder.exists() == bool(inside)
    assert not (tmp_path / KEY / "shard-00003.arrow").exists()


class TestGc:
    def test_partials_of_the_living_stay_those_of_the_dead_go(self, tmp_path):
        store = whole(tmp_path)
        before = tree(tmp_path)
        collection = store.collection(KEY)
        collection.drop([0])
        dead = tmp_path / KEY / ".shard-00003.arrow.0123456789ab.partial"
        dead.write_bytes(b"x" * 1000)
        with collection.shard_writer(0) as writer:
            living = writer._path
            for path in (dead, living):
                os.utime(path, (time.time() - 300,) * 2)
            found = list(debris(store))
            assert [(item.name, item.bytes) for item in found] == [(str(dead), 1000)]
            assert gc(store, found) == 1000
            assert living.exists()
            writer.append(values(23)[:5])
            writer.seal(content_hashes=list("01234"))
        collection.commit()
        assert {n for n in tree(tmp_path) if "manifest" not in n} == {n for n in before if "manifest" not in n}

    def test_one_that_was_just_made_is_left_alone(self, tmp_path):
        store = whole(tmp_path)
        fresh = tmp_path / KEY / ".shard-00003.arrow.0123456789ab.partial"
        fresh.touch()
        assert list(debris(store)) == []
        os.utime(fresh, (time.time() - 300,) * 2)
        fd = os.open(fresh, os.O_RDONLY)
        fcntl.flock(fd, fcntl.LOCK_EX)
        assert list(debris(store)) == []
        os.close(fd)
        assert len(list(debris(store))) == 1

    def test_what_another_gc_removes_meanwhile_is_no_error(self, tmp_path, monkeypatch):
        store = whole(tmp_path)
        for name in ("0123456789ab", "0123456789ac"):
            (tmp_path / KEY / f".shard-00003.arrow.{name}.partial").write_bytes(b"x")

        def dead_and_gone(path, grace_s):
            if "9ab" in path.name:
                path.unlink()
            return True

        monkeypatch.setattr("brainenc.featurestore.recovery._is_dead", dead_and_gone)
        (found,) = debris(store)
        assert "9ac" in found.name

    def test_manifests_long_superseded_go_the_first_and_the_newest_stay(self, tmp_path):
        collection, rows = make_collection(tmp_path), values(23)
        view = None
        for shard in range(5):
            fill(collection, rows, shards=[shard])
            collection.commit()
            view = view or collection.view()
        store = open_store(tmp_path)
        gc(store, list(debris(store)))
        assert sorted(p.name[9:15] for p in (tmp_path / KEY).glob("manifest-*")) == [
            "000001",
            "000004",
            "000005",
            "000006",
        ]
        np.testing.assert_array_equal(store[KEY][:], rows)
        np.testing.assert_array_equal(view[:5], rows[:5])

    def test_it_follows_no_link_out_of_the_store(self, tmp_path):
        store = whole(tmp_path / "store")
        whole(tmp_path / "elsewhere")
        dead = tmp_path / "elsewhere" / KEY / ".shard-00003.arrow.0123456789ab.partial"
        dead.write_bytes(b"x" * 1000)
        os.utime(dead, (time.time() - 300,) * 2)
        (tmp_path / "store" / "subj01-train" / "linked").symlink_to(tmp_path / "elsewhere" / KEY, True)
        (tmp_path / "store" / "other").symlink_to(tmp_path / "elsewhere" / "subj01-train", True)
        assert list(debris(store)) == []
        assert store.keys() == [KEY]
