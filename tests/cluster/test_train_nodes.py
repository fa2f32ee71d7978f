"""Training over several nodes, on which nodes are lost or taken away with notice."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from brainenc.train import checkpoint
from brainenc.train.run_folder import RunFolder
from tests.cluster.conftest import add_node, drain, run, start

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(400)]


def training(learnt, out: Path, workers: str, epochs: int, *more: object) -> list[object]:
    often = ["--snapshot-every", "1h", "--checkpoint-every", "1s"]
    return ["train", *learnt, "--out", out, "--workers", workers, "--epochs", epochs, *often, "--json", *more]


def losses(out: Path) -> dict[int, float]:
    """Step -> training loss; of a step that was done again, the last."""
    return {r["step"]: r["loss"] for r in RunFolder(out).metrics() if r["split"] == "train"}


def runs(out: Path) -> set[int]:
    return {r["run"] for r in RunFolder(out).metrics()}


def wait_for(job, look, seconds: float = 150) -> None:
    deadline = time.monotonic() + seconds
    while not look():
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def has_checkpoint_beyond(out: Path, step: int) -> bool:
    return any(found.step > step for found in checkpoint.list_checkpoints(out / "checkpoints"))


def test_a_lost_node_leaves_one_that_goes_on_with_the_same_samples(cluster, learnt, tmp_path):
    """Steps, samples and results are those of a run that nothing happened to; the command ends well."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    run(*training(learnt, whole, "0", 60))
    lost = add_node(cluster, tmp_path / "scratch" / "goes", num_cpus=1)
    job = start(*training(learnt, out, "1:2", 60), "--address", cluster.address)
    wait_for(job, lambda: has_checkpoint_beyond(out, 20))

    cluster.remove_node(lost, allow_graceful=False)
    printed, err = job.communicate(timeout=280)

    assert job.returncode == 0, err[-3000:]
    assert json.loads(printed.splitlines()[-1])["status"] == "done"
    assert len(runs(out)) == 2, "it began with two workers and went on with one"
    assert "Going on from" in (out / "train.log").read_text()
    expected, found = losses(whole), losses(out)
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([found[s] for s in expected], list(expected.values()), rtol=2e-3)


def test_a_node_that_is_drained_is_saved_for_and_left(cluster, learnt, tmp_path):
    """Ray's own drain notice: a checkpoint at once and one before the end; the machine is taken, the run goes on.

    It is a cloud that takes it: Ray itself ends a drained node only when nothing runs there any more.
    """
    out = tmp_path / "run"
    leaves = add_node(cluster, tmp_path / "scratch" / "leaves", num_cpus=1)
    job = start(*training(learnt, out, "1:2", 400, "--checkpoint-every", "1h"), "--address", cluster.address)
    wait_for(job, lambda: len(losses(out)) > 10)

    ends = time.monotonic() + 12
    drain(leaves, seconds=12)
    guard_log = out / "guard.jsonl"
    wait_for(job, lambda: guard_log.read_text().count('"kind":"order"') == 2 and time.monotonic() > ends, 60)
    cluster.remove_node(leaves, allow_graceful=False)
    printed, err = job.communicate(timeout=300)

    assert job.returncode == 0, err[-3000:]
    orders = [line for line in map(json.loads, guard_log.read_text().splitlines()) if line["kind"] == "order"]
    assert {order["do"] for order in orders} == {"checkpoint"}
    assert "is being taken away in" in orders[0]["reason"]
    assert len(orders) == 2, "once at the notice, once before the deadline"
    assert json.loads(printed.splitlines()[-1])["status"] == "done"
    assert len(runs(out)) == 2
    assert losses(out).keys() == set(range(1, len(losses(out)) + 1))


@contextmanager
def held(cluster, node) -> Iterator[None]:
    """Somebody else's actor on a node, which Ray does not end for being drained."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    class Squatter:
        def there(self) -> bool:
            return True

    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        place = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        squatter = ray.remote(Squatter).options(num_cpus=0, scheduling_strategy=place).remote()
        assert ray.get(squatter.there.remote())
        yield
        assert ray.get(squatter.there.remote()), "the node stayed to the end"
    finally:
        ray.shutdown()


def test_a_drained_node_that_is_never_taken_away_does_not_hold_up_the_rest(cluster, learnt, tmp_path):
    """Ray counts it as there and places nothing on it: a restart must not ask for workers that only it could hold."""
    out = tmp_path / "run"
    leaves = add_node(cluster, tmp_path / "scratch" / "leaves", num_cpus=1)
    with held(cluster, leaves):
        job = start(*training(learnt, out, "1:2", 400, "--checkpoint-every", "1h"), "--address", cluster.address)
        wait_for(job, lambda: len(losses(out)) > 10)
        drain(leaves, seconds=12)
        wait_for(job, lambda: len(runs(out)) == 2, 60)
        printed, err = job.communicate(timeout=300)

    assert job.returncode == 0, err[-3000:]
    assert json.loads(printed.splitlines()[-1])["status"] == "done"
    assert len(runs(out)) == 2, "one restart, no tries that found no place"
    assert losses(out).keys() == set(range(1, len(losses(out)) + 1))


def test_a_run_that_needs_a_drained_node_stops_safely(cluster, learnt, tmp_path):
    """With a fixed number of workers and no room for them elsewhere: saved, and resumable by the same command."""
    out = tmp_path / "run"
    leaves = add_node(cluster, tmp_path / "scratch" / "leaves", num_cpus=1)
    job = start(*training(learnt, out, "2", 100000), "--address", cluster.address)
    wait_for(job, lambda: len(losses(out)) > 10)

    drain(leaves, seconds=30)
    printed, err = job.communicate(timeout=100)

    assert job.returncode == 75, err[-3000:]
    result = json.loads(printed.splitlines()[-1])
    assert result["status"] == "stopped"
    assert "cannot hold this run" in result["reason"]
    assert checkpoint.verify(Path(result["checkpoint"])).position.step == result["step"]
