"""Where images come from, and what their rows are called."""

import shutil

import fsspec
import h5py
import numpy as np
import pytest
from PIL import Image

from brainenc.datasets.layout import stimulus_id as subject_id
from brainenc.errors import DataError, NotASubject, UsageError
from brainenc.extract.config import Source
from brainenc.extract.reading import read_bytes
from brainenc.extract.sources import list_sources, stimulus_id
from tests.extract.conftest import draw_image, save_images


def listed(*sources: Source, **more):
    return list_sources(sources, **more)


def test_a_folder_is_searched_recursively_in_the_order_of_relative_paths(tmp_path):
    for name in ("b/2.png", "b/1.jpg", "a/x/3.png", "z.png"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        draw_image(1).save(tmp_path / "set" / name)
    (tmp_path / "set" / "notes.txt").write_text("no image")
    (tmp_path / "set" / ".hidden.png").write_bytes(b"")
    (tmp_path / "set" / ".trash").mkdir()
    draw_image(1).save(tmp_path / "set" / ".trash" / "old.png")

    (found,) = listed(Source(location=str(tmp_path / "set")))

    assert found.name == "set"
    assert [row.id for row in found.rows] == ["a/x/3.png", "b/1.jpg", "b/2.png", "z.png"]
    assert all(row.size == (tmp_path / "set" / row.id).stat().st_size for row in found.rows)
    assert all(row.stamp == str((tmp_path / "set" / row.id).stat().st_mtime_ns) for row in found.rows)


def test_a_subject_folder_makes_two_sets_named_after_it(tmp_path):
    subject = tmp_path / "subj01"
    save_images(subject / "training_split" / "training_images", 3)
    (subject / "test_split" / "test_images").mkdir(parents=True)
    draw_image(9).save(subject / "test_split" / "test_images" / "test-0001_nsd-00845.png")

    train, test = listed(Source(location=f"{subject}/", kind="subject"))

    assert (train.name, test.name) == ("subj01-train", "subj01-test")
    assert [row.id for row in train.rows] == ["nsd-00000", "nsd-00003", "nsd-00006"]
    assert [row.id for row in test.rows] == ["nsd-00845"]


def test_ids_are_those_that_a_subject_gives(tmp_path):
    for name in ("train-0001_nsd-00013.png", "plain.png", "deep/photo.jpg", "nsd-123456.png"):
        assert stimulus_id(name) == subject_id(tmp_path / name, tmp_path)


def test_a_folder_that_is_no_subject_is_refused_with_what_is_missing(tmp_path):
    save_images(tmp_path / "photos", 2)

    with pytest.raises(NotASubject, match="training_split"):
        listed(Source(location=str(tmp_path / "photos"), kind="subject"))


def test_a_text_list_names_images_relative_to_itself(tmp_path, pictures):
    shutil.copytree(pictures, tmp_path / "in")
    names = sorted(p.name for p in (tmp_path / "in").iterdir())[:3]
    (tmp_path / "chosen.txt").write_text("\n".join(f"in/{n}" for n in reversed(names)) + "\n\n")

    (found,) = listed(Source(location=str(tmp_path / "chosen.txt")))

    assert found.name == "chosen"
    assert [row.id for row in found.rows] == ["nsd-00006", "nsd-00003", "nsd-00000"]
    assert [row.uri for row in found.rows] == [str(tmp_path / "in" / n) for n in reversed(names)]


@pytest.mark.parametrize(("suffix", "mark"), [(".csv", ","), (".tsv", "\t")])
def test_a_table_may_bring_ids_of_its_own(tmp_path, pictures, suffix, mark):
    first, second = sorted(pictures.iterdir())[:2]
    rows = [("id", "Path", "note"), ("b", str(second), "x"), ("a", str(first), "y")]
    (tmp_path / f"table{suffix}").write_text("\n".join(mark.join(r) for r in rows))

    (found,) = listed(Source(location=str(tmp_path / f"table{suffix}"), stimuli="mine"))

    assert (found.name, [row.id for row in found.rows]) == ("mine", ["b", "a"])


def test_a_table_without_paths_says_which_columns_it_has(tmp_path):
    (tmp_path / "t.csv").write_text("subject,activity\n1,2\n")

    with pytest.raises(DataError, match=r"subject, activity.*path"):
        listed(Source(location=str(tmp_path / "t.csv")))


def test_a_listed_image_that_is_not_there_is_named_with_its_list(tmp_path):
    (tmp_path / "t.txt").write_text("gone.png\n")

    with pytest.raises(DataError, match=r"gone\.png, named in .*t\.txt, does not exist"):
        listed(Source(location=str(tmp_path / "t.txt")))


def test_nsd_stimuli_come_row_by_row_with_their_numbers_as_ids(tmp_path):
    brick = np.stack([np.asarray(draw_image(n, 20)) for n in range(5)])
    with h5py.File(tmp_path / "nsd_stimuli.hdf5", "w") as file:
        file["imgBrick"] = brick

    (found,) = listed(Source(location=str(tmp_path / "nsd_stimuli.hdf5")))

    assert found.name == "nsd_stimuli"
    assert [row.id for row in found.rows] == [f"nsd-{n:05d}" for n in range(5)]
    assert read_bytes(found.rows[3].uri) == brick[3].tobytes()
    assert found.rows[3].size == 20 * 20 * 3


def test_another_hdf5_file_is_refused_with_what_it_holds(tmp_path):
    with h5py.File(tmp_path / "betas.hdf5", "w") as file:
        file["betas"] = np.zeros(3)

    with pytest.raises(DataError, match="no imgBrick, but betas"):
        listed(Source(location=str(tmp_path / "betas.hdf5")))


def test_images_on_any_file_system_that_fsspec_knows(pictures):
    memory = fsspec.filesystem("memory")
    for path in sorted(pictures.iterdir())[:4]:
        memory.pipe_file(f"/bucket/lab/images/{path.name}", path.read_bytes())

    (found,) = listed(Source(location="memory://bucket/lab/images"))

    assert found.name == "images"
    assert [row.id for row in found.rows] == ["nsd-00000", "nsd-00003", "nsd-00006", "nsd-00009"]
    assert read_bytes(found.rows[2].uri) == sorted(pictures.iterdir())[2].read_bytes()
    assert found.rows[0].stamp


def test_an_empty_folder_and_a_missing_one_say_what_an_image_is(tmp_path):
    for name in (".", "nowhere"):
        with pytest.raises(DataError, match=r"No images in .*\.png"):
            listed(Source(location=str(tmp_path / name)))


def test_one_id_for_two_images_of_a_set_is_refused_with_both(tmp_path):
    save_images(tmp_path / "s" / "a", 1)
    save_images(tmp_path / "s" / "b", 1)

    with pytest.raises(DataError, match=r"(?s)/a/.*/b/.*nsd-00000"):
        listed(Source(location=str(tmp_path / "s")))


def test_two_sources_of_one_name_are_refused(tmp_path):
    save_images(tmp_path / "a" / "x", 1)
    save_images(tmp_path / "b" / "x", 1)

    with pytest.raises(UsageError, match="'x'"):
        listed(Source(location=str(tmp_path / "a" / "x")), Source(location=str(tmp_path / "b" / "x")))


def test_subjects_share_rows_by_id(tmp_path):
    save_images(tmp_path / "a", 4)
    save_images(tmp_path / "b", 2)
    draw_image(40).save(tmp_path / "b" / "train-9_nsd-00001.png")

    (merged,) = listed(Source(location=str(tmp_path / "a")), Source(location=str(tmp_path / "b")), merged="all")

    assert merged.name == "all"
    assert [row.id for row in merged.rows] == ["nsd-00000", "nsd-00001", "nsd-00003", "nsd-00006", "nsd-00009"]


def test_subjects_do_not_share_rows_of_different_images(tmp_path):
    save_images(tmp_path / "a", 1)
    save_images(tmp_path / "b", 1, size=60)

    with pytest.raises(DataError, match="nsd-00000"):
        listed(Source(location=str(tmp_path / "a")), Source(location=str(tmp_path / "b")), merged="all")


def test_equal_sizes_are_not_taken_for_equal_images(tmp_path):
    """Uncompressed files of one camera all have one size."""
    for name, colour in (("a", "red"), ("b", "blue"), ("c", "red")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), colour).save(tmp_path / name / "nsd-00007.bmp")
    folders = {name: Source(location=str(tmp_path / name)) for name in "abc"}

    with pytest.raises(DataError, match=r"1 image\(s\).*/a/nsd-00007.*/b/nsd-00007.*separate sets"):
        listed(folders["a"], folders["b"], merged="all")
    (merged,) = listed(folders["a"], folders["c"], merged="all")
    assert [row.id for row in merged.rows] == ["nsd-00007"]


def test_links_to_images_are_images_and_links_to_folders_are_passed_over(tmp_path):
    save_images(tmp_path / "elsewhere", 2)
    save_images(tmp_path / "set", 1)
    (tmp_path / "set" / "folder").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "more.png").symlink_to(sorted((tmp_path / "elsewhere").iterdir())[1])

    (found,) = listed(Source(location=str(tmp_path / "set")))

    assert [row.id for row in found.rows] == ["more.png", "nsd-00000"]
