"""The ranks of a run as one object: who I am, small exchanges on a channel of their own, sums of gradients.

A worker holds one :class:`Team`; the training thread alone calls it. :class:`Solo` is a run of one rank without any
process group, :class:`Distributed` wraps ``torch.distributed``. Both are the whole surface that the loop knows.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from brainenc.errors import TrainingFailed

_PATIENCE_S = 900.0
"""How long ranks wait for one that saves or loads: the slowest disk that is still of use."""

Words = npt.NDArray[np.float64]


class RankLost(TrainingFailed):
    """Another rank died or did not answer in time, so that this one cannot go on alone.

    Args:
        rank: the rank that noticed.
        doing: what it was waiting for.
        cause: what the communication library said.
    """

    def __init__(self, rank: int, doing: str, cause: str) -> None:
        super().__init__(rank, doing, cause)
        self.rank, self.doing, self.cause = self.args

    def __str__(self) -> str:
        return (
            f"Rank {self.rank} lost another rank while waiting for {self.doing}: {self.cause.strip()}. "
            "Training restarts from the newest checkpoint or snapshot; `brainenc train --resume RUN` does so by hand."
        )


class Team(Protocol):
    """What the loop needs of the other ranks. Every method but ``close`` is called by all ranks in the same order."""

    rank: int
    size: int
    local_rank: int

    def exchange(self, word: Words) -> Words:
        """Every rank's word, ``(size, fields)`` float64. Raises :class:`RankLost` after the timeout."""
        ...

    def exchange_text(self, text: str) -> list[str]:
        """Every rank's text. Slow; for what happens rarely."""
        ...

    def sum(self, tensors: Iterable[torch.Tensor]) -> None:
        """Sum tensors over ranks in place."""
        ...

    def sum_array(self, array: Words) -> Words:
        """The sum of a float64 array over ranks."""
        ...

    def broadcast(self, value: Any, source: int) -> Any:
        """``value`` of rank ``source`` (tensors and plain containers) on every rank."""
        ...

    def fill(self, tensors: Iterable[torch.Tensor], source: int) -> None:
        """Overwrite tensors with those of rank ``source``."""
        ...

    def close(self) -> None:
        """Give up the groups; never waits for others."""
        ...


class Solo:
    """A team of one."""

    rank = 0
    size = 1
    local_rank = 0

    def exchange(self, word: Words) -> Words:
        """The word, as the only row."""
        return word[np.newaxis]

    def exchange_text(self, text: str) -> list[str]:
        """The text alone."""
        return [text]

    def sum(self, tensors: Iterable[torch.Tensor]) -> None:
        """Nothing to add."""

    def sum_array(self, array: Words) -> Words:
        """The array itself."""
        return array

    def broadcast(self, value: Any, source: int) -> Any:
        """The value itself."""
        return value

    def fill(self, tensors: Iterable[torch.Tensor], source: int) -> None:
        """Nothing to copy."""

    def close(self) -> None:
        """Nothing to give up."""


class Distributed:
    """The ranks of ``torch.distributed``'s default group, with a gloo group beside it for words.

    Words have their own group and timeout because the default one may be NCCL, whose calls cannot be given up, and
    because a word must not queue behind gradients.
    """

    def __init__(self, *, timeout_s: float, local_rank: int = 0) -> None:
        self.rank, self.size, self.local_rank = dist.get_rank(), dist.get_world_size(), local_rank
        self._words: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        # A rank may write a checkpoint to a slow disk while the others wait for where it lies.
        self._patient: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=max(_PATIENCE_S, timeout_s)))

    def exchange(self, word: Words) -> Words:
        """Every rank's word: each fills its own row of a matrix of zeros, which is summed (114 us for two ranks)."""
        rows = torch.zeros(self.size, len(word), dtype=torch.float64)
        rows[self.rank] = torch.from_numpy(word)
        self._guarded("a status word", dist.all_reduce, rows, group=self._words)
        result: Words = rows.numpy()
        return result

    def exchange_text(self, text: str) -> list[str]:
        """Every rank's text."""
        texts: list[Any] = [None] * self.size
        self._guarded("a message", dist.all_gather_object, texts, text, group=self._patient)
        return [str(t) for t in texts]

    def sum(self, tensors: Iterable[torch.Tensor]) -> None:
        """Sum over ranks in place, all buckets in flight at once."""
        works = [self._guarded("gradients", dist.all_reduce, t, async_op=True) for t in tensors]
        for work in works:
            self._guarded("gradients", work.wait)

    def sum_array(self, array: Words) -> Words:
        """The sum over ranks, by gloo."""
        total = torch.from_numpy(np.ascontiguousarray(array, np.float64).copy())
        self._guarded("validation sums", dist.all_reduce, total, group=self._words)
        result: Words = total.numpy()
        return result

    def broadcast(self, value: Any, source: int) -> Any:
        """``value`` of rank ``source``, by gloo and pickle between ranks of one run."""
        box = [value if self.rank == source else None]
        self._guarded("a value", dist.broadcast_object_list, box, src=source, group=self._patient)
        return box[0]

    def fill(self, tensors: Iterable[torch.Tensor], source: int) -> None:
        """One tensor after the other through host memory, so that no second copy of the model is needed."""
        for tensor in tensors:
            host = tensor.detach().to("cpu").contiguous()
            self._guarded("weights", dist.broadcast, host, src=source, group=self._patient)
            tensor.data.copy_(host)

    def close(self) -> None:
        """Forget our groups; the default group belongs to who made it."""
        self._words = self._patient = None

    def _guarded(self, doing: str, call: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except RuntimeError as error:  # gloo and NCCL know no finer class for a peer that is gone or silent
            raise RankLost(self.rank, doing, str(error).splitlines()[0]) from error
