"""Where emergency files go, and which of them counts."""

import errno
import stat

import pytest

from brainenc.errors import CheckpointUnusable, NeedsTrust
from brainenc.guard.emergency import EXPECTED_AT_MOST_S, EmergencyFiles, disk_speed, save_seconds


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

    assert files.retire(lambda path: True) == []

    assert files.found() == []
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "emergency_epoch3.pth.done",
        "emergency_epoch3.pth.xxh128.done",
    ]


def test_what_another_run_has_saved_is_left_and_named(files, tmp_path):
    files.save(3, put)
    files.save(4, put)

    (sentence,) = files.retire(lambda path: path.name == "emergency_epoch3.pth")

    assert [path.name for path in files.found()] == ["emergency_epoch4.pth"]
    assert "emergency_epoch4.pth is not of this run" in sentence


def test_a_whole_file_that_needs_trust_is_not_passed_over(files):
    """Else the training would begin again, and its work be set aside at the end."""
    files.save(3, put)

    def load(path):
        raise NeedsTrust(f"{path} holds objects")

    with pytest.raises(NeedsTrust):
        files.newest(load)


def test_two_scripts_do_not_find_each_others_files(tmp_path):
    one, other = EmergencyFiles(tmp_path / "one"), EmergencyFiles(tmp_path / "other")

    assert not set(one.places) & set(other.places)


def test_the_temporary_folder_is_shared_and_this_users_is_not(files, tmp_path):
    """Its name can be guessed: it is closed to others, and where others may have put something it is left alone."""
    second = files.places[2].parent
    files.save(1, only_in(files.places[2]))

    assert second.parent == tmp_path / "tmp"
    assert stat.S_IMODE(second.stat().st_mode) == 0o700
    assert [path.parent for path in files.found()] == [files.places[2]]
    second.chmod(0o777)
    assert files.found() == []
    saved = files.save(2, only_in(files.places[2], files.places[3]))
    assert saved.path.startswith(str(tmp_path / "home"))
    assert "can be written to by others" in saved.failures[2]


def only_in(*places):
    """A writer that fails elsewhere."""

    def write(path):
        if path.parent not in places:
            raise OSError(errno.EACCES, "Permission denied", str(path))
        return put(path)

    return write


def test_the_speed_of_a_folder_is_measured_and_nothing_left(tmp_path):
    assert disk_speed(tmp_path) > 0
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    assert disk_speed(tmp_path / "file" / "below") == 0


def test_what_to_expect_of_a_save_grows_with_the_file_up_to_a_cap(tmp_path):
    """A small file on a disk far away tells little, and far too long an expectation makes alarms of what is none."""
    assert 0.1 < save_seconds(tmp_path, 1_000) < save_seconds(tmp_path, 500_000_000)
    assert save_seconds(tmp_path, 10**13) == EXPECTED_AT_MOST_S


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("unexpected pos 640 vs 534")])
def test_any_error_leads_to_the_next_place(files, tmp_path, error):
    """Under the brake memory ends in the middle of a save; and torch has words of its own for a full disk."""

    def write(path):
        if path.parent == tmp_path / "run":
            raise error
        return put(path)

    saved = files.save(1, write)

    assert saved.path == str(tmp_path / "second/emergency_epoch1.pth")
    assert len(saved.failures) == 1


def test_a_folder_that_cannot_be_looked_into_is_named_and_passed_over(files, tmp_path, monkeypatch):
    put(tmp_path / "run/emergency_epoch1.pth")
    put(tmp_path / "second/emergency_epoch2.pth")
    look = type(tmp_path).iterdir

    def iterdir(folder):
        if folder == tmp_path / "second":
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return look(folder)

    monkeypatch.setattr(type(tmp_path), "iterdir", iterdir)

    path, _, passed_over = files.newest(contents({str(tmp_path / "run/emergency_epoch1.pth"): (1, 9)}))
    assert path == tmp_path / "run/emergency_epoch1.pth"
    assert passed_over == [f"{tmp_path / 'second'} cannot be looked into: Permission denied."]
    assert files.retire(lambda path: True) == []


def test_a_file_that_cannot_be_set_aside_is_named(files, tmp_path, monkeypatch):
    """The training has ended well: that is no reason to fail."""
    put(tmp_path / "run/emergency_epoch1.pth")

    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(type(tmp_path), "replace", refuse)

    (sentence,) = files.retire(lambda path: True)
    assert "Read-only file system" in sentence
