"""Reading an image: what passes by itself is tried again, and what does not says nothing about the image."""

import asyncio
import errno
import os

import fsspec
import h5py
import numpy as np
import pytest
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from brainenc.errors import BadImages, StimuliChanged, TransferFailed
from brainenc.extract import extractor as extractors
from brainenc.extract import reading
from brainenc.extract.config import Source
from brainenc.extract.extractor import Extractor
from brainenc.extract.prepare import create, survey
from brainenc.featurestore.services.patience import Patience
from brainenc.featurestore.store import open_store
from tests.extract.conftest import draw_image, save_images
from tests.extract.test_extractor import configured

QUICK = Patience(deadline_s=0.4, first_wait_s=0.01, longest_wait_s=0.05)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    for name in ("REMOTE", "LOCAL"):
        monkeypatch.setattr(reading, name, QUICK, raising=False)


class Flaky(MemoryFileSystem):
    """A remote place that answers some calls with an error first."""

    protocol = "flaky"
    store: dict = {}
    pseudo_dirs = [""]
    errors: list = []
    reads: list = []

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("flaky://", "memory://"))

    def cat_file(self, path, start=None, end=None, **kwargs):
        Flaky.reads.append(path)
        if Flaky.errors:
            raise Flaky.errors.pop(0)
        return super().cat_file(path, start=start, end=end, **kwargs)


class Hanging(AsyncFileSystem):
    """A server that takes a request and never answers."""

    protocol = "hanging"

    async def _cat_file(self, path, start=None, end=None, **kwargs):
        await asyncio.sleep(3600)


@pytest.fixture
def flaky(pictures):
    """Eight images in a flaky place; the list is what to raise next."""
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.store.clear()
    Flaky.errors, Flaky.reads = [], []
    for path in sorted(pictures.iterdir())[:8]:
        fsspec.filesystem("flaky").pipe_file(f"/set/{path.name}", path.read_bytes())
    return Flaky


def extracted(config):
    """Outcomes of what is left, in this process."""
    found = survey(config)
    collections = create(found)
    worker = Extractor(found.job)
    try:
        outcomes = [worker.extract(task) for task in found.tasks]
    finally:
        worker.close()
    for collection in collections.values():
        collection.commit()
    return outcomes


def remote(tmp_path, miniature):
    config = configured(tmp_path / "s", "unused", miniature, features=("3.q",), on_bad_image="null")
    return config.with_(sources=(Source(location="flaky://set"),))


@pytest.mark.parametrize("error", [TimeoutError("slow"), ConnectionResetError("reset"), OSError(errno.EIO, "broken")])
def test_an_error_that_passes_is_tried_again(tmp_path, miniature, flaky, error):
    config = remote(tmp_path, miniature)
    found = survey(config)
    create(found)
    flaky.errors = [error, error]
    worker = Extractor(found.job)

    (outcome,) = [worker.extract(task) for task in found.tasks]
    worker.close()

    assert (outcome.status, outcome.rows, dict(outcome.bad)) == ("sealed", 8, {})
    assert len(flaky.reads) == 1 + 8 + 2  # one for the size of the images


def test_a_place_that_does_not_answer_leaves_no_missing_row(tmp_path, miniature, flaky):
    config = remote(tmp_path, miniature)
    found = survey(config)
    create(found)
    flaky.errors = [TimeoutError("slow")] * 1000
    worker = Extractor(found.job)

    outcome = worker.extract(found.tasks[0])
    worker.close()

    assert outcome.status == "failed"
    assert isinstance(outcome.error, TransferFailed)
    assert "the same command goes on" in str(outcome.error)
    assert not list((tmp_path / "s").rglob("shard-*"))
    flaky.errors = []
    assert [o.status for o in extracted(config)] == ["sealed"]
    assert open_store(tmp_path / "s")["set/mini/3.q"].present.all()


def test_a_server_that_hangs_is_dropped(monkeypatch):
    fsspec.register_implementation("hanging", Hanging, clobber=True)
    monkeypatch.setattr(reading, "REMOTE", Patience(deadline_s=0.5, try_s=0.1, first_wait_s=0.01), raising=False)

    with pytest.raises(TransferFailed, match=r"hanging://h/a\.png failed after [2-9] tries"):
        reading.read_bytes("hanging://h/a.png")


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.ESTALE])
def test_a_local_error_is_not_the_images(tmp_path, miniature, monkeypatch, number):
    folder = save_images(tmp_path / "set", 8)
    victim = str(sorted(folder.iterdir())[5])
    config = configured(tmp_path / "s", folder, miniature, features=("3.q",), on_bad_image="null")
    found = survey(config)
    create(found)
    worker = Extractor(found.job)

    def refuse(uri, *mode):
        if str(uri) == victim:
            raise OSError(number, "refused", uri)
        return open(uri, *mode)

    monkeypatch.setattr(reading, "open", refuse, raising=False)
    outcome = worker.extract(found.tasks[0])
    worker.close()

    assert outcome.status == "failed"
    assert isinstance(outcome.error, TransferFailed)
    assert victim in str(outcome.error)
    monkeypatch.undo()
    assert [o.status for o in extracted(config)] == ["sealed"]
    assert open_store(tmp_path / "s")["set/mini/3.q"].present.all()


def test_an_absent_image_is_a_missing_row_by_choice(tmp_path, miniature):
    folder = save_images(tmp_path / "set", 8)
    config = configured(tmp_path / "s", folder, miniature, features=("3.q",), on_bad_image="null")
    found = survey(config)
    collections = create(found)
    sorted(folder.iterdir())[5].unlink()
    worker = Extractor(found.job)

    outcome = worker.extract(found.tasks[0])
    worker.close()
    collections["set/mini/3.q"].commit()

    assert outcome.status == "sealed"
    assert np.flatnonzero(~open_store(tmp_path / "s")["set/mini/3.q"].present).tolist() == [5]


def test_what_cannot_be_decoded_and_reads_differently_again_is_no_bad_image(tmp_path, miniature, monkeypatch):
    """A body that came short, or a file that is being written."""
    folder = save_images(tmp_path / "set", 8)
    victim = str(sorted(folder.iterdir())[5])
    found = survey(configured(tmp_path / "s", folder, miniature, features=("3.q",), on_bad_image="null"))
    create(found)
    worker, seen, read = Extractor(found.job), [], reading.read_bytes

    def short(uri):
        seen.append(uri)
        return read(uri)[:100] if uri == victim and seen.count(uri) == 1 else read(uri)

    monkeypatch.setattr(extractors, "read_bytes", short)
    outcome = worker.extract(found.tasks[0])
    worker.close()

    assert isinstance(outcome.error, TransferFailed)
    assert victim in str(outcome.error)


def test_a_decoder_without_memory_is_not_the_images_fault(tmp_path, miniature):
    """Those decoded ahead are in the way: it goes on one by one."""
    folder = save_images(tmp_path / "set", 8)
    found = survey(configured(tmp_path / "s", folder, miniature, features=("3.q",), on_bad_image="null"))
    create(found)
    worker, failed = Extractor(found.job), []
    whole = worker._backbone.preprocess

    def preprocess(image):
        if not failed:
            failed.append(1)
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:116] . DefaultCPUAllocator: can't allocate memory")
        return whole(image)

    worker._backbone.preprocess = preprocess
    outcome = worker.extract(found.tasks[0])
    worker.close()

    assert (outcome.status, dict(outcome.bad)) == ("sealed", {})


def test_an_image_that_cannot_be_read_just_now_was_not_replaced(tmp_path, miniature, monkeypatch):
    folder = save_images(tmp_path / "set", 8)
    config = configured(tmp_path / "s", folder, miniature, features=("3.q",))
    extracted(config)
    victim = sorted(folder.iterdir())[0]
    data = victim.read_bytes()
    victim.write_bytes(data)  # another time of change: it is read again and compared

    def refuse(uri, *mode):
        raise OSError(errno.EIO, "refused", uri)

    monkeypatch.setattr(reading, "open", refuse, raising=False)
    with pytest.raises(TransferFailed):
        survey(config)
    monkeypatch.undo()
    draw_image(77).save(victim)
    with pytest.raises(StimuliChanged):
        survey(config)


@pytest.fixture
def brick(tmp_path):
    """An HDF5 brick with checksums."""
    path = tmp_path / "nsd_stimuli.hdf5"
    with h5py.File(path, "w") as file:
        pixels = np.stack([np.asarray(draw_image(n, 112)) for n in range(6)])
        file.create_dataset("imgBrick", data=pixels, chunks=(1, 112, 112, 3), fletcher32=True)
    return path


def test_a_brick_of_stimuli_is_extracted_like_files_of_the_same_pixels(tmp_path, miniature, brick):
    folder = tmp_path / "files"
    folder.mkdir()
    for n in range(6):
        draw_image(n, 112).save(folder / f"nsd-{n:05d}.png")

    outcomes = extracted(configured(tmp_path / "s", brick, miniature, features=("3.q",)))
    extracted(configured(tmp_path / "s", folder, miniature, features=("3.q",)))

    assert {o.status for o in outcomes} == {"sealed"}
    store = open_store(tmp_path / "s")
    rows = store["nsd_stimuli/mini/3.q"]
    assert rows.ids == [f"nsd-{n:05d}" for n in range(6)]
    assert rows.details["image_size"] == [112, 112]
    np.testing.assert_array_equal(rows[:], store["files/mini/3.q"][:])


def test_a_damaged_row_of_a_brick_is_a_bad_image_and_one_too_many_is_absent(brick):
    with h5py.File(brick, "r") as file:
        place = file["imgBrick"].id.get_chunk_info(2).byte_offset
    data = bytearray(brick.read_bytes())
    data[place + 1000] ^= 1
    brick.write_bytes(data)

    with pytest.raises(BadImages, match=r"imgBrick\[2\]: damaged"):
        reading.read_pixels(reading.hdf5_uri(str(brick), 2))
    with pytest.raises(FileNotFoundError, match="6 images"):
        reading.read_pixels(reading.hdf5_uri(str(brick), 6))
    assert reading.read_pixels(reading.hdf5_uri(str(brick), 3)).shape == (112, 112, 3)


def test_workers_that_start_in_another_folder_find_store_and_backbone(tmp_path, miniature, monkeypatch):
    """A cluster's workers start where their node's Ray was started."""
    save_images(tmp_path / "images", 2)
    monkeypatch.chdir(tmp_path)
    backbone = os.path.relpath(miniature, tmp_path)

    job = survey(configured("store", "images", backbone)).job

    assert job.store == str(tmp_path / "store")
    assert job.backbone == str(miniature)
    assert reading.absolute("gs://lab/features") == "gs://lab/features"
    assert reading.absolute_backbone("facebook/dinov2-base") == "facebook/dinov2-base"
    assert reading.absolute_backbone(f"dinov2_q@{backbone}") == f"dinov2_q@{miniature}"
