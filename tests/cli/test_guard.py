"""``guard status|probe|drill``, ``doctor`` and ``watch``, as typed."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from brainenc.cli import guard_practice
from brainenc.cli.main import run
from brainenc.extract.guard_record import guard_folder
from brainenc.guard import banner
from brainenc.guard.glances import WHY_NOT_COMPILED
from brainenc.guard.messages import CheckpointAck, WorkerReport
from brainenc.guard.office import Office
from brainenc.guard.probe import MemoryUse, Reading, take_reading
from brainenc.records import JsonLines


@pytest.fixture
def run_folder(tmp_path):
    """A run of two ranks with one incident, in its second epoch."""
    office = Office(tmp_path, resume="brainenc train --resume r")
    numbers = {"used": 91, "limit": 100, "fraction": 0.91}
    for rank in (0, 1):
        office.report(WorkerReport(worker=f"rank{rank}", seq=1, node="a", epoch=1, step=7, numbers={"fraction": 0.4}))
    full = {"level": "critical", "reason": "RAM usage is 91.0%", "numbers": numbers}
    order = office.report(WorkerReport(worker="rank1", seq=2, node="a", epoch=1, step=8, **full))
    for rank in (0, 1):
        ack = CheckpointAck(order_id=order.id, worker=f"rank{rank}", epoch=1, step=8, path="/run/emergency")
        office.report(WorkerReport(worker=f"rank{rank}", seq=3, node="a", epoch=1, step=8, level="warn", ack=ack,
                                   numbers={"fraction": 0.86}))  # fmt: skip
    office.close()
    with JsonLines(tmp_path / "metrics.jsonl") as lines:
        lines.write(epoch=1, step=8, split="train", loss=0.5, steps=100)
        lines.write(epoch=0, step=4, split="val", val_perf=0.3)
    return tmp_path


def test_status_shows_everybody_and_every_incident(run_folder, capsys):
    assert run(["guard", "status", str(run_folder)]) == 0

    out = capsys.readouterr().out
    assert "rank0" in out
    assert "86.0%   warn" in out
    assert "rank1 on a after step 8: RAM usage is 91.0%" in out
    assert "Outcome: saved" in out


def test_status_as_json(run_folder, capsys):
    assert run(["guard", "status", str(run_folder), "--json"]) == 0

    found = json.loads(capsys.readouterr().out)
    assert found["incidents"][0]["checkpoint"] == "/run/emergency"
    assert found["workers"]["rank1"]["level"] == "warn"
    assert found["open_order"] is None


HOSTILE = {
    "reading without fields": '{"kind":"reading","worker":"rank0"}\n{"kind":"closed","at":1}',
    "reading of nobody": '{"kind":"reading"}',
    "silent without worker": '{"kind":"reading","worker":"rank0"}\n{"kind":"silent"}',
    "incident without number": '{"kind":"reading","worker":"rank0"}\n{"kind":"incident"}',
    "incident of other kinds": '{"kind":"reading","worker":"rank0"}\n{"kind":"incident","number":"x","order":[],'
    '"causes":[1],"acks":{"rank0":[]},"dead":3,"opened_at":"now","closed_at":"x","checkpoint":5}',
    "order without fields": '{"kind":"reading","worker":"rank0"}\n{"kind":"order"}',
    "other kinds": '{"kind":"reading","worker":["a"],"step":null,"epoch":"0","leaving":null,"node":3,"level":[],'
    '"numbers":{"fraction":"a","gpus":[1,{"fraction":"b"}]}}',
    "numbers a list": '{"kind":"warning","worker":"rank0","numbers":[]}',
    "escape codes": '{"kind":"reading","worker":"rank0\\u001b]0;X\\u0007\\u001b[31m","level":"\\u001b[2J"}',
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_a_record_lacks_is_told_as_unknown(tmp_path, capsys, what):
    (tmp_path / "guard.jsonl").write_text(HOSTILE[what] + "\n")

    for arguments in (["guard", "status"], ["guard", "status", "--json"], ["watch", "--once"]):
        assert run([*arguments, str(tmp_path)]) == 0, arguments
        out, err = capsys.readouterr()
        assert err == ""
        assert "\x1b" not in out
    run(["guard", "status", str(tmp_path)])
    assert "step" in capsys.readouterr().out


def test_status_of_no_run_is_wrong_usage(tmp_path, capsys):
    assert run(["guard", "status", str(tmp_path / "nothing")]) == 2
    assert "no run folder" in capsys.readouterr().err


def test_status_of_a_store_is_that_of_the_extractions_into_it(tmp_path, capsys):
    store = tmp_path / "features"
    office = Office(guard_folder(str(store)))
    numbers = {"fraction": 0.25}
    office.report(
        WorkerReport(worker="0a1b2c3d:4711", seq=1, role="extract", node="a", epoch=0, step=64, numbers=numbers)
    )
    assert run(["guard", "status", str(store)]) == 0
    assert "0a1b2c3d:4711 a                    -      64 images   25.0%   ok\n" in capsys.readouterr().out
    office.close()

    assert run(["guard", "status", f"{store}/"]) == 0
    assert "ok (ended)" in capsys.readouterr().out


def test_watch_once_shows_progress_memory_and_incidents(run_folder, capsys):
    assert run(["watch", str(run_folder), "--once"]) == 0

    out = capsys.readouterr().out
    assert "epoch 1  step 8/100  loss 0.5000  best val_perf 0.3000" in out
    assert "rank0        #####################...  86.0%  warn" in out
    assert "incident 1: RAM usage is 91.0%: saved /run/emergency" in out


def test_watch_as_json(run_folder, capsys):
    assert run(["watch", str(run_folder), "--once", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["best_val_perf"] == 0.3


def test_probe_reads_this_machine(capsys):
    assert run(["guard", "probe", "--json"]) == 0

    found = json.loads(capsys.readouterr().out)
    assert 0 < found["ram"]["used"] < found["ram"]["limit"]
    assert found["level"] in ("ok", "warn", "critical")


def test_probe_for_people_says_what_it_would_make_of_it(capsys):
    assert run(["guard", "probe", "--batch-size", "8"]) == 0

    out = capsys.readouterr().out
    assert "System Resource Check" in out
    assert "This is " in out


def test_probe_says_nothing_twice(capsys):
    assert run(["guard", "probe", "--json"]) == 0
    levels = [level["source"] for level in json.loads(capsys.readouterr().out)["levels"]]

    assert run(["guard", "probe"]) == 0

    listed = [line.split()[-1] for line in capsys.readouterr().out.splitlines() if re.match(r" *[\d.]+% ", line)]
    assert listed == (levels if len(levels) > 1 else [])


def practise(folder, fault, capsys):
    assert run(["guard", "drill", "--fault", fault, "--out", str(folder), "--json"]) == 0

    out, err = capsys.readouterr()
    report = json.loads(out)  # one object and nothing else
    assert report["exit_codes"] == [0, 75, 0]
    assert report["passed"]
    assert Path(report["saved"]).exists()
    stages = [json.loads(line)["note"] for line in err.splitlines()]
    assert stages == ["whole: undisturbed ...", f"struck: {fault} at step 17 ...", "struck: resumed ..."]


def test_a_gpu_drill_without_a_gpu_says_what_was_not_tried(tmp_path, monkeypatch):
    """Quick: the training itself is not run."""
    if take_reading().gpus:
        pytest.skip("this machine has a GPU")
    done = subprocess.CompletedProcess([], 1, "", "not run")
    monkeypatch.setattr(guard_practice, "_run", lambda folder, fault: done)

    reports = {fault: guard_practice.practise(tmp_path, fault, lambda text: None) for fault in ("gpu", "ram")}

    assert "a real GPU's memory was not tried" in reports["gpu"]["invented"]
    assert reports["ram"]["invented"] == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["watch", "runs/a"], "it is `brainenc watch runs/a`"),
        (["drill", "ram=0.95"], "write `brainenc guard drill --fault ram`"),
        (["drill", "ram=0.95"], "brainenc train ... --drill ram=0.95@step=40"),
        (["probe", "--disk", "/nonexistent"], "--disk /nonexistent: there is no such folder"),
        (["probe", "--batch-size", "0"], "at least 1 sample, found 0"),
    ],
)
def test_wrong_usage_is_told_with_the_right_one(capsys, arguments, said):
    assert run(["guard", *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("batch_size", "said"),
    [
        (None, "Thresholds for a batch of 4: RAM warning at 85%, emergency at 88%"),
        (3, "Thresholds for a batch of 4, whose row is used for 3: RAM"),
        (6, "Thresholds for a batch of 6: RAM warning at 83%, emergency at 86%; GPU warning at 88%"),
        (16, "Thresholds for a batch of 8, whose row is used for 16: RAM warning at 80%"),
    ],
)
def test_probe_names_the_thresholds_that_it_judges_by(capsys, batch_size, said):
    arguments = ["guard", "probe"] + (["--batch-size", str(batch_size)] if batch_size else [])
    assert run(arguments) == 0
    assert said in capsys.readouterr().out
    assert run([*arguments, "--json"]) == 0
    assert f"batch of {json.loads(capsys.readouterr().out)['thresholds']['batch_size']}" in said


def test_the_tightest_group_is_in_the_headline_of_a_fuller_host():
    group, host = MemoryUse(10**8, 10**9, "/job"), MemoryUse(9 * 10**9, 10**10, "host")
    wider = MemoryUse(10**8, 5 * 10**9, "/")

    text = banner.resources(Reading(ram=host, levels=(group, wider, host)))

    assert "RAM: 9.0GB / 10.0GB (90%), limit of host\n     0.1GB / 1.0GB (10%), limit of /job, the tightest" in text
    assert "tightest" not in banner.resources(Reading(ram=group, levels=(group, host)))


def test_status_says_of_a_checkpoint_that_it_was_removed(tmp_path, capsys):
    """Of emergency checkpoints only the newest stays."""
    office = Office(tmp_path)
    office.report(WorkerReport(worker="rank0", seq=1, node="a", step=7))
    for step in (8, 9):
        saved = tmp_path / f"emergency_epoch0_step{step}"
        order = office.trip("checkpoint", "node a is being taken away")
        ack = CheckpointAck(order_id=order.id, worker="rank0", epoch=0, step=step, path=str(saved))
        office.report(WorkerReport(worker="rank0", seq=step, node="a", step=step, ack=ack))
    office.close()
    saved.mkdir()

    assert run(["guard", "status", str(tmp_path)]) == 0

    out = capsys.readouterr().out
    assert "emergency_epoch0_step8 (no longer there)" in out
    assert "emergency_epoch0_step9. Of emergency checkpoints only the newest stays." in out


@pytest.mark.chaos
@pytest.mark.parametrize("fault", ["ram", "gpu", "oom", "sigterm"])
def test_every_drill_passes_here(tmp_path, fault, capsys):
    practise(tmp_path, fault, capsys)


def test_doctor_tells_facts_and_troubles(tmp_path, capsys):
    assert run(["doctor", str(tmp_path), "--json"]) == 0

    found = json.loads(capsys.readouterr().out)
    assert found["cores"] >= 1
    assert found["folders"][0]["path"] == str(tmp_path)
    assert isinstance(found["troubles"], list)


def test_doctor_for_people(capsys):
    assert run(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "Memory (what counts is the fullest):" in printed
    assert f"the watcher's loop is in {'Python' if WHY_NOT_COMPILED else 'C'}" in printed
