"""One feature of several stimulus sets, read as one by stimulus id."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from brainenc.errors import ProvenanceMismatch, UnknownName, UsageError
from brainenc.featurestore.buffers import as_buffer
from brainenc.featurestore.documents import Json
from brainenc.featurestore.rows import as_rows
from brainenc.featurestore.schema import differences
from brainenc.featurestore.view import FeatureView


class JoinedView:
    """Rows of several collections that hold the same feature, in the order of the ids asked for.

    Made by ``store.join``. Reads like a :class:`~brainenc.featurestore.view.FeatureView`; pickles as addresses.

    Args:
        parts: the views that rows come from.
        part: which of them, of each row; shape (n,).
        rows: which row of it; shape (n,).
    """

    def __init__(self, parts: Sequence[FeatureView], part: np.ndarray, rows: np.ndarray) -> None:
        self._parts, self._part, self._rows = tuple(parts), part, rows

    @classmethod
    def of(cls, parts: Sequence[FeatureView], ids: Iterable[str] | None) -> JoinedView:
        """Join views.

        Args:
            parts: in the order of precedence: an id that several have is read from the first.
            ids: what to show, in this order; None: all ids of all parts.

        Raises:
            ProvenanceMismatch: they do not hold the same feature.
            UnknownName: an id that none of them has.
        """
        for other in parts[1:]:
            found = differences(parts[0].spec, other.spec)
            if unlike := {name: sides for name, sides in found.items() if name not in ("rows", "stimuli")}:
                raise ProvenanceMismatch(f"{other.key}, beside {parts[0].key},", unlike, "Join equal features only.")
        home: dict[str, tuple[int, int]] = {}
        for number, view in enumerate(parts):
            for row, stimulus in enumerate(view.ids):
                home.setdefault(stimulus, (number, row))
        try:
            chosen = [home[stimulus] for stimulus in (home if ids is None else ids)]
        except KeyError as error:
            raise UnknownName("stimulus", str(error.args[0]), [*list(home)[:3], "..."], parts[0].key) from None
        part, rows = np.array(chosen, np.int64).reshape(-1, 2).T
        return cls(parts, part, rows)

    @property
    def key(self) -> str:
        """The collections' keys."""
        return " + ".join(view.key for view in self._parts)

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, *row_shape)."""
        return (len(self), *self._parts[0].shape[1:])

    @property
    def dtype(self) -> np.dtype:
        """As of the parts."""
        return self._parts[0].dtype

    @property
    def ids(self) -> list[str]:
        """Stimulus ids in the order of rows."""
        ids = [view.ids for view in self._parts]
        return [ids[part][row] for part, row in zip(self._part, self._rows, strict=True)]

    @property
    def present(self) -> np.ndarray:
        """Mask of shape (rows,): True where the row can be read."""
        masks = [view.present for view in self._parts]
        found = [masks[part][row] for part, row in zip(self._part, self._rows, strict=True)]
        return np.array(found, bool)

    @property
    def details(self) -> Json:
        """As of the first part."""
        return self._parts[0].details

    @property
    def identity(self) -> Json:
        """As of all parts."""
        return self._parts[0].identity

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def gather(self, indices: npt.ArrayLike, out: Any = None) -> Any:
        """Copy rows into one buffer; see ``FeatureView.gather``."""
        chosen = self._indices(indices)
        result = np.empty((len(chosen), *self.shape[1:]), self.dtype) if out is None else out
        buffer = as_buffer(result, (len(chosen), *self.shape[1:]), self.dtype)
        for view, rows, targets in self._by_part(chosen):
            view.copy_rows(rows, buffer, targets)
        return result

    def prefetch(self, indices: npt.ArrayLike) -> None:
        """Say which rows will be wanted soon."""
        for view, rows, _ in self._by_part(self._indices(indices)):
            view.prefetch(rows)

    def select(self, *, ids: Iterable[str] | None = None, rows: npt.ArrayLike | None = None) -> JoinedView:
        """A view on chosen stimuli, in the order given."""
        if (ids is None) == (rows is None):
            raise UsageError("select wants either ids or rows.")
        if ids is not None:
            mine = {stimulus: row for row, stimulus in enumerate(self.ids)}
            wanted = list(ids)
            if unknown := next((stimulus for stimulus in wanted if stimulus not in mine), None):
                raise UnknownName("stimulus", unknown, [*list(mine)[:3], "..."], self.key)
            rows = [mine[stimulus] for stimulus in wanted]
        chosen = self._indices(rows)
        return JoinedView(self._parts, self._part[chosen], self._rows[chosen])

    def release(self) -> None:
        """Give back maps and open files."""
        for view in self._parts:
            view.release()

    close = release

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> np.ndarray:
        if isinstance(index, int | np.integer):
            (row,) = self._indices([int(index)])
            found: np.ndarray = self._parts[self._part[row]][int(self._rows[row])]
            return found
        return np.asarray(self.gather(np.arange(len(self))[index] if isinstance(index, slice) else index))

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[row] for row in range(len(self)))

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype=dtype)

    def __repr__(self) -> str:
        return f"JoinedView({self.key}, {self.shape} {self.dtype})"

    def _indices(self, indices: npt.ArrayLike | None) -> np.ndarray:
        return as_rows(indices, len(self), self.key)

    def _by_part(self, chosen: np.ndarray) -> Iterator[tuple[FeatureView, np.ndarray, np.ndarray]]:
        for number in np.unique(self._part[chosen]):
            targets = np.flatnonzero(self._part[chosen] == number)
            yield self._parts[number], self._rows[chosen[targets]], targets
