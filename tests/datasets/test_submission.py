"""The challenge's zip: what is written passes, and each fault that the server would trip over is found."""

import hashlib
import zipfile

import numpy as np
import pytest

from brainenc.datasets.submission import CHALLENGE_SHAPES, check_submission, write_submission
from brainenc.errors import DataError, UsageError

SHAPES = {f"subj0{n}": {"lh": (5, 11), "rh": (5, 13)} for n in range(1, 9)}


def predictions(folder, *, change=lambda array: array, subject="subj01"):
    """A folder with predictions of one subject; ``change`` spoils those of the left hemisphere."""
    target = folder / subject
    target.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for hemisphere in ("lh", "rh"):
        array = rng.standard_normal(SHAPES[subject][hemisphere]).astype(np.float32)
        np.save(target / f"{hemisphere}_pred_test.npy", change(array) if hemisphere == "lh" else array)
    return target


def test_the_zip_has_the_subjects_at_its_root_and_float32_arrays(tmp_path):
    folders = {s: predictions(tmp_path, subject=s) for s in SHAPES}
    check = write_submission(tmp_path / "out" / "s.zip", folders, SHAPES)
    assert (check.problems, check.missing, check.subjects) == ([], [], list(SHAPES))
    with zipfile.ZipFile(tmp_path / "out" / "s.zip") as archive:
        assert sorted(archive.namelist()) == sorted(f"{s}/{h}_pred_test.npy" for s in SHAPES for h in ("lh", "rh"))
        with archive.open("subj03/rh_pred_test.npy") as file:
            array = np.load(file)
    np.testing.assert_array_equal(array, np.load(folders["subj03"] / "rh_pred_test.npy"))
    assert array.dtype == np.float32


def test_the_same_predictions_give_the_same_bytes(tmp_path):
    folders = {"subj01": predictions(tmp_path)}
    for name in ("a.zip", "b.zip"):
        write_submission(tmp_path / name, folders, SHAPES)
    a, b = (hashlib.sha256((tmp_path / n).read_bytes()).digest() for n in ("a.zip", "b.zip"))
    assert a == b


def test_subjects_that_are_not_there_are_named(tmp_path):
    check = write_submission(tmp_path / "s.zip", {"subj02": predictions(tmp_path, subject="subj02")}, SHAPES)
    assert check.missing == [s for s in SHAPES if s != "subj02"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda a: a.astype(np.float64), "float64, wanted float32"),
        (lambda a: a[:-1], r"shape \(4, 11\), wanted \(5, 11\)"),
        (lambda a: a[:, 1:], r"shape \(5, 10\), wanted \(5, 11\)"),
        (lambda a: np.where(np.arange(11) < 2, np.float32("nan"), a), "NaN or infinite values in 5 rows and 2 ver"),
        (lambda a: np.asfortranarray(a), "column by column"),
        (lambda a: a.astype(np.int32), "int32, wanted float32"),
    ],
)  # fmt: skip
def test_faulty_predictions_are_refused_and_no_zip_is_left(tmp_path, change, complaint):
    with pytest.raises(DataError, match=complaint):
        write_submission(tmp_path / "s.zip", {"subj01": predictions(tmp_path, change=change)}, SHAPES)
    assert [p.name for p in tmp_path.iterdir()] == ["subj01"]


def test_a_fault_leaves_an_older_zip_alone(tmp_path):
    good = {"subj01": predictions(tmp_path / "good")}
    write_submission(tmp_path / "s.zip", good, SHAPES)
    before = (tmp_path / "s.zip").read_bytes()
    with pytest.raises(DataError):
        write_submission(tmp_path / "s.zip", {"subj01": predictions(tmp_path / "bad", change=lambda a: a[1:])}, SHAPES)
    assert (tmp_path / "s.zip").read_bytes() == before


def test_missing_predictions_say_what_to_run(tmp_path):
    folder = predictions(tmp_path)
    (folder / "rh_pred_test.npy").unlink()
    with pytest.raises(DataError, match=r"no rh_pred_test\.npy.*brainenc predict"):
        write_submission(tmp_path / "s.zip", {"subj01": folder}, SHAPES)


def test_other_subjects_than_the_challenge_s_are_refused(tmp_path):
    with pytest.raises(UsageError, match="found mine"):
        write_submission(tmp_path / "s.zip", {"mine": tmp_path}, {})
    with pytest.raises(UsageError, match="found none"):
        write_submission(tmp_path / "s.zip", {}, {})


def zipped(path, entries):
    with zipfile.ZipFile(path, "w") as archive:
        for name, source in entries.items():
            archive.write(source, name)
    return path


def test_a_folder_around_the_subjects_is_found(tmp_path):
    """The usual mistake: the folder was zipped, not what is in it."""
    source = predictions(tmp_path)
    made = zipped(
        tmp_path / "s.zip", {f"algonauts_2023_challenge_submission/subj01/{p.name}": p for p in source.iterdir()}
    )
    problems = "\n".join(check_submission(made, SHAPES).problems)
    assert "is not at the zip's root" in problems
    assert "no subject's predictions" in problems


def test_a_lone_hemisphere_and_files_that_do_not_belong_are_found(tmp_path):
    source = predictions(tmp_path)
    made = zipped(
        tmp_path / "s.zip",
        {"subj01/lh_pred_test.npy": source / "lh_pred_test.npy", "notes.txt": source / "lh_pred_test.npy"},
    )
    problems = check_submission(made, SHAPES).problems
    assert any("subj01/rh_pred_test.npy is missing" in p for p in problems)
    assert any("notes.txt" in p for p in problems)


def test_torn_arrays_and_files_that_are_no_zips_are_found(tmp_path):
    source = predictions(tmp_path)
    torn = tmp_path / "torn.npy"
    torn.write_bytes((source / "lh_pred_test.npy").read_bytes()[:-30])
    made = zipped(
        tmp_path / "s.zip", {"subj01/lh_pred_test.npy": torn, "subj01/rh_pred_test.npy": source / "rh_pred_test.npy"}
    )
    assert any("ends after 4 of 5 rows" in p for p in check_submission(made, SHAPES).problems)
    (tmp_path / "no.zip").write_bytes(b"PK nonsense")
    with pytest.raises(DataError, match="no zip"):
        check_submission(tmp_path / "no.zip")


def test_the_challenge_s_own_shapes_are_the_published_ones():
    assert CHALLENGE_SHAPES["subj01"] == {"lh": (159, 19004), "rh": (159, 20544)}
    assert CHALLENGE_SHAPES["subj06"] == {"lh": (293, 18978), "rh": (293, 20220)}
    assert CHALLENGE_SHAPES["subj08"] == {"lh": (395, 18981), "rh": (395, 20530)}
    assert sum(s["lh"][0] for s in CHALLENGE_SHAPES.values()) == 159 * 4 + 293 * 2 + 395 * 2
