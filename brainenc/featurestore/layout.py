"""Every name in a store, built and parsed here only.

store.json
<stimuli>/stimuli.arrow
<stimuli>/<backbone>/<layer>.<facet>/manifest-000001.json
<stimuli>/<backbone>/<layer>.<facet>/shard-00000.arrow
<stimuli>/<backbone>/<layer>.<facet>/shard-00000.json
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from brainenc.errors import UsageError
from brainenc.featurestore.places.base import check_name

STORE_FILE = "store.json"
_MANIFEST = re.compile(r"manifest-(\d{6,})\.json")
_SHARD = re.compile(r"shard-(\d{5,})\.([a-z0-9]+)")


@dataclass(frozen=True, slots=True)
class Key:
    """``<stimuli>/<backbone>/<layer>.<facet>``, taken apart."""

    stimuli: str
    backbone: str
    layer: str
    facet: str

    def __str__(self) -> str:
        return f"{self.stimuli}/{self.backbone}/{self.layer}.{self.facet}"


def parse_key(text: str) -> Key:
    """Take a collection's key apart; the facet follows the last dot, so that layers may be dotted module names.

    Raises:
        UsageError: not of the form ``<stimuli>/<backbone>/<layer>.<facet>``.
    """
    parts = check_name(text).split("/")
    layer, dot, facet = parts[-1].rpartition(".")
    if len(parts) != 3 or not (layer and dot and facet):
        raise UsageError(
            f"{text!r} is not a collection's key: write <stimuli>/<backbone>/<layer>.<facet>, "
            "for example subj01-train/dinov2-base/11.q."
        )
    return Key(parts[0], parts[1], layer, facet)


def check_stimuli_name(name: str) -> str:
    """Return ``name`` if a stimulus set can be called so.

    Raises:
        UsageError: it holds a slash, or a character that not every place has.
    """
    if "/" in check_name(name):
        raise UsageError(f"{name!r} cannot name a stimulus set: it becomes a folder of the store, so no '/' in it.")
    return name


def stimuli_file(stimuli: str) -> str:
    """The table of a stimulus set."""
    return f"{stimuli}/stimuli.arrow"


def manifest_prefix(key: str) -> str:
    """What the names of all manifests of a collection begin with."""
    return f"{key}/manifest-"


def manifest_file(key: str, number: int) -> str:
    """Manifest ``number`` (from 1) of a collection."""
    return f"{key}/manifest-{number:06d}.json"


def shard_prefix(key: str) -> str:
    """What the names of all shards and receipts of a collection begin with."""
    return f"{key}/shard-"


def shard_file(key: str, shard: int, suffix: str) -> str:
    """Shard ``shard`` (from 0) of a collection in the format with this suffix."""
    return f"{key}/shard-{shard:05d}.{suffix}"


def receipt_file(key: str, shard: int) -> str:
    """The receipt of a shard."""
    return f"{key}/shard-{shard:05d}.json"


def manifest_number(name: str) -> int | None:
    """The number of a manifest from its name, None if it is no manifest's name."""
    match = _MANIFEST.fullmatch(name.rpartition("/")[2])
    return int(match[1]) if match else None


def shard_number(name: str) -> tuple[int, str] | None:
    """Shard number and suffix (``"json"``: a receipt) from a name, None if it is neither's name."""
    match = _SHARD.fullmatch(name.rpartition("/")[2])
    return (int(match[1]), match[2]) if match else None
