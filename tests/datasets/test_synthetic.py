"""Synthetic subjects: the exact layout, and a truth that is where it is said to be."""

import hashlib
import json
import re

import numpy as np
import pytest
from PIL import Image

from brainenc import scoring
from brainenc.datasets import planted
from brainenc.datasets.algonauts import Subject
from brainenc.datasets.planted import Region
from brainenc.datasets.rois import HEMISPHERES, ROI_CLASSES
from brainenc.datasets.synthetic import synthesize
from brainenc.errors import DataError, UsageError

from .conftest import GRID, SIZES, local_colours

SMALL = {"n_train": 12, "n_test": 3, "vertices": (30, 34), "seed": 1}


def hashes(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def organiser(subject):
    return subject.folder.parent / "organiser" / subject.name


def test_folder_and_file_names_are_the_challenge_s(made):
    subject, _ = made
    names = {p.relative_to(subject.folder).as_posix() for p in subject.folder.rglob("*") if p.is_file()}
    images = {n for n in names if n.endswith(".png")}
    wanted = {f"training_split/training_fmri/{h}_training_fmri.npy" for h in HEMISPHERES} | {"truth.json"}
    wanted |= {f"roi_masks/mapping_{c}.npy" for c in ROI_CLASSES}
    wanted |= {
        f"roi_masks/{h}.{c}_{s}_space.npy" for h in HEMISPHERES for c in ROI_CLASSES for s in ("challenge", "fsaverage")
    }
    wanted |= {f"roi_masks/{h}.all-vertices_fsaverage_space.npy" for h in HEMISPHERES}
    assert names - images == wanted
    assert all(
        re.fullmatch(r"(training_split/training_images/train|test_split/test_images/test)-\d{4}_nsd-\d{5}\.png", n)
        for n in images
    )
    assert len(images) == SIZES["n_train"] + SIZES["n_test"]


def test_image_numbers_count_from_one_and_nsd_ids_ascend_and_appear_once(made):
    subject, _ = made
    both = []
    for split in ("train", "test"):
        numbers = [re.fullmatch(r"\w+-(\d+)_nsd-(\d+)\.png", p.name).groups() for p in subject.images(split)]
        assert [int(n) for n, _ in numbers] == list(range(1, len(numbers) + 1))
        ids = [int(i) for _, i in numbers]
        assert ids == sorted(ids)
        assert max(ids) < 73_000
        both += ids
    assert len(set(both)) == len(both)


def test_images_are_425_rgb_and_natural(made):
    """Noise has no correlation between neighbouring pixels; photographs have a lot."""
    subject, _ = made
    smooth = []
    for path in subject.images("train"):
        with Image.open(path) as image:
            assert (image.format, image.size, image.mode) == ("PNG", (425, 425), "RGB")
            pixels = np.asarray(image.convert("L"), np.float64)
        smooth.append(np.corrcoef(pixels[:, 1:].ravel(), pixels[:, :-1].ravel())[0, 1])
    assert np.median(smooth) > 0.9
    assert len({hashlib.sha256(p.read_bytes()).hexdigest() for p in subject.images("train")}) == SIZES["n_train"]


def test_responses_are_float32_rows_of_standardised_values(made):
    subject, _ = made
    for hemisphere, n in zip(HEMISPHERES, SIZES["vertices"], strict=True):
        responses = subject.responses(hemisphere)
        assert responses.dtype == np.float32
        assert responses.shape == (SIZES["n_train"], n)
        assert abs(responses.std() - 1) < 0.1
        assert abs(responses.mean()) < 0.1


def test_fsaverage_masks_hold_the_challenge_labels_at_all_vertices(made):
    subject, _ = made
    for hemisphere, n in zip(HEMISPHERES, SIZES["vertices"], strict=True):
        everywhere = np.load(subject.folder / f"roi_masks/{hemisphere}.all-vertices_fsaverage_space.npy")
        assert everywhere.shape == (163842,)
        assert set(np.unique(everywhere)) == {0, 1}
        assert everywhere.sum() == n
        assert np.diff(np.flatnonzero(everywhere)).max() > 1  # all over the surface, not its first vertices
        for roi_class in ROI_CLASSES:
            whole = np.load(subject.folder / f"roi_masks/{hemisphere}.{roi_class}_fsaverage_space.npy")
            np.testing.assert_array_equal(whole[everywhere == 1], subject.rois.labels[hemisphere][roi_class])
            assert not whole[everywhere == 0].any()


def test_rois_overlap_across_classes_and_one_is_empty(made):
    subject, _ = made
    for hemisphere in HEMISPHERES:
        masks = subject.rois.masks(hemisphere)
        assert [name for name, mask in masks.items() if not mask.any()] == ["aTL-faces"]
        assert (subject.rois.queries("rois_all").masks(hemisphere).sum(axis=0) > 1).any()
        assert masks["remainder"].any()


def test_what_organisers_keep_is_not_in_the_participant_s_folder(made):
    subject, truth = made
    for hemisphere in HEMISPHERES:
        assert not (subject.folder / "test_split/test_fmri").exists()
        responses = subject.responses(hemisphere, "test")
        assert responses.shape[0] == SIZES["n_test"]
        on_disk = np.load(organiser(subject) / f"test_split/test_fmri/{hemisphere}_test_fmri.npy")
        np.testing.assert_array_equal(responses, on_disk)
        ceiling = np.load(organiser(subject) / f"test_split/noise_ceiling/{hemisphere}_noise_ceiling.npy")
        assert ((ceiling > 0) & (ceiling < 1)).all()
        np.testing.assert_allclose(np.sqrt(ceiling).mean(), truth.content["max_r"][hemisphere], rtol=1e-5)


def test_the_best_correlation_is_what_the_noiseless_signal_reaches(made):
    subject, truth = made
    reached = []
    for hemisphere in HEMISPHERES:
        signal = np.load(organiser(subject) / f"signal/{hemisphere}_training_signal.npy")
        reached.append(scoring.pearson(signal, subject.responses(hemisphere)))
    realised = scoring.val_perf(*reached)
    assert realised == pytest.approx(truth.content["realised"]["train"]["val_perf"], abs=1e-6)
    assert truth.max_val_perf == pytest.approx(realised, abs=0.02)
    assert truth.max_val_perf == pytest.approx(0.7, abs=0.02)


def unexplained(signal, *parts):
    """Share of a signal's variance (n,) or (n, V) that no linear readout of the parts (n, D) explains."""
    design = np.column_stack([*parts, np.ones(len(signal))])
    rest = signal - design @ np.linalg.lstsq(design, signal, rcond=None)[0]
    return float(rest.var() / signal.var())


def seen_at(maps, location, width):
    region = Region(hemisphere="lh", name="x", location=tuple(location), width=width, ceiling=0.5, seed=0)
    return planted.pool(maps, planted.windows([region], GRID))[:, 0]


@pytest.mark.parametrize("hemisphere", HEMISPHERES)
def test_each_roi_responds_to_its_own_location(made, hemisphere):
    """A linear readout of what the ROI's window sees explains its signal whole; of the opposite place, it does not."""
    subject, truth = made
    maps = local_colours(subject.images("train"))
    signals = np.load(organiser(subject) / f"signal/{hemisphere}_training_signal.npy")
    single = subject.rois.queries("rois_all").masks(hemisphere).sum(axis=0) == 1
    own, opposite = [], []
    for name, entry in truth.content["rois"][hemisphere].items():
        alone = subject.rois.masks(hemisphere)[name] & single
        if alone.any():
            row, column = entry["location"]
            own.append(unexplained(signals[:, alone], seen_at(maps, (row, column), entry["width"])))
            opposite.append(unexplained(signals[:, alone], seen_at(maps, (1 - row, 1 - column), entry["width"])))
    assert len(own) >= 10
    assert max(own) < 1e-4
    assert np.median(opposite) > 0.1


def test_overlapping_rois_add_up(made):
    """What the windows of both ROIs see explains a vertex that both hold; either alone does not."""
    subject, truth = made
    maps = local_colours(subject.images("train"))
    queries = subject.rois.queries("rois_all")
    vertex = int(np.flatnonzero(queries.lh.sum(axis=0) == 2)[0])
    both = [queries.labels[i] for i in np.flatnonzero(queries.lh[:, vertex])]
    signal = np.load(organiser(subject) / "signal/lh_training_signal.npy")[:, vertex]
    entries = [truth.content["rois"]["lh"][roi] for roi in both]
    first, second = (seen_at(maps, e["location"], e["width"]) for e in entries)
    assert unexplained(signal, first, second) < 1e-4
    assert min(unexplained(signal, first), unexplained(signal, second)) > 1e-3


def test_the_same_arguments_give_the_same_bytes_and_another_seed_does_not(tmp_path):
    for name in ("a", "b"):
        synthesize(tmp_path / name / "subj01", features=local_colours, **SMALL)
    synthesize(tmp_path / "c" / "subj01", features=local_colours, **SMALL | {"seed": 2})
    a, b, c = (hashes(tmp_path / name) for name in "abc")
    assert a == b
    fmri = "subj01/training_split/training_fmri/lh_training_fmri.npy"
    assert a[fmri] != c[fmri]


def test_an_interrupted_subject_is_finished_by_the_same_call(tmp_path):
    def dies(paths):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(tmp_path / "cut" / "subj01", features=dies, **SMALL)
    synthesize(tmp_path / "cut" / "subj01", features=local_colours, **SMALL)
    synthesize(tmp_path / "whole" / "subj01", features=local_colours, **SMALL)
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")


def test_a_finished_subject_is_found_and_nothing_is_computed_again(made):
    def never(paths):
        raise AssertionError("features were asked for again")

    subject, truth = made
    again = synthesize(subject.folder, features=never, **SIZES)
    assert again.content == json.loads((subject.folder / "truth.json").read_text())
    assert again.max_val_perf == truth.max_val_perf


def test_another_plan_for_a_finished_subject_is_refused_with_the_difference(made):
    with pytest.raises(UsageError, match="n_train: there 96, wanted 95"):
        synthesize(made[0].folder, features=local_colours, **SIZES | {"n_train": 95})


def test_a_folder_with_other_things_in_it_is_never_written_to(tmp_path):
    precious = tmp_path / "subj01" / "training_split"
    precious.mkdir(parents=True)
    with pytest.raises(UsageError, match="not empty"):
        synthesize(tmp_path / "subj01", features=local_colours, **SMALL)
    assert list((tmp_path / "subj01").iterdir()) == [precious]


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [({"n_train": 1}, "2 training images"), ({"n_train": 73_000}, "73000"), ({"ceiling": 1.2}, "ceiling"),
     ({"vertices": (10, 163_843)}, "163842"), ({"vertices": (0, 10)}, "163842"), ({"rank": 0}, "rank")],
)  # fmt: skip
def test_impossible_sizes_are_refused(tmp_path, wrong, complaint):
    with pytest.raises(UsageError, match=complaint):
        synthesize(tmp_path / "subj01", features=local_colours, **SMALL | wrong)


def test_features_of_a_wrong_shape_or_with_nan_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"shape \(15, H, W, D\)"):
        synthesize(tmp_path / "flat" / "subj01", features=lambda paths: np.zeros((len(paths), 64, 6)), **SMALL)
    with pytest.raises(DataError, match="finite"):
        synthesize(tmp_path / "nan" / "subj01", features=lambda paths: local_colours(paths) * np.nan, **SMALL)


def test_more_than_9999_images_still_sort_into_the_order_of_their_rows():
    from brainenc.datasets.layout import image_name

    names = [image_name("train", i, i, digits=5) for i in (1, 999, 1000, 9999, 10000, 10001)]
    assert names == sorted(names)
    assert image_name("train", 1, 13) == "train-0001_nsd-00013.png"


def test_tiny_numbers_of_vertices_work(tmp_path):
    synthesize(tmp_path / "subj01", features=local_colours, **SMALL | {"vertices": (1, 2)})
    assert Subject.open(tmp_path / "subj01").n_vertices == (1, 2)


def test_a_ridge_on_all_tokens_comes_near_the_ceiling_and_shuffled_responses_stay_at_chance(made):
    """What was planted can be learned from the features by a model that knows no location, and from nothing else."""
    subject, truth = made
    train, test = (local_colours(subject.images(split)).reshape(-1, 384) for split in ("train", "test"))
    train, test = ((x - train.mean(axis=0)) / train.std(axis=0) for x in (train, test))
    kernel = train @ train.T / train.shape[1]
    order = np.random.default_rng(0).permutation(len(train))

    def reached(rows):
        r = []
        for hemisphere in HEMISPHERES:
            weights = np.linalg.solve(kernel + 0.3 * np.eye(len(train)), subject.responses(hemisphere)[rows])
            predicted = test @ train.T / train.shape[1] @ weights
            r.append(scoring.pearson(predicted, subject.responses(hemisphere, "test")))
        return scoring.val_perf(*r)

    assert reached(np.arange(len(train))) > 0.8 * truth.content["realised"]["test"]["val_perf"]
    assert abs(reached(order)) < 0.15
