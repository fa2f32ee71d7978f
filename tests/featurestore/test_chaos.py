"""Power cuts, full disks and memory limits of the real kind; kills of real processes."""

import contextlib
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from brainenc.errors import NoSpace
from brainenc.featurestore import open_store
from brainenc.featurestore.recovery import debris, gc, verify
from brainenc.guard.testing import MemoryLimit, can_limit_memory, drop_cache
from tests.featurestore.disks import LossyDisk, can_mount
from tests.featurestore.faults import extract_all, problems, public
from tests.featurestore.making import KEY, fill, ids, make_collection, tree, values

pytestmark = pytest.mark.chaos


@functools.cache
def _mountable():
    return can_mount()


@pytest.fixture
def needs_mounts():
    if not _mountable():
        pytest.skip("needs root and loop devices")


_WRITER = """
import os, sys
from pathlib import Path
from tests.featurestore.faults import extract_all
from tests.featurestore.making import KEY, fill, make_collection, values
if sys.argv[2] == "no flush":
    os.fsync = lambda fd: None
folder, rows = Path(sys.argv[1]), values(400, (5000,))
collection = make_collection(folder, 400, row_shape=(5000,), rows_per_shard=8)
for shard in sorted(set(range(50)) - collection.sealed()):
    fill(collection, rows, shards=[shard])
    print(shard, flush=True)
    if shard % 10 == 9:
        collection.commit()
        print(f"commit {shard}", flush=True)
"""


def _write_until_the_power_goes(disk, rng, how):
    """Returns the shards whose seal had returned before the cut, and the last shard of the last commit that had."""
    command = [sys.executable, "-c", _WRITER, str(disk.folder / "store"), how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        first = child.stdout.readline()
        time.sleep(rng.uniform(0, 0.4))
        disk.cut()  # whatever is said from here on may or may not have been durable: it came through the pipe before
        child.kill()
        return first + child.stdout.read()


def _acknowledged_before_the_cut(said):
    """All but the very last line, which may have been written to the pipe while the power went."""
    lines = said.splitlines()[:-1]
    shards = {int(line) for line in lines if not line.startswith("commit")}
    commits = [int(line.split()[1]) for line in lines if line.startswith("commit")]
    return shards, commits[-1] if commits else None


@pytest.mark.root
def test_what_was_sealed_survives_a_power_cut(needs_mounts):
    """At random moments, twenty times; after each the same command finishes."""
    rng = random.Random(1)
    for attempt in range(20):
        with LossyDisk(64) as disk:
            said = _write_until_the_power_goes(disk, rng, "flush")
            disk.power_on()
            shards, committed = _acknowledged_before_the_cut(said)
            folder = disk.folder / "store"
            assert problems(folder, shards) == [], f"attempt {attempt}: {said.split()}"
            collection = make_collection(folder, 400, row_shape=(5000,), rows_per_shard=8)
            if committed is not None:
                assert len(collection.manifest().shards) >= committed + 1
            rows = values(400, (5000,))
            fill(collection, rows, shards=sorted(set(range(50)) - collection.sealed()))
            collection.commit()
            np.testing.assert_array_equal(collection.view()[:], rows)


@pytest.mark.root
def test_the_power_cut_sees_a_store_that_does_not_flush(needs_mounts):
    """A test of the test above: the same writer with flushes left out loses what it had sealed."""
    rng, seen = random.Random(2), 0
    for _ in range(5):
        with LossyDisk(64) as disk:
            said = _write_until_the_power_goes(disk, rng, "no flush")
            disk.power_on()
            seen += bool(problems(disk.folder / "store", _acknowledged_before_the_cut(said)[0]))
        if seen:
            break
    assert seen


@pytest.mark.root
def test_a_disk_that_fills_up_half_way_ends_clearly_and_the_same_command_finishes(needs_mounts):
    """On a real, small file system; nothing half-written is left, and what was sealed stays."""
    rows = values(400, (5000,))
    with LossyDisk(24) as disk:
        folder, ballast = disk.folder / "store", disk.folder / "ballast"
        collection = make_collection(folder, 400, row_shape=(5000,), rows_per_shard=100)
        ballast.write_bytes(b"x" * (shutil.disk_usage(disk.folder).free - (5 << 19)))
        with pytest.raises(NoSpace, match=r"No space left.*needed.*free.*same command again"):
            fill(collection, rows)
        before = {name: data for name, data in tree(folder).items() if "shard" in name}
        sealed = collection.sealed()
        assert 0 < len(sealed) < 4
        assert problems(folder, sealed) == []
        assert not [name for name in tree(folder) if name.endswith(".partial")]
        ballast.unlink()

        fill(collection, rows, shards=sorted(set(range(4)) - sealed))
        collection.commit()
        np.testing.assert_array_equal(collection.view()[:], rows)
        assert before.items() <= tree(folder).items()


_EPOCHS = """
import json, sys
import numpy as np
from brainenc.featurestore import open_store
from tests.featurestore.making import KEY
view, seen = open_store(sys.argv[1])[KEY], []
out, rng, total = np.zeros((32, *view.shape[1:]), view.dtype), np.random.default_rng(0), 0.0
for epoch in range(10):
    order = rng.permutation(len(view))
    for start in range(0, len(order), 32):
        rows = order[start : start + 32]
        view.prefetch(order[start + 32 : start + 64])
        view.gather(rows, out=out[: len(rows)])
        total += float(out[0, 0]) + float(view[int(rows[0])][0])
    with open("/proc/self/status") as status:
        seen.append(next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon")))
print(json.dumps(seen))
"""


@pytest.mark.root
def test_ten_epochs_over_three_times_the_memory_limit_in_flat_anonymous_memory(tmp_path):
    if not can_limit_memory():
        pytest.skip("needs root and a memory control group")
    limit_bytes, row = 256 << 20, 500_000
    n = 3 * limit_bytes // (2 * row) + 1
    batch = values(32, (row,)).astype(np.float16)
    with open_store(tmp_path, create=True).writer(KEY, ids=ids(n), row_shape=(row,), rows_per_shard=64) as writer:
        for start in range(0, n, 32):
            writer.append(batch[: min(32, n - start)])
    drop_cache(sorted((tmp_path / KEY).glob("shard-*.arrow")))
    with MemoryLimit(limit_bytes) as limit:
        command = [sys.executable, "-c", _EPOCHS, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit.enter, check=True, timeout=250)
        kills = limit.oom_kills()
    seen = json.loads(done.stdout)
    assert kills == 0
    assert len(seen) == 10
    assert max(seen[1:]) - seen[0] < 8 << 20, seen


_WRITE_ALL = """
import sys
from pathlib import Path
from tests.featurestore.faults import extract_all
extract_all(Path(sys.argv[1]), acknowledge=lambda shard: print(shard, flush=True))
"""


def test_kill_9_at_random_moments(tmp_path):
    """Of a real process, by a real signal, sixty times."""
    extract_all(tmp_path / "calm")
    calm, rng = tree(tmp_path / "calm"), random.Random(0)
    for attempt in range(60):
        folder = tmp_path / str(attempt)
        command = [sys.executable, "-c", _WRITE_ALL, str(folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            said = child.stdout.readline() if rng.random() < 0.5 else ""
            time.sleep(rng.uniform(0, 0.01) if said else rng.uniform(0.2, 0.5))
            child.send_signal(signal.SIGKILL)
            said += child.stdout.read()
        if folder.exists():
            assert problems(folder, {int(line) for line in said.split()}) == [], f"attempt {attempt}"
        extract_all(folder)
        assert public(tree(folder)) == calm, f"attempt {attempt}"
        shutil.rmtree(folder)


def test_many_real_writers_killed_at_random_leave_a_good_store(tmp_path):
    """Four processes given all the work, killed and started again until all is there."""
    rows, rng = values(400, (5000,)), random.Random(3)
    folder = tmp_path / "store"
    make_collection(folder, 400, row_shape=(5000,), rows_per_shard=8)
    command = [sys.executable, "-c", _WRITER, str(folder), "flush"]
    for _ in range(8):
        writers = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(4)]
        time.sleep(rng.uniform(0.5, 1.2))
        for writer in writers:
            writer.kill()
            writer.wait()
        assert problems(folder) == []
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True, timeout=120)
    collection = open_store(folder).collection(KEY)
    collection.commit()
    np.testing.assert_array_equal(collection.view()[:], rows)
    store = open_store(folder)
    gc(store, list(debris(store, just_opened_s=0)))
    assert verify(store).whole
    ideal = sum(entry.bytes for entry in collection.manifest().shards)
    assert sum(p.stat().st_size for p in folder.rglob("*.arrow*") if "stimuli" not in p.name) <= 1.01 * ideal


@pytest.mark.soak
def test_a_shard_beyond_four_gibibytes_and_two_to_the_31_values_is_written_sealed_and_read(tmp_path):
    """Not framed around a hole, but written row by row, read back and checked."""
    n, row = 2200, 1_000_000
    if shutil.disk_usage(tmp_path).free < 12 << 30:
        pytest.skip("needs 12 GiB of free disk")
    collection = make_collection(tmp_path, n, row_shape=(row,), rows_per_shard=n, allow_64bit=True)
    batch = values(20, (row,)).astype(np.float16)
    with collection.shard_writer(0) as writer:
        for start in range(0, n, 20):
            batch[:, 0] = np.arange(start, start + 20) % 2048
            writer.append(batch)
        receipt = writer.seal()
    assert receipt.bytes > 4 << 30
    collection.commit()
    view = collection.view()
    np.testing.assert_array_equal(
        view.gather(np.arange(n)[::-97])[:, 0], (np.arange(n)[::-97] % 2048).astype(np.float16)
    )
    np.testing.assert_array_equal(view[n - 1][1:], batch[-1][1:])
    with contextlib.suppress(FileNotFoundError):
        os.unlink(tmp_path / KEY / "shard-00000.arrow")
