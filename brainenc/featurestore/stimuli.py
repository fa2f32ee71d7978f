"""Stimulus sets: which row is which image. Immutable; the order of the rows of every collection made from them.

A set is kept as the four columns of its file, so that a million images cost as much memory as their names.
"""

from __future__ import annotations

import io
import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from brainenc.errors import CorruptData, DataError
from brainenc.featurestore.documents import UNREADABLE, canonical
from brainenc.featurestore.layout import check_stimuli_name
from brainenc.redact import bare_address

_SCHEMA = pa.schema([("id", pa.string()), ("uri", pa.string()), ("size", pa.int64()), ("stamp", pa.string())])
_SHOWN = 5  # differences spelled out in a message
_CHUNK = 1 << 14  # rows that are Python objects at once
_MAY_HOLD_KEYS = r"://.*[@=]"  # what bare_address() may change; most addresses are passed over without a look
_PLAIN = r"^[ !#-\[\]-~]*$"  # what JSON writes as it is: printable ASCII without quote and backslash


@dataclass(frozen=True, slots=True)
class Stimulus:
    """One image, by its name and by what a glance at the file tells."""

    id: str
    """``nsd-00013`` where the file name has one, else the relative POSIX path."""
    uri: str = ""
    """Where it was read from; in a store without credentials, so that workers are given their own list."""
    size: int | None = None
    """Bytes of the file."""
    stamp: str | None = None
    """Modification time in nanoseconds as text, or an etag."""


class StimulusSet(Sequence[Stimulus]):
    """An ordered set of stimuli under a name.

    Args:
        name: what it is called; becomes a folder of the store.
        stimuli: in the order of rows.

    Raises:
        DataError: an id occurs twice, or is no text that UTF-8 can hold.
    """

    def __init__(self, name: str, stimuli: Iterable[Stimulus]) -> None:
        self.name = check_stimuli_name(name)
        self._table = _columns(name, stimuli)
        self._check()

    @classmethod
    def from_ids(cls, name: str, ids: Iterable[str]) -> StimulusSet:
        """A set of which only the ids are known."""
        return cls(name, (Stimulus(str(i)) for i in ids))

    @cached_property
    def ids(self) -> list[str]:
        """Ids in the order of rows."""
        ids: list[str] = self._column("id").to_pylist()
        return ids

    @cached_property
    def row_of(self) -> dict[str, int]:
        """Id -> row."""
        return {identity: row for row, identity in enumerate(self.ids)}

    @cached_property
    def checksum(self) -> str:
        """Of the content, whatever file it lies in."""
        found = xxhash.xxh3_128(b'{"stimuli":[')
        for n, batch in enumerate(self._table.to_batches(_CHUNK)):
            found.update(b"," if n else b"")
            found.update(_json(batch))
        found.update(b"]}")
        return found.hexdigest()

    def difference(self, other: StimulusSet) -> str:
        """How ``other`` differs, in one sentence; empty if it does not."""
        mine, theirs = self._column("id"), other._column("id")
        place = pc.index_in(mine, value_set=theirs)
        gone = mine.filter(pc.is_null(place))
        new = theirs.filter(pc.is_null(pc.index_in(theirs, value_set=mine)))
        here = self._table.filter(pc.is_valid(place))
        unlike = _unlike(here, other._table.take(place.drop_null()), _SCHEMA.names[1:])
        changed = here.column("id").filter(pa.array(unlike))
        found = [_count("gone", gone), _count("new", new), _count("changed", changed)]
        if not (len(gone) or len(new)) and not mine.equals(theirs):
            found.append("the order of rows differs")
        return "; ".join(part for part in found if part)

    def touched(self, other: StimulusSet) -> list[int]:
        """Rows whose file has another size or stamp in ``other``, which has the same ids in the same order."""
        rows: list[int] = np.flatnonzero(_unlike(self._table, other._table, ("size", "stamp"))).tolist()
        return rows

    def take(self, rows: Any) -> StimulusSet:
        """The stimuli of these rows, in this order and as often as they are named."""
        return _restored(self.name, self._table.take(pa.array(np.asarray(rows, np.int64))))

    def without_credentials(self) -> StimulusSet:
        """The same set, its URIs as they may be kept: without keys and signatures. Itself where there are none."""
        if not pc.any(pc.match_substring_regex(self._column("uri"), _MAY_HOLD_KEYS), min_count=0).as_py():
            return self
        return StimulusSet(self.name, (replace(s, uri=s.uri and bare_address(s.uri)) for s in self))

    def to_arrow(self) -> bytes:
        """The table as an Arrow IPC file."""
        sink = io.BytesIO()
        schema = _SCHEMA.with_metadata({"name": self.name, "checksum": self.checksum})
        with pa.ipc.new_file(sink, schema) as writer:
            writer.write_table(self._table.replace_schema_metadata(schema.metadata))
        return sink.getvalue()

    @classmethod
    def from_arrow(cls, data: bytes, where: str) -> StimulusSet:
        """Read :meth:`to_arrow`'s bytes.

        Raises:
            CorruptData: torn, or changed since.
        """
        try:
            table = pa.ipc.open_file(pa.BufferReader(data)).read_all()
            table.validate(full=True)
            name, checksum = (table.schema.metadata[key].decode() for key in (b"name", b"checksum"))
            stimuli = _restored(name, table.select(_SCHEMA.names).replace_schema_metadata(None).cast(_SCHEMA))
            stimuli._check()
            matches = stimuli.checksum == checksum
        except (pa.ArrowException, OSError, *UNREADABLE) as error:
            raise CorruptData(f"{where} is torn or was changed: {error}.") from error
        if not matches:
            raise CorruptData(f"{where} was changed: its checksum does not match its rows.")
        return stimuli

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, row: Any) -> Any:
        """A stimulus, or a tuple of them for a slice."""
        if isinstance(row, slice):
            return tuple(_stimuli(self._table.take(pa.array(np.arange(len(self))[row]))))
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} stimuli")
        return next(_stimuli(self._table.slice(int(row) % len(self), 1)))

    def __iter__(self) -> Iterator[Stimulus]:
        return itertools.chain.from_iterable(map(_stimuli, self._table.to_batches(_CHUNK)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StimulusSet) and self.name == other.name and bool(self._table.equals(other._table))

    def __hash__(self) -> int:
        return hash((self.name, self.checksum))

    def __repr__(self) -> str:
        return f"StimulusSet({self.name!r}, {len(self)} stimuli)"

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.name, self._table)

    def _column(self, name: str) -> pa.Array:
        column = self._table.column(name)
        return column.chunk(0) if column.num_chunks else pa.array([], column.type)

    def _check(self) -> None:
        """Each id once. Hashes are compared, eight bytes each; only where two are equal all ids are held at once."""
        ids = self._column("id")
        hashes = np.empty(len(ids), np.int64)
        for start in range(0, len(ids), _CHUNK):
            hashes[start : start + _CHUNK] = [hash(i) for i in ids[start : start + _CHUNK].to_pylist()]
        hashes.sort()
        if ids.null_count or (hashes[1:] == hashes[:-1]).any():
            seen: set[str] = set()
            if twice := [i for i in self.ids if i in seen or seen.add(i)]:  # type: ignore[func-returns-value]
                raise DataError(f"stimulus set {self.name!r} has the id {twice[0]!r} twice: a row is found by its id.")


def _restored(name: str, table: pa.Table) -> StimulusSet:
    """A set from columns that were one already."""
    stimuli = StimulusSet.__new__(StimulusSet)
    whole = all(column.num_chunks == 1 for column in table.columns)
    stimuli.name, stimuli._table = check_stimuli_name(name), table if whole else table.combine_chunks()
    return stimuli


def _columns(name: str, stimuli: Iterable[Stimulus]) -> pa.Table:
    """The columns of stimuli, of which only a few exist at any time if they come from a generator."""
    rest = iter(stimuli)
    columns: tuple[_Texts | _Numbers, ...] = (_Texts(), _Texts(), _Numbers(), _Texts())
    while chunk := list(itertools.islice(rest, _CHUNK)):
        for column, values in zip(columns, zip(*map(_fields, chunk), strict=True), strict=True):
            try:
                column.extend(values)
            except UnicodeEncodeError as error:
                text = f"{error.object!r:.200}"
                raise DataError(f"stimulus set {name!r}: {text} is no UTF-8 text; rename the file.") from error
    return pa.table([column.array() for column in columns], schema=_SCHEMA)


def _fields(stimulus: Stimulus) -> tuple[str, str, int | None, str | None]:
    return stimulus.id, stimulus.uri, stimulus.size, stimulus.stamp


class _Numbers:
    """An int64 column that grows in place. ``pa.array`` would import pandas, which is larger than a million names."""

    def __init__(self) -> None:
        self._values, self._here = array("q"), bytearray()

    def extend(self, values: Sequence[Any]) -> None:
        self._values.extend([value or 0 for value in values])
        self._here += bytes(value is not None for value in values)

    def array(self) -> pa.Array:
        return pa.Array.from_buffers(pa.int64(), len(self._here), [_validity(self._here), pa.py_buffer(self._values)])


class _Texts:
    """The same for text."""

    def __init__(self) -> None:
        self._data, self._ends, self._here = bytearray(), array("i", [0]), bytearray()

    def extend(self, values: Sequence[Any]) -> None:
        encoded = [b"" if value is None else value.encode() for value in values]
        ends = self._ends[-1] + np.cumsum([len(text) for text in encoded])
        self._ends.frombytes(ends.astype(np.int32).tobytes())
        self._data += b"".join(encoded)
        self._here += bytes(value is not None for value in values)

    def array(self) -> pa.Array:
        buffers = [_validity(self._here), pa.py_buffer(self._ends), pa.py_buffer(self._data)]
        return pa.Array.from_buffers(pa.string(), len(self._here), buffers)


def _validity(here: bytearray) -> pa.Buffer | None:
    mask = np.frombuffer(here, bool)
    return None if mask.all() else pa.py_buffer(np.packbits(mask, bitorder="little"))


def _stimuli(columns: pa.Table | pa.RecordBatch) -> Iterator[Stimulus]:
    return map(Stimulus, *(columns.column(name).to_pylist() for name in _SCHEMA.names))


def _json(batch: pa.RecordBatch) -> Any:
    """The rows as canonical JSON, ``[id,uri,size,stamp]`` each, with commas between.

    Nearly all names are plain: those are put together column by column, which is ten times as fast.
    """
    texts = [batch.column(name) for name in ("id", "uri", "stamp")]
    if not all(pc.all(pc.match_substring_regex(text, _PLAIN), min_count=0).as_py() for text in texts):
        return canonical({"": [list(_fields(s)) for s in _stimuli(batch)]})[len('{"":[') : -len("]}")]
    identity, uri, stamp = (_or_null(_joined('"', text, '"')) for text in texts)
    size = _or_null(batch.column("size").cast(pa.string()))
    rows = _joined("[", identity, ",", uri, ",", size, ",", stamp, "],")
    _, offsets, data = rows.buffers()
    ends = np.frombuffer(offsets, np.int32)[rows.offset : rows.offset + len(rows) + 1]
    return memoryview(data)[ends[0] : ends[-1] - 1]


def _joined(*parts: pa.Array | str) -> pa.Array:
    return pc.binary_join_element_wise(*parts, "", null_handling="emit_null")


def _or_null(texts: pa.Array) -> pa.Array:
    return texts.fill_null("null")


def _unlike(a: pa.Table, b: pa.Table, names: Iterable[str]) -> np.ndarray:
    """Mask of the rows in which two tables of equal length differ; null equals null."""
    unlike = np.zeros(a.num_rows, bool)
    for name in names:
        one, two = a.column(name), b.column(name)
        differs = pc.not_equal(one, two).fill_null(False)
        unlike |= pc.or_(differs, pc.xor(pc.is_null(one), pc.is_null(two))).to_numpy()
    return unlike


def _count(what: str, ids: pa.Array | pa.ChunkedArray) -> str:
    if not len(ids):
        return ""
    more = " ..." if len(ids) > _SHOWN else ""
    return f"{len(ids)} {what} ({', '.join(ids[:_SHOWN].to_pylist())}{more})"
