"""What this process may use, and what is used: with fake machines, and with the one the test runs on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from brainenc.guard.nvml import GpuUse, Nvml
from brainenc.guard.probe import Host, Probe, anonymous_bytes, family, parse_meminfo, read_pressure, space
from brainenc.guard.testing import FakeTree, MemoryLimit, can_limit_memory, drop_cache

GB = 1 << 30
MEMINFO = b"""MemTotal:       1000 kB
MemFree:         100 kB
MemAvailable:    400 kB
SReclaimable:     60 kB
SUnreclaim:       10 kB
KernelStack:       5 kB
PageTables:        5 kB
Percpu:           20 kB
"""
needs_groups = pytest.mark.skipif(not can_limit_memory(), reason="needs root and a memory control group")


def test_the_host_is_told_from_available_memory():
    host = parse_meminfo(MEMINFO)

    assert (host.total, host.available) == (1_024_000, 409_600)
    assert host.kernel_share == pytest.approx(40 / 100)


def test_the_host_counts_when_it_is_fuller_than_the_group(tmp_path):
    tree = FakeTree(tmp_path, total=64 * GB, available=4 * GB)
    tree.v2("/job", {"/job": str(32 * GB)}, {"anon": GB, "shmem": 0})

    ram = Probe(root=tmp_path).ram()

    assert (ram.source, ram.limit, ram.used) == ("host", 64 * GB, 60 * GB)


def test_the_last_reading_of_the_host_stands_when_it_is_not_asked(tmp_path):
    readings = iter([Host(100, 90), Host(100, 10)])
    FakeTree(tmp_path)
    probe = Probe(root=tmp_path, host=lambda: next(readings))

    assert probe.ram(host=False).used == 10
    assert probe.ram().used == 90


def test_pressure_is_read_where_there_is_one(tmp_path):
    path = tmp_path / "memory.pressure"
    path.write_text("some avg10=1.50 avg60=0.00 avg300=0.00 total=9\nfull avg10=0.25 avg60=0.00 avg300=0.00 total=3\n")

    assert read_pressure(path) == (1.5, 0.25)
    assert read_pressure(tmp_path / "absent") is None


def test_space_of_a_folder_that_does_not_exist_yet_is_its_parents(tmp_path):
    found = space(tmp_path / "run" / "checkpoints")

    assert found.path == str(tmp_path)
    assert 0 < found.free <= found.total


def test_the_slack_of_torchs_allocator_is_not_used_memory():
    assert GpuUse("GPU-1", "T4", used=15, limit=16, slack=7).fraction == 0.5


class FakeNvml:
    """The driver's library with two devices, the second of which stops answering."""

    def __init__(self):
        self.lost = False

    def nvmlInit_v2(self):
        return 0

    def nvmlDeviceGetCount_v2(self, count):
        count._obj.value = 2
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, handle):
        handle._obj.value = index.value + 1
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid, handle):
        if uuid != b"GPU-2":
            return 6
        handle._obj.value = 2
        return 0

    def nvmlDeviceGetUUID(self, handle, text, size):
        text.value = b"GPU-%d" % handle.value
        return 0

    def nvmlDeviceGetName(self, handle, text, size):
        text.value = b"Fake T4"
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle, memory):
        memory._obj.total, memory._obj.used = 16 * GB, handle.value * GB
        return 15 if self.lost and handle.value == 2 else 0


def test_gpus_are_read_over_all_processes():
    assert Nvml(FakeNvml()).look({"GPU-2": GB}) == [
        GpuUse("GPU-1", "Fake T4", GB, 16 * GB, 0),
        GpuUse("GPU-2", "Fake T4", 2 * GB, 16 * GB, GB),
    ]


def test_only_the_devices_of_this_process_are_read():
    assert [gpu.uuid for gpu in Nvml(FakeNvml(), uuids=["GPU-2", "GPU-9"]).look()] == ["GPU-2"]
    assert Nvml(FakeNvml(), uuids=[]).look() == []


def test_a_gpu_that_stops_answering_is_left_out():
    library = FakeNvml()
    nvml = Nvml(library)
    library.lost = True

    assert [gpu.uuid for gpu in nvml.look()] == ["GPU-1"]


def test_this_machine_is_read_whole(tmp_path):
    probe = Probe(disks=[tmp_path])
    reading = probe.read()
    probe.close()

    assert 0 < reading.ram.used < reading.ram.limit
    assert reading.process_bytes > 1 << 20
    assert reading.disks[0].free > 0
    assert reading.to_dict()["ram"]["fraction"] == round(reading.ram.fraction, 4)


_COUNTED = """
import mmap, os, sys
from brainenc.guard.probe import anonymous_bytes
before = anonymous_bytes(os.getpid())
with open(sys.argv[1], "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
    assert sum(mapped[:: mmap.PAGESIZE]) > 0
    with_map = anonymous_bytes(os.getpid())
held = bytearray(b"\\1") * (64 << 20)
print(with_map - before, anonymous_bytes(os.getpid()) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_anonymous_memory_is_counted_and_mapped_files_are_not(tmp_path):
    """In a process of its own: one that has run a thousand tests frees memory of theirs at any moment."""
    path = tmp_path / "mapped"
    path.write_bytes(os.urandom(1 << 20) * 64)
    done = subprocess.run(
        [sys.executable, "-c", _COUNTED, str(path)], capture_output=True, text=True, check=True, timeout=60,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    by_map, by_heap = map(int, done.stdout.split())

    assert by_map < 8 << 20
    assert by_heap >= 60 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_familys_members_are_found():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert child.pid in family(os.getpid())
    finally:
        child.communicate(b"\n", timeout=10)
    assert anonymous_bytes(child.pid) == 0


_INSIDE = """
import sys
from pathlib import Path
from brainenc.guard.probe import Probe
held = bytearray(b"\\1") * (64 << 20)
data = Path(sys.argv[1]).read_bytes if False else None
with open(sys.argv[1], "rb") as file:
    while file.read(1 << 20): pass
ram = max(Probe().levels()[:-1], key=lambda level: level.fraction)
print(ram.used, ram.limit)
"""


@needs_groups
@pytest.mark.root
def test_inside_a_real_group_the_page_cache_does_not_count(tmp_path):
    """64 MB of heap and 400 MB read from files below a limit of 256 MB: a quarter is used, not all of it."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 << 20) * 400)
    drop_cache([path])
    with MemoryLimit(256 << 20) as limit:
        done = subprocess.run(
            [sys.executable, "-c", _INSIDE, str(path)], preexec_fn=limit.enter, capture_output=True, text=True,
            check=True, cwd=Path(__file__).parents[2], timeout=60,
        )  # fmt: skip
        used, found_limit = map(int, done.stdout.split())

    assert found_limit == 256 << 20
    assert 64 << 20 <= used < 100 << 20


@pytest.mark.parametrize("version", [1, 2])
def test_a_gauge_reads_what_is_used_and_no_page_cache(tmp_path, version):
    tree = FakeTree(tmp_path)
    tree.file("proc/meminfo", "MemTotal: 64000000 kB\nMemFree: 5 kB\nMemAvailable: 16000000 kB\n")
    if version == 1:
        tree.v1("/job", {"/job": 10 * GB}, {"total_rss": 5 * GB})
        tree.file("sys/fs/cgroup/memory/job/memory.kmem.usage_in_bytes", f"{GB}\n")
    else:
        tree.v2("/job", {"/job": str(10 * GB)}, {"anon": 5 * GB, "kernel": 2 * GB, "slab_reclaimable": GB})
    probe = Probe(root=tmp_path)
    job, host = probe.gauges()
    assert (job.read(), host.read()) == (6 * GB, 48_000_000 * 1024)

    if version == 1:
        tree.file("sys/fs/cgroup/memory/job/memory.stat", f"total_cache {9 * GB}\ntotal_rss {6 * GB}\ntotal_shmem 7\n")
    else:
        lines = f"anon {6 * GB}\nfile {9 * GB}\nkernel {2 * GB}\nshmem 7\nslab_reclaimable {GB}\nanon_thp {GB}\n"
        tree.file("sys/fs/cgroup/job/memory.stat", lines)
    tree.file("proc/meminfo", "MemTotal: 64000000 kB\nMemFree: 5 kB\nMemAvailable: 15000000 kB\n")

    assert (job.read(), host.read()) == (7 * GB + 7, 49_000_000 * 1024)


_GAUGE = """
from brainenc.guard.probe import Probe
probe = Probe()
gauge = probe.gauges()[0]
before, kept = gauge.read(), b"1" * (50 << 20)
print(gauge.read() - before, probe.levels()[0].used - gauge.read())
"""


@needs_groups
@pytest.mark.root
def test_inside_a_real_group_a_gauge_sees_what_is_allocated():
    with MemoryLimit(256 << 20) as limit:
        done = subprocess.run(
            [sys.executable, "-c", _GAUGE], preexec_fn=limit.enter, capture_output=True, text=True, check=True,
            cwd=Path(__file__).parents[2], timeout=60,
        )  # fmt: skip
    grown, off = map(int, done.stdout.split())

    assert 50 << 20 <= grown < 54 << 20
    assert abs(off) < 2 << 20


def test_the_limits_alone_are_had_without_looking_at_processes(tmp_path):
    """What the watcher tells every second: a training has a hundred threads to ask otherwise."""
    FakeTree(tmp_path).file("proc/7/statm", "100 90 10 0 0 0 0\n")
    probe = Probe(root=tmp_path, pid=7, disks=[tmp_path], nvml=Nvml(uuids=[]))

    whole, limits = probe.read(), probe.read(limits_only=True)

    assert (whole.process_bytes > 0, len(whole.disks)) == (True, 1)
    assert (limits.ram, limits.levels) == (whole.ram, whole.levels)
    assert (limits.process_bytes, limits.family_bytes, limits.disks, limits.shm) == (0, 0, (), None)
