"""Copying collections between stores: equal bytes, checked on arrival, going on where it stopped."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from brainenc.errors import CorruptData, KeyNotFound, ProvenanceMismatch, StimuliChanged, TransferFailed
from brainenc.featurestore import open_store
from brainenc.featurestore.transfer import copy, select_keys

KEY = "s-train/net/1.q"
ROW = (6, 5)


def make(url, key=KEY, rows=10, seed=0, **options):
    store = open_store(url, create=True)
    features = np.random.default_rng(seed).standard_normal((rows, *ROW)).astype(np.float16)
    with store.writer(
        key,
        ids=[f"i{n}" for n in range(rows)],
        row_shape=ROW,
        rows_per_shard=options.pop("rows_per_shard", 3),
        **options,
    ) as writer:
        writer.append(features)
    return store, features


def shards(store, key=KEY):
    """Name -> hash of every shard and receipt."""
    names = [entry.name for entry in store.place.list(f"{key}/shard-")]
    return {name: hashlib.sha256(store.place.read(name)).hexdigest() for name in names}


@pytest.fixture(params=["folder", "drive", "memory", "gs", "s3"])
def target_url(request, tmp_path):
    if request.param == "gs":
        request.getfixturevalue("gcs")
        return "gs://lab/copy"
    if request.param == "s3":
        return f"{request.getfixturevalue('s3')}/copy"
    if request.param == "memory":
        return f"{request.getfixturevalue('memory_url')}/copy"
    return tmp_path / request.param


def test_there_and_back_again_the_bytes_are_the_same(tmp_path, target_url):
    source, features = make(tmp_path / "source")
    target = open_store(target_url, create=True, stage=True if "drive" in str(target_url) else None)
    done = copy(source, target, source.keys())
    assert (done.shards, done.shards_there, done.keys) == (4, 0, (KEY,))
    assert done.bytes == sum(entry.bytes for entry in source.collection(KEY).manifest().shards)
    assert shards(target) == shards(source)
    assert np.array_equal(target[KEY][:], features)
    assert target.stimuli("s-train") == source.stimuli("s-train")
    back = open_store(tmp_path / "back", create=True)
    copy(target, back, [KEY])
    assert shards(back) == shards(source)
    assert np.array_equal(back[KEY].gather([9, 0, 4]), features[[9, 0, 4]])


def test_what_is_there_is_passed_over(tmp_path):
    source, _ = make(tmp_path / "source")
    target = open_store(tmp_path / "target", create=True)
    copy(source, target, [KEY])
    again = copy(source, target, [KEY])
    assert (again.shards, again.shards_there, again.bytes) == (0, 4, 0)


def test_an_interrupted_copy_goes_on_and_what_had_arrived_is_committed(tmp_path, gcs):
    source, features = make(tmp_path / "source")
    gcs.fault("upload_start", "status", name="shard-00002.arrow", times=-1, status=403)
    target = open_store("gs://lab/copy", create=True)
    with pytest.raises(TransferFailed):
        copy(source, target, [KEY])
    gcs.clear()
    arrived = int(open_store("gs://lab/copy")[KEY].present.sum())
    done = copy(source, target, [KEY])
    assert done.shards >= 1
    assert done.shards_there * 3 >= arrived
    assert np.array_equal(target[KEY][:], features)


def test_bytes_damaged_on_their_way_are_fetched_again(tmp_path, gcs):
    source, features = make("gs://lab/source")
    target = open_store(tmp_path / "target", create=True)
    for fault in ("flip", "short", "reset"):
        gcs.fault("media", fault, name=r"\.arrow", skip=1)
    copy(source, target, [KEY])
    assert np.array_equal(target[KEY][:], features)


def test_a_damaged_source_is_an_error_that_names_the_shard(tmp_path):
    source, _ = make(tmp_path / "source")
    path = tmp_path / "source" / KEY / "shard-00001.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    target = open_store(tmp_path / "target", create=True)
    with pytest.raises(CorruptData, match=r"shard-00001.arrow cannot be copied"):
        copy(source, target, [KEY])
    assert not list(target.place.partials())
    assert f"{KEY}/shard-00001.arrow" not in shards(target)


def test_the_same_key_made_or_cut_in_another_way_is_refused(tmp_path):
    source, _ = make(tmp_path / "source")
    other, _ = make(tmp_path / "cut", rows_per_shard=4)
    with pytest.raises(ProvenanceMismatch, match="rows_per_shard"):
        copy(source, other, [KEY])
    other, _ = make(tmp_path / "made", identity={"weights": "others"})
    with pytest.raises(ProvenanceMismatch, match="weights"):
        copy(source, other, [KEY])
    other, _ = make(tmp_path / "images", rows=11)
    with pytest.raises(StimuliChanged):
        copy(source, other, [KEY])


def test_two_copies_at_once_end_in_one(tmp_path, gcs):
    source, features = make(tmp_path / "source", rows=30)
    targets = [open_store("gs://lab/copy", create=True) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda target: copy(source, target, [KEY]), targets))
    assert shards(targets[0]) == shards(source)
    assert np.array_equal(open_store("gs://lab/copy")[KEY][:], features)


def test_collections_are_chosen_by_key_or_pattern(tmp_path):
    store, _ = make(tmp_path / "source")
    for key in ("s-train/net/2.q", "s-train/other/2.k"):
        make(tmp_path / "source", key=key)
    assert select_keys(store, []) == sorted([KEY, "s-train/net/2.q", "s-train/other/2.k"])
    assert select_keys(store, ["*/net/*"]) == [KEY, "s-train/net/2.q"]
    assert select_keys(store, [KEY]) == [KEY]
    with pytest.raises(KeyNotFound, match="nothing-like-it"):
        select_keys(store, ["nothing-like-it"])


def test_progress_counts_what_was_there(tmp_path):
    source, _ = make(tmp_path / "source")
    target = open_store(tmp_path / "target", create=True)
    copy(source, target, [KEY])
    Path(tmp_path / "target" / KEY / "shard-00003.json").unlink()
    Path(tmp_path / "target" / KEY / "shard-00003.arrow").unlink()
    calls = []
    copy(source, target, [KEY], progress=lambda *call: calls.append(call))
    assert [call[:2] for call in calls] == [(4, 4)]
