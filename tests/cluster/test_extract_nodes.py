"""Extraction spread over several nodes, and over nodes that go away."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from conftest import add_node, drain, run, start

from brainenc.featurestore.store import open_store

pytestmark = [pytest.mark.ray, pytest.mark.chaos]


def command(pictures: Path, store: Path, backbone: str) -> list[object]:
    what = ["--images", pictures, "--store", store, "--backbone", backbone, "--feature", "1.q", "--feature", "3.token"]
    how = ["--batch-size", 4, "--rows-per-shard", 8, "--actors", 2, "--threads", 1, "--json"]
    return ["extract", *what, *how]


def shards(store: Path) -> dict[str, bytes]:
    """Every shard and receipt: what must be the same whoever computed it."""
    return {str(p.relative_to(store)): p.read_bytes() for p in sorted(store.rglob("shard-*"))}


def test_two_nodes_write_the_bytes_that_one_machine_writes(cluster, pictures, miniature, tmp_path):
    run(*command(pictures, tmp_path / "alone", miniature), RAY_ADDRESS="")
    for name in ("a", "b"):
        add_node(cluster, tmp_path / "scratch" / name, num_cpus=1)

    out = run(*command(pictures, tmp_path / "spread", miniature), "--address", cluster.address)

    assert json.loads(out.splitlines()[-1])["images"] == 120
    assert shards(tmp_path / "spread") == shards(tmp_path / "alone")
    assert len(shards(tmp_path / "spread")) == 2 * 2 * 15


def test_a_lost_node_loses_nothing(cluster, pictures, miniature, tmp_path):
    """Its shards are done by others, none twice in the store, and the command ends well."""
    run(*command(pictures, tmp_path / "alone", miniature), RAY_ADDRESS="")
    add_node(cluster, tmp_path / "scratch" / "stays", num_cpus=2)
    lost = add_node(cluster, tmp_path / "scratch" / "goes", num_cpus=1)
    store = tmp_path / "spread"
    job = start(*command(pictures, store, miniature), "--address", cluster.address)
    while len(list(store.rglob("shard-*.json"))) < 6:
        assert job.poll() is None, job.communicate()
        time.sleep(0.05)

    cluster.remove_node(lost, allow_graceful=False)
    _, err = job.communicate(timeout=280)

    assert job.returncode == 0, err[-3000:]
    assert shards(store) == shards(tmp_path / "alone")
    opened = open_store(store)
    keys = opened.keys()
    assert [len(opened[key]) for key in keys] == [120, 120]


def test_nodes_that_come_and_go_leave_nothing_undone(cluster, pictures, miniature, tmp_path):
    """One is taken away with notice, another one joins in the middle."""
    run(*command(pictures, tmp_path / "alone", miniature), RAY_ADDRESS="")
    leaves = add_node(cluster, tmp_path / "scratch" / "leaves", num_cpus=2)
    store = tmp_path / "spread"
    job = start(*command(pictures, store, miniature), "--address", cluster.address)
    while len(list(store.rglob("shard-*.json"))) < 4:
        assert job.poll() is None, job.communicate()
        time.sleep(0.05)

    drain(leaves, seconds=1)
    add_node(cluster, tmp_path / "scratch" / "comes", num_cpus=2)
    _, err = job.communicate(timeout=280)

    assert job.returncode == 0, err[-3000:]
    assert shards(store) == shards(tmp_path / "alone")


def test_shards_wait_on_the_nodes_disks_and_are_moved_at_the_end(cluster, pictures, miniature, tmp_path):
    """Also those of a run that was killed; those of a lost node are computed again. Nothing is there twice."""
    run(*command(pictures, tmp_path / "alone", miniature), RAY_ADDRESS="")
    for name in ("stays", "goes"):
        node = add_node(cluster, tmp_path / "scratch" / name, num_cpus=1)
    store = tmp_path / "spread"
    local = ["--node-store", "$NODE_DISK/waiting", "--address", cluster.address]

    def waiting(name: str) -> int:
        return len(list((tmp_path / "scratch" / name / "waiting").rglob("shard-*.json")))

    killed = start(*command(pictures, store, miniature), *local)
    while waiting("stays") + waiting("head") < 4:
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.05)
    killed.kill()
    killed.communicate()
    assert not shards(store), "nothing is moved before the end"

    job = start(*command(pictures, store, miniature), *local)
    while waiting("goes") < 2:
        assert job.poll() is None, job.communicate()
        time.sleep(0.05)
    cluster.remove_node(node, allow_graceful=False)
    out, err = job.communicate(timeout=280)

    assert job.returncode == 0, err[-3000:]
    assert shards(store) == shards(tmp_path / "alone")
    assert json.loads(out.splitlines()[-1])["shards_before"] >= 4
    assert not waiting("stays")
    assert not waiting("head")
    opened = open_store(store)
    assert [len(opened[key]) for key in opened] == [120, 120]


def test_ray_client_is_refused_before_anything_starts(pictures, miniature, tmp_path):
    job = start(*command(pictures, tmp_path / "store", miniature), "--address", "ray://head:10001")
    _, err = job.communicate(timeout=60)

    assert job.returncode == 2
    assert "ray job submit" in err
