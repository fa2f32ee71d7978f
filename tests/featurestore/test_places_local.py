"""A local folder as a place."""

import errno
import fcntl
import mmap
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from brainenc import atomic, mounts
from brainenc.errors import NoSpace, NotAStore, PlaceUnfit
from brainenc.featurestore import open_store
from brainenc.featurestore.places import local_path, open_place
from brainenc.featurestore.places.local import LocalPlace
from brainenc.featurestore.recovery import debris, verify
from brainenc.featurestore.sources import LocalSource
from brainenc.featurestore.testing import PlaceContract
from tests.featurestore.making import KEY, make_collection, make_view


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


NFS = """\
22 1 8:1 / / rw,relatime - ext4 /dev/vda1 rw
31 22 0:32 / {folder} rw - {kind} host:/x rw
"""


@pytest.fixture(params=["nfs4", "cifs", "9p", "lustre", "gpfs"])
def network(request, tmp_path, monkeypatch):
    """A folder that the system's table of mounts puts behind a network."""
    folder, table = tmp_path / "srv", tmp_path / "mountinfo"
    folder.mkdir()
    table.write_text(NFS.format(folder=folder, kind=request.param))
    monkeypatch.setattr(mounts, "MOUNTINFO", table)
    return folder


class TestNetworkFileSystem(TestLocalPlace):
    @pytest.fixture
    def place(self, network):
        return LocalPlace.open(network / "store", create=True)

    def test_what_it_can(self, place, tmp_path):
        assert (place.can.mappable, place.can.readable, place.can.fresh_listing) == (False, True, False)
        assert (place.can.atomic_create, place.can.real_flush, place.can.shared_locks) == (True, True, False)
        assert pickle.loads(pickle.dumps(place)).can == place.can
        assert LocalPlace(tmp_path / "beside").can == LocalPlace.can
        assert open_place(place.root).can == place.can

    def test_a_store_is_read_in_place_without_maps_and_without_copies(self, network, tmp_path, monkeypatch):
        _, rows = make_view(network / "store")
        monkeypatch.setattr(mmap, "mmap", lambda *_, **__: pytest.fail("mapped"))
        store = open_store(network / "store")
        assert store.cache is None
        view = store[KEY]
        assert isinstance(view._source, LocalSource)
        np.testing.assert_array_equal(view[2:4], rows[2:4])
        np.testing.assert_array_equal(view[:, 0], rows[:, 0])
        np.testing.assert_array_equal(view.gather([22, 0, 7]), rows[[22, 0, 7]])
        view.prefetch([0, 1])
        assert not (tmp_path / "brainenc-cache" / "shards").exists()
        assert verify(store).whole
        assert store.collection(KEY).sealed() == frozenset(range(5))
        assert not any("manifest" in item.name for item in debris(store)), "a number would be taken again"

    def test_before_receipts_are_looked_for_the_client_is_made_to_forget(self, network, monkeypatch):
        """A change of the folder does it; of a local disk nobody needs to forget anything."""
        made, before = make_collection(network / "store"), []
        folder = network / "store" / KEY
        monkeypatch.setattr(Path, "touch", lambda path: before.append(path) or os.close(os.open(path, os.O_CREAT)))
        collection = open_store(network / "store").collection(KEY)
        collection.found()
        assert [path.parent for path in before] == [folder]
        assert sorted(path.name for path in folder.iterdir()) == ["manifest-000001.json"]

        def refused(path):
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(Path, "touch", refused)
        assert collection.found() == (frozenset(), frozenset())
        local = LocalPlace(network.parent)
        assert local.can.fresh_listing
        local.refresh(made.key)


def test_partials_are_locked_through_a_file_open_for_writing(tmp_path, monkeypatch):
    """As NFS wants it, which answers EBADF otherwise."""
    make_view(tmp_path)
    partial = tmp_path / KEY / ".shard-00003.arrow.0123456789ab.partial"
    partial.write_bytes(b"x")
    os.utime(partial, (0, 0))
    real = fcntl.flock

    def nfs_flock(fd, how):
        if how & fcntl.LOCK_EX and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return real(fd, how)

    monkeypatch.setattr(fcntl, "flock", nfs_flock)
    assert [item.name for item in debris(open_store(tmp_path))] == [str(partial)]


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
