"""Where emergency files go, and which of them counts."""

import errno

import pytest

from brainenc.errors import CheckpointUnusable
from brainenc.guard.emergency import EmergencyFiles, disk_speed


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Two folders of one's own, with the temporary and the home folder inside the test's."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    return EmergencyFiles(tmp_path / "run", [tmp_path / "second"])


def put(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("state")
    return 5


def test_the_first_place_is_taken_when_it_can(files, tmp_path):
    saved = files.save(42, put)

    assert saved.path == str(tmp_path / "run/emergency_epoch42.pth")
    assert saved.failures == ()


@pytest.mark.parametrize("broken", [1, 2, 3])
def test_the_next_place_is_tried_and_the_failure_told(files, broken):
    refused = files.places[:broken]

    def write(path):
        if path.parent in refused:
            raise OSError(errno.EACCES, "Permission denied", str(path))
        return put(path)

    saved = files.save(1, write)

    assert saved.path == str(files.places[broken] / "emergency_epoch1.pth")
    assert len(saved.failures) == broken
    assert all("Permission denied" in failure for failure in saved.failures)


def test_when_no_place_takes_it_every_reason_is_told(files):
    def write(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    saved = files.save(1, write)

    assert saved.path == ""
    assert len(saved.failures) == 4


def contents(positions, torn=()):
    """A loader for files that hold (epoch, step)."""

    def load(path):
        if str(path) in torn:
            raise CheckpointUnusable(f"{path} is torn.")
        epoch, step = positions[str(path)]
        return {"epoch": epoch, "step": step}

    return load


def test_the_newest_step_counts_wherever_it_lies(files, tmp_path):
    names = ["run/emergency_epoch1.pth", "run/emergency_epoch2.pth", "second/emergency_epoch2.pth"]
    paths = [str(tmp_path / name) for name in names]
    for path in paths:
        put(tmp_path / path)

    path, content, passed_over = files.newest(contents(dict(zip(paths, [(1, 9), (2, 3), (2, 7)], strict=True))))

    assert (str(path), content["step"], passed_over) == (paths[2], 7, [])


def test_a_torn_file_is_passed_over_and_named(files, tmp_path):
    old, new = (str(tmp_path / f"run/emergency_epoch{e}.pth") for e in (1, 2))
    put(tmp_path / old)
    put(tmp_path / new)

    path, _, passed_over = files.newest(contents({old: (1, 9)}, torn=[new]))

    assert str(path) == old
    assert passed_over == [f"{new} is torn."]


def test_without_files_there_is_nothing_to_resume(files):
    assert files.newest(contents({})) == (None, {}, [])


def test_other_files_are_left_alone(files, tmp_path):
    for name in ("emergency_epoch1.pth.done", "emergency_epochX.pth", "best.pth", ".emergency_epoch1.pth.ab.partial"):
        put(tmp_path / "run" / name)

    assert files.found() == []


def test_a_finished_training_retires_its_files(files, tmp_path):
    files.save(3, put)
    (tmp_path / "run/emergency_epoch3.pth.xxh128").write_text("sum")

    files.retire()

    assert files.found() == []
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "emergency_epoch3.pth.done",
        "emergency_epoch3.pth.xxh128.done",
    ]


def test_two_scripts_do_not_find_each_others_files(tmp_path):
    one, other = EmergencyFiles(tmp_path / "one"), EmergencyFiles(tmp_path / "other")

    assert not set(one.places) & set(other.places)


def test_the_speed_of_a_folder_is_measured_and_nothing_left(tmp_path):
    assert disk_speed(tmp_path) > 0
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    assert disk_speed(tmp_path / "file" / "below") == 0
