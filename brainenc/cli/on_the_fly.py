"""Features computed while training, without a store: extraction and training do not know each other, and meet here."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from brainenc.datasets.algonauts import Subject
from brainenc.errors import UsageError

_CHUNK = 8
"""Images in one forward pass of the backbone, as in extraction on a CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OnTheFly:
    """Opens views that run a backbone. Pickles as names: each worker loads its own copy of the weights."""

    subject_dir: str
    backbone: str
    features: tuple[str, ...]
    """``-1.q``, as for extraction."""
    size_policy: str | None = None
    image_size: int | None = None

    def __call__(self, split: Literal["train", "test"]) -> list[ComputedView]:
        """One view a feature; they share the backbone and each batch's forward pass."""
        engine = _Engine(self, split)
        return [ComputedView(engine, number) for number in range(len(engine.resolved))]

    def names(self) -> list[str]:
        """``dinov2-base/11.q`` for each feature: the names that a store would have."""
        return _Engine(self, "train").names


class ComputedView:
    """Rows of one feature, computed when they are gathered. Used by the loader's thread alone."""

    def __init__(self, engine: _Engine, number: int) -> None:
        self._engine, self._number = engine, number

    @property
    def shape(self) -> tuple[int, ...]:
        """(images, *row_shape)."""
        return (len(self._engine.images), *self._engine.row_shape(self._number))

    @property
    def dtype(self) -> np.dtype[Any]:
        """float32: nothing is rounded on the way."""
        return np.dtype(np.float32)

    @property
    def ids(self) -> Sequence[str]:
        """Stimulus id of each image."""
        return self._engine.ids

    @property
    def details(self) -> Mapping[str, Any]:
        """``n_prefix``, ``grid``."""
        return self._engine.details(self._number)

    @property
    def identity(self) -> Mapping[str, Any]:
        """As a store would record it."""
        return self._engine.identity(self._number)

    def gather(self, indices: Any, out: Any = None) -> npt.NDArray[Any]:
        """Run the backbone on these images, once for all features."""
        rows = self._engine.rows([int(i) for i in indices])[self._number]
        if out is None:
            return rows
        out[...] = rows
        result: npt.NDArray[Any] = out
        return result

    def prefetch(self, indices: Any) -> None:
        """The loader is ahead of the step already."""

    def release(self) -> None:
        """There is no map."""


class _Engine:
    """The backbone, and the features of the last batch."""

    def __init__(self, source: OnTheFly, split: Literal["train", "test"]) -> None:
        subject = Subject.open(source.subject_dir)
        self._source = source
        self.images: list[Path] = subject.images(split)
        self.ids = subject.ids(split)
        self._lock = threading.Lock()
        self._last: tuple[tuple[int, ...], list[npt.NDArray[np.float32]]] | None = None

    @cached_property
    def backbone(self) -> Any:
        """Loaded when it is first needed."""
        import torch

        from brainenc.extract.backbone import load_backbone

        loaded = load_backbone(
            self._source.backbone, size_policy=self._source.size_policy, image_size=self._source.image_size
        )
        if torch.cuda.is_available():
            loaded.to(torch.device("cuda"))
        return loaded

    @cached_property
    def resolved(self) -> list[Any]:
        from brainenc.extract.backbone import parse_features

        return parse_features(self._source.features, self.backbone.info)

    @property
    def names(self) -> list[str]:
        return [f"{self.backbone.info.slug}/{feature}" for feature in self.resolved]

    @cached_property
    def _image_shape(self) -> tuple[int, int]:
        from brainenc.extract.images import open_image

        image = open_image(self.images[0])
        return image.height, image.width

    def row_shape(self, number: int) -> tuple[int, ...]:
        shape: tuple[int, ...] = self.backbone.row_shape(self.resolved[number], self._image_shape)
        return shape

    def details(self, number: int) -> dict[str, Any]:
        details: dict[str, Any] = self.backbone.details(self.resolved[number], self._image_shape)
        return details

    def identity(self, number: int) -> dict[str, Any]:
        identity: dict[str, Any] = self.backbone.identity(self.resolved[number])
        return identity

    def rows(self, numbers: list[int]) -> list[npt.NDArray[np.float32]]:
        """Rows of every feature for these images."""
        with self._lock:
            if self._last is None or self._last[0] != tuple(numbers):
                chunks = [self._compute(numbers[i : i + _CHUNK]) for i in range(0, len(numbers), _CHUNK)]
                self._last = (tuple(numbers), [np.concatenate(parts) for parts in zip(*chunks, strict=True)])
            return self._last[1]

    def _compute(self, numbers: list[int]) -> list[npt.NDArray[np.float32]]:
        import torch

        from brainenc.extract.images import open_image

        with torch.inference_mode():
            batch = torch.stack([self.backbone.preprocess(open_image(self.images[i])) for i in numbers])
            found = self.backbone.forward(batch, self.resolved)
            return [found[feature].float().cpu().numpy() for feature in self.resolved]


def views_of(subject_dir: str, source: Mapping[str, Any]) -> OnTheFly:
    """What computes the features that the options of ``train`` mean, as a run keeps them in ``source``.

    Raises:
        UsageError: options that go together were not all given.
        UnknownName: as for :func:`on_the_fly`.
    """
    backbone = source.get("preset") or source.get("backbone")
    if not source.get("on_the_fly") or not backbone:
        raise UsageError("--on-the-fly and --backbone (or --preset) go together; with a --store neither is needed.")
    return on_the_fly(
        subject_dir, backbone, source.get("features", ()),
        size_policy=source.get("size_policy"), image_size=source.get("image_size"),
    )  # fmt: skip


def views_of_run(run: str | Path, subject_dir: str | None = None) -> OnTheFly | None:
    """What computes the features of a run, as they were computed when it was trained; None: they lie in a store.

    Args:
        run: its folder, a local one.
        subject_dir: where the subject lies now; where the run had it when None.

    Raises:
        UsageError: no run there.
    """
    from brainenc.train.run_folder import RunFolder

    config = RunFolder(Path(run).absolute()).config()
    return views_of(subject_dir or config.subject_dir, config.source) if config.source else None


def on_the_fly(
    subject_dir: str, backbone: str, features: Sequence[str], *, size_policy: str | None, image_size: int | None
) -> OnTheFly:
    """Check names and make the source.

    Raises:
        UsageError: no feature was named.
        UnknownName: no such backbone, layer or facet.
    """
    from brainenc.extract.presets import find_preset, names_preset

    wanted = tuple(features) or ((find_preset(backbone).feature,) if names_preset(backbone) else ())
    if not wanted:
        raise UsageError("--on-the-fly needs --feature LAYER.FACET, for example --feature -1.q.")
    return OnTheFly(
        subject_dir=subject_dir, backbone=backbone, features=wanted, size_policy=size_policy, image_size=image_size
    )
