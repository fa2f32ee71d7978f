"""Files appear whole, once, and survive; names that are taken stay as they are."""

import errno
import os
import threading

import pytest

from brainenc import atomic


def test_write_new_creates_once(tmp_path):
    assert atomic.write_new(tmp_path / "a", b"one")
    assert not atomic.write_new(tmp_path / "a", b"two")

    assert (tmp_path / "a").read_bytes() == b"one"
    assert os.listdir(tmp_path) == ["a"]


def test_one_of_many_writers_wins(tmp_path):
    wins = []
    barrier = threading.Barrier(16)

    def write(i: int) -> None:
        barrier.wait()
        if atomic.write_new(tmp_path / "a", str(i).encode()):
            wins.append(i)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(16)]
    [t.start() for t in threads]
    [t.join() for t in threads]

    assert len(wins) == 1
    assert (tmp_path / "a").read_bytes() == str(wins[0]).encode()
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("taken", [False, True])
def test_file_systems_without_links_rename_without_replacing(tmp_path, monkeypatch, taken):
    def no_links(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    if taken:
        (tmp_path / "a").write_bytes(b"first")

    assert atomic.write_new(tmp_path / "a", b"second") is not taken
    assert (tmp_path / "a").read_bytes() == (b"first" if taken else b"second")
    assert os.listdir(tmp_path) == ["a"]


def test_replace_leaves_nothing_beside(tmp_path):
    atomic.replace(tmp_path / "a", b"one")
    atomic.replace(tmp_path / "a", b"two")

    assert (tmp_path / "a").read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("call", [atomic.write_new, atomic.replace])
def test_a_failed_flush_leaves_the_old_state(tmp_path, monkeypatch, call):
    (tmp_path / "b").write_bytes(b"old")

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "flush failed")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="flush failed"):
        call(tmp_path / "b", b"new")

    assert (tmp_path / "b").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["b"]


def test_make_dirs_makes_parents(tmp_path):
    atomic.make_dirs(tmp_path / "a" / "b" / "c")
    atomic.make_dirs(tmp_path / "a" / "b" / "c")

    assert (tmp_path / "a" / "b" / "c").is_dir()
