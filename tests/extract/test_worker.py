"""A worker asks before it begins, says what it takes, and stops when told. No Ray."""

import time
from dataclasses import replace

import pytest

from brainenc.errors import UnknownName
from brainenc.extract.attempts import AttemptLedger
from brainenc.extract.prepare import create, survey
from brainenc.extract.worker import Worker
from brainenc.guard.office import LocalLink, Office
from brainenc.guard.testing import wait_until
from tests.extract.test_extractor import configured


class Ledger(AttemptLedger):
    """The ledger in this process."""

    def tell(self, reading):
        self.report(reading)


@pytest.fixture
def job(tmp_path, miniature, pictures):
    found = survey(configured(tmp_path / "s", pictures, miniature, guard=False))
    create(found)
    return found


def test_a_worker_seals_shard_after_shard_and_says_what_it_takes(job):
    ledger = Ledger()
    worker = Worker(job.job, ledger, name="w")

    outcomes = [worker(task) for task in job.tasks]
    worker.close()

    assert {o.status for o in outcomes} == {"sealed"}
    state = ledger.state()
    assert (state.rows, state.active) == (45, 0)
    reading = state.readings["w"]
    assert 50 << 20 < reading.loaded_bytes <= reading.peak_bytes <= reading.limit_bytes
    assert reading.micro_batch in (1, 4)


def test_a_shard_that_killed_others_is_not_begun(job):
    ledger = Ledger(max_attempts=2, max_deaths=9)
    for n in range(2):
        ledger.begin(job.tasks[0].name, f"dead{n}")
    worker = Worker(job.job, ledger, name="w")

    outcomes = [worker(task) for task in job.tasks[:2]]
    worker.close()

    assert [o.status for o in outcomes] == ["quarantined", "sealed"]


def test_a_backbone_that_does_not_load_is_told_not_raised(job, tmp_path):
    worker = Worker(replace(job.job, backbone=str(tmp_path / "nothing")), Ledger(), name="w")

    outcome = worker(job.tasks[0])
    worker.close()

    assert outcome.status == "failed"
    assert isinstance(outcome.error, UnknownName)


def test_a_worker_hears_that_it_should_stop_within_a_report(job):
    ledger = Ledger()
    worker = Worker(job.job, ledger, name="w")
    worker(job.tasks[0])
    ledger.stop("SIGTERM")

    deadline = time.monotonic() + 10
    while not worker.stopping and time.monotonic() < deadline:
        time.sleep(0.02)

    assert worker.stopping
    assert worker(job.tasks[1]).status == "stopped"
    worker.close()


def test_a_guarded_worker_has_a_watcher_and_ends_it(tmp_path, miniature, pictures):
    import psutil

    found = survey(configured(tmp_path / "s", pictures, miniature))
    create(found)
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    worker = Worker(found.job, Ledger(), name="w")

    assert worker(found.tasks[0]).status == "sealed"
    watchers = {p.pid for p in psutil.Process().children(recursive=True)} - before
    worker.close()

    assert watchers
    assert not watchers & {p.pid for p in psutil.Process().children(recursive=True) if p.status() != "zombie"}


@pytest.fixture
def guarded(job, tmp_path):
    """A worker under the guard of a coordinator in this process, after its first shard; ledger, office and tasks."""
    office = Office(tmp_path / "guard", resume="the same command again")
    worker = Worker(replace(job.job, guard=True), Ledger(), name="a:1", link=LocalLink(office))
    assert worker(job.tasks[0]).status == "sealed"
    yield worker, office, job.tasks
    worker.close()
    office.close()


def test_memory_that_gets_short_halves_this_workers_batch_and_the_coordinator_writes_it_down(guarded, tmp_path):
    worker, office, tasks = guarded
    assert wait_until(lambda: "a:1" in office.status()["workers"])
    worker.guard.drill("ram", 0.95, 1.0)
    assert wait_until(lambda: worker.guard.pending() is not None)

    outcome = worker(tasks[1])

    assert outcome.status == "sealed"
    assert (outcome.micro_batch, len(outcome.notes)) == (2, 1)
    assert "memory got short (RAM usage is 95.0%" in outcome.notes[0]
    assert wait_until(lambda: [i["outcome"] for i in office.status()["incidents"]] == ["saved"])
    text = (tmp_path / "guard" / "incident-1.txt").read_text()
    assert "ordered to shrink because RAM usage is 95.0%" in text
    assert "a:1, 8 images: halved its micro-batch; what is sealed is durable" in text


def test_an_order_of_the_coordinator_stops_workers_at_work_and_between_shards(guarded):
    worker, office, tasks = guarded

    office.trip("stop", "another actor is short of memory")

    assert wait_until(lambda: [i["outcome"] for i in office.status()["incidents"]] == ["saved"]), "idle, and answered"
    outcome = worker(tasks[1])
    assert (outcome.status, outcome.notes) == ("stopped", ("stopped: another actor is short of memory",))
