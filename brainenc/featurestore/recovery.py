"""Is everything there as it was written, and what to do where it is not: verify, repair, gc."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from brainenc.errors import CorruptData, StoreError
from brainenc.featurestore import commit, layout
from brainenc.featurestore.collection import Collection
from brainenc.featurestore.schema import Manifest, ShardEntry
from brainenc.featurestore.store import FeatureStore

Progress = Callable[[int, int, int], None]
"""Called with shards done, shards in all, bytes read."""

_READERS = 4
_GRACE_S = 3600.0
_JUST_OPENED_S = 60.0  # a writer locks its partial right after it made it
_MANIFESTS_KEPT = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Something wrong with one file."""

    key: str
    """Collection, or stimulus set."""
    shard: int | None
    """None: not about a shard."""
    problem: str
    cure: str
    """What :func:`repair` does: ``"drop"`` the shard, write its ``"receipt"`` again, ``"commit"`` it, drop a broken
    ``"manifest"``, or ``""``: nothing can be done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """What reading back a store, or part of it, has shown."""

    shards: int
    bytes: int
    seconds: float
    findings: tuple[Finding, ...]

    @property
    def whole(self) -> bool:
        """Nothing is wrong."""
        return not self.findings


def verify(store: FeatureStore, keys: Sequence[str] | None = None, *, progress: Progress | None = None) -> Verification:
    """Read back every byte of every shard, from the disk and not from memory, and compare with all that is recorded.

    Args:
        store: the store.
        keys: collections; None: all, and the stimulus sets.
        progress: told after each shard.

    Raises:
        KeyNotFound: there is no such collection.
    """
    started = time.monotonic()
    findings = [] if keys is not None else [*_check_stimuli(store), *_check_hidden(store)]
    todo: list[tuple[Collection, dict[int, ShardEntry], int]] = []
    for key in list(store) if keys is None else keys:
        broken, collection = _open(store, key)
        findings += broken
        if collection is not None:
            entries = {entry.shard: entry for entry in collection.manifest().shards}
            findings += _check_spec(store, collection)
            receipts, shards = collection.found()
            todo += [(collection, entries, shard) for shard in sorted(receipts | shards | entries.keys())]
    done = size = 0
    with ThreadPoolExecutor(_READERS, thread_name_prefix="brainenc-verify") as pool:
        for finding, n_bytes in pool.map(lambda item: _check_shard(*item), todo):
            findings += [] if finding is None else [finding]
            done, size = done + 1, size + n_bytes
            if progress is not None:
                progress(done, len(todo), size)
    return Verification(shards=done, bytes=size, seconds=time.monotonic() - started, findings=tuple(findings))


def repair(store: FeatureStore, findings: Sequence[Finding], *, progress: Progress | None = None) -> list[Finding]:
    """Mend what :func:`verify` found, so that the next extraction computes just what is lost.

    Not beside a running extraction into the same collections.

    Returns:
        What could not be mended.
    """
    left = [finding for finding in findings if not finding.cure]
    keys = sorted({finding.key for finding in findings if finding.cure})
    for done, key in enumerate(keys, 1):
        try:
            _repair(store, key, [f for f in findings if f.key == key])
        except (CorruptData, OSError) as error:  # what stands in the way here is no reason to leave the others
            left.append(Finding(key=key, shard=None, problem=str(error), cure=""))
        if progress is not None:
            progress(done, len(keys), 0)
    return left


@dataclass(frozen=True, kw_only=True, slots=True)
class Debris:
    """A file that nobody needs."""

    name: str
    """In the store, or a path where it lies outside."""
    bytes: int
    why: str


def debris(
    store: FeatureStore, *, just_opened_s: float = _JUST_OPENED_S, grace_s: float = _GRACE_S
) -> Iterator[Debris]:
    """What a store could do without: partials of dead writers and manifests long superseded.

    Args:
        store: the store.
        just_opened_s: how long a writer may take from making its partial to locking it.
        grace_s: the same where locks are not seen by all writers, so that age alone tells.
    """
    for path in dead_partials(store, just_opened_s=just_opened_s, grace_s=grace_s):
        try:
            size = path.stat().st_size
        except FileNotFoundError:  # another gc was faster
            continue
        yield Debris(name=str(path), bytes=size, why="a writer died over it")
    if not store.place.can.fresh_listing:
        return  # a number that looks free would be taken again by a driver with an old listing
    for key in store:
        for number in commit.numbers(store.place, key)[1:-_MANIFESTS_KEPT]:
            name = layout.manifest_file(key, number)
            yield Debris(name=name, bytes=store.place.size(name) or 0, why="superseded by later manifests")


def dead_partials(
    store: FeatureStore, prefix: str = "", *, just_opened_s: float = _JUST_OPENED_S, grace_s: float = _GRACE_S
) -> Iterator[Path]:
    """Partials whose writers are dead.

    Args:
        store: the store.
        prefix: of the names that they were meant for, such as a collection's key.
        just_opened_s: how long a writer may take from making its partial to locking it.
        grace_s: the same where locks are not seen by all writers, so that age alone tells.
    """
    for path in store.place.partials(prefix):
        if _is_dead(path, just_opened_s if store.place.can.shared_locks else grace_s):
            yield path


def gc(store: FeatureStore, found: Sequence[Debris]) -> int:
    """Remove debris.

    Returns:
        Bytes that were freed.
    """
    for item in found:
        path = Path(item.name)
        if path.is_absolute():
            path.unlink(missing_ok=True)
        else:
            store.place.delete(item.name)
    return sum(item.bytes for item in found)


def _check_stimuli(store: FeatureStore) -> list[Finding]:
    found = []
    for name in store.stimuli_names():
        try:
            store.stimuli(name)
        except StoreError as error:
            found.append(Finding(key=name, shard=None, problem=str(error), cure=""))
    return found


def _check_hidden(store: FeatureStore) -> list[Finding]:
    """Shards that no manifest speaks for: nothing else in the store shows that they are there."""
    found = []
    for key in store.folders():
        shards = next(iter(store.place.list(layout.shard_prefix(key))), None)
        if shards is not None and key not in store:
            text = (
                f"{store.url}/{key} has shards but no manifest, so that readers do not see it. The extraction or copy "
                "that made it, run again, writes one and takes the shards over; if nobody wants it, remove the folder"
            )
            found.append(Finding(key=key, shard=None, problem=text, cure=""))
    return found


def _open(store: FeatureStore, key: str) -> tuple[list[Finding], Collection | None]:
    """Broken manifests, and the collection by its newest whole one."""
    found = []
    numbers = commit.numbers(store.place, key)
    for number in numbers:
        try:
            commit.read(store.place, key, number)
        except CorruptData as error:
            found.append(Finding(key=key, shard=None, problem=str(error), cure="manifest"))
    if numbers and numbers[0] != 1:
        name = f"{store.url}/{layout.manifest_file(key, 1)}"
        text = f"{name} is gone: other programs may not see the collection. `brainenc store repair` writes it again"
        found.append(Finding(key=key, shard=None, problem=text, cure="manifest"))
    try:
        return found, store.collection(key)
    except CorruptData:
        return found, None


def _check_spec(store: FeatureStore, collection: Collection) -> list[Finding]:
    try:
        same = store.stimuli(collection.spec.stimuli).checksum == collection.spec.stimuli_checksum
    except StoreError:
        return []  # found already, as a stimulus set
    except ValueError as error:
        return [Finding(key=collection.key, shard=None, problem=str(error), cure="")]
    text = f"{collection.key} was made from another stimulus set than {collection.spec.stimuli!r} is now"
    return [] if same else [Finding(key=collection.key, shard=None, problem=text, cure="")]


def _check_shard(collection: Collection, entries: Mapping[int, ShardEntry], shard: int) -> tuple[Finding | None, int]:
    """What is wrong with a shard, if anything, and the bytes that were read to know."""
    entry = entries.get(shard)

    def found(problem: str, cure: str) -> Finding:
        return Finding(key=collection.key, shard=shard, problem=problem, cure=cure)

    name = f"{collection.place.url}/{collection.shard_name(shard)}"
    try:
        actual = collection.inspect(shard, from_disk=True)
    except FileNotFoundError:
        return found(f"{name} is gone", "drop"), 0
    except (CorruptData, OSError) as error:
        return found(str(error), "drop"), collection.place.size(collection.shard_name(shard)) or 0
    try:
        problem = "" if collection.receipt(shard) == actual else f"the receipt of {name} speaks of other bytes"
        uncommitted = not problem and entry is None
    except FileNotFoundError:
        problem = f"the receipt of {name} is gone" if entry else ""  # without an entry: a writer's death, adopted later
        uncommitted = False
    except CorruptData as error:
        problem, uncommitted = str(error), False
    if problem:
        return found(problem, "receipt"), actual.bytes
    if uncommitted:
        advice = "sealed but not committed: run `brainenc store repair` or the same extraction again"
        return found(f"{name} is {advice}; until then readers miss its rows", "commit"), actual.bytes
    if entry is not None and entry != ShardEntry.of(actual):
        return found(f"{name} is whole, but not the one that the manifest names", "commit"), actual.bytes
    return None, actual.bytes


def _repair(store: FeatureStore, key: str, findings: Sequence[Finding]) -> None:
    broken, collection = _open(store, key)
    if collection is None:  # no whole manifest: the next extraction creates it again and takes over the shards
        _drop_broken_manifests(store, key)
        return
    if broken:
        _drop_broken_manifests(store, key)
        store.place.create(layout.manifest_file(key, 1), Manifest(spec=collection.spec).to_bytes())
    stuck = _drop_each(collection, [f.shard for f in findings if f.shard is not None and f.cure == "drop"])
    listed = {entry.shard for entry in collection.manifest().shards}
    again = {f.shard for f in findings if f.shard is not None and f.cure == "receipt"}
    again |= {f.shard for f in findings if f.shard in listed and f.cure == "commit"}
    if again:
        collection.recommit(again)
    collection.commit()  # what the broken manifests had, and what was sealed since
    if stuck is not None:
        raise stuck


def _drop_each(collection: Collection, shards: Sequence[int]) -> CorruptData | None:
    """Drop shards; says what stood in the way of one that could not be, after all others are gone."""
    try:
        collection.drop(shards)
    except CorruptData:
        stuck = None
        for shard in shards:
            try:
                collection.drop([shard])
            except CorruptData as error:
                stuck = error
        return stuck
    return None


def _drop_broken_manifests(store: FeatureStore, key: str) -> None:
    for number in commit.numbers(store.place, key):
        try:
            commit.read(store.place, key, number)
        except CorruptData:
            store.place.delete(layout.manifest_file(key, number))


def _is_dead(path: Path, grace_s: float) -> bool:
    """Whether a partial's writer is gone: its lock is free, and it has not just been made."""
    try:
        fd = os.open(path, os.O_RDWR)  # NFS locks exclusively only what is open for writing
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS):  # gone, or not ours to remove
            return False
        raise
    try:
        if time.time() - os.fstat(fd).st_mtime < grace_s:
            return False
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True
