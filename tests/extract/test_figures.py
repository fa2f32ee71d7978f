"""The figures of a run in a file: seldom, bounded, and never a reason for a run to fail."""

import pytest

from brainenc import records
from brainenc.extract.config import ExtractProgress
from brainenc.extract.figures import Figures


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def shown(done: int) -> ExtractProgress:
    return ExtractProgress(
        images_done=done, images_total=100, images_per_s=2.5, seconds_left=None, shards_sealed=3, shards_total=9,
        retries=1, memory_bytes=7 << 20, memory_limit_bytes=1 << 30, note="a worker died",
    )  # fmt: skip


@pytest.fixture
def clock():
    return Clock()


def test_a_line_every_five_seconds_and_one_at_the_end(tmp_path, clock):
    figures = Figures(tmp_path / "made", clock=clock)
    for done in range(13):
        clock.now = 1000.0 + done
        figures.take(shown(done))
    figures.close()
    figures.close()

    lines = list(records.read(figures.path))
    assert [line["images_done"] for line in lines] == [5, 10, 12]
    assert [line["at"] for line in lines] == [1005, 1010, 1012]
    assert lines[0] == {
        "kind": "extraction", "at": 1005, "began": 1000, "images_done": 5, "images_total": 100, "images_per_s": 2.5,
        "seconds_left": None, "shards_sealed": 3, "shards_total": 9, "retries": 1, "memory_bytes": 7 << 20,
        "memory_limit_bytes": 1 << 30, "gpu_fraction": None,
    }  # fmt: skip


def test_a_run_that_had_no_figures_leaves_no_file(tmp_path, clock):
    Figures(tmp_path, clock=clock).close()

    assert not list(tmp_path.iterdir())


def test_the_file_begins_anew_when_it_is_full(tmp_path, clock):
    figures = Figures(tmp_path, every_s=0, most_bytes=1000, clock=clock)
    for done in range(100):
        figures.take(shown(done))

    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["metrics.1.jsonl", "metrics.jsonl"]
    assert all(file.stat().st_size < 1500 for file in files)
    done = [line["images_done"] for file in files for line in records.read(file)]
    assert done == list(range(done[0], 100))


def test_a_folder_that_cannot_be_made_costs_the_figures_alone(tmp_path, clock):
    (tmp_path / "file").write_text("no folder")
    figures = Figures(tmp_path / "file" / "below", every_s=0, clock=clock)

    figures.take(shown(1))
    figures.close()

    assert (tmp_path / "file").read_text() == "no folder"
