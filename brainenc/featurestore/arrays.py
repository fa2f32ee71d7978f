"""Features as plain NumPy files: the layouts that older code reads, and what export and import share.

adeli    <out>/dinov2_q_last/01/train.npy, synt.npy      float32, C order, (N, 962, 768), rows in the images' order
         <out>/clip_vit_512/01/train.npy, synt.npy       which its default loader wants as well
npy      <out>/<stimuli>/<backbone>/<layer>.<facet>.npy  and <out>/<stimuli>/ids.txt, one stimulus id a line
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from brainenc.errors import DataError

Progress = Callable[[int, int], None]
"""Called with rows done and rows in all."""

ADELI_FEATURES, ADELI_CLIP = "dinov2_q_last", "clip_vit_512"
ADELI_SPLITS = {"train": "train.npy", "test": "synt.npy"}
ADELI_SHAPE, CLIP_WIDTH = (962, 768), 512
IDS_FILE = "ids.txt"
_BATCH_BYTES = 64 << 20


def open_npy(path: Path, *, rows: bool = True) -> np.ndarray:
    """A ``.npy`` file, mapped; nothing in it is ever unpickled.

    Args:
        path: the file.
        rows: whether it holds rows (N, ...); else any array of values.

    Raises:
        DataError: no such file, or not floating-point values of that form.
    """
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{path} is no .npy file that can be read: {error}") from error
    if array.dtype.kind != "f" or array.ndim < (2 if rows else 1):
        raise DataError(
            f"{path} holds an array of shape {array.shape} and dtype {array.dtype}; floating-point "
            f"{'rows (N, ...)' if rows else 'values'} are wanted."
        )
    return array


def batches(n: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """First and last row (exclusive) of consecutive batches of bounded size."""
    step = max(1, _BATCH_BYTES // max(row_bytes, 1))
    return ((start, min(start + step, n)) for start in range(0, n, step))
