"""Reading a subject folder, and what is said about one that is not whole."""

import errno
import mmap
import pickle
import shutil

import numpy as np
import pytest

from brainenc.datasets.algonauts import Subject, not_finite
from brainenc.datasets.rois import HEMISPHERES
from brainenc.errors import DataError, NotASubject, UnknownName

from .conftest import SIZES

LH = "training_split/training_fmri/lh_training_fmri.npy"


def test_rows_follow_the_sorted_image_names(made):
    subject, _ = made
    images = subject.images("train")
    assert images == sorted(images)
    assert subject.ids("train")[0] == "nsd-" + images[0].stem.rpartition("-")[2]
    assert len(subject.ids("test")) == SIZES["n_test"]
    assert subject.name == "subj01"
    assert subject.n_vertices == SIZES["vertices"]


def test_an_image_without_an_nsd_id_is_called_by_its_path(broken):
    folder = broken / "training_split/training_images"
    first = min(folder.iterdir())
    first.rename(folder / "a-photo.png")
    assert Subject.open(broken).ids("train")[0] == "a-photo.png"


def test_what_is_no_hemisphere_or_split_is_told_those_there_are(made):
    subject, _ = made
    for ask in (subject.responses, subject.noise_ceiling):
        with pytest.raises(UnknownName, match=r"no hemisphere 'left'.* lh, rh"):
            ask("left")
    for ask in (subject.images, subject.ids, lambda split: subject.responses("lh", split)):
        with pytest.raises(UnknownName, match=r"no split 'val'.* train, test"):
            ask("val")


def test_responses_are_a_read_only_map_or_a_copy(made):
    subject, _ = made
    mapped, copied = subject.responses("lh"), subject.responses("lh", mapped=False)
    assert isinstance(mapped, np.memmap)
    assert not mapped.flags.writeable
    assert not isinstance(copied, np.memmap)
    np.testing.assert_array_equal(mapped, copied)


def test_responses_are_read_as_they_are_sliced(made, monkeypatch):
    """Without a map, in every way that they are asked for, and equal to the map."""
    subject, _ = made
    mapped = np.array(subject.responses("rh"))
    monkeypatch.setattr(mmap, "mmap", lambda *_, **__: pytest.fail("mapped"))
    rows = pickle.loads(pickle.dumps(Subject.open(subject.folder).response_rows("rh")))
    assert (rows.shape, rows.dtype, len(rows)) == (mapped.shape, mapped.dtype, len(mapped))
    mask = np.arange(len(mapped)) % 3 == 1
    keys = [0, -1, slice(5, 40), slice(90, 200), slice(0, 9, 4), slice(3, 3), np.array([7, 0, 7, 95]), mask,
            (np.array([9, 2]), slice(30, 77)), (slice(4, 8), slice(0, 140)), (5, slice(139, 500))]  # fmt: skip
    for key in keys:
        np.testing.assert_array_equal(rows[key], mapped[key], err_msg=str(key))
    with pytest.raises(IndexError):
        rows[96]
    with pytest.raises(IndexError):
        rows[:, ::2]
    subject.require_finite("rh", mapped=False)


def test_an_array_whose_columns_lie_together_is_read_whole(broken):
    plain = np.load(broken / LH)
    np.save(broken / LH, np.asfortranarray(plain))
    np.testing.assert_array_equal(Subject.open(broken).response_rows("lh")[[3, 1]], plain[[3, 1]])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda a: a[:-1], "has 95 rows, but .* has 96 images"),
        (lambda a: a.astype(np.float64), "float64, wanted float32"),
        (lambda a: a[0], r"shape \(120,\), wanted 2 dimensions"),
    ],
)
def test_responses_are_checked_without_a_map_too(broken, change, told):
    np.save(broken / LH, change(np.load(broken / LH)))
    with pytest.raises(DataError, match=told):
        Subject.open(broken).response_rows("lh")


def test_a_file_that_is_cut_while_it_is_used_is_an_error_that_names_it(broken):
    """Under a map it would kill the process."""
    rows = Subject.open(broken).response_rows("lh")
    data = (broken / LH).read_bytes()
    (broken / LH).write_bytes(data[: len(data) // 2])
    assert rows[0].shape == (120,)
    with pytest.raises(DataError, match=f"{LH} ends .* bytes before rows that it had"):
        rows[[2, 90]]
    with pytest.raises(DataError, match=r"no whole NumPy file: it has .* bytes"):
        Subject.open(broken).response_rows("lh")
    (broken / LH).unlink()
    with pytest.raises(FileNotFoundError, match=LH):
        rows[0]


def test_an_input_error_names_the_file(made, monkeypatch):
    """The system says only which call failed."""
    subject, _ = made
    rows = subject.response_rows("lh")

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(type(rows), "_fill", fail)
    with pytest.raises(OSError, match=rf"Input/output error: '.*{LH}'"):
        rows[3:9]


def test_a_subject_survives_pickling(made):
    subject, _ = made
    again = pickle.loads(pickle.dumps(subject))
    assert again.folder == subject.folder
    assert again.n_vertices == subject.n_vertices


def test_a_folder_that_holds_one_subject_opens_as_it(made):
    subject, _ = made
    assert Subject.open(subject.folder.parent).folder == subject.folder


def test_a_folder_that_is_no_subject_is_refused_with_the_missing_parts(tmp_path):
    with pytest.raises(NotASubject, match=r"training_images/\*\.png.*training_fmri.*roi_masks"):
        Subject.open(tmp_path)
    with pytest.raises(NotASubject, match="the folder itself"):
        Subject.open(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "part", [LH, "roi_masks/rh.floc-faces_challenge_space.npy", "roi_masks/mapping_streams.npy"]
)  # fmt: skip
def test_each_missing_file_is_named(broken, part):
    (broken / part).unlink()
    with pytest.raises(NotASubject, match="1 part missing: " + part.replace(".", r"\.")):
        Subject.open(broken)


def test_responses_of_another_number_of_images_are_refused(broken):
    np.save(broken / LH, np.load(broken / LH)[:-1])
    with pytest.raises(DataError, match=r"has 95 rows, but .* has 96 images"):
        Subject.open(broken).responses("lh")


def test_responses_of_another_type_are_refused_with_the_way_out(broken):
    np.save(broken / LH, np.load(broken / LH).astype(np.float64))
    with pytest.raises(DataError, match=r"float64, wanted float32.*astype"):
        Subject.open(broken).responses("lh")


def test_a_torn_response_file_is_a_data_error(broken):
    data = (broken / LH).read_bytes()
    (broken / LH).write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="no whole NumPy file"):
        Subject.open(broken).responses("lh")


def test_nan_responses_are_counted(broken):
    responses = np.load(broken / LH)
    responses[[3, 3, 60], [5, 6, 5]] = np.nan, np.inf, np.nan
    np.save(broken / LH, responses)
    subject = Subject.open(broken)
    with pytest.raises(DataError, match="2 rows and 2 vertices"):
        subject.require_finite("lh")
    subject.require_finite("rh")


def test_not_finite_counts_across_blocks_of_rows():
    array = np.zeros((1000, 7), np.float32)
    array[[0, 255, 256, 999], [1, 1, 2, 6]] = np.nan
    assert not_finite(array) == (4, 3)


def test_masks_of_another_length_are_refused(broken):
    path = broken / "roi_masks/lh.floc-words_challenge_space.npy"
    np.save(path, np.load(path)[:-3])
    with pytest.raises(DataError, match="has 117 entries, but the lh responses have 120 vertices"):
        _ = Subject.open(broken).rois


def test_masks_with_fractions_are_refused(broken):
    path = broken / "roi_masks/lh.floc-words_challenge_space.npy"
    np.save(path, np.load(path) + 0.5)
    with pytest.raises(DataError, match="no whole numbers"):
        _ = Subject.open(broken).rois


def test_two_images_with_one_nsd_id_are_refused(broken):
    folder = broken / "training_split/training_images"
    first, second = sorted(folder.iterdir())[:2]
    second.rename(folder / f"train-0002_{first.stem.rpartition('_')[2]}.png")
    with pytest.raises(DataError, match="more than one image of nsd-"):
        Subject.open(broken).ids("train")


def test_hidden_files_and_notes_are_no_images(broken):
    folder = broken / "training_split/training_images"
    for name in ("._train-0001_nsd-00000.png", ".DS_Store", "notes.txt"):
        (folder / name).write_bytes(b"x")
    assert len(Subject.open(broken).images("train")) == SIZES["n_train"]


def test_a_subject_without_test_images_still_opens(broken):
    shutil.rmtree(broken / "test_split")
    subject = Subject.open(broken)
    with pytest.raises(DataError, match="no test images"):
        subject.images("test")
    with pytest.raises(DataError, match="no test responses"):
        subject.responses("lh", "test")
    assert subject.noise_ceiling("lh") is None


def test_noise_ceilings_are_found_in_the_subject_or_beside_it(made, broken):
    beside = made[0].noise_ceiling("lh")
    assert beside.shape == (SIZES["vertices"][0],)
    inside = broken / "test_split/noise_ceiling"
    inside.mkdir()
    np.save(inside / "lh_noise_ceiling.npy", beside / 2)
    np.testing.assert_allclose(Subject.open(broken).noise_ceiling("lh"), beside / 2)


@pytest.mark.parametrize(
    ("change", "complaint"), [(lambda c: c * 100, "Divide percent by 100"), (lambda c: c[1:], "entries")]
)
def test_noise_ceilings_in_percent_or_of_another_length_are_refused(made, broken, change, complaint):
    (broken / "test_split/noise_ceiling").mkdir()
    np.save(broken / "test_split/noise_ceiling/lh_noise_ceiling.npy", change(made[0].noise_ceiling("lh")))
    with pytest.raises(DataError, match=complaint):
        Subject.open(broken).noise_ceiling("lh")


def test_truth_is_there_for_synthetic_subjects_only(made, broken):
    assert made[0].truth()["max_val_perf"] == made[1].max_val_perf
    (broken / "truth.json").unlink()
    assert Subject.open(broken).truth() is None
    for hemisphere in HEMISPHERES:
        assert Subject.open(broken).responses(hemisphere).shape[0] == SIZES["n_train"]
