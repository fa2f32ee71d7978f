"""Shards on the disk of the node that computes them, moved into the shared store when the run ends.

For clusters whose shared storage is slow, or must not be written to all the time. The folder is a store of its own for
each collection, so that what a killed run left there is whole shards with receipts, found and moved by the next run.
Moving is copying as between any two stores: checked, never overwriting, so that a shard is there once, whoever brings
it. Knows no Ray; ``pipeline.py`` calls :func:`collect` on every node.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from brainenc import atomic
from brainenc.errors import BrainencError, UsageError
from brainenc.featurestore import transfer
from brainenc.featurestore.collection import Collection
from brainenc.featurestore.recovery import dead_partials
from brainenc.featurestore.store import FeatureStore, open_store


@dataclass(frozen=True, kw_only=True, slots=True)
class Collected:
    """What was moved from one node, or why not all of it."""

    shards: int = 0
    bytes: int = 0
    error: BrainencError | None = None
    """What is not moved stays on the node, and the next run tries again."""


def collection_beside(shared: FeatureStore, key: str, node_store: str) -> Collection:
    """The collection on this node's disk in which shards wait for being moved; made if it is not there."""
    folder = _root(node_store, shared.url) / _tag(shared.collection(key).spec.checksum)
    atomic.make_dirs(folder)
    return transfer.prepare(shared, open_store(folder, create=True), key)[1]


def collect(node_store: str, store: str, stage: bool | None = None) -> Collected:
    """Move every whole shard that lies on this node into the shared store. Repeatable; several at once share the work.

    Args:
        node_store: folder on this node's disk, as :class:`~brainenc.extract.config.ExtractConfig` has it.
        store: the shared store.
        stage: as for :func:`~brainenc.featurestore.store.open_store`.
    """
    moved: list[transfer.Copied] = []
    error: BrainencError | None = None
    try:
        shared = open_store(store, stage=stage)
        folders = sorted(_root(node_store, shared.url).glob("*"))
    except BrainencError as problem:
        return Collected(error=problem)
    for folder in folders:
        try:
            moved.append(_move(open_store(folder), shared))
        except BrainencError as problem:  # the others are moved all the same
            error = error or problem
    return Collected(shards=sum(m.shards for m in moved), bytes=sum(m.bytes for m in moved), error=error)


def _move(local: FeatureStore, shared: FeatureStore) -> transfer.Copied:
    keys = local.keys()
    waiting = {key: [entry.shard for entry in local.collection(key).commit().shards] for key in keys}
    copied = transfer.copy(local, shared, keys)
    for key, shards in waiting.items():
        local.collection(key).drop(shards)
    for partial in dead_partials(local, ""):
        partial.unlink(missing_ok=True)
    return copied


def _root(node_store: str, url: str) -> Path:
    """This node's folder for one shared store."""
    expanded = os.path.expanduser(os.path.expandvars(node_store))
    if "$" in expanded or not os.path.isabs(expanded):
        raise UsageError(
            f"--node-store {node_store} is {expanded} on {os.uname().nodename}: it must be an absolute path there, and "
            "its variables must be set where Ray was started."
        )
    return Path(expanded) / f"brainenc-{_tag(url)}"


def _tag(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
