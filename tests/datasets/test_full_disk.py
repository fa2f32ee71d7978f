"""A full disk is one paragraph, and nothing is lost by it."""

import shutil
import subprocess
from collections import namedtuple

import numpy as np
import pytest

from brainenc.datasets.submission import write_submission
from brainenc.datasets.synthetic import synthesize
from brainenc.errors import NoSpace

from .conftest import local_colours

SMALL = {"n_train": 12, "n_test": 3, "vertices": (30, 34), "seed": 1}


def test_a_subject_that_cannot_fit_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1_000_000))
    with pytest.raises(NoSpace, match=r"takes about .* has 1 MB left"):
        synthesize(tmp_path / "subj01", features=local_colours, **SMALL)
    assert list((tmp_path / "subj01").iterdir()) == []


@pytest.mark.root
def test_a_disk_that_fills_up_meanwhile_says_so_and_the_same_call_finishes_elsewhere(small_disk, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as blind:
        blind.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, 10**12))
        with pytest.raises(NoSpace, match="filled up"):
            synthesize(small_disk / "subj01", features=local_colours, **SMALL)
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    again = synthesize(small_disk / "subj01", features=local_colours, **SMALL)
    assert again.content == synthesize(tmp_path / "subj01", features=local_colours, **SMALL).content


@pytest.mark.root
def test_a_submission_that_does_not_fit_leaves_the_old_one(small_disk, tmp_path):
    shape = (400, 4000)  # 6.4 MB of noise, which no zip makes smaller than 4 MB
    for hemisphere in ("lh", "rh"):
        np.save(
            tmp_path / f"{hemisphere}_pred_test.npy", np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        )
    (small_disk / "s.zip").write_bytes(b"old")
    with pytest.raises(NoSpace, match=r"No room for .*s\.zip"):
        write_submission(small_disk / "s.zip", {"subj01": tmp_path}, {"subj01": {"lh": shape, "rh": shape}})
    assert [p.name for p in small_disk.iterdir()] == ["s.zip"]
    assert (small_disk / "s.zip").read_bytes() == b"old"
