"""What will not work on a machine: each trouble is seen, and told with a way out."""

from dataclasses import replace

import pytest

from brainenc.guard.machine import Folder, Machine, examine, file_system, troubles
from brainenc.guard.nvml import GpuUse
from brainenc.guard.probe import MemoryUse, Reading, Space

GB = 1_000_000_000
GOOD_READING = Reading(
    ram=MemoryUse(5 * GB, 64 * GB, "host"), levels=(MemoryUse(5 * GB, 64 * GB, "host"),),
    gpus=(GpuUse("GPU-1", "T4", 0, 16 * GB),), shm=Space(path="/dev/shm", free=32 * GB, total=32 * GB),
)  # fmt: skip
GOOD = Machine(
    system="Linux", python="3.11", cores=8, colab=False, versions={"ray": "2.60"}, reading=GOOD_READING,
    host_memory=64 * GB, folders=(Folder(path="/data", file_system="ext4", free=500 * GB, total=1000 * GB),),
    ray_threshold=0.95, ray_address="", bytecode=True, why_not_compiled="",
)  # fmt: skip


def in_folder(**changes):
    return replace(GOOD, folders=(replace(GOOD.folders[0], **changes),))


def with_reading(**changes):
    return replace(GOOD, reading=replace(GOOD_READING, **changes))


def test_a_good_machine_has_no_troubles():
    assert troubles(GOOD) == []


@pytest.mark.parametrize(
    ("machine", "part"),
    [
        (with_reading(ram=MemoryUse(GB, 12 * GB, "cgroup v2 /x")), "limited to 12 GB by cgroup v2 /x"),
        (replace(with_reading(ram=MemoryUse(GB, 2 * GB, "host")), host_memory=2 * GB), "--workers 0"),
        (with_reading(ram=MemoryUse(50 * GB, 64 * GB, "host")), "78% of memory is used already"),
        (with_reading(gpus=()), "No GPU is visible"),
        (with_reading(shm=Space(path="/dev/shm", free=1, total=64_000_000)), "--shm-size"),
        (replace(GOOD, bytecode=False), "PYTHONDONTWRITEBYTECODE"),
        (replace(GOOD, versions={}), "Ray is not installed"),
        (replace(GOOD, ray_threshold=0.8), "Ray's memory monitor kills workers at 80%"),
        (in_folder(file_system="fuse.drive"), "no real flush"),
        (in_folder(file_system="nfs4"), "in place but not mapped"),
        (in_folder(free=3 * GB), "3 GB free"),
    ],
)  # fmt: skip
def test_each_trouble_is_told(machine, part):
    (sentence,) = troubles(machine)

    assert part in sentence


def test_this_machine_is_examined(tmp_path):
    machine = examine([tmp_path])

    assert machine.host_memory >= machine.reading.ram.limit
    assert machine.folders[0].file_system == file_system(tmp_path) != ""
    assert {"torch", "ray"} <= set(machine.versions)
    assert machine.to_dict()["reading"]["ram"]["limit"] == machine.reading.ram.limit
