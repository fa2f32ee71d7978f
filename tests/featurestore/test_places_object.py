"""An object store as the place of a feature store, and what it does when the network misbehaves."""

import os
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from brainenc.errors import PlaceUnfit, TransferFailed
from brainenc.featurestore.places import open_place
from brainenc.featurestore.places.object import ObjectPlace
from brainenc.featurestore.services.generic import FsspecService
from brainenc.featurestore.services.patience import Patience
from brainenc.featurestore.services.s3 import S3Service
from brainenc.featurestore.testing import PlaceContract
from tests.emulators.faultfs import FLIP, LOST, SHORT, FaultFS, Plan

QUICK = Patience(deadline_s=30.0, try_s=20.0, first_wait_s=0.01, silence_s=0.5, connect_s=2.0)


@pytest.fixture(params=["memory", "gs", "s3"])
def url(request):
    if request.param == "memory":
        return request.getfixturevalue("memory_url")
    if request.param == "gs":
        request.getfixturevalue("gcs")
        return "gs://lab/a store/of mine"
    return f"{request.getfixturevalue('s3')}/store"


def partial_with(place, name, data):
    path = place.partial(name)
    path.write_bytes(data)
    return path


class Emulated(PlaceContract):
    """The contract of every place, read around the place by another client."""

    @pytest.fixture
    def place(self, url):
        return open_place(url, create=True)


class TestMemory(Emulated):
    @pytest.fixture
    def url(self, memory_url):
        return memory_url

    def raw(self, place, name):
        store = MemoryFileSystem.store
        path = f"{place.url.removeprefix('memory:/')}/{name}"
        return store[path].getvalue() if path in store else None


class TestGoogle(Emulated):
    @pytest.fixture
    def url(self, gcs):
        self.gcs = gcs
        return "gs://lab/store"

    def raw(self, place, name):
        found = self.gcs.service.buckets["lab"].get(f"store/{name}")
        return found.data if found else None


class TestAmazon(Emulated):
    @pytest.fixture
    def url(self, s3):
        return f"{s3}/store"

    def raw(self, place, name):
        import s3fs

        fs = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
        path = f"{place.url.removeprefix('s3://')}/{name}"
        return fs.cat_file(path) if fs.exists(path) else None


class TestEveryService:
    def test_bytes_come_back_whole_and_in_ranges(self, url):
        place = open_place(url, create=True)
        for data in (b"", b"\r", b"line\r\n--==0==\r", bytes(range(256)) * 7):
            name = f"a/b-{len(data)}.json"
            assert place.create(name, data)
            assert place.read(name) == data
            assert place.size(name) == len(data)
            assert place.read(name, 3) == data[3:]
            assert place.read(name, 1, 9) == data[1:9]
            assert place.read(name, 5, 5) == b""
            assert place.read(name, 10**6, 10**6 + 5) == b""

    def test_absent_is_said_plainly_and_with_the_address(self, url):
        place = open_place(url, create=True)
        assert place.size("no/such.json") is None
        with pytest.raises(FileNotFoundError, match=re.escape(f"{url}/no/such.json")):
            place.read("no/such.json")
        place.delete("no/such.json")

    def test_a_published_file_is_whole_and_its_partial_gone(self, url):
        place = open_place(url, create=True)
        data = os.urandom(18 * 2**20 + 7)  # more than one part of an upload
        mine = partial_with(place, "k/shard-00000.arrow", data)
        assert list(place.partials("k/")) == [mine]
        assert place.publish(mine, "k/shard-00000.arrow")
        assert not mine.exists()
        assert place.size("k/shard-00000.arrow") == len(data)
        assert place.read("k/shard-00000.arrow") == data

    def test_equal_bytes_by_two_writers_have_one_winner(self, url):
        place = open_place(url, create=True)
        partials = [partial_with(place, "s.arrow", b"same bytes" * 1000) for _ in range(8)]
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda partial: place.publish(partial, "s.arrow"), partials))
        assert sum(won) == 1
        assert sum(partial.exists() for partial in partials) == 7


def test_a_listing_leaves_out_what_no_store_would_name(gcs):
    place = ObjectPlace("gs://lab/store")
    gcs.service._store("lab", {"name": "store/../../etc/x"}, b"evil", {})
    place.create("good.json", b"")
    assert [entry.name for entry in place.list()] == ["good.json"]


class TestFaultsOfTheNetwork:
    """Each fault once, at the emulator of Google Cloud Storage."""

    @pytest.mark.parametrize("fault", ["commit_reset", "commit_status"])
    def test_a_creation_whose_answer_is_lost_is_known_as_ours(self, gcs, fault):
        place = ObjectPlace("gs://lab/store", patience=QUICK)
        gcs.fault("upload_simple", fault)
        assert place.create("manifest-000001.json", b"mine")

    def test_a_shard_whose_last_answer_is_lost_is_known_as_ours(self, gcs):
        place = ObjectPlace("gs://lab/store", patience=QUICK)
        data = os.urandom(100_000)
        gcs.fault("upload_chunk", "commit_reset")
        assert place.publish(partial_with(place, "s.arrow", data), "s.arrow")
        assert gcs.data("lab", "store/s.arrow") == data

    @pytest.mark.parametrize("status", [404, 410])
    def test_an_upload_that_was_finished_and_forgotten_is_known_as_ours(self, gcs, status):
        """The retry begins a new upload, which our own object refuses."""
        place = ObjectPlace("gs://lab/store", patience=QUICK)
        data = os.urandom(100_000)
        gcs.fault("upload_chunk", "commit_status", status=status)
        assert place.publish(partial_with(place, "s.arrow", data), "s.arrow")
        assert not place.publish(partial_with(place, "s.arrow", data), "s.arrow"), "a later one is not"
        assert gcs.count("upload_start") == 3

    def test_bytes_damaged_on_their_way_up_are_sent_again(self, gcs):
        place = ObjectPlace("gs://lab/store", patience=QUICK)
        gcs.fault("upload_simple", "flip_upload", at=0.6)
        gcs.fault("upload_chunk", "flip_upload", at=0.6)
        data = os.urandom(5000)
        assert place.create("a.json", data)
        assert place.publish(partial_with(place, "s.arrow", data * 9), "s.arrow")
        assert gcs.data("lab", "store/a.json") == data
        assert gcs.data("lab", "store/s.arrow") == data * 9

    @pytest.mark.parametrize("fault", ["short", "flip", "truncate", "reset", "status"])
    def test_a_bad_answer_to_a_read_is_noticed_and_asked_for_again(self, gcs, fault):
        place = ObjectPlace("gs://lab/store", patience=QUICK)
        data = os.urandom(50_000)
        place.create("a.json", data)
        gcs.fault("media", fault)
        assert place.read("a.json") == data
        assert gcs.count("media") == 2

    def test_a_short_answer_to_a_ranged_read_is_noticed(self, gcs):
        place = ObjectPlace("gs://lab/store", patience=QUICK)
        data = os.urandom(50_000)
        place.create("a.json", data)
        gcs.fault("media", "short")
        assert place.read("a.json", 100, 20_000) == data[100:20_000]
        assert [entry.range for entry in gcs.log if entry.op == "media"] == ["bytes=100-19999"] * 2

    def test_a_server_that_hangs_is_dropped_and_asked_again(self, gcs):
        place = ObjectPlace("gs://lab/store", patience=QUICK)
        place.create("a.json", b"data")
        gcs.fault("media", "hang")
        started = time.monotonic()
        assert place.read("a.json") == b"data"
        assert time.monotonic() - started < 15

    def test_a_deletion_whose_answer_is_lost_is_done(self, gcs):
        place = ObjectPlace("gs://lab/store", patience=QUICK)
        place.create("a.json", b"data")
        gcs.fault("delete", "commit_reset")
        place.delete("a.json")
        assert gcs.names("lab") == []

    def test_giving_up_names_the_object_and_the_reason_before_the_deadline(self, gcs):
        place = ObjectPlace("gs://lab/store", patience=Patience(deadline_s=2.0, try_s=1.0, first_wait_s=0.1))
        gcs.fault("media", "status", times=-1)
        started = time.monotonic()
        with pytest.raises(TransferFailed, match=r"Reading gs://lab/store/a.json failed after \d+ tries"):
            place.read("a.json")
        assert time.monotonic() - started < 10

    def test_refused_permission_is_said_at_once(self, gcs):
        place = ObjectPlace("gs://lab/store", patience=QUICK)
        gcs.fault("upload_simple", "status", status=403, message="no access")
        with pytest.raises(TransferFailed, match="permissions"):
            place.create("a.json", b"data")
        assert gcs.count("upload_simple") == 1

    def test_a_service_that_ignores_conditions_is_refused(self, gcs, monkeypatch):
        monkeypatch.setattr(gcs.service, "_check", lambda bucket, name, query, prefix="if": None)
        with pytest.raises(PlaceUnfit, match="only if absent"):
            ObjectPlace("gs://lab/store").create("a.json", b"data")


class TestUploadsInParts:
    """Large shards, whose condition goes with the last request of their upload."""

    LARGE = bytes(17 * 2**20)

    def test_nothing_is_overwritten_by_one(self, s3):
        place = ObjectPlace(s3, patience=QUICK)
        assert place.create("s.arrow", b"first")
        assert not place.publish(partial_with(place, "s.arrow", self.LARGE), "s.arrow")
        assert place.read("s.arrow") == b"first"

    @pytest.mark.parametrize("way", ["a server that ignores it", "a client that drops it"])
    def test_a_condition_that_does_not_hold_for_them_is_found_at_the_first_creation(self, s3, monkeypatch, way):
        if way == "a server that ignores it":
            from moto.s3.models import S3Backend

            answer = S3Backend.get_object

            def blind(self, bucket, key, *args, **kwargs):  # what the server looks at before it completes an upload
                asked_by = sys._getframe(1).f_code.co_name
                return None if asked_by == "_key_response_post" else answer(self, bucket, key, *args, **kwargs)

            monkeypatch.setattr(S3Backend, "get_object", blind)
        else:
            asked = S3Service._call

            def old_client(self, limit, method, key, **request):
                request = {
                    k: v for k, v in request.items() if method != "complete_multipart_upload" or k != "IfNoneMatch"
                }
                return asked(self, limit, method, key, **request)

            monkeypatch.setattr(S3Service, "_call", old_client)
        with pytest.raises(PlaceUnfit, match="uploads in parts included"):
            ObjectPlace(s3, patience=QUICK).create("a.json", b"data")

    def test_one_that_was_finished_and_forgotten_is_known_as_ours(self, s3, monkeypatch):
        """Its answer was lost; the client asks again, and the service no longer knows the upload."""
        asked, lost = S3Service._call, []

        def answer_lost(self, limit, method, key, **request):
            answer = asked(self, limit, method, key, **request)
            if method == "complete_multipart_upload" and not lost:
                lost.append(key)
                raise FileNotFoundError("The specified upload does not exist.")
            return answer

        place = ObjectPlace(s3, patience=QUICK)
        monkeypatch.setattr(S3Service, "_call", answer_lost)
        assert place.publish(partial_with(place, "s.arrow", self.LARGE), "s.arrow")
        assert lost
        assert not place.publish(partial_with(place, "s.arrow", self.LARGE), "s.arrow"), "a later one is not"


class TestFaultsBelowFsspec:
    """The same without a network, through any fsspec client."""

    @pytest.fixture
    def store(self, memory_url):
        plan = Plan()
        root = memory_url.removeprefix("memory:/")
        service = FsspecService(FaultFS(MemoryFileSystem(), plan), root, atomic_create=True)
        return ObjectPlace(memory_url, patience=QUICK, service=service), plan

    def test_lost_answers_short_reads_and_errors(self, store):
        place, plan = store
        plan.on("pipe_file", LOST).on("cat_file", SHORT).on("cat_file", OSError(5, "Input/output error"))
        assert place.create("a.json", b"0123456789")
        assert place.read("a.json") == b"0123456789"

    def test_a_shard_whose_answer_is_lost_is_known_by_its_bytes(self, store):
        place, plan = store
        place.create("warm.json", b"")
        plan.on("pipe_file", LOST)
        assert place.publish(partial_with(place, "s.arrow", b"x" * 1000), "s.arrow")
        assert not place.publish(partial_with(place, "s.arrow", b"x" * 1000), "s.arrow")

    def test_flips_are_for_the_block_checksums_to_find(self, store):
        place, plan = store
        place.create("a.json", bytes(100))
        plan.on("cat_file", FLIP)
        assert place.read("a.json", 0, 100) != bytes(100)


def test_what_cannot_create_atomically_is_read_only(tmp_path):
    place = ObjectPlace("ftp://host/x", service=FsspecService(MemoryFileSystem(), "/x", atomic_create=False))
    with pytest.raises(PlaceUnfit, match="can be read but not written"):
        place.create("a.json", b"")
    with pytest.raises(PlaceUnfit, match="can be read but not written"):
        place.publish(tmp_path / "x", "a.json")


def test_an_unknown_kind_of_address_says_what_is_missing():
    with pytest.raises(PlaceUnfit, match="nosuchkind"):
        open_place("nosuchkind://x/y", create=True)


def test_credentials_in_an_address_are_used_but_not_shown(s3):
    place = ObjectPlace(s3.replace("s3://", "s3://AKIAEXAMPLE:topsecret@"), patience=QUICK)
    assert place.create("a.json", b"1")
    assert "topsecret" not in place.url + repr(place)
    with pytest.raises(FileNotFoundError) as caught:
        place.read("b.json")
    assert "topsecret" not in str(caught.value)


def test_sixteen_threads_each_with_all_the_work_make_each_object_once(gcs):
    """Lost answers and resets among them; every object has one winner and its bytes are right."""
    places = [ObjectPlace("gs://lab/store", patience=QUICK) for _ in range(4)]
    for fault, count in (("commit_reset", 6), ("reset", 4)):
        gcs.fault("upload_(simple|chunk)", fault, times=count, skip=3)
    wins = {n: [] for n in range(8)}
    lock = threading.Lock()

    def write_all(writer):
        place = places[writer % 4]
        for n in range(8):
            name = f"shard-{n:05d}.arrow"
            partial = partial_with(place, name, b"%d" % n * 20_000)
            if place.publish(partial, name):
                with lock:
                    wins[n].append(writer)
            else:
                partial.unlink()

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(write_all, range(16)))
    assert [len(writers) for writers in wins.values()] == [1] * 8
    assert all(gcs.data("lab", f"store/shard-{n:05d}.arrow") == b"%d" % n * 20_000 for n in range(8))


def test_numbered_commits_by_many_writers_are_dense_and_each_there_once(gcs):
    """The commit protocol over lost answers: 6 writers, 5 commits each, 30 numbers, nothing twice."""
    for n in range(5):
        gcs.fault("upload_simple", "commit_reset", skip=3 * n)
    place = ObjectPlace("gs://lab/store", patience=QUICK)

    def commit(writer):
        number = 1
        for k in range(5):
            while not place.create(f"manifest-{number:06d}.json", b"writer %d commit %d" % (writer, k)):
                number += 1

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(commit, range(6)))
    names = [entry.name for entry in place.list()]
    assert names == [f"manifest-{n:06d}.json" for n in range(1, 31)]
    assert len({place.read(name) for name in names}) == 30
