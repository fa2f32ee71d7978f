"""Features for torch and for Ray. The only module of the store that imports either, and only when asked to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from brainenc.errors import DataError
from brainenc.featurestore.view import FeatureView

if TYPE_CHECKING:
    import ray.data
    import torch
    from torch.utils.data import Dataset

_BLOCK_BYTES = 128 << 20


def as_tensor(rows: np.ndarray) -> torch.Tensor:
    """The same memory as a torch tensor, bfloat16 natively. Rows of a store must not be written to: the memory is
    mapped read-only, and writing kills the process.
    """
    import torch

    if rows.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(_writable(rows.view(np.int16))).view(torch.bfloat16)
    return torch.from_numpy(_writable(rows))


def torch_dataset(
    view: FeatureView,
    targets: Sequence[Any] | np.ndarray | None = None,
    *,
    transform: Callable[[Any], Any] | None = None,
) -> Dataset[Any]:
    """A map-style ``torch.utils.data.Dataset`` over a view.

    An item is a row's tensor, or with ``targets`` the pair of tensor and target. Nothing is copied for a single item
    of a local store; a batch that ``DataLoader`` asks for by its indices is gathered into one buffer in parallel, and
    its items are slices of that. Pickles as the store's address, so that workers of any start method open the store
    themselves.

    Args:
        view: the rows.
        targets: one for each row, e.g. an array of shape (rows, vertices).
        transform: applied to each tensor; must pickle for workers that are spawned.

    Raises:
        DataError: not as many targets as rows.
    """
    if targets is not None and len(targets) != len(view):
        raise DataError(f"{view.key} has {len(view)} rows, but there are {len(targets)} targets.")
    made: Dataset[Any] = _dataset_class()(view, targets, transform)
    return made


def to_ray(view: FeatureView, *, rows_per_block: int | None = None) -> ray.data.Dataset:
    """The rows that are present as a Ray dataset with the columns ``id``, ``row`` and ``features``.

    Blocks are read where Ray runs the tasks: each needs to reach the store. bfloat16, which Arrow does not know,
    comes as float32.

    Args:
        view: the rows.
        rows_per_block: None: blocks of about 128 MB.
    """
    import ray.data

    row_bytes = max(1, int(np.prod(view.shape[1:])) * view.dtype.itemsize)
    step = rows_per_block or max(1, _BLOCK_BYTES // row_bytes)
    starts = [{"start": start} for start in range(0, len(view), step)]
    blocks = ray.data.from_items(starts, override_num_blocks=max(1, len(starts)))
    return blocks.map_batches(_Reader, batch_size=1, fn_constructor_args=(view, step), concurrency=_concurrency())


def _concurrency() -> tuple[int, int]:
    import ray

    cpus = ray.cluster_resources().get("CPU", 1)  # type: ignore[no-untyped-call]
    return 1, max(1, int(cpus))


class _Reader:
    """A Ray actor that reads blocks of rows, one view for all its blocks."""

    def __init__(self, view: FeatureView, step: int) -> None:
        self._view, self._step = view, step
        self._ids = view.ids
        self._present = view.present

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, Any]]:
        for start in batch["start"]:
            rows = np.arange(start, min(start + self._step, len(self._view)))
            rows = rows[self._present[rows]]
            if len(rows):
                features = self._view.gather(rows)
                if features.dtype == ml_dtypes.bfloat16:
                    features = features.astype(np.float32)
                yield {"id": np.array([self._ids[row] for row in rows]), "row": rows, "features": features}


class _SameMemory:
    """Hands out an array's memory as writable. torch has no read-only tensors and warns at every one made from
    read-only memory; whoever writes to it is told by the kernel instead."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}


def _writable(array: np.ndarray) -> np.ndarray:
    return array if array.flags.writeable or array.size == 0 else np.asarray(_SameMemory(array))


def __getattr__(name: str) -> Any:
    """``FeatureDataset`` is made when it is first asked for: its base class needs torch. Unpickling comes this way."""
    if name == "FeatureDataset":
        return _dataset_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _dataset_class() -> Any:
    known = globals().get("FeatureDataset")
    if known is not None:
        return known
    from torch.utils.data import Dataset

    class FeatureDataset(Dataset[Any]):
        """Rows of a view as tensors; see :func:`torch_dataset`."""

        __module__, __qualname__ = __name__, "FeatureDataset"

        def __init__(
            self, view: FeatureView, targets: Sequence[Any] | np.ndarray | None, transform: Callable[[Any], Any] | None
        ) -> None:
            self.view, self.targets, self.transform = view, targets, transform

        def __len__(self) -> int:
            return len(self.view)

        def __getitem__(self, index: int) -> Any:
            return self._item(index, self.view[int(index)])

        def __getitems__(self, indices: Sequence[int]) -> list[Any]:
            rows = self.view.gather(indices)
            return [self._item(index, row) for index, row in zip(indices, rows, strict=True)]

        def _item(self, index: int, row: np.ndarray) -> Any:
            tensor = as_tensor(row)
            if self.transform is not None:
                tensor = self.transform(tensor)
            return tensor if self.targets is None else (tensor, self.targets[index])

    globals()["FeatureDataset"] = FeatureDataset
    return FeatureDataset
