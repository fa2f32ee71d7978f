"""A whole feature store on an object store: many writers, a bad network, deaths, and what readers see."""

import hashlib
import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from brainenc.errors import CacheTooSmall, CorruptData, ShardSealed
from brainenc.featurestore import StimulusSet, open_store
from brainenc.featurestore.recovery import repair, verify

KEY, ROWS, ROW, PER_SHARD = "s-train/net/1.q", 24, (300, 7), 3


def features():
    return np.random.default_rng(0).standard_normal((ROWS, *ROW)).astype(np.float16)


def collection_in(store):
    store.add_stimuli(StimulusSet.from_ids("s-train", [f"i{n}" for n in range(ROWS)]))
    return store.create_collection(
        KEY, identity={"weights": "w"}, rows_per_shard=PER_SHARD, row_shape=ROW, dtype="float16"
    )


def write_all(store, order=range(ROWS // PER_SHARD)):
    """One writer that was given all the work."""
    collection = collection_in(store)
    data = features()
    for shard in order:
        try:
            with collection.shard_writer(shard) as writer:
                rows = collection.rows(shard)
                writer.append(data[rows.start : rows.stop])
                writer.seal()
        except ShardSealed:
            continue
        collection.commit()
    return collection.commit()


def objects(place):
    """Name -> hash of all but the numbered commits, whose number tells who came when."""
    return {
        entry.name: hashlib.sha256(place.read(entry.name)).hexdigest()
        for entry in place.list()
        if "manifest" not in entry.name
    }


@pytest.fixture
def undisturbed(tmp_path):
    store = open_store(tmp_path / "undisturbed", create=True)
    write_all(store)
    return objects(store.place)


@pytest.fixture(params=["memory", "gs", "s3"])
def url(request):
    if request.param == "memory":
        return f"{request.getfixturevalue('memory_url')}/store"
    if request.param == "gs":
        request.getfixturevalue("gcs")
        return "gs://lab/store"
    return f"{request.getfixturevalue('s3')}/store"


def test_the_store_is_byte_equal_to_a_local_one(url, undisturbed):
    store = open_store(url, create=True)
    write_all(store)
    assert objects(store.place) == undisturbed


@pytest.mark.parametrize("cache_bytes", [None, 0], ids=["whole shards", "ranges"])
def test_readers_see_the_rows(url, cache_bytes):
    write_all(open_store(url, create=True))
    view = open_store(url, cache_bytes=cache_bytes)[KEY]
    data = features()
    assert np.array_equal(view[:], data)
    assert np.array_equal(view[5], data[5])
    order = np.random.default_rng(1).permutation(ROWS)
    out = np.empty_like(data)
    view.prefetch(order[:4])
    view.gather(order, out=out)
    assert np.array_equal(out, data[order])


def test_a_cache_below_one_shard_is_refused_at_open_with_both_sizes(gcs):
    write_all(open_store("gs://lab/store", create=True))
    with pytest.raises(CacheTooSmall, match=r"may hold 1000 bytes, but one shard takes \d+"):
        open_store("gs://lab/store", cache_bytes=1000)[KEY]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("cache_bytes", [None, 0], ids=["whole shards", "ranges"])
def test_a_forked_process_reads_with_a_connection_of_its_own(gcs, cache_bytes):
    write_all(open_store("gs://lab/store", create=True))
    view = open_store("gs://lab/store", cache_bytes=cache_bytes)[KEY]
    view.gather([0, 1])
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=lambda: answers.put(np.array_equal(view[:], features())))
    child.start()
    assert answers.get(timeout=60)
    child.join(20)
    assert np.array_equal(view[:], features())


def test_ranged_reads_fetch_little(gcs):
    write_all(open_store("gs://lab/store", create=True))
    view = open_store("gs://lab/store", cache_bytes=0)[KEY]
    gcs.clear()
    assert np.array_equal(view.gather([7]), features()[[7]])
    assert [entry.name for entry in gcs.log if entry.name.endswith(".arrow")] == [
        "lab/store/s-train/net/1.q/shard-00002.arrow"
    ]
    assert all(entry.range for entry in gcs.log if entry.name.endswith(".arrow"))


@pytest.mark.parametrize("cache_bytes", [None, 0], ids=["whole shards", "ranges"])
@pytest.mark.parametrize("fault", ["flip", "short", "truncate", "reset", "status"])
def test_readers_get_right_bytes_over_a_bad_network(gcs, fault, cache_bytes):
    write_all(open_store("gs://lab/store", create=True))
    gcs.fault("media", fault, name=r"\.arrow", times=2)
    view = open_store("gs://lab/store", cache_bytes=cache_bytes)[KEY]
    assert np.array_equal(view[:], features())


@pytest.mark.parametrize("cache_bytes", [None, 0], ids=["whole shards", "ranges"])
def test_bytes_that_are_wrong_for_good_are_never_handed_out(gcs, cache_bytes):
    write_all(open_store("gs://lab/store", create=True))
    stored = gcs.service.buckets["lab"][f"store/{KEY}/shard-00001.arrow"]
    middle = len(stored.data) // 2
    stored.data = stored.data[:middle] + bytes([stored.data[middle] ^ 8]) + stored.data[middle + 1 :]
    view = open_store("gs://lab/store", cache_bytes=cache_bytes)[KEY]
    with pytest.raises(CorruptData, match="shard-00001"):
        view.gather(range(ROWS))
    assert np.array_equal(view.gather([0, 9]), features()[[0, 9]])


def test_a_damaged_object_is_found_and_made_again(gcs, undisturbed):
    store = open_store("gs://lab/store", create=True)
    write_all(store)
    stored = gcs.service.buckets["lab"][f"store/{KEY}/shard-00004.arrow"]
    stored.data = stored.data[:-40]
    found = verify(store)
    assert [finding.shard for finding in found.findings] == [4]
    assert repair(store, found.findings) == []
    write_all(store)
    assert verify(store).whole
    assert objects(store.place) == undisturbed


def test_sixteen_writers_with_all_the_work_end_with_each_row_once(gcs, undisturbed):
    """Lost answers, resets and errors among them; the right bytes, and no more of them than one writer makes."""
    for fault, op in (("commit_reset", "upload_simple"), ("commit_reset", "upload_chunk"), ("reset", "upload_.*"),
                      ("status", ".*"), ("commit_status", "upload_simple"), ("reset", "list")):  # fmt: skip
        for skip in (4, 9, 23):
            gcs.fault(op, fault, skip=skip)

    def writer(number):
        order = np.random.default_rng(number).permutation(ROWS // PER_SHARD)
        return write_all(open_store("gs://lab/store", create=True), order)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(writer, range(16)))
    store = open_store("gs://lab/store")
    assert objects(store.place) == undisturbed
    assert [entry.shard for entry in store.collection(KEY).manifest().shards] == list(range(ROWS // PER_SHARD))
    size = sum(len(one.data) for name, one in gcs.service.buckets["lab"].items() if name.endswith(".arrow"))
    assert size <= 1.3 * features().nbytes  # frames of these tiny shards; see the size test of real ones
    assert np.array_equal(store[KEY][:], features())


WRITER = """
import sys
from tests.featurestore.test_remote_store import open_store, write_all
import numpy as np
order = np.random.default_rng(int(sys.argv[2])).permutation(8)
write_all(open_store(sys.argv[1], create=True), order)
"""


def start_writer(url, seed, cache):
    environment = os.environ | {"BRAINENC_CACHE": str(cache), "PYTHONPATH": os.getcwd()}
    return subprocess.Popen([sys.executable, "-c", WRITER, url, str(seed)], env=environment)


@pytest.mark.chaos
def test_processes_killed_at_any_moment_lose_nothing(gcs, tmp_path, undisturbed):
    """Two processes on two 'machines', killed again and again at growing times, then one that finishes."""
    gcs.latency = 0.01
    for n in range(10):
        writers = [start_writer("gs://lab/store", n * 2 + i, tmp_path / f"machine-{i}") for i in range(2)]
        time.sleep(0.8 + 0.15 * n)
        for each in writers:
            each.kill()
            each.wait()
    gcs.latency = 0.0
    last = start_writer("gs://lab/store", 0, tmp_path / "machine-0")
    assert last.wait(120) == 0
    store = open_store("gs://lab/store")
    assert objects(store.place) == undisturbed
    assert verify(store).whole
    assert np.array_equal(store[KEY][:], features())


@pytest.mark.chaos
def test_four_processes_at_once_end_with_each_row_once(gcs, tmp_path, undisturbed):
    for skip in range(0, 60, 5):
        gcs.fault("upload_.*", "commit_reset", skip=skip)
    writers = [start_writer("gs://lab/store", seed, tmp_path / f"machine-{seed}") for seed in range(4)]
    assert [each.wait(180) for each in writers] == [0] * 4
    store = open_store("gs://lab/store")
    assert objects(store.place) == undisturbed
    assert np.array_equal(store[KEY][:], features())


@pytest.mark.chaos
def test_a_hang_in_every_kind_of_request_is_survived(gcs, tmp_path, undisturbed, monkeypatch):
    """One after the other: a server that never answers, with the time limit of the silence shortened."""
    from brainenc.featurestore.services import patience

    monkeypatch.setattr(patience.Patience.__init__, "__kwdefaults__", {
        **patience.Patience.__init__.__kwdefaults__, "silence_s": 0.5})  # fmt: skip
    for n, op in enumerate(("upload_simple", "upload_start", "upload_chunk", "media", "stat", "list")):
        gcs.fault(op, "hang", skip=n)
    store = open_store("gs://lab/store", create=True)
    write_all(store)
    assert np.array_equal(store[KEY][:], features())
    assert objects(store.place) == undisturbed
