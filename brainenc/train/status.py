"""The status word of a step, and what all ranks make of all words: pure decisions, the same on every rank.

Every rank fills one :class:`Word` after its local forward and backward; the words are exchanged; :func:`decide` is
computed by each rank from the same matrix, so that all of them do the same thing at the same step. Decisions by clock
are made by rank 0 alone and travel in its word.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace

import numpy as np
import numpy.typing as npt


class Trouble(enum.IntEnum):
    """What went wrong on a rank since the last exchange, the worse the higher."""

    NONE = 0
    OUT_OF_MEMORY = 1
    """The forward or backward did not fit; gradients are void, weights are whole."""
    NOT_FINITE = 2
    """The loss or the gradient is NaN or infinite; weights are whole."""
    ERROR = 3
    """Data could not be read, or the program failed, before "go"; weights are whole."""
    BROKEN = 4
    """The update failed after "go": this rank's weights do not count any more, and its step is not finished."""


class Wish(enum.IntEnum):
    """What somebody outside the step asked for, the stronger the higher."""

    NONE = 0
    CHECKPOINT = 1
    SHRINK = 2
    STOP = 3


@dataclass(frozen=True, slots=True)
class Word:
    """One rank's word. Numbers only, so that it travels as one row of float64."""

    step: int
    """Finished optimizer steps."""
    trouble: int = Trouble.NONE
    wish: int = Wish.NONE
    micro_batch: int = 1
    snapshot: int = 0
    """Rank 0: a rolling snapshot is due."""
    save: int = 0
    """Rank 0: a periodic checkpoint is due."""
    loss: float = 0.0
    """Sum of the loss over this rank's samples."""
    samples: int = 0
    waited: float = 0.0
    """Seconds this rank waited for data."""

    def row(self) -> npt.NDArray[np.float64]:
        """As one row of a matrix."""
        return np.array(astuple(self), dtype=np.float64)


_COLUMN = {field.name: i for i, field in enumerate(fields(Word))}


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What every rank does now, in the order of the fields."""

    go: bool
    """Reduce the gradients and update; else the local work is thrown away."""
    save: bool = False
    """Write an emergency or periodic checkpoint of the last finished step."""
    snapshot: bool = False
    shrink: bool = False
    """Halve the micro-batch (and, without ``go``, do the step again)."""
    stop: bool = False
    trouble: Trouble = Trouble.NONE
    """The worst trouble of all ranks."""
    who: tuple[int, ...] = ()
    """The ranks in that trouble, or with the strongest wish."""
    wish: Wish = Wish.NONE
    healthy: tuple[int, ...] = (0,)
    """The ranks whose weights count; the first of them writes checkpoints."""
    loss: float = 0.0
    """Mean loss over the global batch."""
    samples: int = 0
    waited: float = 0.0
    """The longest wait for data of any rank."""


def decide(words: npt.NDArray[np.float64]) -> Verdict:
    """What to do, from every rank's word.

    Args:
        words: ``(ranks, fields of Word)``.

    Raises:
        AssertionError: the ranks are at different steps, which would be a bug of ours.
    """
    column = {name: words[:, i] for name, i in _COLUMN.items()}
    healthy = [r for r, t in enumerate(column["trouble"]) if t < Trouble.BROKEN]
    steps = {int(column["step"][r]) for r in healthy}
    assert len(steps) <= 1, f"ranks are at different steps: {column['step'].tolist()}"
    trouble, wish = Trouble(int(column["trouble"].max())), Wish(int(column["wish"].max()))
    verdict = Verdict(
        go=trouble == Trouble.NONE,
        trouble=trouble,
        wish=wish,
        who=tuple(np.flatnonzero(column["trouble"] == trouble if trouble else column["wish"] == wish).tolist()),
        healthy=tuple(healthy),
        loss=float(column["loss"].sum() / max(1.0, column["samples"].sum())),
        samples=int(column["samples"].sum()),
        waited=float(column["waited"].max()),
    )
    if trouble > Trouble.OUT_OF_MEMORY:
        # A loss that is not finite says nothing good about the weights: the last good checkpoint stays the newest.
        return replace(verdict, save=trouble != Trouble.NOT_FINITE and bool(healthy), stop=True)
    can_shrink = bool((column["micro_batch"] > 1).any())
    wants_less = trouble == Trouble.OUT_OF_MEMORY or wish == Wish.SHRINK
    stop = wish == Wish.STOP or (wants_less and not can_shrink)
    return replace(
        verdict,
        save=stop or wish > Wish.NONE or (verdict.go and bool(column["save"][0])),
        snapshot=verdict.go and bool(column["snapshot"][0]) and wish == Wish.NONE,
        shrink=wants_less and not stop,
        stop=stop,
    )


def after_update(verdict: Verdict, failed: Sequence[bool], *, short: bool = False) -> Verdict:
    """The verdict on a step after its update, when something is to be saved: weights half of one step are not.

    Args:
        verdict: from before the update, with "go".
        failed: of every rank, whether its update failed.
        short: one of them because memory ended.

    Returns:
        The same where all updates ended; else what :func:`decide` would make of it at the next step, so that a rank
        whose update ended saves instead.
    """
    who = tuple(rank for rank, it_failed in enumerate(failed) if it_failed)
    if not who:
        return verdict
    healthy = tuple(rank for rank in verdict.healthy if rank not in who)
    return replace(
        verdict, go=False, save=bool(healthy), snapshot=False, shrink=False, stop=True, trouble=Trouble.BROKEN,
        who=who, healthy=healthy, wish=max(verdict.wish, Wish.STOP if short else Wish.NONE),
    )  # fmt: skip
