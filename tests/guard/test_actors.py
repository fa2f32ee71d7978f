"""The guard's edge to Ray: workers in other processes, one coordinator, and its death."""

import pickle
import time

import pytest

from brainenc import records
from brainenc.guard.testing import wait_until

pytestmark = pytest.mark.ray


def make_loop(ray):
    """A worker whose loop does what a training loop does, in a thread that no signal reaches."""

    @ray.remote(num_cpus=0.1, max_concurrency=3)
    class Loop:
        def run(self, address, rank, steps):
            from brainenc.guard.actors import worker_guard
            from brainenc.guard.policy import PolicyConfig
            from brainenc.guard.worker import WorkerGuardConfig

            config = WorkerGuardConfig(policy=PolicyConfig(dwell_s=0.5), heartbeat_s=0.1)
            seen = []
            with worker_guard(address, rank, config=config) as self.guard:
                for step in range(steps):
                    with self.guard.computing():
                        time.sleep(0.02)
                    order = self.guard.pending()
                    if order is not None:
                        seen.append((order.kind, step))
                        self.guard.saved(path=f"/ckpt/step{step}", step=step, epoch=0)
                        if order.kind == "stop":
                            break
                    self.guard.beat(epoch=0, step=step)
            return seen

        def drill(self, *args):
            self.guard.drill(*args)

    return Loop


@pytest.fixture
def coordinator(ray_session, tmp_path):
    from brainenc.guard.actors import start_coordinator

    handle = start_coordinator(tmp_path, n_workers=2, dwell_s=0.5, resume="brainenc train --resume run")
    yield handle
    handle.close()


def test_one_worker_in_trouble_stops_all_and_the_account_is_written(ray_session, coordinator, tmp_path):
    loop = make_loop(ray_session)
    loops = [loop.remote() for _ in range(2)]
    results = [actor.run.remote(coordinator, rank, 2000) for rank, actor in enumerate(loops)]
    assert wait_until(lambda: len(coordinator.status().get("workers", {})) == 2, timeout_s=60)

    ray_session.get(loops[1].drill.remote("ram", 0.95))

    seen = ray_session.get(results, timeout=60)
    assert [[kind for kind, _ in one] for one in seen] == [["shrink", "stop"], ["shrink", "stop"]]
    assert wait_until(lambda: [i["outcome"] for i in coordinator.status()["incidents"]] == ["saved", "saved"])
    workers = coordinator.status()["workers"]
    assert all(worker["leaving"] == "stopped" for worker in workers.values())
    assert "rank1" in (tmp_path / "incident-1.txt").read_text()
    assert "brainenc train --resume run" in (tmp_path / "incident-2.txt").read_text()


def test_when_the_coordinator_dies_a_new_one_takes_over(ray_session, coordinator, tmp_path):
    loop = make_loop(ray_session)
    actor = loop.remote()
    result = actor.run.remote(coordinator, 0, 3000)
    assert wait_until(lambda: "rank0" in coordinator.status().get("workers", {}), timeout_s=60)

    ray_session.kill(coordinator._actor)

    assert wait_until(lambda: "rank0" in coordinator.status().get("workers", {}) and coordinator.restarts, timeout_s=60)
    coordinator.trip("stop", "the driver received SIGTERM")
    assert ray_session.get(result, timeout=60)[-1][0] == "stop"
    kinds = [line["kind"] for line in records.read(tmp_path / "guard.jsonl")]
    assert kinds.count("coordinator") == 2


def test_the_handle_travels_as_an_address(coordinator):
    assert pickle.loads(pickle.dumps(coordinator)) == coordinator.address


def test_rays_threshold_is_compared(ray_session, monkeypatch):
    from brainenc.guard.actors import ray_conflicts
    from brainenc.guard.policy import Thresholds

    monkeypatch.setenv("RAY_memory_usage_threshold", "0.8")
    assert any("80%" in sentence for sentence in ray_conflicts(Thresholds()))
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "0")
    assert ray_conflicts(Thresholds()) == []


def test_a_signal_to_the_driver_becomes_an_order(ray_session, coordinator):
    import os
    import signal

    from brainenc.guard.actors import trip_on_signals

    before = signal.getsignal(signal.SIGTERM)
    with trip_on_signals(coordinator):
        os.kill(os.getpid(), signal.SIGTERM)
        assert wait_until(lambda: bool(coordinator.status()["incidents"]))

    assert signal.getsignal(signal.SIGTERM) == before
    assert coordinator.status()["incidents"][0]["order"]["reason"] == "the driver received SIGTERM"


def test_the_keeper_of_the_coordinator_outlives_what_it_meets(monkeypatch, caplog):
    """A metric that cannot be set, an answer that cannot be read: the next look comes all the same."""
    import threading

    from brainenc.guard import actors

    monkeypatch.setattr(actors, "_LOOK_EVERY_S", 0.01)
    handle = object.__new__(actors.CoordinatorHandle)
    handle._ending, looks = threading.Event(), []

    def look():
        looks.append(1)
        if len(looks) == 3:
            handle._ending.set()
        raise ValueError("no gauge takes that")

    handle._look = look
    handle._keep()

    assert len(looks) == 3
    assert sum("goes on" in record.getMessage() for record in caplog.records) == 1
