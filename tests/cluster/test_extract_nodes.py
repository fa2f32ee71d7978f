"""Extraction spread over several nodes, and over nodes that go away."""

from __future__ import annotations

import json
import subprocess
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


@pytest.mark.parametrize("sizes", [(1, 1), (3, 1)])
def test_without_options_a_copy_fits_the_largest_node(cluster, pictures, miniature, tmp_path, sizes):
    """Whatever cores the driver's own machine has, and all nodes together."""
    for number, cpus in enumerate(sizes):
        add_node(cluster, tmp_path / "scratch" / str(number), num_cpus=cpus)
    store = tmp_path / "store"
    what = ["--images", pictures, "--store", store, "--backbone", miniature, "--feature", "3.token", "--json"]

    out = run("extract", *what, "--batch-size", "auto", "--address", cluster.address)

    assert json.loads(out.splitlines()[-1])["images"] == 120
    assert open_store(store).collection("pictures/mini/3.token").receipt(0).environment["threads"] == max(sizes)


def test_a_plan_is_made_for_the_nodes(cluster, pictures, miniature, tmp_path):
    add_node(cluster, tmp_path / "scratch" / "large", num_cpus=2)
    what = ["--images", pictures, "--store", tmp_path / "store", "--backbone", miniature, "--feature", "3.token"]

    out = run("plan", *what, "--actors", 3, "--json", "--address", cluster.address)

    plan = json.loads(out.splitlines()[-1])
    assert (plan["actors"], plan["device"], plan["images_left"]) == (3, "cpu", 120)
    assert 0 < plan["seconds_per_image"] < 5
    assert not (tmp_path / "store").exists()


LEDGERS = """
import sys, ray
from brainenc.extract.pipeline import start_ledger

ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
ledgers = [start_ledger(3, 2) for _ in range(6)]
where = [ray.get(each.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id())) for each in ledgers]
print(*sorted(set(where)), ray.get_runtime_context().get_node_id())
"""


def test_the_ledger_is_on_the_drivers_own_node(cluster, tmp_path):
    """With any other node, the account of what was tried would be lost, and the run with it."""
    for name in ("a", "b"):
        add_node(cluster, tmp_path / "scratch" / name, num_cpus=2)

    done = subprocess.run(
        [sys.executable, "-c", LEDGERS, cluster.address], capture_output=True, text=True, timeout=120, check=True
    )

    ledgers, driver = done.stdout.split()
    assert ledgers == driver


def test_ray_client_is_refused_before_anything_starts(pictures, miniature, tmp_path):
    job = start(*command(pictures, tmp_path / "store", miniature), "--address", "ray://head:10001")
    _, err = job.communicate(timeout=60)

    assert job.returncode == 2
    assert "ray job submit" in err
