"""A run folder that lies on an object store or a drive: what is sent, what is taken, who may go on."""

import json
import threading
import time

import pytest

from brainenc.errors import TakenOver, TransferFailed, UsageError
from brainenc.featurestore.places.mount import MountPlace
from brainenc.featurestore.places.object import ObjectPlace
from brainenc.featurestore.services.generic import FsspecService
from brainenc.featurestore.services.patience import Patience
from brainenc.train.elsewhere import elsewhere, local_run, on_this_node, run_to_look_at
from brainenc.train.mirror import RunMirror


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BRAINENC_CACHE", str(tmp_path / "machine-a"))


@pytest.fixture
def other_machine(tmp_path, monkeypatch):
    def go(name="machine-b"):
        monkeypatch.setenv("BRAINENC_CACHE", str(tmp_path / name))

    return go


@pytest.fixture
def url():
    import fsspec

    fs = fsspec.filesystem("memory")
    yield "memory://runs-of-test/first"
    for path in [path for path in fs.store if path.startswith("/runs-of-test")]:
        del fs.store[path]


def checkpoint(folder, name, weights=b"weights"):
    path = folder / "checkpoints" / name
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(weights)
    (path / "state.pt").write_bytes(b"state")
    (path / "manifest.json").write_text(json.dumps({"of": weights.decode()}))
    (folder / "checkpoints" / "last.json").write_text(json.dumps({"checkpoint": name}))


def begin(folder):
    (folder / "config.yaml").write_text("seed: 0\n")
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')


def append(folder, line):
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(f"{line}\n")


def names(url):
    return [entry.name for entry in ObjectPlace(url).list()]


def test_a_local_run_is_worked_on_in_place(tmp_path):
    with local_run(tmp_path / "run", new=True) as folder:
        assert folder == tmp_path / "run"
    with run_to_look_at(tmp_path / "run") as folder:
        assert folder == tmp_path / "run"


def test_everything_but_hidden_files_is_sent_and_comes_back_elsewhere(url, other_machine):
    with local_run(url, new=True) as folder:
        begin(folder)
        checkpoint(folder, "epoch0_step5")
        (folder / ".ray").mkdir()
        (folder / ".ray" / "log").write_text("x")
    assert names(url) == [
        "checkpoints/epoch0_step5/manifest.json", "checkpoints/epoch0_step5/model.safetensors",
        "checkpoints/epoch0_step5/state.pt", "checkpoints/last.json", "config.yaml", "metrics.jsonl", "mirror.json",
    ]  # fmt: skip
    other_machine()
    with local_run(url) as again:
        assert again != folder
        assert (again / "checkpoints/epoch0_step5/model.safetensors").read_bytes() == b"weights"
        with open(again / "metrics.jsonl", "a") as file:
            file.write('{"step": 2}\n')
    assert ObjectPlace(url).read("metrics.jsonl").count(b"\n") == 2


def test_a_checkpoint_is_sent_as_soon_as_it_is_whole_its_manifest_last(url):
    place = ObjectPlace(url)
    order = []
    real = place.replace_file
    place.replace_file = lambda name, path: (order.append(name), real(name, path))[1]
    with local_run(url, new=True) as folder:
        pass
    mirror = RunMirror(place, folder, every_s=0.05)
    with mirror:
        begin(folder)
        checkpoint(folder, "epoch0_step5")
        deadline = time.monotonic() + 10
        while "checkpoints/last.json" not in order and time.monotonic() < deadline:
            time.sleep(0.01)
    inside = [name for name in order if "epoch0_step5" in name]
    assert inside[-1].endswith("manifest.json")
    assert order.index(inside[-1]) < order.index("checkpoints/last.json"), "no pointer before what it points to"


def test_what_is_pruned_here_is_removed_there(url):
    import shutil

    with local_run(url, new=True) as folder:
        begin(folder)
        checkpoint(folder, "epoch0_step5")
    with local_run(url) as folder:
        checkpoint(folder, "epoch0_step9")
        shutil.rmtree(folder / "checkpoints/epoch0_step5")
    assert not [name for name in names(url) if "step5" in name]
    assert [name for name in names(url) if "step9" in name]


def test_a_step_that_was_made_again_replaces_the_one_before(url, other_machine):
    with local_run(url, new=True) as folder:
        begin(folder)
        checkpoint(folder, "epoch0_step5", b"first")
    other_machine()
    with local_run(url) as folder:
        import shutil

        shutil.rmtree(folder / "checkpoints/epoch0_step5")
        checkpoint(folder, "epoch0_step5", b"second")
    assert ObjectPlace(url).read("checkpoints/epoch0_step5/model.safetensors") == b"second"


def test_a_step_made_again_and_sent_by_half_is_not_taken_for_whole(url):
    import shutil

    with local_run(url, new=True) as folder:
        begin(folder)
        checkpoint(folder, "epoch0_step5", b"first")
    shutil.rmtree(folder / "checkpoints/epoch0_step5")
    checkpoint(folder, "epoch0_step5", b"second")
    place = ObjectPlace(url)

    def breaks(name, path):
        raise TransferFailed(f"{name} was not sent")

    place.replace_file = breaks
    with pytest.raises(TransferFailed):
        RunMirror(place, folder).push()
    assert "checkpoints/epoch0_step5/manifest.json" not in names(url)


def test_nothing_that_did_not_change_is_sent_again(url):
    with local_run(url, new=True) as folder:
        begin(folder)
        checkpoint(folder, "epoch0_step5")
    place = ObjectPlace(url)
    sent = []
    place.replace_file = lambda name, path: sent.append(name)
    with RunMirror(place, folder):
        pass
    assert sent == []


def test_the_machine_that_was_killed_goes_on_from_its_own_disk(url):
    with local_run(url, new=True) as folder:
        begin(folder)
    checkpoint(folder, "epoch0_step5")  # made, and never sent: the machine was killed
    with local_run(url) as again:
        assert (again / "checkpoints/epoch0_step5/manifest.json").exists()
    assert "checkpoints/epoch0_step5/manifest.json" in names(url)


def test_whoever_was_overtaken_sends_nothing_more(url, other_machine):
    ours = local_run(url, new=True)
    folder = ours.__enter__()
    begin(folder)
    RunMirror(ObjectPlace(url), folder).push()
    other_machine()
    with local_run(url) as theirs:
        append(theirs, "theirs")
    append(folder, "ours")
    with pytest.raises(TakenOver, match="gone on with by another machine"):
        ours.__exit__(None, None, None)
    assert ObjectPlace(url).read("metrics.jsonl").endswith(b"theirs\n")


def test_a_run_is_not_begun_twice_and_not_gone_on_with_where_there_is_none(url):
    with pytest.raises(UsageError, match="is no run folder"), local_run(url):
        pass
    with local_run(url, new=True) as folder:
        begin(folder)
    with pytest.raises(UsageError, match=r"--resume memory://runs-of-test/first"), local_run(url, new=True):
        pass


def test_looking_at_a_run_that_goes_on_elsewhere_claims_nothing(url, other_machine):
    with local_run(url, new=True) as folder:
        begin(folder)
        RunMirror(ObjectPlace(url), folder).push()
        other_machine()
        with run_to_look_at(url) as look:
            assert (look / "metrics.jsonl").read_text() == '{"step": 1}\n'
            (look / "scores.json").write_text("{}")
    assert "scores.json" in names(url)


def test_a_place_that_fails_is_tried_again_and_the_end_says_what_is_not_there(url, tmp_path):
    with local_run(url, new=True) as folder:
        begin(folder)

    class Down(FsspecService):
        down = threading.Event()

        def put(self, *args, **kwargs):
            if self.down.is_set():
                raise ConnectionResetError("the network is down")
            super().put(*args, **kwargs)

    import fsspec

    service = Down(fsspec.filesystem("memory"), "/runs-of-test/first", atomic_create=True)
    place = ObjectPlace(url, service=service, patience=Patience(deadline_s=0.2, first_wait_s=0.05))
    with RunMirror(place, folder, every_s=0.05):
        service.down.set()
        append(folder, "more")
        time.sleep(0.5)
        service.down.clear()
    assert place.read("metrics.jsonl").endswith(b"more\n")
    mirror = RunMirror(place, folder, every_s=60).__enter__()
    append(folder, "even more")
    service.down.set()
    with pytest.raises(TransferFailed, match=r"metrics\.jsonl"):
        mirror.__exit__(None)


def test_an_error_in_training_is_not_hidden_by_one_in_sending(url):
    def fails():
        with local_run(url, new=True) as folder:
            begin(folder)
            ObjectPlace(url).replace("mirror.json", b'{"owner": "somebody"}')
            raise ValueError("of training")

    with pytest.raises(ValueError, match="of training"):
        fails()


def test_a_drive_is_handed_to_and_says_so(tmp_path, monkeypatch, other_machine):
    monkeypatch.setattr("brainenc.train.elsewhere.needs_staging", lambda path: True)
    notes = []
    with local_run(tmp_path / "drive" / "run", new=True, note=notes.append) as folder:
        begin(folder)
        checkpoint(folder, "epoch0_step5")
    assert "handed over, not confirmed" in notes[0]
    assert (tmp_path / "drive/run/checkpoints/epoch0_step5/model.safetensors").read_bytes() == b"weights"
    other_machine()
    assert MountPlace.open(tmp_path / "drive" / "run").doubtful("config.yaml") is True
    with local_run(tmp_path / "drive" / "run") as again:
        assert (again / "config.yaml").exists()


class TestNodes:
    """Workers on several machines of one run, whose disks they do not share."""

    def test_a_local_run_is_where_it_is(self, tmp_path):
        (tmp_path / "run").mkdir()
        assert elsewhere(tmp_path / "run") is None
        with on_this_node(None) as folder:
            assert folder is None

    def test_on_the_drivers_machine_workers_use_the_drivers_folder(self, url):
        with local_run(url, new=True) as folder:
            begin(folder)
            with on_this_node(elsewhere(folder)) as worked_on:
                assert worked_on == folder

    def test_what_a_rank_on_another_machine_makes_arrives_and_moves_with_the_rank(self, url, other_machine):
        """Rank 0 on node b, then on node c, then on the driver's own; the driver goes on from all of it."""
        with local_run(url, new=True) as folder:
            begin(folder)
            run = elsewhere(folder)
            other_machine("machine-b")
            with on_this_node(run) as on_b:
                assert on_b != folder
                assert (on_b / "config.yaml").exists()
                checkpoint(on_b, "epoch0_step5")
                with open(on_b / "metrics.jsonl", "a") as file:
                    file.write('{"step": 5}\n')
            other_machine("machine-c")
            with on_this_node(run) as on_c:
                assert (on_c / "checkpoints/epoch0_step5/model.safetensors").exists()
                checkpoint(on_c, "epoch1_step9")
                (on_c / "checkpoints/last.json").write_text('{"checkpoint": "epoch1_step9", "step": 9}')
            other_machine("machine-a")
            with on_this_node(run) as on_a:
                assert on_a == folder
                assert (on_a / "checkpoints/epoch1_step9/manifest.json").exists()
                assert json.loads((on_a / "checkpoints/last.json").read_text())["step"] == 9
                assert (on_a / "metrics.jsonl").read_text().count("\n") == 2
        assert [name for name in names(url) if name.endswith("manifest.json")] == [
            "checkpoints/epoch0_step5/manifest.json", "checkpoints/epoch1_step9/manifest.json"
        ]  # fmt: skip

    def test_the_driver_does_not_put_its_old_records_over_newer_ones(self, url, other_machine):
        with local_run(url, new=True) as folder:
            begin(folder)
            run = elsewhere(folder)
            other_machine("machine-b")
            with on_this_node(run) as on_b:
                (on_b / "metrics.jsonl").write_text("long and newer records\n" * 3)
            other_machine("machine-a")
        assert ObjectPlace(url).read("metrics.jsonl").startswith(b"long and newer")
        with local_run(url) as again:
            assert (again / "metrics.jsonl").read_text().startswith("long and newer")

    def test_what_a_killed_worker_left_on_its_node_is_sent_by_the_next_one(self, url, other_machine):
        with local_run(url, new=True) as folder:
            begin(folder)
            run = elsewhere(folder)
            other_machine("machine-b")
            with on_this_node(run) as on_b:
                pass
            checkpoint(on_b, "emergency_epoch0_step3")  # its process was killed before it was sent
            with on_this_node(run):
                pass
            assert "checkpoints/emergency_epoch0_step3/manifest.json" in names(url)
            other_machine("machine-a")

    def test_what_was_pruned_on_one_node_does_not_come_back(self, url, other_machine):
        import shutil

        with local_run(url, new=True) as folder:
            begin(folder)
            checkpoint(folder, "epoch0_step5")
            run = elsewhere(folder)
            shutil.rmtree(folder / "checkpoints/epoch0_step5")
            with on_this_node(run):
                assert not (folder / "checkpoints/epoch0_step5").exists()


def test_a_checkpoint_is_there_only_with_what_it_takes_to_go_on_from_it(url, monkeypatch):
    """Whatever the machine dies after, config and the records up to a checkpoint came before it, its pointer after."""
    order = []
    replace = ObjectPlace.replace_file
    monkeypatch.setattr(ObjectPlace, "replace_file", lambda *a: (order.append(a[1]), replace(*a))[1])
    with local_run(url, new=True) as folder:
        begin(folder)
        checkpoint(folder, "epoch0_step5")
    manifest = order.index("checkpoints/epoch0_step5/manifest.json")
    assert {"config.yaml", "metrics.jsonl"} <= set(order[:manifest])
    assert order.index("checkpoints/last.json") > manifest


def test_a_pointer_waits_for_its_checkpoint(url):
    with local_run(url, new=True) as folder:
        begin(folder)
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "last.json").write_text('{"checkpoint": "epoch0_step5"}')  # not whole yet
    assert "checkpoints/last.json" not in names(url)
