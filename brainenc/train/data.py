"""Batches from memory maps, gathered ahead of the step by a thread, into buffers that are allocated once.

Nothing of the split is copied but the rows of the next few batches, so anonymous memory is flat in the size of the
store and the number of epochs.
"""

from __future__ import annotations

import mmap
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch

from brainenc.datasets.algonauts import Responses
from brainenc.datasets.npy import NpyReader, take
from brainenc.train.features import FeatureLayout
from brainenc.train.order import Order, Rows, share

AHEAD = 2
"""Batches that wait ready; with the one in use there are three sets of buffers."""

MAP_BUDGET = 4 << 30
"""Bytes read through maps before they are released: mapped pages need page tables, which are anonymous memory."""


class View(Protocol):
    """What the loader needs of a feature: ``brainenc.featurestore.FeatureView`` has it, and so has a backbone that
    computes features on the fly."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, *row_shape)."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the rows."""
        ...

    @property
    def ids(self) -> Sequence[str]:
        """Stimulus id of each row."""
        ...

    @property
    def details(self) -> Mapping[str, Any]:
        """``n_prefix``, ``grid``."""
        ...

    def gather(self, indices: Any, out: Any = None) -> npt.NDArray[Any]:
        """Rows in any order, into ``out``."""
        ...

    def prefetch(self, indices: Any) -> None:
        """These rows are wanted soon; may do nothing."""
        ...

    def release(self) -> None:
        """Drop maps; they come back when they are needed."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """Samples numbered 0 to n: where each one's features and responses lie."""

    views: Sequence[View]
    feature_rows: Sequence[Rows]
    """For each view, the row of each sample."""
    responses: tuple[Responses, Responses] | None
    """``(rows, V_lh)``, ``(rows, V_rh)``: memory maps, or files to read; None for a test split."""
    response_rows: Rows
    ids: Sequence[str]
    layout: FeatureLayout

    def __len__(self) -> int:
        return len(self.response_rows)

    def take(self, numbers: Rows) -> Samples:
        """These samples alone, in this order."""
        return Samples(
            views=self.views, feature_rows=[rows[numbers] for rows in self.feature_rows], responses=self.responses,
            response_rows=self.response_rows[numbers], ids=[self.ids[i] for i in numbers], layout=self.layout,
        )  # fmt: skip


class Batch:
    """One rank's share of a global batch. Valid until the next one is asked for: its buffers are used again."""

    def __init__(
        self, *, step: int, ids: Sequence[str], global_count: int, features: Sequence[torch.Tensor],
        responses: Sequence[torch.Tensor], layout: FeatureLayout, device: torch.device,
    ) -> None:  # fmt: skip
        self.step, self.ids, self.count, self.global_count = step, ids, len(ids), global_count
        self._features, self._responses, self._layout, self._device = features, responses, layout, device

    def features(self, first: int, last: int) -> torch.Tensor:
        """Samples ``first`` to before ``last`` as a map ``(m, D, H, W)`` float32 on the device."""
        rows = [f[first:last].to(self._device, non_blocking=True) for f in self._features]
        return self._layout.assemble(rows)

    def responses(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Both hemispheres' responses, ``(count, V_lh)`` and ``(count, V_rh)``."""
        lh, rh = (r[: self.count].numpy() for r in self._responses)
        return lh, rh

    def part(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Features and both hemispheres' responses of samples ``first`` to before ``last``."""
        lh, rh = (r[first:last].to(self._device, non_blocking=True) for r in self._responses)
        return self.features(first, last), lh, rh


class _Slot:
    """Buffers for one batch: pinned where a GPU will read them."""

    def __init__(self, samples: Samples, rows: int, *, pin: bool) -> None:
        self.features = [_buffer((rows, *v.shape[1:]), v.dtype, pin=pin) for v in samples.views]
        self.responses = [_buffer((rows, r.shape[1]), r.dtype, pin=pin) for r in samples.responses or ()]
        self._feature_arrays = [_as_array(t, v.dtype) for t, v in zip(self.features, samples.views, strict=True)]
        self._response_arrays = [t.numpy() for t in self.responses]

    def fill(self, samples: Samples, numbers: Rows) -> int:
        """Gather rows; returns the bytes that were read through maps."""
        n, read = len(numbers), 0
        for view, rows, buffer in zip(samples.views, samples.feature_rows, self._feature_arrays, strict=True):
            if n:
                view.gather(rows[numbers], out=buffer[:n])
            read += buffer[:n].nbytes
        for responses, buffer in zip(samples.responses or (), self._response_arrays, strict=True):
            take(responses, samples.response_rows[numbers], buffer[:n])  # rows were checked when samples were matched
            read += buffer[:n].nbytes
        return read


def _buffer(shape: tuple[int, ...], dtype: np.dtype[Any], *, pin: bool) -> torch.Tensor:
    kind = torch.bfloat16 if dtype.name == "bfloat16" else torch.from_numpy(np.empty(0, dtype)).dtype
    return torch.zeros(shape, dtype=kind, pin_memory=pin)  # touched now, so that memory does not grow later


def _as_array(tensor: torch.Tensor, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    return tensor.view(torch.int16).numpy().view(dtype) if tensor.dtype is torch.bfloat16 else tensor.numpy()


def buffer_bytes(samples: Samples, batch_size: int, size: int, *, ahead: int = AHEAD) -> int:
    """Bytes that a :class:`Loader` allocates."""
    row = sum(int(np.prod(v.shape[1:])) * v.dtype.itemsize for v in samples.views)
    row += sum(r.shape[1] * r.itemsize for r in samples.responses or ())
    return (ahead + 1) * -(-batch_size // size) * int(row)


class Loader:
    """This rank's share of every batch, in order, gathered ahead by a thread.

    Args:
        samples: what is read.
        order: which samples a batch holds.
        rank: of this worker.
        size: number of workers.
        device: where batches are used.
        ahead: batches that may wait ready.
        share_buffers: another loader of the same features and batch size, whose buffers are used; the two never run
            at the same time.
    """

    def __init__(
        self, samples: Samples, order: Order, *, rank: int = 0, size: int = 1,
        device: torch.device | None = None, ahead: int = AHEAD, share_buffers: Loader | None = None,
    ) -> None:  # fmt: skip
        self.waited = 0.0
        """Seconds that the last call to ``next`` waited."""
        self._samples, self._order, self._rank, self._size = samples, order, rank, size
        self._device = device or torch.device("cpu")
        rows = -(-order.batch_size // size)
        self._slots: list[_Slot] = share_buffers._slots if share_buffers is not None else self._allocate(rows, ahead)
        self._free: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[tuple[_Slot, int, Rows, int] | BaseException | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._used: _Slot | None = None

    def _allocate(self, rows: int, ahead: int) -> list[_Slot]:
        return [_Slot(self._samples, rows, pin=self._device.type == "cuda") for _ in range(ahead + 1)]

    def run(self, first: int, last: int) -> Iterator[Batch]:
        """The batches of steps ``first`` to before ``last``. One run at a time; ends its thread when it is closed."""
        self._begin(first, last)
        try:
            while (batch := self._next()) is not None:
                yield batch
        finally:
            self.close()

    def _begin(self, first: int, last: int) -> None:
        self.close()
        self._free, self._ready = queue.SimpleQueue(), queue.SimpleQueue()
        for slot in self._slots:
            self._free.put(slot)
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._fill, args=(first, last, self._free, self._ready, self._stop), name="loader", daemon=True
        )
        self._thread.start()

    def _next(self) -> Batch | None:
        if self._used is not None:
            self._free.put(self._used)
            self._used = None
        started = time.perf_counter()
        item = self._ready.get()
        self.waited = time.perf_counter() - started
        if isinstance(item, BaseException):
            raise item
        if item is None:
            return None
        slot, step, numbers, global_count = item
        self._used = slot
        return Batch(
            step=step, ids=[self._samples.ids[i] for i in numbers], global_count=global_count,
            features=slot.features, responses=slot.responses, layout=self._samples.layout, device=self._device,
        )  # fmt: skip

    def _fill(self, first: int, last: int, free: Any, ready: Any, stop: threading.Event) -> None:
        """The thread: waits for a free slot, fills it, says that it is ready."""
        read = 0
        try:
            for step, numbers, global_count, following in self._shares(first, last):
                slot = free.get()
                if stop.is_set():
                    return
                for view, rows in zip(self._samples.views, self._samples.feature_rows, strict=True):
                    view.prefetch(rows[following])
                read += slot.fill(self._samples, numbers)
                if read > MAP_BUDGET:
                    self.release()
                    read = 0
                ready.put((slot, step, numbers, global_count))
            ready.put(None)
        except BaseException as error:
            ready.put(error)

    def _shares(self, first: int, last: int) -> Iterator[tuple[int, Rows, int, Rows]]:
        """Step, this rank's samples, samples of all ranks, and this rank's samples of the step after."""
        waiting: tuple[int, Rows, int] | None = None
        for step, batch in self._order.batches(first, last):
            mine = share(batch, self._rank, self._size)
            if waiting is not None:
                yield (*waiting, mine)
            waiting = (step, mine, len(batch))
        if waiting is not None:
            yield (*waiting, np.empty(0, np.int64))

    def release(self) -> None:
        """Drop the maps; they come back when rows are read. Any thread."""
        for view in self._samples.views:
            view.release()
        for responses in self._samples.responses or ():
            drop_pages(responses)

    def close(self) -> None:
        """End the thread. Batches handed out are void."""
        if self._thread is not None:
            self._stop.set()
            for slot in self._slots:  # wakes the thread if it waits
                self._free.put(slot)
            self._thread.join()
            self._thread = None
        self._used = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def drop_pages(array: npt.NDArray[Any] | NpyReader) -> None:
    """Take a memory-mapped file's pages out of this process; they stay in the page cache. Others have none."""
    mapped: Any = array
    while mapped is not None and not isinstance(mapped, mmap.mmap):
        mapped = getattr(mapped, "_mmap", None) or getattr(mapped, "base", None)
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)
