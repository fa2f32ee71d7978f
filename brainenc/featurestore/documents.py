"""The store's small documents: JSON that checks itself.

Keys are sorted and there are no times or random bytes, so that the same content gives the same file whoever wrote it
and however often they were interrupted. Each holds a ``checksum`` over itself without that field: a torn or flipped
document is found by reading it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from brainenc.errors import CorruptData, NotAStore, UsageError
from brainenc.featurestore.checksums import digest

VERSION = 1
"""Of every document here. Raised when an older brainenc would misread a new document."""

_WAY_OUT = "`brainenc store repair` mends what can be mended."

Json = dict[str, Any]


def canonical(fields: Mapping[str, Any]) -> bytes:
    """The one way in which these fields are written as JSON.

    Raises:
        UsageError: something JSON has no words for, such as NaN or an array.
    """
    try:
        return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise UsageError(f"provenance must be plain JSON (text, numbers, lists, mappings): {error}.") from error


def write_document(kind: str, fields: Mapping[str, Any]) -> bytes:
    """A document of this kind, its checksum included."""
    body = {"kind": kind, "version": VERSION, **fields}
    return canonical({**body, "checksum": digest(canonical(body))}) + b"\n"


def read_document(kind: str, data: bytes, where: str) -> Json:
    """The fields of a document, checked.

    Raises:
        CorruptData: torn, flipped, or no such document.
        NotAStore: written by a newer brainenc.
    """
    try:
        body: Json = json.loads(data)
        found, version, checksum = body["kind"], int(body["version"]), body.pop("checksum")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptData(f"{where} is torn or was changed: it is no {kind} document. {_WAY_OUT}") from error
    if found == kind and version > VERSION:
        raise NotAStore(f"{where} has version {version}, this brainenc reads up to {VERSION}: use a newer brainenc.")
    if found != kind or checksum != digest(canonical(body)):
        raise CorruptData(f"{where} is torn or was changed: its checksum does not match its content. {_WAY_OUT}")
    return body
