"""Rows that other stimulus sets of the store have of the same images: copied instead of computed (``--by-id``).

An image is the same if its id and the hash of its bytes are: the id finds the row, the hash in its receipt decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from brainenc.extract.changes import KnownHashes
from brainenc.extract.features import Feature
from brainenc.featurestore.store import FeatureStore
from brainenc.featurestore.view import FeatureView


@dataclass(frozen=True, slots=True)
class Donation:
    """A row that is there already, in every feature asked for."""

    views: Mapping[Feature, FeatureView]
    row: int

    def read(self, feature: Feature) -> np.ndarray:
        """The row of one feature."""
        return np.asarray(self.views[feature][self.row])


class _Set:
    """One stimulus set that has all the features."""

    def __init__(self, store: FeatureStore, keys: Mapping[Feature, str]) -> None:
        self._views = {feature: store[key] for feature, key in keys.items()}
        some = next(iter(keys.values()))
        self._row_of = store.collection(some).stimuli.row_of
        self._known = KnownHashes([store.collection(some)])
        self._present = np.logical_and.reduce([view.present for view in self._views.values()])

    def find(self, stimulus_id: str, content_hash: str) -> Donation | None:
        row = self._row_of.get(stimulus_id)
        if row is None or not self._present[row] or self._known(row) != content_hash:
            return None
        return Donation(self._views, row)


class Donors:
    """Where rows may be taken from. Worker only; asked by the decoding threads; sees what was committed when made.

    Args:
        store: the store.
        keys: feature -> collections of other stimulus sets, made in exactly the same way.
    """

    def __init__(self, store: FeatureStore, keys: Mapping[Feature, Sequence[str]]) -> None:
        by_set = [{key.split("/")[0]: key for key in found} for found in keys.values()]
        common = sorted(set.intersection(*map(set, by_set))) if by_set else []
        there = [name for name in common if all(known[name] in store for known in by_set)]
        self._sets = [_Set(store, {f: known[name] for f, known in zip(keys, by_set, strict=True)}) for name in there]

    def find(self, stimulus_id: str, content_hash: str) -> Donation | None:
        """The row of this very image, if any set has it in all features."""
        found = (one.find(stimulus_id, content_hash) for one in self._sets)
        return next((donation for donation in found if donation is not None), None)
