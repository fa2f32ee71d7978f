"""Sharded, memory-mapped, crash-proof store of features.

store = open_store("features", create=True)
view = store["subj01-train/dinov2-base/11.q"]
view.gather([5, 3, 8], out=buffer)
"""

from __future__ import annotations

from brainenc.featurestore.collection import Collection
from brainenc.featurestore.stimuli import Stimulus, StimulusSet
from brainenc.featurestore.store import FeatureStore, open_store
from brainenc.featurestore.view import FeatureView

__all__ = ["Collection", "FeatureStore", "FeatureView", "Stimulus", "StimulusSet", "open_store"]
