"""One live line on a terminal, few plain lines in a log, objects with --json."""

import io
import json

from brainenc.cli.progress import Progress


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(stream: io.StringIO, *, steps: int = 100, seconds: float = 1.0, json_lines: bool = False) -> str:
    clock = Clock()
    with Progress("extract", stream=stream, clock=clock, json_lines=json_lines) as progress:
        for done in range(steps + 1):
            clock.now = done * seconds
            progress.update(done, steps, images_per_s=12.3456)
    return stream.getvalue()


def test_a_terminal_sees_one_line_that_changes():
    text = run(Terminal())

    assert text.count("\n") == 1
    assert text.count("\r") > 50
    assert "images per s 12.35" in text


def test_a_log_gets_few_lines_and_the_last_state():
    lines = run(io.StringIO()).splitlines()

    assert 6 <= len(lines) <= 9
    assert lines[-1].startswith("extract: 100/100, took 2 min")
    assert not any("\r" in line for line in lines)


def test_time_left_follows_the_rate():
    clock, stream = Clock(), io.StringIO()
    progress = Progress("train", stream=stream, clock=clock)
    progress.update(0, 4)
    clock.now = 20.0
    progress.update(1, 4)

    assert stream.getvalue() == "train: 1/4, 1 min left\n"


def test_no_time_left_is_told_while_no_rate_is_known():
    """The first progress waits for everything to start: what follows from it is alarming, and wrong."""
    clock, stream = Clock(), io.StringIO()
    progress = Progress("extract", stream=stream, clock=clock)
    for done, now in ((0, 0.0), (1, 60.0), (2, 61.0), (40, 100.0)):
        clock.now = now
        progress.update(done, 1000)
        progress.close()

    first, second, third = stream.getvalue().splitlines()[-3:]
    assert "left" not in first + second
    assert third == "extract: 40/1000, 16 min left"


def test_what_was_done_before_this_run_is_no_part_of_its_rate():
    clock, stream = Clock(), io.StringIO()
    progress = Progress("train", stream=stream, clock=clock)
    for done, now in ((900, 0.0), (901, 10.0), (910, 100.0)):
        clock.now = now
        progress.update(done, 1000)

    assert stream.getvalue().splitlines()[-1] == "train: 910/1000, 15 min left"


def test_json_lines_are_objects():
    records = [json.loads(line) for line in run(io.StringIO(), json_lines=True).splitlines()]

    assert records[-1]["done"] == records[-1]["total"] == 100
    assert {"command", "seconds", "images_per_s"} <= records[-1].keys()


def test_a_note_does_not_mix_with_the_live_line():
    stream = Terminal()
    with Progress("extract", stream=stream) as progress:
        progress.update(1, 2)
        progress.note("shard 3 is done by somebody else")

    assert "\rshard 3 is done by somebody else\n" in stream.getvalue()


def test_what_is_quick_leaves_no_line_in_a_log():
    assert run(io.StringIO(), steps=10, seconds=0.1) == ""


def test_a_log_ends_with_the_last_figures_even_of_what_was_cut_short():
    clock, stream = Clock(), io.StringIO()
    with Progress("extract", stream=stream, clock=clock) as progress:
        for done in range(20):
            clock.now = done
            progress.update(done, 100)

    assert stream.getvalue().splitlines()[-1].startswith("extract: 19/100")
