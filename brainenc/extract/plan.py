"""What is left to do, and what it will take. Pure: values in, values out; no clock, no disk, no Ray."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from brainenc.errors import ExtractionFailed, NoSpace
from brainenc.extract.config import MAX_ROWS_PER_SHARD
from brainenc.units import format_bytes, format_seconds

SPACE_MARGIN = 64 << 20
"""Bytes that stay free on the store's disk beyond what the features take: for receipts, logs, other programs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """One collection as the run finds it."""

    key: str
    stimuli: str
    feature: str
    row_shape: tuple[int, ...]
    row_bytes: int
    n_rows: int
    rows_per_shard: int
    micro_batch: int
    sealed: frozenset[int] = frozenset()

    @property
    def n_shards(self) -> int:
        """Shards of the whole collection."""
        return math.ceil(self.n_rows / self.rows_per_shard)

    @property
    def rows_left(self) -> int:
        """Rows of the shards that are not sealed."""
        return sum(len(shard_rows(s, self.rows_per_shard, self.n_rows)) for s in self.shards_left)

    @property
    def shards_left(self) -> list[int]:
        """Shards that are not sealed, in order."""
        return [s for s in range(self.n_shards) if s not in self.sealed]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardTask:
    """One pass over the images of one shard, for every feature that the shard lacks."""

    stimuli: str
    shard: int
    start: int
    stop: int
    micro_batch: int
    features: tuple[tuple[str, str], ...]
    """(feature, key) of each."""
    uris: tuple[str, ...] = ()
    ids: tuple[str, ...] = ()
    """Stimulus ids; only where rows may be taken from other sets."""
    sibling: str | None = None
    """A key in which all these rows are sealed: its receipts say what the images were."""

    @property
    def name(self) -> str:
        """What ledgers and messages call it: no two tasks of a run have a key and a shard in common."""
        return f"{self.features[0][1]} shard {self.shard} (rows {self.start} to {self.stop - 1})"

    @property
    def n_rows(self) -> int:
        """Images in it."""
        return self.stop - self.start


def shard_rows(shard: int, rows_per_shard: int, n_rows: int) -> range:
    """Rows of a shard; the last one may be short."""
    return range(shard * rows_per_shard, min((shard + 1) * rows_per_shard, n_rows))


def choose_rows_per_shard(row_bytes: Iterable[int], micro_batch: int, shard_bytes: int) -> int:
    """Rows of a shard for features that are computed together: the largest feature fills ``shard_bytes``.

    A whole number of micro-batches, because a micro-batch never crosses a shard, and at most
    :data:`~brainenc.extract.config.MAX_ROWS_PER_SHARD`.
    """
    fitting = shard_bytes // max(row_bytes)
    return max(1, min(fitting, MAX_ROWS_PER_SHARD) // micro_batch) * micro_batch


@dataclass(frozen=True, kw_only=True, slots=True)
class Voucher:
    """A collection whose receipts say what the images of its sealed rows were."""

    key: str
    stimuli: str
    rows_per_shard: int
    sealed: frozenset[int]

    def vouches_for(self, rows: range) -> bool:
        """Whether all these rows are sealed."""
        return all(
            s in self.sealed for s in range(rows.start // self.rows_per_shard, rows[-1] // self.rows_per_shard + 1)
        )


def outstanding(wanted: Iterable[Wanted], vouchers: Sequence[Voucher] = ()) -> list[ShardTask]:
    """What is left: one task for each range of rows, with all features that lack it.

    Features whose collections were created with other shard sizes or micro-batches cannot share a pass and get
    tasks of their own. Tasks come in the order of rows.
    """
    passes: dict[tuple[str, int, int], list[Wanted]] = defaultdict(list)
    for w in wanted:
        passes[(w.stimuli, w.rows_per_shard, w.micro_batch)].append(w)
    tasks: list[ShardTask] = []
    for (stimuli, per_shard, micro_batch), members in passes.items():
        for shard in range(members[0].n_shards):
            lacking = tuple((w.feature, w.key) for w in members if shard not in w.sealed)
            if lacking:
                rows = shard_rows(shard, per_shard, members[0].n_rows)
                mine = (v for v in vouchers if v.stimuli == stimuli and v.vouches_for(rows))
                tasks.append(
                    ShardTask(
                        stimuli=stimuli, shard=shard, start=rows.start, stop=rows.stop, micro_batch=micro_batch,
                        features=lacking, sibling=next((v.key for v in mine), None),
                    )
                )  # fmt: skip
    return tasks


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectionPlan:
    """One collection, as `brainenc plan` shows it."""

    key: str
    rows: int
    row_shape: tuple[int, ...]
    bytes_per_image: int
    bytes_total: int
    bytes_left: int
    shards: int
    shards_left: int
    exists: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractPlan:
    """What an extraction will take."""

    store: str
    """Its address without credentials."""
    collections: tuple[CollectionPlan, ...]
    images_left: int
    """Images that have to go through the model; one pass serves all features of a shard."""
    disk_needed_bytes: int
    disk_free_bytes: int | None
    """None: the place does not say (object stores)."""
    staging: str = ""
    """Local folder in which shards lie until they are handed over to a remote store or a mount; empty for others."""
    staging_needed_bytes: int = 0
    """What the shards take that are in work at the same time."""
    staging_free_bytes: int | None = None
    """None: it is on other machines."""
    actors: int
    micro_batch: int
    device: str
    actor_memory_bytes: int | None = None
    """Anonymous memory of one worker at its peak; None when nothing was timed."""
    memory_limit_bytes: int | None = None
    seconds_per_image: float | None = None
    startup_s: float = 0.0

    @property
    def seconds(self) -> float | None:
        """Time for what is left, start-up included; None when nothing was timed."""
        if self.images_left == 0:
            return 0.0
        if self.seconds_per_image is None:
            return None
        return self.startup_s + self.images_left * self.seconds_per_image

    def problem(self) -> str:
        """Why it does not fit, and what to do; empty if it does."""
        return " ".join(filter(None, (self.disk_problem(), self.memory_problem())))

    def disk_problem(self) -> str:
        """Why it does not fit on the store's disk, or on the local one on the way there; empty if it does."""
        problems = []
        if _exceeds(self.disk_needed_bytes, self.disk_free_bytes):
            largest = sorted(self.collections, key=lambda c: -c.bytes_left)[:3]
            listing = ", ".join(f"{c.key} {format_bytes(c.bytes_left)}" for c in largest)
            problems.append(
                f"{self.store} has {_size(self.disk_free_bytes)} free, but {format_bytes(self.disk_needed_bytes)} "
                f"are still to be written ({listing}) and {format_bytes(SPACE_MARGIN)} are to stay free. "
                "Make space, ask for fewer features, or name a store elsewhere with --store."
            )
        if _exceeds(self.staging_needed_bytes, self.staging_free_bytes):
            problems.append(
                f"{self.staging} has {_size(self.staging_free_bytes)} free, but shards wait there on their way to "
                f"{self.store}: {format_bytes(self.staging_needed_bytes)} at the same time with {self.actors} "
                f"actor(s), and {format_bytes(SPACE_MARGIN)} are to stay free. Make space, set BRAINENC_CACHE to a "
                "folder on a larger disk, or take a smaller --shard-size, fewer features or fewer --actors."
            )
        return " ".join(problems)

    def memory_problem(self) -> str:
        """Why it does not fit into memory; empty if it does, or nobody measured."""
        if self.actor_memory_bytes is None or not self.memory_limit_bytes:
            return ""
        if self.actors * self.actor_memory_bytes <= self.memory_limit_bytes:
            return ""
        return (
            f"{self.actors} actor(s) take {format_bytes(self.actors * self.actor_memory_bytes)} of memory, "
            f"{format_bytes(self.actor_memory_bytes)} each with {self.micro_batch} images at a time, but "
            f"{format_bytes(self.memory_limit_bytes)} are the limit here. Take a smaller --batch-size, fewer --actors, "
            "or a smaller backbone."
        )

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {**asdict(self), "seconds": self.seconds, "problem": self.problem()}

    def lines(self) -> list[str]:
        """The plan as people read it."""
        out = []
        for c in self.collections:
            shape = " x ".join(map(str, c.row_shape))
            state = "new" if not c.exists else f"{c.shards - c.shards_left} of {c.shards} shards sealed"
            out.append(
                f"{c.key}: {c.rows} rows of {shape}, {format_bytes(c.bytes_per_image)} an image, "
                f"{format_bytes(c.bytes_total)} in {c.shards} shards ({state})"
            )
        free = _size(self.disk_free_bytes)
        out.append(f"disk: {format_bytes(self.disk_needed_bytes)} to write, {free} free at {self.store}")
        if self.staging_needed_bytes:
            out.append(
                f"local disk: {format_bytes(self.staging_needed_bytes)} at a time on the way to the store, "
                f"{_size(self.staging_free_bytes)} free at {self.staging}"
            )
        if self.actor_memory_bytes is not None:
            limit = f" of {format_bytes(self.memory_limit_bytes)}" if self.memory_limit_bytes else ""
            out.append(
                f"memory: {format_bytes(self.actor_memory_bytes)} an actor, {self.actors} actor(s), micro-batch "
                f"{self.micro_batch} on {self.device}; {format_bytes(self.actor_memory_bytes * self.actors)}{limit}"
            )
        if self.seconds is not None:
            rate = "" if not self.seconds_per_image else f" ({1 / self.seconds_per_image:.3g} images/s)"
            out.append(f"time: {format_seconds(self.seconds)} for {self.images_left} images{rate}")
        return out


def _exceeds(needed: int, free: int | None) -> bool:
    return bool(needed) and free is not None and needed + SPACE_MARGIN > free


def _size(n_bytes: int | None) -> str:
    return "unknown" if n_bytes is None else format_bytes(n_bytes)


def bytes_at_once(tasks: Iterable[ShardTask], wanted: Iterable[Wanted], actors: int) -> int:
    """The most that the shard files take that are half-written at the same time: the largest task of each actor."""
    row_bytes = {w.key: w.row_bytes for w in wanted}
    sizes = sorted((t.n_rows * sum(row_bytes[key] for _, key in t.features) for t in tasks), reverse=True)
    return sum(sizes[:actors])


def collection_plans(wanted: Sequence[Wanted], existing: Iterable[str]) -> tuple[CollectionPlan, ...]:
    """One line each; ``existing`` are the keys that the store has."""
    there = set(existing)
    return tuple(
        CollectionPlan(
            key=w.key, rows=w.n_rows, row_shape=w.row_shape, bytes_per_image=w.row_bytes,
            bytes_total=w.n_rows * w.row_bytes, bytes_left=w.rows_left * w.row_bytes, shards=w.n_shards,
            shards_left=len(w.shards_left), exists=w.key in there,
        )
        for w in wanted
    )  # fmt: skip


def check_space(plan: ExtractPlan) -> None:
    """Refuse what cannot fit.

    Raises:
        NoSpace: with what is needed, what is there, and the collections by size.
        ExtractionFailed: it was measured, and memory is too small.
    """
    if problem := plan.disk_problem():
        raise NoSpace(f"{problem} Nothing was started.")
    if problem := plan.memory_problem():
        raise ExtractionFailed(f"{problem} Nothing was started.")
