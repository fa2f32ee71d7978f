"""Numbered manifests: each is created if absent and never overwritten; the highest whole one is current.

A manifest's bytes follow from its content, not from who wrote it or when. So an answer that was lost, two drivers with
the same news, or a driver that died right after its commit all end in one commit: whoever comes second finds his own
bytes, or takes the next number on top of what he finds.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass

from brainenc.errors import CorruptData, StoreError
from brainenc.featurestore import layout
from brainenc.featurestore.places.base import Place
from brainenc.featurestore.schema import CollectionSpec, Manifest

log = logging.getLogger(__name__)
_TRIES = 1000  # numbers lost to other drivers before something must be wrong


@dataclass(frozen=True, slots=True)
class Commit:
    """A manifest and its number."""

    number: int
    manifest: Manifest


def numbers(place: Place, key: str) -> list[int]:
    """Numbers of all manifests of a collection, ascending, whole or not."""
    if place.can.fresh_listing:
        return sorted(_listed(place, key))
    listed = _listed(place, key)
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
        CorruptData: torn or flipped, or it says something else of the collection than the first manifest.
    """
    manifest = _by_itself(place, key, number)
    if number != 1 and manifest.spec != _fixed(place, key):
        raise CorruptData(
            f"{place.url}/{layout.manifest_file(key, number)} is the manifest of another collection: what it says of "
            "identity, rows or shards is not what the first manifest fixed. `brainenc store repair` removes it."
        )
    return manifest


def _by_itself(place: Place, key: str, number: int) -> Manifest:
    name = layout.manifest_file(key, number)
    return Manifest.from_bytes(place.read(name), f"{place.url}/{name}")


def _fixed(place: Place, key: str) -> CollectionSpec | None:
    """What the first manifest fixed; where it is broken or gone, the lowest whole one speaks for it."""
    with contextlib.suppress(FileNotFoundError, CorruptData):
        return _by_itself(place, key, 1).spec
    for number in numbers(place, key):
        with contextlib.suppress(FileNotFoundError, CorruptData):
            return _by_itself(place, key, number).spec
    return None


def latest(place: Place, key: str) -> Commit | None:
    """The highest whole manifest; None if the collection does not exist. Broken ones are passed over, with a warning.

    Raises:
        CorruptData: manifests are there, and not one is whole.
    """
    problem: CorruptData | None = None
    for number in reversed(numbers(place, key)):
        try:
            return Commit(number, read(place, key, number))
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
    for _ in range(_TRIES):
        current = latest(place, key)
        if current is None:
            raise StoreError(f"{place.url}/{key} has no manifest: the collection was never created, or was removed.")
        wanted = change(current.manifest)
        if wanted == current.manifest:
            return current
        number = numbers(place, key)[-1] + 1  # above broken ones, too
        if place.create(layout.manifest_file(key, number), wanted.to_bytes()):
            return Commit(number, wanted)
    raise StoreError(f"{place.url}/{key}: no manifest number could be had in {_TRIES} tries; are many drivers at it?")
