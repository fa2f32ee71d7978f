"""The account of an incident, as a person reads it, and the record it is made from."""

from contextlib import suppress

import pytest

from brainenc import records
from brainenc.guard.history import read_history
from brainenc.guard.incident import account
from brainenc.guard.messages import CheckpointAck, Order, WorkerReport
from brainenc.guard.office import LocalLink, Office
from brainenc.guard.testing import FakeClock


def story(folder, resume=""):
    """rank1 is full, both save, the driver goes on."""
    clock = FakeClock(1_700_000_000.0)
    office = Office(folder, resume=resume, clock=clock)
    link = LocalLink(office)
    link.post(WorkerReport(worker="rank0", seq=1, node="a", pid=1, step=7))
    full = {"level": "critical", "reason": "RAM usage is 91.0%", "numbers": {"used": 91, "limit": 100}}
    link.post(WorkerReport(worker="rank1", seq=1, node="b", pid=2, step=7, **full))
    (order,) = link.answers()
    for rank in (0, 1):
        clock.advance(0.25)
        ack = CheckpointAck(order_id=order.id, worker=f"rank{rank}", epoch=0, step=8, path="/run/step8")
        link.post(WorkerReport(worker=f"rank{rank}", seq=2, node="ab"[rank], pid=rank + 1, step=8, ack=ack))
    return office


def test_the_account_says_who_what_when_where_and_how_to_go_on(tmp_path):
    story(tmp_path, resume="brainenc train --resume /run").close()

    text = (tmp_path / "incident-1.txt").read_text()

    parts = ["rank1 on b after step 7: RAM usage is 91.0%", "ordered to shrink", "rank0, step 8: durable at"]
    for part in [*parts, "Outcome: saved after 0.50 s", "/run/step8", "brainenc train --resume /run"]:
        assert part in text


def test_the_record_has_every_kind_of_line_with_its_numbers(tmp_path):
    story(tmp_path).close()

    lines = list(records.read(tmp_path / "guard.jsonl"))

    kinds = ["coordinator", "reading", "warning", "order", "ack", "reading", "ack", "incident", "closed"]
    assert [line["kind"] for line in lines] == kinds
    assert lines[2]["numbers"] == {"used": 91, "limit": 100}
    assert lines[-2]["outcome"] == "saved"
    assert "durable at" in account(lines[-2])


def test_a_new_coordinator_goes_on_counting_incidents(tmp_path):
    story(tmp_path).close()

    again = Office(tmp_path)
    again.trip("stop", "SIGTERM")

    assert again.status()["incidents"][0]["number"] == 2
    again.close()


def test_lines_that_others_have_damaged_do_not_keep_a_coordinator_from_starting(tmp_path):
    (tmp_path / "guard.jsonl").write_text('{"kind":"incident","number":"x"}\n{"kind":"order","incident":[]}\n')

    office = Office(tmp_path)
    office.trip("stop", "SIGTERM")

    assert office.status()["incidents"][0]["number"] == 1
    office.close()


def test_an_account_of_a_failure_names_the_dead(tmp_path):
    clock = FakeClock(100.0)
    office = Office(tmp_path, clock=clock)
    office.report(WorkerReport(worker="rank0", seq=1, level="critical", reason="full"))
    clock.advance(10)
    office.tick()
    office.close()

    text = (tmp_path / "incident-1.txt").read_text()
    assert "rank0 fell silent before it answered" in text
    assert "Outcome: failed" in text


def test_a_late_answer_of_an_older_step_is_told_as_that(tmp_path):
    """All died before they had answered; one that was started again began with an older snapshot, and saved that."""
    clock = FakeClock(100.0)
    office = Office(tmp_path, clock=clock)
    office.report(WorkerReport(worker="rank0", seq=1, pid=1, step=40))
    order = office.trip("stop", "SIGTERM")
    clock.advance(10)
    office.tick()
    assert "Outcome: failed after 10.00 s." in (tmp_path / "incident-1.txt").read_text()

    again = {"worker": "rank0", "pid": 2, "step": 12}
    assert office.report(WorkerReport(seq=1, **again)).id == order.id
    ack = CheckpointAck(order_id=order.id, worker="rank0", epoch=0, step=12, path="/run/step12")
    office.report(WorkerReport(seq=2, ack=ack, **again))
    office.close()

    text = (tmp_path / "incident-1.txt").read_text()
    assert "Outcome: saved after 10.00 s, but only an older step." in text
    assert "The checkpoint of step 12 lies in /run/step12." in text
    assert "The order came after step 40: what was done from step 12 to 40 is done again." in text
    assert read_history(tmp_path).incidents[0]["done_again"] == 28


def test_who_obeys_is_no_cause_and_no_reason_is_empty(tmp_path):
    """A signal to the driver: the ranks report the order that they carry out, and nothing of their own."""
    office = Office(tmp_path)
    for rank in (0, 1):
        office.report(WorkerReport(worker=f"rank{rank}", seq=0, node="a", step=6))
    order = office.trip("stop", "the driver received SIGTERM")
    for rank in (0, 1):
        office.report(WorkerReport(worker=f"rank{rank}", seq=1, node="a", step=7, order=order))
        ack = CheckpointAck(order_id=order.id, worker=f"rank{rank}", epoch=0, step=7, path="/run/step7")
        office.report(WorkerReport(worker=f"rank{rank}", seq=2, node="a", step=7, order=order, ack=ack))
    office.close()

    lines = (tmp_path / "incident-1.txt").read_text().splitlines()

    assert lines[0].endswith("ordered to stop because the driver received SIGTERM.")
    assert [line.split(":")[0] for line in lines[1:3]] == ["  rank0, step 7", "  rank1, step 7"]
    assert not [line for line in lines if line.rstrip().endswith(":")]


def test_a_new_coordinator_gives_the_orders_reason_where_the_worker_has_none(tmp_path):
    office = Office(tmp_path)
    order = Order(kind="shrink", reason="RAM usage is 91.0%", id="rank1-5-1", step=3)
    office.report(WorkerReport(worker="rank1", seq=1, node="a", step=3, order=order))
    office.close()

    assert "rank1 on a after step 3: RAM usage is 91.0%" in (tmp_path / "incident-1.txt").read_text()


def test_an_incident_of_extraction_speaks_of_images_and_of_what_is_sealed(tmp_path):
    office = Office(tmp_path, resume="the same command again")
    full = {"level": "critical", "reason": "RAM usage is 91.0%"}
    order = office.report(WorkerReport(worker="a:1", seq=1, role="extract", node="a", step=40, **full))
    office.report(WorkerReport(worker="a:2", seq=1, role="extract", node="a", step=44))
    ack = CheckpointAck(order_id=order.id, worker="a:1", epoch=0, step=48, path="/store")
    office.report(WorkerReport(worker="a:1", seq=2, role="extract", node="a", step=48, ack=ack))
    office.close()

    text = (tmp_path / "incident-1.txt").read_text()

    assert "a:1 on a after 40 images: RAM usage is 91.0%" in text
    assert "a:1, 48 images: halved its micro-batch; what is sealed is durable in /store" in text
    assert "a:2" not in text
    assert "checkpoint of step" not in text


def test_who_falls_silent_is_seen_and_a_run_that_ended_says_so(tmp_path):
    clock = FakeClock(100.0)
    office = Office(tmp_path, clock=clock)
    for name in ("rank0", "rank1"):
        office.report(WorkerReport(worker=name, seq=1, node="a"))
    clock.advance(2)
    office.report(WorkerReport(worker="rank0", seq=2, node="a"))
    clock.advance(2)
    office.tick()
    assert {n: w["leaving"] for n, w in read_history(tmp_path).workers.items()} == {"rank0": "", "rank1": "silent"}
    office.report(WorkerReport(worker="rank1", seq=2, node="a"))
    assert read_history(tmp_path).workers["rank1"]["leaving"] == ""
    office.close()
    assert {w["leaving"] for w in read_history(tmp_path).workers.values()} == {"ended"}

    Office(tmp_path).close()

    assert read_history(tmp_path).workers == {}, "another run: its own workers only"
    Office(tmp_path, successor=True).close()


@pytest.mark.root
def test_on_a_full_disk_orders_are_heard_all_the_same(small_disk, caplog):
    """The record is lost, and that is told; a worker that hears of no order would lose more."""
    with suppress(OSError), open(small_disk / "fill", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    office = Office(small_disk)
    report = {"worker": "rank0", "node": "a", "step": 6}
    office.report(WorkerReport(seq=1, **report))
    order = office.trip("stop", "the driver received SIGTERM")

    assert office.report(WorkerReport(seq=2, **report)).id == order.id
    ack = CheckpointAck(order_id=order.id, worker="rank0", epoch=0, step=6, path="/spare/step6")
    office.report(WorkerReport(seq=3, ack=ack, **report))
    assert office.tick() == "stopped"
    assert office.status()["incidents"][0]["checkpoint"] == "/spare/step6"
    office.close()
    told = [record.getMessage() for record in caplog.records]
    assert sum(f"writing its record {small_disk}/guard.jsonl failed" in text for text in told) == 1


def test_an_incident_that_the_end_of_the_run_overtakes_is_closed(tmp_path):
    office = Office(tmp_path)
    office.report(WorkerReport(worker="rank0", seq=1, level="critical", reason="full"))
    office.close()

    history = read_history(tmp_path)
    assert history.open_order is None
    assert history.incidents[0]["outcome"] == "failed"
