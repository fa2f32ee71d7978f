"""Limits of control groups: which one counts, and what counts as used."""

import pytest

from brainenc.guard.cgroup import UNLIMITED, find_mount, limited_groups, read_limit
from brainenc.guard.probe import Probe
from brainenc.guard.testing import FakeTree

GB = 1 << 30
V2 = {
    "anon": 2 * GB, "file": 9 * GB, "kernel": 300_000_000, "slab_reclaimable": 250_000_000, "sock": 7, "shmem": GB,
    "slab_unreclaimable": 11, "pagetables": 5,
}  # fmt: skip


def test_v1_counts_anonymous_and_shared_memory_and_no_page_cache(tmp_path):
    tree = FakeTree(tmp_path)
    tree.v1("/job", {"/job": 8 * GB}, {"total_cache": 7 * GB, "total_rss": 2 * GB, "total_shmem": GB, "rss": 1})

    (group,) = limited_groups(tmp_path)

    assert (group.version, group.limit, group.used()) == (1, 8 * GB, 3 * GB)


def test_v1_counts_the_hosts_unreclaimable_share_of_kernel_memory(tmp_path):
    tree = FakeTree(tmp_path)
    tree.v1("/job", {"/job": 8 * GB}, {"total_rss": GB, "total_shmem": 0}, kmem=1000)

    (group,) = limited_groups(tmp_path)

    assert group.used(host_kernel_share=0.25) == GB + 250


def test_v2_counts_anonymous_shared_and_unreclaimable_kernel_memory(tmp_path):
    FakeTree(tmp_path).v2("/user/job", {"/user/job": str(8 * GB)}, V2)

    (group,) = limited_groups(tmp_path)

    assert (group.version, group.used()) == (2, 3 * GB + 50_000_000 + 7)


def test_v2_without_the_kernel_sum_adds_its_parts(tmp_path):
    older = {k: v for k, v in V2.items() if k != "kernel"}
    FakeTree(tmp_path).v2("/job", {"/job": str(8 * GB)}, older)

    assert limited_groups(tmp_path)[0].used() == 3 * GB + 11 + 5 + 7


def test_a_literal_max_is_no_limit(tmp_path):
    FakeTree(tmp_path).v2("/user/job", {"/user/job": "max"}, V2)

    assert limited_groups(tmp_path) == []
    assert read_limit(2, tmp_path / "sys/fs/cgroup/user/job") == UNLIMITED


def test_memory_high_is_a_limit_too(tmp_path):
    tree = FakeTree(tmp_path)
    tree.v2("/job", {"/job": str(8 * GB)}, V2)
    tree.file("sys/fs/cgroup/job/memory.high", f"{5 * GB}\n")

    assert limited_groups(tmp_path)[0].limit == 5 * GB


@pytest.mark.parametrize("version", [1, 2])
def test_of_nested_limits_the_lowest_counts(tmp_path, version):
    tree = FakeTree(tmp_path)
    if version == 1:
        limits = {"/a": 16 * GB, "/a/b": 4 * GB}
        tree.v1("/a/b/c", limits, {"total_rss": 3 * GB, "total_shmem": 0})
    else:
        tree.v2("/a/b/c", {"/a": str(16 * GB), "/a/b": str(4 * GB)}, {"anon": 3 * GB, "shmem": 0})

    ram = Probe(root=tmp_path).ram()

    assert (ram.limit, ram.used) == (4 * GB, 3 * GB)
    assert ram.source.endswith("/a/b")


def test_a_parent_filled_by_others_counts_before_ones_own_lower_limit(tmp_path):
    tree = FakeTree(tmp_path)
    stat = {"/": {}, "/pod": {"anon": 15 * GB, "shmem": 0}, "/pod/me": {"anon": GB, "shmem": 0}}
    tree.v2("/pod/me", {"/pod": str(16 * GB), "/pod/me": str(8 * GB)}, stat)

    assert Probe(root=tmp_path).ram().limit == 16 * GB


def test_a_container_whose_path_is_the_hosts_finds_its_own_group(tmp_path):
    """Docker with version 1: the mount's root is the container's group, the path is the host's."""
    tree = FakeTree(tmp_path)
    tree.v1("/", {"/": 2 * GB}, {"total_rss": GB, "total_shmem": 0}, mount_root="/docker/abc")
    tree.file("proc/self/cgroup", "4:memory:/docker/abc\n")

    assert [g.limit for g in limited_groups(tmp_path)] == [2 * GB]


def test_a_path_outside_the_namespace_stays_inside_the_mount(tmp_path):
    tree = FakeTree(tmp_path)
    tree.v2("/job", {"/job": str(GB)}, V2)
    tree.file("proc/self/cgroup", "0::/../../job\n")

    assert find_mount(tmp_path).group == tmp_path / "sys/fs/cgroup/job"


def test_with_both_versions_mounted_the_one_that_has_memory_counts(tmp_path):
    """The hybrid layout of systemd: memory is version 1's, and version 2 has a path, too."""
    tree = FakeTree(tmp_path)
    tree.v1("/job", {"/job": 8 * GB}, {"total_rss": GB, "total_shmem": 0})
    mounts = (tmp_path / "proc/self/mountinfo").read_text()
    tree.file("proc/self/mountinfo", "31 25 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n" + mounts)
    tree.file("proc/self/cgroup", "0::/elsewhere\n4:memory:/job\n")
    tree.file("sys/fs/cgroup/unified/elsewhere/memory.max", f"{GB}\n")

    assert [(g.version, g.limit) for g in limited_groups(tmp_path)] == [(1, 8 * GB)]


def test_without_control_groups_there_are_no_limits(tmp_path):
    FakeTree(tmp_path)

    assert limited_groups(tmp_path) == []


def test_a_limit_that_is_lowered_under_a_running_job_is_noticed(tmp_path):
    tree = FakeTree(tmp_path)
    tree.v2("/job", {"/job": str(8 * GB)}, V2)
    probe = Probe(root=tmp_path)
    assert probe.ram().limit == 8 * GB

    tree.file("sys/fs/cgroup/job/memory.max", f"{4 * GB}\n")
    probe.refresh()

    assert probe.ram().limit == 4 * GB
