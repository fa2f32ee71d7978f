"""Numbered manifests: each is created if absent and never overwritten; the highest whole one is current.

A manifest's bytes follow from its content, not from who wrote it or when. So an answer that was lost, two drivers with
the same news, or a driver that died right after its commit all end in one commit: whoever comes second finds his own
bytes, or takes the next number on top of what he finds.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from brainenc.errors import CorruptData, StoreError, UsageError
from brainenc.featurestore import layout
from brainenc.featurestore.documents import canonical
from brainenc.featurestore.formats import shard_format
from brainenc.featurestore.inspection import PlaceBytes, own_note
from brainenc.featurestore.places.base import Place
from brainenc.featurestore.schema import CollectionSpec, Manifest, Receipt

log = logging.getLogger(__name__)
_TRIES = 1000  # numbers lost to other drivers before something must be wrong
_ASKED = 16  # files, where manifests alone do not tell which collection lies here


@dataclass(frozen=True, slots=True)
class Commit:
    """A manifest and its number."""

    number: int
    manifest: Manifest


def numbers(place: Place, key: str, *, known: int = 0) -> list[int]:
    """Numbers of all manifests of a collection, ascending, whole or not.

    Args:
        place: where the collection lies.
        key: its key.
        known: a number that is there, whatever the listing shows.
    """
    listed = _listed(place, key)
    highest = max(listed, default=0)
    if place.can.fresh_listing and highest >= known:
        return sorted(listed)
    probed = range(highest + 1, known)
    listed += [number for number in probed if place.size(layout.manifest_file(key, number)) is not None]
    listed += [known] if known > highest else []
    number = max(listed, default=0) + 1
    while place.size(layout.manifest_file(key, number)) is not None:  # newer than the listing
        listed.append(number)
        number += 1
    return sorted(listed)


def _listed(place: Place, key: str) -> list[int]:
    found = ((entry.name, layout.manifest_number(entry.name)) for entry in place.list(layout.manifest_prefix(key)))
    return [number for name, number in found if number and name == layout.manifest_file(key, number)]


def read(place: Place, key: str, number: int) -> Manifest:
    """One manifest. One of another collection, whole in itself, is as broken as a torn one: who trusted it would take
    every shard here for a stranger's.

    Raises:
        FileNotFoundError: no such number.
        CorruptData: torn or flipped, or it says something else of the collection than the others and the receipts do.
    """
    manifest = _by_itself(place, key, number)
    if not _belongs(place, key, number, manifest):
        raise CorruptData(
            f"{place.url}/{layout.manifest_file(key, number)} is the manifest of another collection: what it says of "
            "identity, rows or shards is not what the other manifests and the shards here say. `brainenc store "
            "repair` removes it; the same extraction then goes on from the shards that are there."
        )
    return manifest


def _by_itself(place: Place, key: str, number: int) -> Manifest:
    name = layout.manifest_file(key, number)
    return Manifest.from_bytes(place.read(name), f"{place.url}/{name}")


def _belongs(place: Place, key: str, number: int, manifest: Manifest) -> bool:
    """Whether a manifest is one of this collection: equal to the first, or the first to the newest, is the rule."""
    if manifest.spec.stimuli != layout.parse_key(key).stimuli:
        return False
    other = 1 if number != 1 else max(numbers(place, key), default=1)
    if other == number:  # alone: only what is sealed can speak against it, where nothing there speaks for it
        receipts, shards = (Counter[str](), Counter[str]()) if manifest.shards else _papers(place, key)
        return not receipts or manifest.spec.checksum in receipts + shards
    with contextlib.suppress(FileNotFoundError, CorruptData):
        if _by_itself(place, key, other).spec == manifest.spec:
            return True
    return manifest.spec == _agreed(place, key)


def _agreed(place: Place, key: str) -> CollectionSpec | None:
    """What the collection is where its manifests disagree: what most receipts say, then most manifests, then the
    lowest."""
    specs: dict[bytes, CollectionSpec] = {}
    votes = Counter[bytes]()
    for number in numbers(place, key):
        with contextlib.suppress(FileNotFoundError, CorruptData):
            spec = _by_itself(place, key, number).spec
            if spec.stimuli == layout.parse_key(key).stimuli:
                specs.setdefault(canonical(spec.to_json()), spec)
                votes[canonical(spec.to_json())] += 1
    papers = sum(_papers(place, key), Counter[str]()) if len(specs) > 1 else Counter[str]()
    return max(specs.items(), key=lambda item: (papers[item[1].checksum], votes[item[0]]), default=(b"", None))[1]


def _papers(place: Place, key: str) -> tuple[Counter[str], Counter[str]]:
    """Which collections some of the receipts, and of the shards, that lie here say they are of."""
    receipts, shards = Counter[str](), Counter[str]()
    for entry in itertools.islice(place.list(layout.shard_prefix(key)), _ASKED):
        suffix = (layout.shard_number(entry.name) or (0, ""))[1]
        with contextlib.suppress(FileNotFoundError, CorruptData, UsageError):
            if suffix == "json":
                receipt = Receipt.from_bytes(place.read(entry.name), f"{place.url}/{entry.name}")
                receipts[receipt.note.collection] += 1
            else:
                note = own_note(PlaceBytes(place, entry.name, entry.size), shard_format(suffix))
                shards[note.collection] += 1
    return receipts, shards


def latest(place: Place, key: str, *, known: int = 0) -> Commit | None:
    """The highest whole manifest; None if the collection does not exist. Broken ones are passed over, with a warning.

    Args:
        place: where the collection lies.
        key: its key.
        known: a number that is there, whatever the listing shows.

    Raises:
        CorruptData: manifests are there, and not one is whole.
    """
    return _newest(place, key, numbers(place, key, known=known), known)


def _newest(place: Place, key: str, listed: list[int], known: int) -> Commit | None:
    """The highest whole manifest of those that were listed."""
    problem: CorruptData | None = None
    for number in reversed(listed):
        try:
            return Commit(number, read(place, key, number))
        except FileNotFoundError:  # removed since it was listed
            if number == known:  # the next commit must not be made without what this one says
                raise
        except CorruptData as error:
            log.warning("passing over a broken manifest: %s", error)
            problem = problem or error
    if problem is not None:
        raise problem
    return None


def advance(place: Place, key: str, change: Callable[[Manifest], Manifest]) -> Commit:
    """Commit ``change`` of the current manifest; nothing is written where it changes nothing.

    Args:
        place: where the collection lies.
        key: its key.
        change: the next manifest from the current one; called again whenever another driver was faster.

    Raises:
        StoreError: the collection does not exist, or others were faster a thousand times.
    """
    taken = 0  # a number that refused us is there, even where a listing does not show it for a while
    for _ in range(_TRIES):
        listed = numbers(place, key, known=taken)
        current = _newest(place, key, listed, taken)
        if current is None:
            raise StoreError(f"{place.url}/{key} has no manifest: the collection was never created, or was removed.")
        wanted = change(current.manifest)
        if wanted == current.manifest:
            return current
        # Above broken ones, too; but of the same listing: what came after it, we have not read.
        number = listed[-1] + 1
        if place.create(layout.manifest_file(key, number), wanted.to_bytes()):
            return Commit(number, wanted)
        taken = number
    raise StoreError(f"{place.url}/{key}: no manifest number could be had in {_TRIES} tries; are many drivers at it?")
