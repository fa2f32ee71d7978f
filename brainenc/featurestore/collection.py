"""One feature of one stimulus set: its shards, their receipts, its commits."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from brainenc.errors import CorruptData, ProvenanceMismatch, ShardSealed
from brainenc.featurestore import commit, layout
from brainenc.featurestore.documents import Json
from brainenc.featurestore.formats import shard_format
from brainenc.featurestore.inspection import LocalBytes, PlaceBytes, inspect
from brainenc.featurestore.places.base import Doubting, Place, Refreshing, ShardCache
from brainenc.featurestore.resuming import drop_unfit
from brainenc.featurestore.schema import CollectionSpec, Manifest, Receipt, ShardEntry, differences
from brainenc.featurestore.staged import look_back
from brainenc.featurestore.stimuli import StimulusSet
from brainenc.featurestore.writer import ShardWriter

if TYPE_CHECKING:
    from brainenc.featurestore.view import FeatureView

log = logging.getLogger(__name__)


class Collection:
    """A collection as its writers see it. Pickles as its address.

    Args:
        place: where the store lies.
        key: ``<stimuli>/<backbone>/<layer>.<facet>``.
        spec: what manifest 1 fixed.
        cache: whole-shard copies, for views of places that cannot be mapped.
    """

    def __init__(self, place: Place, key: str, spec: CollectionSpec, cache: ShardCache | None = None) -> None:
        self.place, self.key, self.spec, self._cache = place, key, spec, cache
        self._format = shard_format(spec.format)
        self._stimuli: StimulusSet | None = None
        self._looked_back = False

    @classmethod
    def open(cls, place: Place, key: str, cache: ShardCache | None = None) -> Collection | None:
        """The collection of this key, None if there is none."""
        current = commit.latest(place, key)
        return None if current is None else cls(place, key, current.manifest.spec, cache)

    @classmethod
    def create(cls, place: Place, key: str, spec: CollectionSpec, cache: ShardCache | None = None) -> Collection:
        """Create it, or compare with what is there.

        Raises:
            ProvenanceMismatch: it is there, made in another way.
        """
        existing = cls.open(place, key, cache)
        if existing is None and not place.create(layout.manifest_file(key, 1), Manifest(spec=spec).to_bytes()):
            existing = cls.open(place, key, cache)  # another driver was faster
        if existing is None:
            made = cls(place, key, spec, cache)
            if next(iter(place.list(layout.shard_prefix(key))), None) is not None:
                made.sealed()  # shards whose manifests were lost are taken over, those of another collection removed
            return made
        if found := differences(existing.spec, spec):
            advice = "Use another name for this one (--name or --stimuli), or another store."
            raise ProvenanceMismatch(f"{key} in {place.url}", found, advice)
        return existing

    @property
    def identity(self) -> Json:
        """What makes these features these features."""
        return self.spec.identity

    @property
    def details(self) -> Json:
        """What readers want to know beside: ``n_prefix``, ``grid`` ..."""
        return self.spec.details

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return self.spec.row_shape

    @property
    def dtype(self) -> str:
        """Storage dtype by name."""
        return self.spec.dtype

    @property
    def rows_per_shard(self) -> int:
        """Rows of every shard but the last."""
        return self.spec.rows_per_shard

    @property
    def n_rows(self) -> int:
        """Rows when all are there."""
        return self.spec.n_rows

    @property
    def n_shards(self) -> int:
        """Shards when all rows are there."""
        return self.spec.n_shards

    @property
    def stimuli(self) -> StimulusSet:
        """Whose rows these are."""
        if self._stimuli is None:
            name = layout.stimuli_file(self.spec.stimuli)
            self._stimuli = StimulusSet.from_arrow(self.place.read(name), f"{self.place.url}/{name}")
        return self._stimuli

    def rows(self, shard: int) -> range:
        """The rows of a shard."""
        return self.spec.rows(shard)

    def sealed(self) -> frozenset[int]:
        """Shards that need not be computed: those with a receipt, and whole ones without, which get theirs now.

        A receipt counts if it can be read, is of this shard, and the file beside it has the size that it says; what is
        not so is made again from its shard, or dropped. No rows are read for that. Of remote places only receipts that
        no manifest lists yet are read, one request each. Where a flush is no flush, what earlier sessions handed over
        is read back first, and dropped if it is not whole.
        """
        listed = self._listed() if self.place.can.fresh_listing else None
        receipts, shards = self.found() if listed is None else (frozenset(listed[0]), frozenset(listed[1]))
        if isinstance(self.place, Doubting) and not self._looked_back:
            receipts -= look_back(self, receipts, self.place)
            self._looked_back = True
        receipts -= drop_unfit(self, receipts, None if listed is None else listed[1])
        return receipts | {shard for shard in shards - receipts if self.adopt(shard) is not None}

    def receipt(self, shard: int) -> Receipt:
        """The receipt of a sealed shard.

        Raises:
            FileNotFoundError: it has none.
            CorruptData: it is torn or flipped, or that of another shard or collection.
        """
        name = layout.receipt_file(self.key, shard)
        receipt = Receipt.from_bytes(self.place.read(name), f"{self.place.url}/{name}")
        receipt.note.check(self.spec, shard, f"{self.place.url}/{name}")
        return receipt

    def shard_writer(self, shard: int, *, environment: Mapping[str, Any] | None = None) -> ShardWriter:
        """A writer of one shard.

        Args:
            shard: its number.
            environment: what it is made with: library versions, device, batch size. Recorded, never compared.

        Raises:
            ShardSealed: it is there already.
            NoSpace: it would not fit on the disk.
        """
        self.spec.rows(shard)
        if self.place.size(layout.receipt_file(self.key, shard)) is not None or self.adopt(shard) is not None:
            raise ShardSealed(f"shard {shard} of {self.key} in {self.place.url} is sealed: its rows are there already.")
        partial = self.place.partial(self._shard_file(shard))
        return ShardWriter(self.spec, shard, partial, self._publish, environment=environment or {},
                           name_row=self._name_row)  # fmt: skip

    def adopt(self, shard: int) -> Receipt | None:
        """Write the receipt of a whole shard that has none; a shard that does not verify is removed.

        Returns:
            The receipt; None if there is no whole shard.
        """
        try:
            receipt = self.inspect(shard)
        except FileNotFoundError:
            return None
        except CorruptData as error:
            log.warning("removing a shard without a receipt that is not whole: %s", error)
            self.place.delete(self._shard_file(shard))
            return None
        return self._write_receipt(receipt)

    def inspect(self, shard: int, *, from_disk: bool = False) -> Receipt:
        """Read a whole shard and check it against its own checksums; says what its receipt must say.

        Args:
            shard: its number.
            from_disk: read what the disk has, not what memory remembers of it.

        Raises:
            FileNotFoundError: it is not there.
            CorruptData: it is not whole.
        """
        name = self._shard_file(shard)
        path = self.place.local(name)
        if path is not None:
            return self.check_copy(shard, path, from_disk=from_disk)
        size = self.place.size(name)
        if size is None:
            raise FileNotFoundError(f"{self.place.url}/{name}")
        return inspect(PlaceBytes(self.place, name, size), self._format, self.spec, shard)

    def check_copy(self, shard: int, path: Path, *, from_disk: bool = False) -> Receipt:
        """Check a local copy of a shard, as a cache fill does.

        Raises:
            CorruptData: it is not whole.
        """
        fd = os.open(path, os.O_RDONLY)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise CorruptData(f"{path} is no file: it cannot be shard {shard}.")
            return inspect(LocalBytes(path, fd, from_disk=from_disk), self._format, self.spec, shard)
        finally:
            os.close(fd)

    def take_over(self, shard: int, partial: Path) -> Receipt:
        """Publish a whole shard file that was copied from another store, checked first.

        Args:
            shard: its number.
            partial: a flushed local file, from :meth:`~brainenc.featurestore.places.base.Place.partial`.

        Returns:
            Its receipt, or that of whoever was first.

        Raises:
            CorruptData: it is not whole, or not this shard of this collection.
        """
        return self._publish(partial, self.check_copy(shard, partial))

    def commit(self) -> Manifest:
        """Make every sealed shard visible to readers. Of several drivers at once each commits on top of the others."""
        receipts, _ = self.found()
        return commit.advance(self.place, self.key, lambda manifest: self._extended(manifest, receipts)).manifest

    def drop(self, shards: Iterable[int]) -> None:
        """Remove shards, so that they are computed again: committed without them first, then unlinked."""
        gone = frozenset(shards)
        self._commit_without(gone)
        for shard in sorted(gone):
            self.place.delete(layout.receipt_file(self.key, shard))
            self.place.delete(self._shard_file(shard))
        self._commit_without(gone)  # a driver that still saw the receipts may have committed in between

    def recommit(self, shards: Iterable[int]) -> None:
        """Write receipts and manifest anew from whole shards whose papers are wrong."""
        again = frozenset(shards)
        self._commit_without(again)
        for shard in sorted(again):
            self.place.delete(layout.receipt_file(self.key, shard))
            self.adopt(shard)
        self.commit()

    def manifest(self) -> Manifest:
        """What readers see now."""
        current = commit.latest(self.place, self.key)
        return Manifest(spec=self.spec) if current is None else current.manifest

    def view(self) -> FeatureView:
        """The committed rows."""
        from brainenc.featurestore.view import FeatureView

        return FeatureView.open(self.place, self.key, cache=self._cache)

    def shard_name(self, shard: int) -> str:
        """Name of a shard's file in the store."""
        return self._shard_file(shard)

    def __repr__(self) -> str:
        return f"Collection({self.key!r}, {self.n_rows} rows of {self.row_shape} {self.dtype}, in {self.place.url})"

    def __reduce__(self) -> tuple[type[Collection], tuple[Any, ...]]:
        return Collection, (self.place, self.key, self.spec, self._cache)

    def _shard_file(self, shard: int) -> str:
        return layout.shard_file(self.key, shard, self._format.suffix)

    def _name_row(self, row: int) -> str:
        return f"{self.stimuli.ids[row]!r} (row {row} of {self.key})"

    def found(self) -> tuple[frozenset[int], frozenset[int]]:
        """Numbers of the receipts and of the shards that are there."""
        if not self.place.can.fresh_listing:
            return self._probed()
        receipts, shards = self._listed()
        return frozenset(receipts), frozenset(shards)

    def _listed(self) -> tuple[dict[int, int], dict[int, int]]:
        """Number -> bytes of the receipts and of the shards, by one listing."""
        receipts, shards = dict[int, int](), dict[int, int]()
        for entry in self.place.list(layout.shard_prefix(self.key)):
            shard, suffix = layout.shard_number(entry.name) or (-1, "")
            if 0 <= shard < self.n_shards and entry.name == layout.shard_file(self.key, shard, suffix):
                (receipts if suffix == "json" else shards if suffix == self._format.suffix else {})[shard] = entry.size
        return receipts, shards

    def _probed(self) -> tuple[frozenset[int], frozenset[int]]:
        if isinstance(self.place, Refreshing):
            self.place.refresh(self.key)
        every = range(self.n_shards)
        receipts = frozenset(s for s in every if self.place.size(layout.receipt_file(self.key, s)) is not None)
        rest = (s for s in every if s not in receipts)
        return receipts, frozenset(s for s in rest if self.place.size(self._shard_file(s)) is not None)

    def _publish(self, partial: Path, receipt: Receipt) -> Receipt:
        """Publish our copy of a shard, or take the receipt of whoever was first."""
        for _ in range(2):
            if self.place.publish(partial, self._shard_file(receipt.shard)):
                return self._write_receipt(receipt)
            if (theirs := self.receipt_mended(receipt.shard) or self.adopt(receipt.shard)) is not None:
                return theirs
        raise CorruptData(
            f"{self.place.url}/{self._shard_file(receipt.shard)} is not whole and came back when removed."
        )

    def _write_receipt(self, receipt: Receipt) -> Receipt:
        name = layout.receipt_file(self.key, receipt.shard)
        if self.place.create(name, receipt.to_bytes()):
            return receipt
        try:
            return self.receipt(receipt.shard)
        except CorruptData as error:  # ours follows from the shard's bytes, what is in its way does not
            log.warning("replacing a receipt: %s", error)
            self.place.delete(name)
            return receipt if self.place.create(name, receipt.to_bytes()) else self.receipt(receipt.shard)

    def _receipt_or_none(self, shard: int) -> Receipt | None:
        try:
            return self.receipt(shard)
        except FileNotFoundError:
            return None

    def _commit_without(self, gone: frozenset[int]) -> None:
        def without(manifest: Manifest) -> Manifest:
            kept = tuple(entry for entry in manifest.shards if entry.shard not in gone)
            return Manifest(spec=manifest.spec, shards=kept)

        commit.advance(self.place, self.key, without)

    def _extended(self, manifest: Manifest, receipts: Iterable[int]) -> Manifest:
        known = {entry.shard for entry in manifest.shards}
        found = [self.receipt_mended(shard) for shard in receipts if shard not in known]
        new = [ShardEntry.of(receipt) for receipt in found if receipt is not None]
        return Manifest(spec=manifest.spec, shards=_in_order([*manifest.shards, *new]))

    def receipt_mended(self, shard: int) -> Receipt | None:
        """A receipt; one that is broken is made again from its shard, so that a flipped bit in it stops no driver."""
        try:
            return self._receipt_or_none(shard)
        except CorruptData as error:
            log.warning("writing a receipt again: %s", error)
            self.place.delete(layout.receipt_file(self.key, shard))
            return self.adopt(shard)


def _in_order(entries: Sequence[ShardEntry]) -> tuple[ShardEntry, ...]:
    return tuple(sorted(entries, key=lambda entry: entry.shard))
