"""A local folder as a place."""

import errno
import os

import pytest

from brainenc import atomic
from brainenc.errors import NoSpace, NotAStore, PlaceUnfit
from brainenc.featurestore.places import local_path, open_place
from brainenc.featurestore.places.local import LocalPlace
from brainenc.featurestore.testing import PlaceContract


class TestLocalPlace(PlaceContract):
    @pytest.fixture
    def place(self, tmp_path):
        return LocalPlace.open(tmp_path / "store", create=True)

    def raw(self, place, name):
        path = place.root / name
        return path.read_bytes() if path.exists() else None


class TestLocalPlaceWithoutLinks(TestLocalPlace):
    """exFAT and some network file systems have no hard links; a rename that does not replace takes their place."""

    @pytest.fixture(autouse=True)
    def _no_links(self, monkeypatch):
        def link(*_):
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", link)


def test_a_folder_that_is_not_there_is_no_store(tmp_path):
    with pytest.raises(NotAStore, match="no folder"):
        open_place(tmp_path / "nowhere")


def test_a_file_system_without_links_and_renames_is_refused_at_open(tmp_path, monkeypatch):
    def cannot(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(atomic, "publish_new", cannot)
    with pytest.raises(PlaceUnfit, match="stage=True"):
        LocalPlace.open(tmp_path, create=True)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_with_the_way_out(tmp_path, monkeypatch):
    place = LocalPlace.open(tmp_path, create=True)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic, "write_new", full)
    with pytest.raises(NoSpace, match=r"2 B are needed.*free.*run the same command again"):
        place.create("a/x.json", b"xy")


@pytest.mark.parametrize(
    ("url", "path"),
    [("features", "features"), ("file:///data/my%20store", "/data/my store"), ("/data", "/data"),
     ("C:/data", "C:/data"), ("gs://lab/features", None), ("memory://x", None), ("simplecache::s3://b/c", None)],
)  # fmt: skip
def test_urls_and_folders_are_told_apart(url, path):
    found = local_path(url)
    assert (None if found is None else str(found)) == path
