"""What a person at the terminal gets to see of a run while it goes on."""

import json

from brainenc.train.follow import following, following_guard
from brainenc.train.launch import train
from brainenc.train.run_folder import RunFolder

WARNING = {"kind": "warning", "worker": "rank1", "step": 7, "reason": "RAM usage is 86.0% (10.3GB/12.0GB)"}
READING = {"kind": "reading", "worker": "rank1", "step": 8, "reason": ""}


def append(path, *lines) -> None:
    with open(path, "a") as file:
        file.writelines(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)


def test_warnings_of_the_guard_are_shown_and_its_readings_are_not(tmp_path):
    folder, notes = RunFolder(tmp_path), []
    append(folder.guard_file, WARNING | {"step": 1})  # from before: shown then

    with following(folder, lambda record: None, notes.append):
        append(folder.guard_file, READING, WARNING, "torn {\n")

    (text,) = notes
    assert text.startswith("[Batch 7] ")
    assert text.endswith("rank1: RAM usage is 86.0% (10.3GB/12.0GB)")


def test_records_and_notes_of_workers_are_shown(tmp_path):
    folder, notes, records = RunFolder(tmp_path), [], []

    with following(folder, records.append, notes.append):
        append(folder.metrics_file, {"step": 1})
        append(folder.log_file, "2026-01-01 00:00:00 rank 0 [17] going on\n")

    assert (records, notes) == ([{"step": 1}], ["going on"])


def test_beside_a_run_in_this_process_only_the_guard_is_followed(tmp_path):
    folder, notes = RunFolder(tmp_path), []

    with following_guard(folder, notes.append):
        append(folder.log_file, "2026-01-01 00:00:00 rank 0 [17] going on\n")
        append(folder.guard_file, WARNING)

    assert len(notes) == 1


def test_a_run_in_this_process_shows_the_warning_that_a_drill_brings(small, tmp_path):
    notes: list[str] = []
    config = small.config(
        tmp_path / "run", epochs=10**5, drill=("ram=0.99@step=3",), guard={"on_critical": "stop"}, log_every=100
    )

    result = train(config, note=notes.append)

    assert result.exit_code == 75
    assert any("rank0: RAM usage is 99.0%" in text and text.startswith("[Batch ") for text in notes), notes
