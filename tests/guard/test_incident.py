"""The account of an incident, as a person reads it, and the record it is made from."""

from brainenc import records
from brainenc.guard.incident import account
from brainenc.guard.messages import CheckpointAck, WorkerReport
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

    kinds = ["coordinator", "reading", "warning", "order", "ack", "reading", "ack", "incident"]
    assert [line["kind"] for line in lines] == kinds
    assert lines[2]["numbers"] == {"used": 91, "limit": 100}
    assert lines[-1]["outcome"] == "saved"
    assert "durable at" in account(lines[-1])


def test_a_new_coordinator_goes_on_counting_incidents(tmp_path):
    story(tmp_path).close()

    again = Office(tmp_path)
    again.trip("stop", "SIGTERM")

    assert again.status()["incidents"][0]["number"] == 2
    again.close()


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
