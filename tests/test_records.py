"""Run records: whole lines or none, whatever dies."""

import json

from brainenc.records import JsonLines, read


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


def test_every_line_is_strict_json(tmp_path):
    with JsonLines(tmp_path / "m.jsonl") as log:
        log.write(value=float("nan"))

    def refuse(name: str) -> None:
        raise ValueError(name)

    for line in (tmp_path / "m.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
