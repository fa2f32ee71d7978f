"""The store: open it, list it, add to it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from brainenc.errors import KeyNotFound, NotAStore, StimuliChanged, UnknownName, UsageError
from brainenc.featurestore import commit, layout
from brainenc.featurestore.collection import Collection
from brainenc.featurestore.documents import canonical, read_document, write_document
from brainenc.featurestore.dtypes import logical_dtype
from brainenc.featurestore.external import ExternalWriter
from brainenc.featurestore.formats import shard_format
from brainenc.featurestore.joined import JoinedView
from brainenc.featurestore.places import Place, ShardCache, open_place
from brainenc.featurestore.schema import CollectionSpec
from brainenc.featurestore.stimuli import StimulusSet
from brainenc.featurestore.view import FeatureView
from brainenc.units import parse_bytes


def open_store(
    url: str | Path, *, create: bool = False, stage: bool | None = None,
    cache_dir: Path | None = None, cache_bytes: int | str | None = None,
) -> FeatureStore:  # fmt: skip
    """Open a feature store.

    Args:
        url: a folder, or any URL that fsspec knows (``gs://lab/features``).
        create: make it if it is not there.
        stage: copy whole shards instead of mapping them in place; None decides by what the folder is on.
        cache_dir: where local copies of remote shards go; None: the user's cache folder.
        cache_bytes: what they may take together, ``"20GB"``; None: a share of the free disk; 0: none, read by ranges.

    Raises:
        NotAStore: there is none, or one of a newer version.
        PlaceUnfit: the place cannot do what a store needs.
        UsageError: ``cache_bytes`` is no size.
    """
    budget = None if cache_bytes is None else parse_bytes(cache_bytes)  # also where no cache will be
    place = open_place(url, create=create, stage=stage)
    if create:
        place.create(layout.STORE_FILE, _STORE)
    try:
        found = place.read(layout.STORE_FILE)
    except FileNotFoundError as error:
        raise NotAStore(f"{place.url} is no feature store: it has no {layout.STORE_FILE}.") from error
    read_document("store", found, f"{place.url}/{layout.STORE_FILE}")
    in_place = place.can.mappable or place.can.readable
    return FeatureStore(place, None if in_place else _open_cache(cache_dir, budget))


_STORE = write_document("store", {})


def _open_cache(directory: Path | None, budget: int | None) -> ShardCache | None:
    from brainenc.featurestore.cache import DiskCache

    return None if budget == 0 else DiskCache(directory, budget)


class FeatureStore:
    """Features by key. Pickles as its address.

    Args:
        place: where it lies.
        cache: whole-shard copies, where the place cannot be mapped; None reads those by ranges.
    """

    def __init__(self, place: Place, cache: ShardCache | None = None) -> None:
        self.place, self.cache = place, cache

    @property
    def url(self) -> str:
        """The address, without credentials."""
        return self.place.url

    def keys(self) -> list[str]:
        """All collections."""
        return list(self)

    def __iter__(self) -> Iterator[str]:
        return (key for key in self.folders() if key in self)

    def folders(self) -> Iterator[str]:
        """Names of the folders in which collections lie or might."""
        for stimuli in self.place.folders():
            for backbone in self.place.folders(f"{stimuli}/"):
                for feature in self.place.folders(f"{stimuli}/{backbone}/"):
                    if _is_key(f"{stimuli}/{backbone}/{feature}"):
                        yield f"{stimuli}/{backbone}/{feature}"

    def __contains__(self, key: str) -> bool:
        first = self.place.size(layout.manifest_file(key, 1)) is not None
        return first or bool(commit.numbers(self.place, key))  # one that lost its first manifest is not gone

    def __getitem__(self, key: str) -> FeatureView:
        """The committed rows of a collection.

        Raises:
            KeyNotFound: there is no such collection.
        """
        return self.collection(key).view()

    def stimuli_names(self) -> list[str]:
        """All stimulus sets."""
        return [name for name in self.place.folders() if self.place.size(layout.stimuli_file(name)) is not None]

    def stimuli(self, name: str) -> StimulusSet:
        """A stimulus set.

        Raises:
            UnknownName: there is none of this name.
        """
        file = layout.stimuli_file(layout.check_stimuli_name(name))
        try:
            return StimulusSet.from_arrow(self.place.read(file), f"{self.url}/{file}")
        except FileNotFoundError:
            raise UnknownName("stimulus set", name, self.stimuli_names(), self.url) from None

    def add_stimuli(self, stimuli: StimulusSet) -> StimulusSet:
        """Record a stimulus set, once for all; of addresses that hold keys or signatures, what remains without.

        Returns:
            The set that the store has under this name.

        Raises:
            StimuliChanged: it has another one.
        """
        stimuli = stimuli.without_credentials()
        if self.place.create(layout.stimuli_file(stimuli.name), stimuli.to_arrow()):
            return stimuli
        stored = self.stimuli(stimuli.name)
        if difference := stored.difference(stimuli):
            raise StimuliChanged(
                f"the stimulus set {stimuli.name!r} of {self.url} has other images: {difference}. A set never "
                "changes; give the new one another name (--stimuli), rows of the same ids can be taken over."
            )
        return stored

    def create_collection(
        self, key: str, *, identity: Mapping[str, Any], rows_per_shard: int, row_shape: tuple[int, ...], dtype: str,
        format: str = "arrow", details: Mapping[str, Any] | None = None, allow_64bit: bool = False,
    ) -> Collection:  # fmt: skip
        """Create a collection, or open it and compare. Its stimulus set must be there.

        Rows per shard, format and details are those of whoever was first: take them from what is returned.

        Args:
            key: ``<stimuli>/<backbone>/<layer>.<facet>``.
            identity: what makes these features these features; plain JSON.
            rows_per_shard: rows of every shard but the last.
            row_shape: shape of one row.
            dtype: ``"float16"``, ``"float32"`` or ``"bfloat16"``.
            format: ``"arrow"`` or ``"npy"``.
            details: what readers want to know beside, not compared.
            allow_64bit: allow more than 2^31 values in a shard.

        Raises:
            ProvenanceMismatch: it is there, made in another way; names both sides.
        """
        stimuli = self.stimuli(layout.parse_key(key).stimuli)
        logical_dtype(dtype)
        shard_format(format)
        spec = CollectionSpec(
            identity=_plain(identity), row_shape=tuple(int(n) for n in row_shape), dtype=dtype, n_rows=len(stimuli),
            stimuli=stimuli.name, stimuli_checksum=stimuli.checksum, rows_per_shard=int(rows_per_shard),
            format=format, allow_64bit=allow_64bit, details=_plain(details or {}),
        )  # fmt: skip
        return Collection.create(self.place, key, spec, self.cache)

    def collection(self, key: str) -> Collection:
        """A collection to write to, or to look into.

        Raises:
            KeyNotFound: there is no such collection.
        """
        found = Collection.open(self.place, str(layout.parse_key(key)), self.cache)
        if found is None:
            raise KeyNotFound(key, self.url, self.keys())
        return found

    def join(
        self, feature: str, *, ids: Iterable[str] | None = None, stimuli: Iterable[str] | None = None
    ) -> JoinedView:
        """One feature of several stimulus sets, read as one by stimulus id.

        Args:
            feature: ``<backbone>/<layer>.<facet>``.
            ids: stimuli in the order wanted; None: all there are.
            stimuli: the sets to look in, in this order; None: all that have the feature.

        Raises:
            KeyNotFound: no set has this feature, or one that was named has not.
            UnknownName: no set has an id.
            ProvenanceMismatch: the sets' features were not made in the same way.
        """
        names = [name for name in self.place.folders() if f"{name}/{feature}" in self] if stimuli is None else stimuli
        parts = [self[f"{name}/{feature}"] for name in names]
        if not parts:
            raise KeyNotFound(feature, self.url, self.keys())
        return JoinedView.of(parts, ids)

    def writer(
        self, key: str, *, ids: Iterable[str], row_shape: tuple[int, ...], dtype: str = "float16",
        identity: Mapping[str, Any] | None = None, details: Mapping[str, Any] | None = None,
        rows_per_shard: int | None = None, format: str = "arrow", environment: Mapping[str, Any] | None = None,
    ) -> ExternalWriter:  # fmt: skip
        """A writer for features made elsewhere: a context manager with ``append(batch)``, rows in the order of ``ids``.

        All rows must come, in batches of any size; what an earlier, interrupted run sealed is not written again.
        Leaving the context without an error seals what is whole and commits.

        Args:
            key: ``<stimuli>/<name>/<layer>.<facet>``; the stimulus set is made from the ids.
            ids: stimulus ids in the order of rows.
            row_shape: shape of one row.
            dtype: storage dtype.
            identity: what else should be compared when it is written to again.
            details: what readers want to know.
            rows_per_shard: None: shards of about 256 MiB.
            format: ``"arrow"`` or ``"npy"``.
            environment: recorded with every shard.
        """
        stimuli = self.add_stimuli(StimulusSet.from_ids(layout.parse_key(key).stimuli, ids))
        row = CollectionSpec(identity={}, row_shape=tuple(row_shape), dtype=dtype, n_rows=len(stimuli), format=format,
                             stimuli=stimuli.name, stimuli_checksum="", rows_per_shard=1).shard(0)  # fmt: skip
        collection = self.create_collection(
            key, identity={"source": "made elsewhere", **(identity or {})}, row_shape=row_shape, dtype=dtype,
            rows_per_shard=rows_per_shard or max(1, _SHARD_BYTES // row.row_bytes), format=format, details=details,
        )  # fmt: skip
        return ExternalWriter(collection, environment or {})

    def to_ray(self, key: str, *, rows_per_block: int | None = None) -> Any:
        """A collection as a ``ray.data.Dataset`` of ``id``, ``row`` and ``features``; see ``interop.to_ray``."""
        from brainenc.featurestore.interop import to_ray

        return to_ray(self[key], rows_per_block=rows_per_block)

    def __repr__(self) -> str:
        return f"FeatureStore({self.url!r})"

    def __reduce__(self) -> tuple[type[FeatureStore], tuple[Any, ...]]:
        return FeatureStore, (self.place, self.cache)


_SHARD_BYTES = 256 << 20


def _is_key(text: str) -> bool:
    try:
        layout.parse_key(text)
    except UsageError:
        return False
    return True


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """As it will be read back: tuples are lists in JSON, and numbers as keys are text."""
    return dict(json.loads(canonical(fields)))
