"""File and folder names of an Algonauts 2023 subject. This module alone builds or parses them.

::

    subj01/
      training_split/training_images/train-0001_nsd-00013.png    425 x 425 RGB; rows of the fMRI follow the sorted names
      training_split/training_fmri/{lh,rh}_training_fmri.npy     float32 (n_train, V)
      test_split/test_images/test-0001_nsd-00845.png
      roi_masks/{lh,rh}.<class>_challenge_space.npy              integer labels (V,)
      roi_masks/{lh,rh}.<class>_fsaverage_space.npy              (163842,); also for all-vertices, 0 or 1
      roi_masks/mapping_<class>.npy                              0-d object array: {0: 'Unknown', 1: ...}
      truth.json                                                 synthetic subjects only

What the challenge's organisers kept to themselves (``test_split/test_fmri``, ``test_split/noise_ceiling``) lies in
the subject folder where somebody has it, or in ``organiser/<subject>`` beside it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

Split = Literal["train", "test"]

N_FSAVERAGE = 163_842
"""Vertices of one hemisphere of fsaverage."""

IMAGE_SIZE = 425
"""Side of NSD's images, in pixels."""

ALL_VERTICES = "all-vertices"
TRUTH = "truth.json"
ORGANISER = "organiser"

_FOLDER: dict[Split, str] = {"train": "training", "test": "test"}
_IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})
_NSD_ID = re.compile(r"nsd-(\d+)")
_SUBJECT = re.compile(r"subj\d\d")


def images_dir(split: Split) -> str:
    """Folder of a split's images, below the subject's."""
    return f"{_FOLDER[split]}_split/{_FOLDER[split]}_images"


def responses_file(split: Split, hemisphere: str) -> str:
    """File of a split's responses."""
    return f"{_FOLDER[split]}_split/{_FOLDER[split]}_fmri/{hemisphere}_{_FOLDER[split]}_fmri.npy"


def noise_ceiling_file(hemisphere: str) -> str:
    """File of the noise ceilings of the test responses."""
    return f"test_split/noise_ceiling/{hemisphere}_noise_ceiling.npy"


def signal_file(split: Split, hemisphere: str) -> str:
    """File of the noiseless responses of a synthetic subject, in the organisers' folder."""
    return f"signal/{hemisphere}_{_FOLDER[split]}_signal.npy"


def mask_file(hemisphere: str, roi_class: str, space: Literal["challenge", "fsaverage"]) -> str:
    """File of one class's labels."""
    return f"roi_masks/{hemisphere}.{roi_class}_{space}_space.npy"


def mapping_file(roi_class: str) -> str:
    """File of one class's label names."""
    return f"roi_masks/mapping_{roi_class}.npy"


def image_name(split: Split, number: int, nsd_id: int, digits: int = 4) -> str:
    """``train-0001_nsd-00013.png``; numbers count from 1, NSD's ids from 0."""
    return f"{split}-{number:0{digits}d}_nsd-{nsd_id:05d}.png"


def stimulus_id(path: Path, folder: Path) -> str:
    """``nsd-00013`` where the file's name has an NSD id, else the path below ``folder`` in POSIX form."""
    found = _NSD_ID.search(path.name)
    return f"nsd-{int(found.group(1)):05d}" if found else path.relative_to(folder).as_posix()


def is_image(path: Path) -> bool:
    """Whether a file's name is that of an image (hidden files are not)."""
    return path.suffix.lower() in _IMAGE_SUFFIXES and not path.name.startswith(".")


def is_subject_name(name: str) -> bool:
    """``subj01`` ... are."""
    return _SUBJECT.fullmatch(name) is not None


def organiser_dir(subject: Path) -> Path:
    """Where the organisers' part of a subject lies, out of a participant's sight."""
    return subject.parent / ORGANISER / subject.name
