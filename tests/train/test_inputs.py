"""What does not fit together is refused before anything starts, with what was found and what to do."""

import mmap
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash

from brainenc import mounts
from brainenc.cli.main import run as brainenc
from brainenc.datasets import layout
from brainenc.datasets.algonauts import Subject
from brainenc.errors import DataError, KeyNotFound, UnknownName, UsageError
from brainenc.featurestore import Stimulus, StimulusSet
from brainenc.featurestore.store import open_store
from brainenc.train import prepare
from brainenc.train.data import Loader
from brainenc.train.evaluate import evaluate, evaluate_ridge, open_run
from brainenc.train.inputs import StoredViews, open_samples, provenance, read_split, split_samples
from brainenc.train.launch import train
from brainenc.train.order import Order
from brainenc.train.run_folder import RunFolder


def samples_of(config):
    return open_samples(config, Subject.open(config.subject_dir), StoredViews(config))


def test_features_are_matched_by_id_not_by_position(small, tmp_path):
    """A store of other images too, in another order, serves the subject."""
    config = small.config(tmp_path / "run")
    plain = samples_of(config)
    rng = np.random.default_rng(1)
    ids = [f"nsd-{i:05d}" for i in rng.permutation(60)]
    rows = rng.normal(size=(60, 17, 16)).astype(np.float16)
    with open_store(tmp_path / "store", create=True).writer("all/tiny/1.q", ids=ids, row_shape=(17, 16)) as writer:
        writer.append(rows)

    found = samples_of(replace(config, store=str(tmp_path / "store"), stimuli="all", features=("tiny/1.q:cls",)))

    assert found.ids == plain.ids
    assert [ids[row] for row in found.feature_rows[0]] == plain.ids


def test_images_without_features_are_counted_and_named(small, tmp_path):
    config = small.config(tmp_path / "run", stimuli="subj01-test")

    with pytest.raises(
        DataError, match=r"45 of the 45 train images .* have no row in the feature 'tiny/1.q' \(5 rows\)"
    ):
        train(config)
    assert not (tmp_path / "run").exists(), "nothing was started"


def test_a_feature_that_is_not_there_names_those_that_are(small, tmp_path):
    with pytest.raises(KeyNotFound, match=r"subj01-train/tiny/2\.token"):
        train(small.config(tmp_path / "run", features=("tiny/9.q",)))


def test_no_feature_and_unknown_readouts_are_usage_errors(small, tmp_path):
    with pytest.raises(UsageError, match="at least one --feature"):
        train(small.config(tmp_path / "run", features=()))
    with pytest.raises(UnknownName, match="rois_all"):
        train(small.config(tmp_path / "run", encoder={"readout": "everything"}))


def test_responses_that_are_nan_are_counted(small, tmp_path):
    subject = tmp_path / "subj01"
    shutil.copytree(small.subject_dir, subject)
    file = subject / layout.responses_file("train", "rh")
    broken = np.load(file)
    broken[3, 4:6] = np.nan
    np.save(file, broken)

    with pytest.raises(DataError, match="NaN or infinite responses in 1 row and 2 vertices"):
        train(small.config(tmp_path / "run", subject_dir=str(subject)))


def test_rois_without_a_vertex_are_said_and_kept(small, tmp_path):
    subject = tmp_path / "subj01"
    shutil.copytree(small.subject_dir, subject)
    for hemisphere in ("lh", "rh"):
        file = subject / layout.mask_file(hemisphere, "floc-faces", "challenge")
        labels = np.load(file)
        labels[labels == 5] = 0
        np.save(file, labels)
    config, notes = small.config(tmp_path / "run", subject_dir=str(subject)), []

    prepare.check(config, StoredViews(config), note=notes.append)

    assert any("lh aTL-faces" in note and "rh aTL-faces" in note for note in notes)


def test_the_split_is_nine_to_one_by_seed_and_can_be_given(small, tmp_path):
    config = small.config(tmp_path / "run")
    samples = samples_of(config)

    train_rows, val_rows = split_samples(samples, read_split(config, 45))
    np.save(tmp_path / "idxs.npy", np.arange(45))
    given = split_samples(samples, read_split(replace(config, split=str(tmp_path / "idxs.npy")), 45))

    assert (len(train_rows), len(val_rows)) == (40, 5)
    assert sorted([*train_rows, *val_rows]) == list(range(45))
    assert [rows.tolist() for rows in given] == [list(range(40)), list(range(40, 45))]


@pytest.mark.parametrize("indices", [np.arange(44), np.zeros(45, int), np.arange(45)[:, None]])
def test_a_split_of_other_images_is_refused(small, tmp_path, indices):
    np.save(tmp_path / "idxs.npy", indices)

    with pytest.raises(DataError, match="wanted each of the numbers 0 to 44 once"):
        read_split(small.config(tmp_path / "run", split=str(tmp_path / "idxs.npy")), 45)


def test_a_run_folder_that_holds_a_run_is_not_overwritten(small, tmp_path):
    config = small.config(tmp_path / "run", epochs=1, predict=False)
    train(config)

    with pytest.raises(UsageError, match="holds a run already"):
        train(config)


def test_images_of_another_size_than_when_they_were_extracted_are_told(small, tmp_path):
    """Renamed or rotated files keep their ids: what the store knows of each file tells. A moved copy is not refused."""
    config = small.config(tmp_path / "run")
    subject = tmp_path / "subj01"
    shutil.copytree(config.subject_dir, subject)
    images = Subject.open(subject).images("train")
    for number, path in enumerate(images):
        path.write_bytes(b"x" * (100 + number))
    store = open_store(tmp_path / "store", create=True)
    files = [Stimulus(layout.stimulus_id(p, p.parent), f"/elsewhere/{p.name}", 100 + n) for n, p in enumerate(images)]
    store.add_stimuli(StimulusSet("subj01-train", files))
    collection = store.create_collection(
        "subj01-train/tiny/1.q", identity={}, rows_per_shard=50, row_shape=(17, 16), dtype="float16",
        details={"n_prefix": 1, "grid": [4, 4]},
    )  # fmt: skip
    with collection.shard_writer(0) as writer:
        writer.append(np.ones((len(images), 17, 16), np.float16))
        writer.seal()
    collection.commit()
    config = replace(config, store=str(tmp_path / "store"), subject_dir=str(subject), features=("tiny/1.q",))

    def told():
        notes = []
        prepare.check(config, StoredViews(config), note=notes.append)
        return [note for note in notes if note.startswith("WARNING")]

    assert told() == []
    images[3].rename(subject / "aside")
    images[4].rename(images[3])
    (subject / "aside").rename(images[4])
    (warning,) = told()
    assert f"2 of {len(images)} train images" in warning
    assert f"{images[3].name} has 104 bytes, it had 103" in warning


@pytest.fixture
def mounted(small, tmp_path, monkeypatch):
    """A copy of the subject on another mount, by the system's table, and those of its files that are mapped."""

    def mount(kind):
        subject = shutil.copytree(small.subject_dir, tmp_path / "srv" / "subj01")
        organisers = subject / "test_split" / "test_fmri"
        organisers.mkdir()
        for hemisphere, n_vertices in (("lh", 30), ("rh", 26)):
            rows = np.random.default_rng(0).normal(size=(5, n_vertices)).astype(np.float32)
            np.save(organisers / f"{hemisphere}_test_fmri.npy", rows)
        table = tmp_path / "mountinfo"
        table.write_text(f"22 1 8:1 / / rw - ext4 /dev/vda1 rw\n31 22 0:32 / {subject.parent} rw - {kind} host:/x rw\n")
        monkeypatch.setattr(mounts, "MOUNTINFO", table)
        mapped, plain = [], mmap.mmap

        class Told(plain):
            def __new__(cls, descriptor, *args, **options):
                path = Path(os.readlink(f"/proc/self/fd/{descriptor}")) if descriptor >= 0 else Path()
                mapped.extend([path] if subject in path.parents else [])
                return plain.__new__(cls, descriptor, *args, **options)

        monkeypatch.setattr(mmap, "mmap", Told)
        return subject, mapped

    return mount


@pytest.mark.parametrize("encoder", ["transformer", "ridge"])
@pytest.mark.parametrize("kind", ["nfs4", "fuse.rclone"])
def test_responses_behind_a_network_are_never_mapped_and_give_the_same_run(kind, encoder, mounted, small, tmp_path):
    """A page fault on a mount whose server is gone kills the process; reading rows does not."""
    subject, mapped = mounted("ext4")
    settings = {"encoder": {"encoder": encoder}, "subject_dir": str(subject)}
    train(small.config(tmp_path / "here", **settings))
    assert mapped, "the test of the test: on a disk they are mapped"
    shutil.rmtree(subject)
    subject, mapped = mounted(kind)

    train(small.config(tmp_path / "run", **settings))
    scored = evaluate_ridge(tmp_path / "run", "test") or evaluate(open_run(tmp_path / "run"), "test")
    checked = brainenc(["data", "check", str(subject)])

    assert mapped == []
    assert scored["n_images"] == 5
    assert checked in (0, 1)  # its images are small
    here, run = RunFolder(tmp_path / "here"), RunFolder(tmp_path / "run")
    for name in ("lh_val_corr", "rh_val_corr", "lh_pred_test", "rh_pred_test"):
        np.testing.assert_array_equal(*(np.load(f.predictions / f"{name}.npy") for f in (here, run)))
    losses = [[r["loss"] for r in folder.metrics()] for folder in (here, run)]
    assert losses[0] == losses[1]


def test_responses_that_are_cut_off_end_a_run_with_their_file_s_name(mounted, small, tmp_path):
    """Not with a signal: the loader's error reaches whoever trains."""
    subject, _ = mounted("nfs4")
    config = small.config(tmp_path / "run", subject_dir=str(subject))
    samples = samples_of(config)
    assert not isinstance(samples.responses[0], np.memmap)
    file = subject / layout.responses_file("train", "rh")
    file.write_bytes(file.read_bytes()[:1000])

    with (
        Loader(samples, Order(n_samples=45, batch_size=8, seed=0)) as loader,
        pytest.raises(DataError, match=r"rh_training_fmri\.npy ends .* bytes before rows"),
    ):
        list(loader.run(0, 6))


def test_the_data_of_a_run_are_the_same_with_and_without_a_map(mounted, small, tmp_path):
    """A run goes on when its subject has moved to a mount: what checkpoints know of the responses is equal."""
    known = []
    for kind in ("ext4", "nfs4"):
        subject, _ = mounted(kind)
        config = small.config(tmp_path / "run", subject_dir=str(subject))
        known.append(provenance(config, Subject.open(subject), samples_of(config), 40))
        shutil.rmtree(subject)

    assert known[0] == known[1]
    plain = np.load(small.subject_dir / layout.responses_file("train", "lh"))
    digest = xxhash.xxh3_128(str(plain.shape).encode())
    for row in plain:
        digest.update(row.tobytes())
    assert known[0]["responses"][0] == digest.hexdigest(), "as checkpoints of earlier versions have it"
