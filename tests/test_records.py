"""Run records: whole lines or none, whatever dies."""

import errno
import json
from contextlib import suppress

import pytest

from brainenc.records import JsonLines, read, standing


def test_what_is_written_is_read(tmp_path):
    with JsonLines(tmp_path / "m.jsonl") as log:
        log.write(step=1, loss=0.5)
        log.write(step=2, loss=float("nan"), more=[1.0, float("inf")], deep={"r": float("-inf")})

    assert list(read(tmp_path / "m.jsonl")) == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": None, "more": [1.0, None], "deep": {"r": None}},
    ]


def test_a_torn_line_costs_itself_alone(tmp_path):
    path = tmp_path / "m.jsonl"
    with JsonLines(path) as log:
        log.write(step=1)
        log.write(step=2)
    path.write_bytes(path.read_bytes()[:-4])  # the writer died in the middle of its second line
    with JsonLines(path) as log:
        log.write(step=3)

    assert [r["step"] for r in read(path)] == [1, 3]


@pytest.mark.root
def test_a_full_disk_costs_what_is_written_meanwhile_alone(small_disk):
    path = small_disk / "m.jsonl"
    with JsonLines(path) as log:
        log.write(step=1, text="x" * 3000)
        with suppress(OSError), open(small_disk / "fill", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        for step in (2, 3):  # the first of them is half there, on the last page
            with pytest.raises(OSError, match="No space left") as refused:
                log.write(step=step, text="y" * 3000)
            assert refused.value.errno == errno.ENOSPC
        (small_disk / "fill").unlink()
        log.write(step=4)
        log.write(step=5)

    assert [r["step"] for r in read(path)] == [1, 4, 5]
    assert path.read_text().count('"y') == 1


def test_every_line_is_strict_json(tmp_path):
    with JsonLines(tmp_path / "m.jsonl") as log:
        log.write(value=float("nan"))

    def refuse(name: str) -> None:
        raise ValueError(name)

    for line in (tmp_path / "m.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_what_a_later_run_did_again_is_superseded():
    def line(run, step, split="train"):
        return {"run": run, "step": step, "split": split}

    first = [line(0, 1), line(0, 2), line(0, 2, "val"), line(0, 3)]
    second = [line(1, 3), line(1, 4), line(1, 4, "val")]

    kept = list(standing([*first, {"note": "no metric"}, *second]))

    assert kept == [*first[:3], *second]


def test_a_validation_done_again_supersedes_only_itself_and_what_follows():
    first = [{"run": 0, "step": 2, "split": "train"}, {"run": 0, "step": 2, "split": "val"}]
    again = [{"run": 1, "step": 2, "split": "val"}]

    assert list(standing([*first, *again])) == [first[0], *again]
