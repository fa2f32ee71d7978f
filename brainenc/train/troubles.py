"""What is said about trouble in a step: texts and errors, the same on every rank."""

from __future__ import annotations

from brainenc.errors import BrainencError, LossNotFinite, TrainingFailed
from brainenc.train.checkpoint import Position
from brainenc.train.data import Batch
from brainenc.train.status import Trouble, Verdict


def told(error: BaseException) -> str:
    """An error as one text: ours alone, others with their class."""
    return str(error) if isinstance(error, BrainencError) else f"{type(error).__name__}: {error}"


def ids(batch: Batch | None) -> str:
    """Which samples, for a message."""
    return f" on the samples {', '.join(batch.ids)}" if batch is not None else ""


def as_error(verdict: Verdict, what: str, position: Position, unsaved: str = "") -> BrainencError:
    """What a run that ends for a trouble ends with.

    Args:
        verdict: of all ranks.
        what: the first troubled rank's own words.
        position: the last finished step of the ranks whose weights count.
        unsaved: why it could not be saved; empty: it was, or need not be.
    """
    ranks = ", ".join(map(str, verdict.who))
    last = f"The last finished step is {position.step}"
    if unsaved:
        last += (
            f", and nothing was saved of it: {unsaved.rstrip('.')}. `brainenc train --resume RUN` goes on from the "
            "newest checkpoint or snapshot"
        )
    if verdict.trouble == Trouble.NOT_FINITE:
        return LossNotFinite(
            f"Training stopped: {what}. The weights of step {position.step} are finite, and the last good checkpoint "
            "is the newest in the run's checkpoints. Look at those samples' responses and features, lower "
            "--learning-rate, or train in float32."
        )
    if verdict.trouble == Trouble.OUT_OF_MEMORY:
        return TrainingFailed(
            f"Rank {ranks} ran out of memory with one sample at a time: {what}. {last}. Use fewer workers on this "
            "machine, a smaller --hidden, or features with fewer tokens."
        )
    when, step = "in its own part", position.step
    if verdict.trouble == Trouble.BROKEN:
        when = "in the update"
        if verdict.healthy:  # they have finished the step that failed
            when, step = "in the update after the others had gone on,", position.step - 1
    return TrainingFailed(f"Rank {ranks} failed {when} of step {step}: {what}. {last}.")
