"""The whole of extraction over real Ray: the same bytes however it is divided, stopped or killed."""

import os
import signal
import threading
import time

import psutil
import pytest

from brainenc import records
from brainenc.errors import BadImages, ExtractionFailed, NoSpace, ProvenanceMismatch, StimuliChanged, StoppedSafely
from brainenc.extract import driver
from brainenc.extract.config import Source
from brainenc.extract.extractor import Extractor
from brainenc.extract.guard_record import guard_folder
from brainenc.extract.miniature import save_miniature
from brainenc.extract.prepare import create, survey
from brainenc.featurestore.store import open_store
from brainenc.guard.history import read_history
from tests.extract.conftest import draw_image, save_images, tree
from tests.extract.killing import kill, receipts
from tests.extract.test_extractor import configured

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Images and a backbone that keep a core busy for some seconds, and what one undisturbed process makes of them."""
    root = tmp_path_factory.mktemp("work")
    images = save_images(root / "set", 96, size=224)
    backbone = save_miniature("dinov2", root / "mini", hidden_size=96, num_hidden_layers=6)

    def config(store, **more):
        return configured(store, images, backbone, features=("5.q", "4-5.token"), **more)

    reference = root / "reference"
    extract_here(config(reference))
    return config, reference


def extract_here(config) -> None:
    """The same work without Ray."""
    found = survey(config)
    collections = create(found)
    extractor = Extractor(found.job)
    assert {extractor.extract(task).status for task in found.tasks} == {"sealed"}
    extractor.close()
    for collection in collections.values():
        collection.commit()


def without_manifests(store) -> dict[str, bytes]:
    """Commits follow the clock and signals; all else must be equal byte for byte."""
    return {name: data for name, data in tree(store).items() if "manifest-" not in name}


def ray_workers() -> list[psutil.Process]:
    """Processes of this session's Ray that hold a model."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline() and process.cmdline()[0].startswith("ray::MapWorker"):
                found.append(process)
        except psutil.Error:
            continue
    return found


class Beside:
    """Runs something in a thread while the pipeline is at work in the main thread."""

    def __init__(self, work):
        self._end = threading.Event()
        self._thread = threading.Thread(target=lambda: work(self._end), daemon=True)

    def __enter__(self):
        self._thread.start()

    def __exit__(self, *_):
        self._end.set()
        self._thread.join(30)


def test_a_store_made_by_two_actors_is_byte_equal_to_one_made_without(tmp_path, miniature, pictures):
    def config(store, **more):
        return configured(store, pictures, miniature, features=("3.q", "2-3.token"), **more)

    extract_here(config(tmp_path / "reference"))
    seen = []

    summary = driver.extract(config(tmp_path / "s", actors=2), progress=seen.append)

    assert tree(tmp_path / "s") == tree(tmp_path / "reference")
    assert (summary.images, summary.shards_sealed, summary.shards_before) == (45, 18, 0)
    assert summary.keys == ("pictures/mini/3.q", "pictures/mini/2.token", "pictures/mini/3.token")
    assert summary.micro_batch == 4
    assert summary.images_per_s > 0
    assert summary.peak_worker_bytes > 50 << 20
    assert seen[-1].shards_sealed == 18
    assert [p.images_done for p in seen] == sorted(p.images_done for p in seen)
    guarded = read_history(guard_folder(str(tmp_path / "s"))).workers
    assert [(w["role"], w["level"], w["leaving"]) for w in guarded.values()] == 2 * [("extract", "ok", "ended")]
    assert sum(w["step"] for w in guarded.values()) <= 45
    *_, last = records.read(guard_folder(str(tmp_path / "s")) / "metrics.jsonl")
    assert (last["images_done"], last["shards_sealed"], last["retries"]) == (45, 18, 0)
    assert last["memory_bytes"] > 50 << 20


def test_done_work_is_not_scheduled_and_its_images_are_not_read(tmp_path, miniature, pictures):
    extract_here(configured(tmp_path / "s", pictures, miniature))
    before = tree(tmp_path / "s")
    for image in pictures.iterdir():
        os.utime(image, ns=(0, image.stat().st_mtime_ns))  # never read since

    summary = driver.extract(configured(tmp_path / "s", pictures, miniature))

    assert not summary.started_ray
    assert (summary.images, summary.shards_sealed, summary.shards_before) == (0, 0, 12)
    assert tree(tmp_path / "s") == before
    unread = [i for i in sorted(pictures.iterdir())[1:] if i.stat().st_atime_ns == 0]
    assert len(unread) == 44  # the first tells the size


def test_what_died_before_its_commit_is_committed_by_the_next_run(tmp_path, miniature, pictures):
    config = configured(tmp_path / "s", pictures, miniature)
    found = survey(config)
    create(found)
    extractor = Extractor(found.job)
    for task in found.tasks:
        extractor.extract(task)
    extractor.close()
    assert not open_store(tmp_path / "s")["pictures/mini/3.q"].present.any()

    summary = driver.extract(config)

    assert not summary.started_ray
    assert open_store(tmp_path / "s")["pictures/mini/3.q"].present.all()


def test_bad_images_end_the_run_after_all_else_is_sealed(tmp_path, miniature):
    folder = save_images(tmp_path / "set", 24)
    bad = [sorted(folder.iterdir())[n] for n in (2, 5, 20)]
    for path in bad:
        path.write_bytes(b"GIF89a")

    with pytest.raises(BadImages, match="--on-bad-image null") as caught:
        driver.extract(configured(tmp_path / "s", folder, miniature))

    assert set(caught.value.reasons) == {str(path) for path in bad}
    assert set(receipts(tmp_path / "s")) == {f"set/mini/3.{f}/shard-00001.json" for f in ("q", "token")}
    extract_here(configured(tmp_path / "s", folder, miniature, on_bad_image="null"))
    assert (~open_store(tmp_path / "s")["set/mini/3.q"].present).sum() == 3


@pytest.mark.chaos
def test_a_worker_that_is_killed_is_replaced_and_the_bytes_are_the_same(tmp_path, work):
    config, reference = work

    def kill_one(end):
        while not end.wait(0.01):
            victims = ray_workers()
            if len(receipts(tmp_path / "s")) >= 6 and list((tmp_path / "s").rglob("*.partial")):
                kill(victims[:1])
                return

    with Beside(kill_one):
        summary = driver.extract(config(tmp_path / "s"))

    assert summary.retries == 1
    assert tree(tmp_path / "s") == tree(reference)


@pytest.mark.chaos
def test_workers_that_keep_dying_end_the_run_with_what_they_took(tmp_path, work):
    config, _ = work

    seen: set = set()

    def kill_all(end):
        while not end.wait(0.01):
            if set((tmp_path / "s").rglob("*.partial")) - seen:
                seen.update((tmp_path / "s").rglob("*.partial"))
                time.sleep(0.05)
                kill(ray_workers())

    with Beside(kill_all), pytest.raises(ExtractionFailed, match=r"died.*peak.*limit is") as caught:
        driver.extract(config(tmp_path / "s", max_attempts=1))

    assert "--batch-size" in str(caught.value)


@pytest.mark.chaos
@pytest.mark.parametrize(("number", "raised"), [(signal.SIGTERM, StoppedSafely), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_stops_safely_and_what_is_left_can_be_done_later(tmp_path, work, number, raised):
    config, reference = work
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]

    def interrupt(end):
        while not end.wait(0.01):
            if len(receipts(tmp_path / "s")) >= 3:
                os.kill(os.getpid(), number)
                return

    with Beside(interrupt), pytest.raises(raised):
        driver.extract(config(tmp_path / "s"))

    sealed = receipts(tmp_path / "s")
    assert 3 <= len(sealed) < 36
    assert not list((tmp_path / "s").rglob("*.partial"))
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert open_store(tmp_path / "s")["set/mini/5.q"].present.any()
    extract_here(config(tmp_path / "s"))
    assert without_manifests(tmp_path / "s") == without_manifests(reference)
    assert sealed.items() <= receipts(tmp_path / "s").items()


def test_a_replaced_image_is_noticed_and_a_touched_one_is_not(tmp_path, miniature):
    folder = save_images(tmp_path / "set", 16)
    config = configured(tmp_path / "s", folder, miniature)
    extract_here(config)
    touched, replaced = sorted(folder.iterdir())[4:6]
    os.utime(touched, ns=(1, 1))
    assert driver.extract(config).images == 0

    draw_image(77).save(replaced)

    with pytest.raises(StimuliChanged, match=rf"1 image.*nsd-00015.*{replaced.name}.*--stimuli"):
        driver.extract(config)


def test_an_image_replaced_behind_equal_stats_is_found_by_reading_all(tmp_path, miniature):
    folder = save_images(tmp_path / "set", 8)
    config = configured(tmp_path / "s", folder, miniature)
    extract_here(config)
    victim = sorted(folder.iterdir())[3]
    stat, data = victim.stat(), bytearray(victim.read_bytes())
    data[-20] ^= 1
    victim.write_bytes(data)
    os.utime(victim, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert driver.extract(config).images == 0

    with pytest.raises(StimuliChanged, match="nsd-00009"):
        driver.extract(config.with_(check_images=True))


def test_a_set_with_one_more_image_is_explained(tmp_path, miniature):
    folder = save_images(tmp_path / "set", 8)
    extract_here(configured(tmp_path / "s", folder, miniature))
    draw_image(50).save(folder / "train-0050_nsd-00999.png")

    with pytest.raises(StimuliChanged, match=r"of 8 there, 9 here: 1 new \(nsd-00999\)"):
        driver.extract(configured(tmp_path / "s", folder, miniature))


def test_images_that_moved_are_the_same_images(tmp_path, miniature):
    folder = save_images(tmp_path / "old" / "set", 8)
    extract_here(configured(tmp_path / "s", folder, miniature, features=("3.q",)))
    folder.rename(tmp_path / "set")

    assert driver.extract(configured(tmp_path / "s", tmp_path / "set", miniature, features=("3.q",))).images == 0
    extract_here(configured(tmp_path / "s", tmp_path / "set", miniature, features=("3.q", "2.q")))

    assert open_store(tmp_path / "s")["set/mini/2.q"].present.all()


def test_another_backbone_under_the_same_name_is_refused_with_both_weights(tmp_path, miniature):
    folder = save_images(tmp_path / "set", 8)
    extract_here(configured(tmp_path / "s", folder, miniature, features=("3.q",)))
    other = save_miniature("dinov2", tmp_path / "other" / "mini", seed=1)

    for feature in ("3.q", "2.q"):
        with pytest.raises(ProvenanceMismatch, match=r"weights.*--name"):
            driver.extract(configured(tmp_path / "s", folder, other, features=(feature,)))


def test_subjects_that_share_images_share_rows(tmp_path, miniature):
    one, two = save_images(tmp_path / "one", 10), save_images(tmp_path / "two", 6)
    config = configured(tmp_path / "s", one, miniature).with_(
        by_id=True, stimuli="nsd", sources=(Source(location=str(one)), Source(location=str(two)))
    )

    extract_here(config)

    assert driver.extract(config).shards_before == 4
    view = open_store(tmp_path / "s")["nsd/mini/3.q"]
    assert view.select(ids=["nsd-00015", "nsd-00000"]).shape[0] == 2


def test_what_cannot_fit_is_refused_before_anything_is_made(tmp_path, miniature, pictures, monkeypatch):
    from brainenc.extract import estimate
    from brainenc.guard.probe import Space

    monkeypatch.setattr(estimate, "space", lambda path: Space(path=str(path), free=100_000, total=10**9))

    with pytest.raises(NoSpace, match=r"100 kB free, but .* are still to be written"):
        driver.extract(configured(tmp_path / "s", pictures, miniature))

    assert not (tmp_path / "s").exists()
