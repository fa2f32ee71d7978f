"""Folders in a place that everybody shares, which are one user's alone."""

import os
import stat

import pytest

from brainenc import private


def test_a_folder_is_made_closed_and_one_that_is_there_is_closed(tmp_path):
    new, there = tmp_path / "below" / "new", tmp_path / "there"
    there.mkdir(mode=0o755)

    for folder in (new, there):
        private.make(folder)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert private.refusal(folder) is None


def test_users_have_folders_of_their_own():
    assert private.temporary("brainenc").name == f"brainenc-{os.getuid()}"


def test_what_others_can_write_to_or_point_elsewhere_is_refused(tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o770)
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "file").write_text("")

    for name, why in (("open", "can be written to by others"), ("link", "is no folder"), ("file", "is no folder")):
        assert private.refusal(tmp_path / name) == why
        with pytest.raises(PermissionError, match=why):
            private.make(tmp_path / name)
    assert private.refusal(tmp_path / "nothing") is None


def test_what_somebody_else_made_is_refused(tmp_path, monkeypatch):
    (tmp_path / "theirs").mkdir(mode=0o700)
    mine = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)

    with pytest.raises(PermissionError, match=f"belongs to user {mine}, not to this one"):
        private.make(tmp_path / "theirs")
