"""Stimulus sets: which row is which image. Immutable; the order of the rows of every collection made from them."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa

from brainenc.errors import CorruptData, DataError
from brainenc.featurestore.checksums import digest
from brainenc.featurestore.documents import UNREADABLE, canonical
from brainenc.featurestore.layout import check_stimuli_name

_SCHEMA = pa.schema([("id", pa.string()), ("uri", pa.string()), ("size", pa.int64()), ("stamp", pa.string())])
_SHOWN = 5  # differences spelled out in a message


@dataclass(frozen=True, slots=True)
class Stimulus:
    """One image, by its name and by what a glance at the file tells."""

    id: str
    """``nsd-00013`` where the file name has one, else the relative POSIX path."""
    uri: str = ""
    """Where it was read from."""
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
        DataError: an id occurs twice.
    """

    def __init__(self, name: str, stimuli: Iterable[Stimulus]) -> None:
        self.name = check_stimuli_name(name)
        self._stimuli = tuple(stimuli)
        if len(self.row_of) != len(self._stimuli):
            seen: set[str] = set()
            twice = next(s.id for s in self._stimuli if s.id in seen or seen.add(s.id))  # type: ignore[func-returns-value]
            raise DataError(f"stimulus set {name!r} has the id {twice!r} twice: a row is found by its id.")

    @classmethod
    def from_ids(cls, name: str, ids: Iterable[str]) -> StimulusSet:
        """A set of which only the ids are known."""
        return cls(name, (Stimulus(str(i)) for i in ids))

    @cached_property
    def ids(self) -> list[str]:
        """Ids in the order of rows."""
        return [stimulus.id for stimulus in self._stimuli]

    @cached_property
    def row_of(self) -> dict[str, int]:
        """Id -> row."""
        return {stimulus.id: row for row, stimulus in enumerate(self._stimuli)}

    @cached_property
    def checksum(self) -> str:
        """Of the content, whatever file it lies in."""
        return digest(canonical({"stimuli": [[s.id, s.uri, s.size, s.stamp] for s in self._stimuli]}))

    def difference(self, other: StimulusSet) -> str:
        """How ``other`` differs, in one sentence; empty if it does not."""
        gone = [i for i in self.ids if i not in other.row_of]
        new = [i for i in other.ids if i not in self.row_of]
        both = [i for i in self.ids if i in other.row_of]
        changed = [i for i in both if self[self.row_of[i]] != other[other.row_of[i]]]
        found = [_count("gone", gone), _count("new", new), _count("changed", changed)]
        if not (gone or new) and self.ids != other.ids:
            found.append("the order of rows differs")
        return "; ".join(part for part in found if part)

    def to_arrow(self) -> bytes:
        """The table as an Arrow IPC file."""
        columns = list(zip(*((s.id, s.uri, s.size, s.stamp) for s in self._stimuli), strict=True)) or [()] * 4
        table = pa.table([pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)],
                         schema=_SCHEMA.with_metadata({"name": self.name, "checksum": self.checksum}))  # fmt: skip
        sink = io.BytesIO()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        return sink.getvalue()

    @classmethod
    def from_arrow(cls, data: bytes, where: str) -> StimulusSet:
        """Read :meth:`to_arrow`'s bytes.

        Raises:
            CorruptData: torn, or changed since.
        """
        try:
            table = pa.ipc.open_file(pa.BufferReader(data)).read_all()
            columns = [table.column(name).to_pylist() for name in _SCHEMA.names]
            name, checksum = (table.schema.metadata[key].decode() for key in (b"name", b"checksum"))
            stimuli = cls(name, map(Stimulus, *columns))
        except (pa.ArrowException, OSError, *UNREADABLE) as error:
            raise CorruptData(f"{where} is torn or was changed: {error}.") from error
        if stimuli.checksum != checksum:
            raise CorruptData(f"{where} was changed: its checksum does not match its rows.")
        return stimuli

    def __len__(self) -> int:
        return len(self._stimuli)

    def __getitem__(self, row):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204 (int or slice, as a tuple's)
        return self._stimuli[row]

    def __iter__(self) -> Iterator[Stimulus]:
        return iter(self._stimuli)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StimulusSet) and (self.name, self._stimuli) == (other.name, other._stimuli)

    def __hash__(self) -> int:
        return hash((self.name, self.checksum))

    def __repr__(self) -> str:
        return f"StimulusSet({self.name!r}, {len(self)} stimuli)"


def _count(what: str, ids: Sequence[str]) -> str:
    if not ids:
        return ""
    more = " ..." if len(ids) > _SHOWN else ""
    return f"{len(ids)} {what} ({', '.join(ids[:_SHOWN])}{more})"
