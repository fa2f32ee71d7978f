"""A mounted drive as the place of a feature store: recognised, never mapped, and not believed."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from brainenc.errors import NoSpace, NotAStore, PlaceUnfit, TransferFailed
from brainenc.featurestore import open_store
from brainenc.featurestore.places import open_place
from brainenc.featurestore.places.local import LocalPlace
from brainenc.featurestore.places.mount import MountPlace, needs_staging
from brainenc.featurestore.services.patience import Patience
from brainenc.featurestore.testing import PlaceContract
from tests.emulators.drivefs import MountedDrive, why_not

MOUNTS = """\
22 1 8:1 / / rw,relatime - ext4 /dev/vda1 rw
30 22 0:31 / /mnt/my\\040drive rw,nosuid - fuse.rclone remote: rw
31 22 0:32 / /srv/nfs rw - nfs4 host:/x rw
32 22 0:33 / /data rw - fuse.fuse-overlayfs overlay rw
33 30 8:2 / /mnt/my\\040drive/disk rw - ext4 /dev/vdb rw
"""


class TestRecognition:
    @pytest.mark.parametrize(
        ("folder", "staged"),
        [
            ("/mnt/my drive/store", True), ("/mnt/my drive", True), ("/mnt/my drive/disk/store", False),
            ("/mnt/my driver", False), ("/srv/nfs/store", False), ("/data/store", False), ("/home/x", False),
            ("/content/drive/MyDrive/store", True), ("/content/data", False),
        ],
    )  # fmt: skip
    def test_by_what_the_folder_is_mounted_from(self, tmp_path, folder, staged):
        table = tmp_path / "mountinfo"
        table.write_text(MOUNTS)
        assert needs_staging(Path(folder), mountinfo=table) is staged

    def test_where_the_system_does_not_say_folders_are_local(self, tmp_path):
        assert not needs_staging(tmp_path, mountinfo=tmp_path / "absent")

    def test_the_user_may_say_otherwise(self, tmp_path):
        assert isinstance(open_place(tmp_path / "a", create=True), LocalPlace)
        assert isinstance(open_place(tmp_path / "b", create=True, stage=True), MountPlace)

    def test_what_the_user_said_holds_for_those_who_come_later(self, tmp_path):
        open_place(tmp_path / "b", create=True, stage=True)
        assert isinstance(open_place(tmp_path / "b"), MountPlace)
        assert isinstance(open_place(tmp_path / "b", create=True), MountPlace)
        assert isinstance(open_place(tmp_path / "b", stage=False), LocalPlace)
        assert list(open_place(tmp_path / "b").list()) == []

    def test_a_folder_that_is_not_there_is_no_store(self, tmp_path):
        with pytest.raises(NotAStore, match="Is the drive mounted"):
            open_place(tmp_path / "absent", stage=True)


def test_folders_follows_no_link_out_of_the_store(tmp_path):
    place = MountPlace.open(tmp_path / "drive", create=True)
    (tmp_path / "drive" / "set").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "drive" / "linked").symlink_to(tmp_path / "elsewhere")
    assert place.folders() == ["set"]


@pytest.mark.parametrize("stage", [False, True])
@pytest.mark.parametrize("inside", ["", "/store"])
def test_a_file_where_the_folder_should_be_is_said(tmp_path, stage, inside):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(PlaceUnfit, match="file"):
        open_place(f"{tmp_path}/file{inside}", create=True, stage=stage)
    with pytest.raises(NotAStore):
        open_place(f"{tmp_path}/file{inside}", stage=stage)
    assert (tmp_path / "file").read_text() == "mine"


class TestFiles(PlaceContract):
    @pytest.fixture
    def place(self, tmp_path):
        return MountPlace.open(tmp_path / "drive", create=True)

    def raw(self, place, name):
        path = Path(place.url, name)
        return path.read_bytes() if path.exists() else None

    def test_files_are_made_elsewhere_and_copied_whole(self, place, tmp_path):
        partial = place.partial("k/s.arrow")
        assert tmp_path / "drive" not in partial.parents
        partial.write_bytes(bytes(range(256)) * 1000)
        assert list(place.partials("k/")) == [partial]
        assert place.publish(partial, "k/s.arrow")
        assert not partial.exists()
        assert place.read("k/s.arrow") == bytes(range(256)) * 1000
        late = place.partial("k/s.arrow")
        late.write_bytes(b"late")
        assert not place.publish(late, "k/s.arrow")
        assert late.exists()

    def test_nothing_is_ever_mapped(self, place):
        place.create("a.json", b"1")
        assert place.local("a.json") is None
        assert not place.can.mappable
        assert not place.can.real_flush

    def test_copies_cut_short_are_debris_not_files(self, place, tmp_path):
        place.create("k/a.json", b"1")
        (tmp_path / "drive" / "k" / ".s.arrow.0123456789ab.partial").write_bytes(b"half")
        assert [entry.name for entry in place.list()] == ["k/a.json"]
        assert [path.name for path in place.partials("k/")] == [".s.arrow.0123456789ab.partial"]

    def test_threads_of_one_machine_have_one_winner(self, place):
        partials = []
        for _ in range(8):
            partials.append(place.partial("s.arrow"))
            partials[-1].write_bytes(os.urandom(1000))
        won = []
        threads = [
            threading.Thread(target=lambda p=partial: won.append(place.publish(p, "s.arrow"))) for partial in partials
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(won) == 1


class TestWhatArrived:
    def test_handed_over_in_this_session_is_neither_doubted_nor_confirmed(self, tmp_path):
        place = MountPlace.open(tmp_path / "drive", create=True)
        place.create("a.json", b"1")
        assert not place.doubtful("a.json")
        assert place.staged() == ["a.json"]
        place.confirm(["a.json"])
        assert place.staged() == ["a.json"], "reading back here would only show the mount's own cache"

    def test_a_later_session_doubts_until_it_has_confirmed(self, tmp_path, monkeypatch):
        MountPlace.open(tmp_path / "drive", create=True).create("a.json", b"1")
        monkeypatch.setenv("BRAINENC_CACHE", str(tmp_path / "another machine"))
        later = MountPlace.open(tmp_path / "drive")
        assert later.doubtful("a.json")
        later.confirm(["a.json"])
        assert not later.doubtful("a.json")
        monkeypatch.setenv("BRAINENC_CACHE", str(tmp_path / "a third machine"))
        assert not MountPlace.open(tmp_path / "drive").doubtful("a.json")

    def test_a_torn_note_of_what_arrived_counts_for_nothing(self, tmp_path, monkeypatch):
        MountPlace.open(tmp_path / "drive", create=True).create("a.json", b"1")
        monkeypatch.setenv("BRAINENC_CACHE", str(tmp_path / "another machine"))
        MountPlace.open(tmp_path / "drive").confirm(["a.json"])
        (note,) = (tmp_path / "drive" / ".brainenc-confirmed").iterdir()
        note.write_bytes(note.read_bytes()[:-2])
        assert MountPlace.open(tmp_path / "drive").doubtful("a.json")


ROWS, SHARD, ROW = 12, 3, (5, 4)


def features():
    return np.arange(ROWS * 20, dtype=np.float32).reshape(ROWS, *ROW)


def write_store(folder, **options):
    store = open_store(folder, create=True, stage=True, **options)
    with store.writer(
        "s/net/1.q", ids=[f"i{n}" for n in range(ROWS)], row_shape=ROW, dtype="float32", rows_per_shard=SHARD
    ) as writer:
        writer.append(features())
    return store


class TestAStoreOnADrive:
    @pytest.fixture
    def later(self, tmp_path, monkeypatch):
        """Writes a store in one session; gives a function that opens it in another."""
        write_store(tmp_path / "drive")

        def reopen(name="later"):
            monkeypatch.setenv("BRAINENC_CACHE", str(tmp_path / name))
            return open_store(tmp_path / "drive", stage=True)

        return reopen

    def test_is_read_through_the_cache(self, tmp_path):
        view = write_store(tmp_path / "drive")["s/net/1.q"]
        assert np.array_equal(view[:], features())
        assert np.array_equal(view.gather([7, 0, 11]), features()[[7, 0, 11]])
        assert (tmp_path / "brainenc-cache" / "shards").is_dir()

    def test_what_arrived_is_trusted_after_it_was_read_back_once(self, later, tmp_path):
        assert later().collection("s/net/1.q").sealed() == {0, 1, 2, 3}
        place = later("third").place
        assert not place.doubtful("s/net/1.q/shard-00002.arrow")

    @pytest.mark.parametrize("damage", ["absent", "cut", "flipped", "empty"])
    def test_what_did_not_arrive_is_made_again(self, later, tmp_path, damage):
        shard = tmp_path / "drive/s/net/1.q/shard-00002.arrow"
        data = bytearray(shard.read_bytes())
        shard.unlink()
        if damage != "absent":
            data[len(data) // 2] ^= 1
            shard.write_bytes({"cut": data[:-7], "flipped": bytes(data), "empty": b""}[damage])
        store = later()
        assert store.collection("s/net/1.q").sealed() == {0, 1, 3}
        assert list(store["s/net/1.q"].present) == [True] * 6 + [False] * 3 + [True] * 3
        store = write_store(tmp_path / "drive")
        assert np.array_equal(store["s/net/1.q"][:], features())

    def test_a_receipt_that_did_not_arrive_costs_a_look_not_the_work(self, later, tmp_path):
        (tmp_path / "drive/s/net/1.q/shard-00001.json").unlink()
        assert later().collection("s/net/1.q").sealed() == {0, 1, 2, 3}


@pytest.mark.root
@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
class TestOnAMountedDrive:
    """A real FUSE mount, in a process that is killed as a Colab machine is taken away."""

    def test_is_recognised(self, tmp_path):
        with MountedDrive(tmp_path / "colab", upload_s=0) as drive:
            assert needs_staging(drive.mnt)
            assert needs_staging(drive.mnt / "not/yet/made")
            place = open_place(drive.mnt / "store", create=True)
            assert isinstance(place, MountPlace)
            assert isinstance(open_place(drive.mnt / "store", stage=False), LocalPlace)

    def test_a_mount_that_loses_its_last_writes_costs_only_those(self, tmp_path):
        drive = MountedDrive(tmp_path / "colab")
        drive.start(upload_s=0.0)
        write_part(drive.mnt / "store", shards=2)
        time.sleep(0.3)
        drive.kill()
        drive.start(upload_s=60)
        write_part(drive.mnt / "store", shards=4)
        assert open_store(drive.mnt / "store").collection("s/net/1.q").sealed() == {0, 1, 2, 3}
        drive.kill()  # the last two shards were handed over, and never arrived

        drive.start(upload_s=0.0)
        try:
            store = open_store(drive.mnt / "store")
            assert store.collection("s/net/1.q").sealed() == {0, 1}
            store = write_part(drive.mnt / "store", shards=4)
            assert np.array_equal(store["s/net/1.q"][:], features())
        finally:
            drive.kill()

    def test_a_read_error_is_tried_again_and_kills_nobody(self, tmp_path):
        with MountedDrive(tmp_path / "colab", upload_s=0) as drive:
            place = MountPlace.open(drive.mnt / "store", create=True)
            place.create("a.json", b"x" * 100_000)
            drive.break_reads()
            healed = threading.Timer(0.4, drive.break_reads, (False,))
            healed.start()
            assert place.read("a.json") == b"x" * 100_000
            healed.join()

    def test_a_read_error_that_stays_is_an_error(self, tmp_path):
        with MountedDrive(tmp_path / "colab", upload_s=0) as drive:
            place = MountPlace(drive.mnt, patience=Patience(deadline_s=0.5, first_wait_s=0.05))
            place.create("a.json", b"x" * 100_000)
            drive.break_reads()
            with pytest.raises(TransferFailed, match="Input/output error"):
                place.read("a.json")

    def test_a_full_drive_says_how_much_is_free_and_leaves_no_debris(self, tmp_path):
        with MountedDrive(tmp_path / "colab", upload_s=0, quota=1_000_000) as drive:
            place = MountPlace.open(drive.mnt / "store", create=True)
            partial = place.partial("s.arrow")
            partial.write_bytes(bytes(3_000_000))
            with pytest.raises(NoSpace, match="of 999424 bytes free"):
                place.publish(partial, "s.arrow")
            assert partial.exists(), "the work is not lost"
            assert os.listdir(drive.mnt / "store") == []

    def test_a_drive_that_went_away_is_an_error_with_its_path(self, tmp_path):
        drive = MountedDrive(tmp_path / "colab", upload_s=0)
        drive.start()
        place = MountPlace(drive.mnt, patience=Patience(deadline_s=0.3, first_wait_s=0.05))
        place.create("a.json", b"1")
        assert drive.process is not None
        drive.process.kill()
        drive.process.wait()
        try:
            with pytest.raises(TransferFailed, match=r"mnt/a.json failed .*Transport endpoint is not connected"):
                place.read("a.json")
        finally:
            drive.kill()


def write_part(folder, shards):
    """Write the first ``shards`` shards of the test's features, passing over what is sealed, and commit."""
    store = open_store(folder, create=True)
    collection = _collection(store)
    sealed = collection.sealed()
    for shard in set(range(shards)) - sealed:
        with collection.shard_writer(shard) as writer:
            rows = collection.rows(shard)
            writer.append(features()[rows.start : rows.stop])
            writer.seal()
    collection.commit()
    return store


def _collection(store):
    from brainenc.featurestore import StimulusSet

    store.add_stimuli(StimulusSet.from_ids("s", [f"i{n}" for n in range(ROWS)]))
    return store.create_collection("s/net/1.q", identity={"a": 1}, rows_per_shard=SHARD, row_shape=ROW, dtype="float32")


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the boot and the mounts")
def test_all_processes_of_a_machine_are_one_session(tmp_path):
    MountPlace.open(tmp_path / "drive", create=True).create("a.json", b"1")
    code = (
        "from pathlib import Path; from brainenc.featurestore.places.mount import MountPlace; "
        f"print(MountPlace(Path({str(tmp_path / 'drive')!r})).doubtful('a.json'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"
