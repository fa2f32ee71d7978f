"""The store's small documents: JSON that checks itself.

Keys are sorted and there are no times or random bytes, so that the same content gives the same file whoever wrote it
and however often they were interrupted. Each holds a ``checksum`` over itself without that field: a torn or flipped
document is found by reading it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from brainenc.errors import CorruptData, NotAStore, UsageError
from brainenc.featurestore.checksums import digest

VERSION = 1
"""Of every document here. Raised when an older brainenc would misread a new document."""

_WAY_OUT = "`brainenc store repair` mends what can be mended."

Json = dict[str, Any]

UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, MemoryError)
"""What taking apart bytes that anybody may have changed can raise: nesting without end, numbers beyond all bounds,
fields that are not there. Where a document is read, all of it becomes ``CorruptData``."""


@contextlib.contextmanager
def reading(what: str, where: str) -> Iterator[None]:
    """Take a document's fields apart: whatever is wrong with them is ``CorruptData``.

    Args:
        what: kind of document.
        where: its address, for the message.
    """
    try:
        yield
    except UNREADABLE as error:
        raise CorruptData(f"{where} is no {what} that could be: {type(error).__name__}: {error}. {_WAY_OUT}") from error


def whole_number(value: Any, most: int, least: int = 0) -> int:
    """``value`` if it is an integer from ``least`` to ``most``.

    Raises:
        ValueError: it is not.
    """
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"a number from {least} to {most} is wanted, not {value!r:.60}")
    return value


def texts(values: Any) -> tuple[str, ...]:
    """A list of texts as a tuple.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(values, list) or not all(type(value) is str for value in values):
        raise ValueError(f"a list of texts is wanted, not {values!r:.60}")
    return tuple(values)


def numbers(values: Any, most: int) -> tuple[int, ...]:
    """A list of integers from 0 to ``most`` as a tuple.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(values, list):
        raise ValueError(f"a list of numbers is wanted, not {values!r:.60}")
    return tuple(whole_number(value, most) for value in values)


def typed(fields: Any, kinds: Mapping[str, type]) -> Json:
    """Those of the fields that ``kinds`` names.

    Raises:
        KeyError: one is lacking.
        ValueError: one is of another type.
    """
    for name, kind in kinds.items():
        if type(fields[name]) is not kind:
            raise ValueError(f"{name} must be a {kind.__name__}, not {fields[name]!r:.60}")
    return {name: fields[name] for name in kinds}


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
        actual = digest(canonical(body))
    except UNREADABLE as error:
        raise CorruptData(f"{where} is torn or was changed: it is no {kind} document. {_WAY_OUT}") from error
    flipped = version > VERSION and checksum == digest(canonical({**body, "version": VERSION}))
    if found == kind and version > VERSION and not flipped:
        raise NotAStore(f"{where} has version {version}, this brainenc reads up to {VERSION}: use a newer brainenc.")
    if found != kind or checksum != actual:
        raise CorruptData(f"{where} is torn or was changed: its checksum does not match its content. {_WAY_OUT}")
    return body
