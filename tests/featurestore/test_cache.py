"""The cache of shards: bounded, verified, shared by the threads and processes of a host."""

import multiprocessing
import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from brainenc.errors import CacheTooSmall, CorruptData, NoSpace, TransferFailed
from brainenc.featurestore.cache import DiskCache, open_cache
from brainenc.units import parse_bytes

SIZE = 100_000


class FakePlace:
    """Files in a dictionary; remembers what was read, and may answer wrongly a few times."""

    url = "fake://place"

    def __init__(self, **files):
        self.files = {name: files[name] for name in files}
        self.reads, self.wrong, self.delay = [], 0, 0.0
        self._lock = threading.Lock()

    def read(self, name, start=0, end=None):
        with self._lock:
            self.reads.append((name, start, end))
            wrong, self.wrong = self.wrong > 0, max(0, self.wrong - 1)
        time.sleep(self.delay)
        data = self.files[name][start:end]
        return bytes([data[0] ^ 1]) + data[1:] if wrong else data

    def check(self, name):
        want = xxhash.xxh3_128_hexdigest(self.files[name])

        def compare(path: Path) -> None:
            if xxhash.xxh3_128_hexdigest(path.read_bytes()) != want:
                raise CorruptData(f"{path} is not {name}")

        return compare

    def fetch(self, cache, name):
        return cache.fetch(self, name, size=len(self.files[name]), check=self.check(name))


@pytest.fixture
def place():
    return FakePlace(**{f"s{i}": os.urandom(SIZE) for i in range(8)})


def test_a_copy_is_fetched_once_and_has_the_bytes(place, tmp_path):
    cache = DiskCache(tmp_path, 10 * SIZE)
    first = place.fetch(cache, "s0")
    assert first.read_bytes() == place.files["s0"]
    assert place.fetch(cache, "s0") == first
    assert len(place.reads) == 1


def test_large_files_come_in_pieces(tmp_path):
    data = os.urandom(20 * 2**20 + 3)
    place = FakePlace(big=data)
    assert place.fetch(DiskCache(tmp_path, "100MiB"), "big").read_bytes() == data
    assert len(place.reads) == 3


def test_the_least_recently_used_copy_goes_first(place, tmp_path):
    cache = DiskCache(tmp_path, 3 * SIZE)
    paths = {name: place.fetch(cache, name) for name in ("s0", "s1", "s2")}
    time.sleep(0.01)
    place.fetch(cache, "s0")
    place.fetch(cache, "s3")
    assert not paths["s1"].exists(), "the oldest use"
    assert paths["s0"].exists()
    assert paths["s2"].exists()
    assert cache.used() == 3 * SIZE


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 5000), min_size=1, max_size=6),
    uses=st.lists(st.integers(0, 5), max_size=30),
    spare=st.integers(0, 6000),
)
def test_the_budget_holds_for_any_sequence_of_uses(tmp_path_factory, sizes, uses, spare):
    place = FakePlace(**{f"s{i}": os.urandom(n) for i, n in enumerate(sizes)})
    cache = DiskCache(tmp_path_factory.mktemp("cache"), max(sizes) + spare)
    for use in uses:
        name = f"s{use % len(sizes)}"
        assert place.fetch(cache, name).read_bytes() == place.files[name]
        assert cache.used() <= cache.budget


def test_a_budget_below_one_shard_is_refused_with_both_sizes(place, tmp_path):
    with pytest.raises(CacheTooSmall, match=f"{SIZE - 1} bytes.*{SIZE}"):
        place.fetch(DiskCache(tmp_path, SIZE - 1), "s0")
    assert place.reads == []


def test_the_default_budget_is_half_of_what_is_free(tmp_path):
    stat = os.statvfs(tmp_path)
    assert open_cache(tmp_path).budget == pytest.approx(stat.f_bavail * stat.f_frsize / 2, rel=0.1)
    assert open_cache(tmp_path, "20GB").budget == parse_bytes("20GB")


def test_wrong_bytes_are_fetched_again(place, tmp_path):
    place.wrong = 2
    assert place.fetch(DiskCache(tmp_path, "1MB"), "s0").read_bytes() == place.files["s0"]
    assert len(place.reads) == 3


def test_bytes_that_stay_wrong_are_an_error_and_leave_nothing(place, tmp_path):
    cache = DiskCache(tmp_path, "1MB")
    place.wrong = 1000
    with pytest.raises(CorruptData):
        place.fetch(cache, "s0")
    assert cache.used() == 0


def test_a_file_shorter_than_its_manifest_says_is_an_error(place, tmp_path):
    with pytest.raises(TransferFailed, match="should have 100001 bytes"):
        DiskCache(tmp_path, "1MB").fetch(place, "s0", size=SIZE + 1, check=lambda path: None)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_copy_damaged_on_the_local_disk_is_found_by_the_next_process(place, tmp_path, damage):
    path = place.fetch(DiskCache(tmp_path, "1MB"), "s0")
    data = bytearray(path.read_bytes())
    data[50] ^= 4
    path.write_bytes({"flip": bytes(data), "cut": data[:-1], "empty": b""}[damage])
    later = DiskCache(tmp_path, "1MB")  # as another process would: it has verified nothing yet
    assert place.fetch(later, "s0").read_bytes() == place.files["s0"]


def test_the_same_name_with_other_content_is_not_taken_for_the_old_one(place, tmp_path):
    place.fetch(DiskCache(tmp_path, "1MB"), "s0")
    place.files["s0"] = os.urandom(SIZE)
    assert place.fetch(DiskCache(tmp_path, "1MB"), "s0").read_bytes() == place.files["s0"]


def test_what_a_dead_process_was_filling_is_removed(place, tmp_path):
    cache = DiskCache(tmp_path, 2 * SIZE)
    debris = tmp_path / ("ab" * 16 + ".0123abcd.filling")
    debris.write_bytes(bytes(2 * SIZE))
    place.fetch(cache, "s0")
    assert not debris.exists()


def test_a_failed_fill_leaves_nothing_behind(place, tmp_path):
    cache = DiskCache(tmp_path, "1MB")
    place.read = lambda *_: (_ for _ in ()).throw(TransferFailed("gone"))
    with pytest.raises(TransferFailed):
        place.fetch(cache, "s0")
    assert cache.used() == 0


def test_a_full_disk_evicts_and_then_says_so(place, tmp_path, monkeypatch):
    cache = DiskCache(tmp_path, 10 * SIZE)
    place.fetch(cache, "s0")
    real = os.posix_fallocate
    room = [SIZE]

    def fallocate(fd, offset, length):
        used = sum(p.stat().st_size for p in tmp_path.glob("*") if p.is_file())
        if used + length > room[0]:
            raise OSError(28, "No space left on device")
        real(fd, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    assert place.fetch(cache, "s1").exists(), "made room by evicting"
    room[0] = 0
    with pytest.raises(NoSpace, match="BRAINENC_CACHE"):
        place.fetch(cache, "s2")


def test_threads_that_want_the_same_copy_fetch_it_once(place, tmp_path):
    place.delay = 0.05
    cache = DiskCache(tmp_path, "1MB")
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(lambda _: place.fetch(cache, "s0"), range(8)))
    assert len(paths) == 1
    assert len(place.reads) == 1


def test_threads_share_a_budget_of_one_shard_without_a_deadlock(place, tmp_path):
    cache = DiskCache(tmp_path, SIZE)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda i: place.fetch(cache, f"s{i % 6}"), range(30)))
    assert cache.used() <= SIZE


def test_evict_empties_it(place, tmp_path):
    cache = DiskCache(tmp_path, "1MB")
    for i in range(4):
        place.fetch(cache, f"s{i}")
    assert cache.evict(keep=2 * SIZE) == 2 * SIZE
    assert cache.evict() == 2 * SIZE
    assert cache.used() == 0


def test_pickles_as_folder_and_budget(place, tmp_path):
    cache = DiskCache(tmp_path, "1MB")
    place.fetch(cache, "s0")
    again = pickle.loads(pickle.dumps(cache))
    assert (again.folder, again.budget) == (cache.folder, cache.budget)
    place.fetch(again, "s0")
    assert len(place.reads) == 1


def _fill_all(folder, source, seed, problems):
    """One process: fetches random shards from a folder and compares them, in a cache of three shards."""
    import random

    place = FakePlace(**{path.name: path.read_bytes() for path in Path(source).iterdir()})
    cache = DiskCache(Path(folder), 3 * SIZE)
    pick = random.Random(seed)
    for _ in range(40):
        name = pick.choice(sorted(place.files))
        for _ in range(100):
            try:
                data = place.fetch(cache, name).read_bytes()
                break
            except FileNotFoundError:  # evicted between the fetch and the read, as documented
                continue
        if data != place.files[name]:
            problems.put(f"{name} is wrong")
        if cache.used() > cache.budget:
            problems.put("over budget")
    problems.put("done")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_processes_share_one_folder_and_one_budget(place, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name, data in place.files.items():
        (source / name).write_bytes(data)
    context = multiprocessing.get_context("fork")
    problems = context.Queue()
    arguments = [(tmp_path / "cache", source, seed, problems) for seed in range(3)]
    workers = [context.Process(target=_fill_all, args=each) for each in arguments]
    for worker in workers:
        worker.start()
    found = [problems.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(20)
    assert found == ["done"] * 3
    assert problems.empty()


def _die_while_filling(folder, data):
    place = FakePlace(s0=data)
    place.read = lambda *_: os._exit(9)
    place.fetch(DiskCache(Path(folder), SIZE), "s0")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_killed_while_filling_blocks_nobody(place, tmp_path):
    context = multiprocessing.get_context("fork")
    victim = context.Process(target=_die_while_filling, args=(tmp_path, place.files["s0"]))
    victim.start()
    victim.join(20)
    assert victim.exitcode == 9
    assert any(path.suffix == ".filling" for path in tmp_path.iterdir())
    cache = DiskCache(tmp_path, SIZE)
    assert place.fetch(cache, "s0").read_bytes() == place.files["s0"]
    assert cache.used() == SIZE
