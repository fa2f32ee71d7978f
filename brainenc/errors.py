"""Every error that brainenc raises on purpose.

    BrainencError
    |- UsageError (ValueError)            what was asked for does not exist or does not go together (exit 2)
    |  `- UnknownName                     a backbone, layer, facet, encoder ... that is not there, with those that are
    |- DataError (ValueError)             the user's files are not what they should be
    |  |- NotASubject                     a folder that is no Algonauts subject folder
    |  `- BadImages                       images that could not be decoded, all of them
    |- StoreError                         a feature store
    |  |- NotAStore (FileNotFoundError)   no store at this place, or of a version that we do not read
    |  |- KeyNotFound (KeyError)          no such collection
    |  |- ProvenanceMismatch              the same name, but made with something else
    |  |- StimuliChanged                  the same stimulus set, but other images
    |  |- ShardSealed (FileExistsError)   the rows are there already; of two writers the first wins
    |  |- CorruptData (OSError)           bytes on disk are not those that were written
    |  |- MissingRow (LookupError)        the row was left out on purpose when it was extracted
    |  |- Incomplete (LookupError)        the row has not been extracted yet
    |  |- ValueNotStorable (ValueError)   a value that the storage dtype cannot hold
    |  |- CacheTooSmall (ValueError)      a cache budget below one shard
    |  |- PlaceUnfit (OSError)            the place cannot do what a store needs (atomic create, real flush ...)
    |  |- TransferFailed (OSError)        a remote place did not answer, in all tries
    |  `- TakenOver                        another machine goes on with this run
    |- NoSpace (OSError)                  a disk or quota is full, or would be
    |- ExtractionFailed                   extraction ended with work undone
    |- TrainingFailed                     training ended with work undone
    |  |- LossNotFinite (ArithmeticError) the loss is NaN or infinite
    |  `- CheckpointUnusable              a checkpoint is torn, of another model or of another version
    |     `- NeedsTrust                   it is whole, but holds pickled objects, which are code
    |- MemoryRefused (MemoryError)        a reservation that would not fit
    `- StoppedSafely                      stopped before the end on purpose, resumable (exit 75)

Credentials are taken out of whatever an error is made with, so that neither its text nor its pickle nor its ``repr``
has them. Messages say what happened, where, what was found and wanted, and what to do, in one paragraph. Everything an
error carries goes positionally to ``Exception.__init__`` and the text is built in ``__str__``, so that errors
survive the pickling between Ray's processes.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from brainenc.redact import redacted


class BrainencError(Exception):
    """Base of all errors that brainenc raises on purpose."""

    exit_code = 1
    """What the command line exits with."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*map(redacted, args))


class UsageError(BrainencError, ValueError):
    """What was asked for does not exist, or does not go together."""

    exit_code = 2


class UnknownName(UsageError):
    """A name that is not among those there are.

    Args:
        kind: what was looked up, e.g. ``"layer"``.
        name: what was asked for.
        choices: what there is.
        where: the object that was searched, e.g. ``"facebook/dinov2-base"``; empty when there is no such thing.
        near: names that may have been meant, where ``choices`` are no plain names.
    """

    def __init__(self, kind: str, name: str, choices: Sequence[str], where: str = "", near: Sequence[str] = ()) -> None:
        super().__init__(kind, name, tuple(choices), where, tuple(near))
        self.kind, self.name, self.choices, self.where, self.near = self.args

    def __str__(self) -> str:
        place = f" in {self.where}" if self.where else ""
        there = f"There is: {', '.join(self.choices) or 'nothing'}."
        return f"There is no {self.kind} {self.name!r}{place}.{_meant(self.name, self.near or self.choices)} {there}"


def _meant(name: str, choices: Sequence[str]) -> str:
    near = [choice for choice in difflib.get_close_matches(name, choices, n=2, cutoff=0.75) if choice != name]
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


class DataError(BrainencError, ValueError):
    """The user's files are not what they should be."""


class NotASubject(DataError):
    """A folder that is not an Algonauts 2023 subject folder."""


class BadImages(DataError):
    """Images that could not be decoded.

    Args:
        reasons: path or URI of each bad image, and why it could not be read.
        advice: what to do.
    """

    def __init__(self, reasons: Mapping[str, str], advice: str = "") -> None:
        super().__init__(dict(reasons), advice)
        self.reasons, self.advice = self.args

    def __str__(self) -> str:
        listing = "; ".join(f"{path}: {why}" for path, why in self.reasons.items())
        return f"{len(self.reasons)} image(s) could not be read: {listing}. {self.advice}".rstrip()


class StoreError(BrainencError):
    """Something about a feature store."""


class NotAStore(StoreError, FileNotFoundError):
    """There is no store at this place, or one of a version that this brainenc does not read."""


class KeyNotFound(StoreError, KeyError):
    """No collection has this key.

    Args:
        key: what was asked for.
        where: the store, without credentials.
        keys: the keys that the store has.
    """

    def __init__(self, key: str, where: str, keys: Sequence[str] = ()) -> None:
        super().__init__(key, where, tuple(keys))
        self.key, self.where, self.keys = self.args

    def __str__(self) -> str:
        there = f"There is: {', '.join(self.keys) or 'nothing'}."
        return f"No collection {self.key!r} in {self.where}.{_meant(self.key, self.keys)} {there}{self._way_out()}"

    def _way_out(self) -> str:
        """How to make it, where the key says what it would be."""
        _, _, name = self.key.partition("/")
        backbone, slash, feature = name.partition("/")
        if not slash or "/" in feature or not all((backbone, feature)):
            return ""
        return (
            f" To make it: brainenc extract --store {self.where} --subject-dir DIR (or --images DIR) --backbone NAME "
            f"--name {backbone} --feature={feature}, with the NAME or folder that {backbone} is loaded from."
        )


class ProvenanceMismatch(StoreError):
    """The same name is taken by features that were made in another way.

    Args:
        what: the collection.
        differences: field -> (found in the store, wanted now).
        advice: what to do.
    """

    def __init__(self, what: str, differences: Mapping[str, tuple[Any, Any]], advice: str = "") -> None:
        super().__init__(what, dict(differences), advice)
        self.what, self.differences, self.advice = self.args

    def __str__(self) -> str:
        sides = "; ".join(f"{k}: stored {a!r}, wanted {b!r}" for k, (a, b) in self.differences.items())
        return f"{self.what} was made in another way: {sides}. {self.advice}".rstrip()


class StimuliChanged(StoreError):
    """A stimulus set exists under this name, with other images."""


class ShardSealed(StoreError, FileExistsError):
    """The shard's rows are in the store already; of two writers the first wins."""


class CorruptData(StoreError, OSError):
    """Bytes in the store are not those that were written."""


class MissingRow(StoreError, LookupError):
    """A row that was left out on purpose (its image could not be read) was asked for.

    Args:
        stimulus_id: the stimulus whose row is missing.
        where: the collection.
    """

    def __init__(self, stimulus_id: str, where: str) -> None:
        super().__init__(stimulus_id, where)
        self.stimulus_id, self.where = self.args

    def __str__(self) -> str:
        return (
            f"{self.where} has no row for {self.stimulus_id!r}: its image could not be read when it was extracted. "
            "`view.present` is the mask of the rows that are there."
        )


class Incomplete(StoreError, LookupError):
    """A row that has not been extracted, or not been committed, yet was asked for.

    Args:
        stimulus_id: the stimulus whose row was asked for.
        where: the collection.
        rows: how many rows can be read.
        total: how many there will be.
    """

    def __init__(self, stimulus_id: str, where: str, rows: int, total: int) -> None:
        super().__init__(stimulus_id, where, rows, total)
        self.stimulus_id, self.where, self.rows, self.total = self.args

    def __str__(self) -> str:
        return (
            f"{self.where} has no row for {self.stimulus_id!r} yet: {self.rows} of {self.total} rows are there. "
            "Run the extraction that makes them again: it goes on from what is sealed."
        )


class ValueNotStorable(StoreError, ValueError):
    """A value that the storage dtype cannot hold."""


class CacheTooSmall(StoreError, ValueError):
    """The cache budget is smaller than one shard.

    Args:
        need: bytes that one shard takes.
        have: bytes that the budget allows.
        where: the collection or store.
    """

    def __init__(self, need: int, have: int, where: str) -> None:
        super().__init__(need, have, where)
        self.need, self.have, self.where = self.args

    def __str__(self) -> str:
        return (
            f"The cache for {self.where} may hold {self.have} bytes, but one shard takes {self.need}. "
            "Raise cache_bytes to at least that, or read by ranges."
        )


class PlaceUnfit(StoreError, OSError):
    """The place cannot do what a store needs."""


class TransferFailed(StoreError, OSError):
    """A remote place failed in all tries."""


class TakenOver(StoreError):
    """Another machine goes on with this run; what this one made since is not sent."""


class NoSpace(BrainencError, OSError):
    """A disk or a quota is full, or would be."""


class ExtractionFailed(BrainencError):
    """Extraction ended with work undone; what was sealed stays."""


class TrainingFailed(BrainencError):
    """Training ended with work undone; checkpoints stay."""


class LossNotFinite(TrainingFailed, ArithmeticError):
    """The loss is NaN or infinite."""


class CheckpointUnusable(TrainingFailed):
    """A checkpoint is torn, of another model or of another version."""


class NeedsTrust(CheckpointUnusable):
    """A checkpoint is whole, but holds pickled objects, which are code: whoever wrote it decides."""


class MemoryRefused(BrainencError, MemoryError):
    """A reservation that would not fit.

    Args:
        wanted: bytes asked for.
        free: bytes that may still be used.
        what: what the bytes are for.
    """

    def __init__(self, wanted: int, free: int, what: str) -> None:
        super().__init__(wanted, free, what)
        self.wanted, self.free, self.what = self.args

    def __str__(self) -> str:
        return f"{self.what} wants {self.wanted} bytes, but only {self.free} may still be used."


class StoppedSafely(BrainencError):
    """Stopped before the end on purpose; the same command, or ``--resume``, goes on."""

    exit_code = 75
