"""What planning asks of a backbone, and a kept copy of the answers.

A repeat of a finished extraction has to know which collections it is about, and that they were made in the same way; no
model needs to be loaded for that, which takes longer than everything else a repeat does. So the answers are kept in the
local cache, under everything that they follow from: what was asked for, the files that the backbone is loaded from (by
size and time of change), the versions of the libraries, our own code. They only ever show that nothing is left to do:
before anything is computed, the backbone is loaded and asked again.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from brainenc.atomic import replace
from brainenc.errors import BrainencError
from brainenc.extract.config import ExtractConfig
from brainenc.extract.devices import library_version
from brainenc.extract.features import Feature
from brainenc.extract.presets import find_preset, names_preset
from brainenc.featurestore.checksums import digest
from brainenc.featurestore.documents import UNREADABLE, canonical, read_document, write_document
from brainenc.featurestore.places.scratch import cache_root

if TYPE_CHECKING:
    from brainenc.extract.backbone import Backbone

_KIND = "backbone description"
_LIBRARIES = ("torch", "torchvision", "transformers", "open_clip_torch", "timm", "pillow", "brainenc")
_MOST_FILES = 1000
"""A folder with more is no backbone's."""


class NotKept(Exception):
    """A question that nobody asked before. Never leaves this package."""


class Description:
    """Answers about one backbone; each is noted, so that all of them can be kept.

    Args:
        load: gives the backbone itself, at the first question whose answer is not in ``notes``.
        notes: answers from before, by question.
    """

    def __init__(self, load: Callable[[], Backbone], notes: dict[str, Any] | None = None) -> None:
        self.notes = notes or {}
        self._load = load
        self._loaded: Backbone | None = None

    @property
    def backbone(self) -> Backbone:
        """The backbone, loaded now if it is not yet."""
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    @property
    def slug(self) -> str:
        """What its collections are filed under."""
        return str(self._answer("slug", lambda: self.backbone.info.slug))

    @property
    def weights_hash(self) -> str:
        """One hash for all its weights."""
        return str(self._answer("weights", lambda: self.backbone.info.weights_hash))

    def features(self, texts: Sequence[str]) -> list[Feature]:
        """As :func:`~brainenc.extract.backbone.parse_features`."""

        def resolve() -> list[str]:
            from brainenc.extract.backbone import parse_features

            return [str(feature) for feature in parse_features(texts, self.backbone.info)]

        return [Feature.parse(text) for text in self._answer(f"features {json.dumps(list(texts))}", resolve)]

    def input_shape(self, image_shape: tuple[int, int]) -> tuple[int, int]:
        """As the backbone's."""
        height, width = self._answer(f"input {image_shape}", lambda: list(self.backbone.input_shape(image_shape)))
        return int(height), int(width)

    def row_shape(self, feature: Feature, image_shape: tuple[int, int]) -> tuple[int, ...]:
        """As the backbone's."""
        found = self._answer(
            f"rows {feature} {image_shape}", lambda: list(self.backbone.row_shape(feature, image_shape))
        )
        return tuple(map(int, found))

    def details(self, feature: Feature, image_shape: tuple[int, int]) -> dict[str, Any]:
        """As the backbone's."""
        return dict(
            self._answer(f"details {feature} {image_shape}", lambda: self.backbone.details(feature, image_shape))
        )

    def identity(self, feature: Feature) -> dict[str, Any]:
        """As the backbone's."""
        return dict(self._answer(f"identity {feature}", lambda: self.backbone.identity(feature)))

    def _answer(self, question: str, ask: Callable[[], Any]) -> Any:
        if question not in self.notes:
            self.notes[question] = ask()
        return self.notes[question]


def loaded(config: ExtractConfig) -> Description:
    """A description that loads the backbone when it is asked.

    Raises (when asked):
        UnknownName, UsageError: as :func:`~brainenc.extract.backbone.load_backbone`.
    """

    def load() -> Backbone:
        from brainenc.extract.backbone import load_backbone

        backbone = load_backbone(
            config.backbone, slug=config.slug, size_policy=config.size_policy, image_size=config.image_size
        )
        return backbone.to("cpu", config.compute)

    return Description(load)


def kept(config: ExtractConfig) -> Description | None:
    """What an earlier run has kept, if nothing that it follows from has changed since; raises ``NotKept`` when asked
    for more. None: nothing."""
    asked = _asked(config)
    if asked is None:
        return None
    path = _path(asked)
    try:
        document = read_document(_KIND, path.read_bytes(), str(path))
        if document["asked"] != asked:
            return None
        return Description(_not_kept, dict(document["notes"]))
    except (OSError, BrainencError, *UNREADABLE):  # a cache: what cannot be read is made again
        return None


def keep(config: ExtractConfig, description: Description) -> None:
    """Keep the answers for the next run. A cache: where it cannot be written, the next run loads the backbone."""
    asked = _asked(config)
    if asked is None:
        return
    path = _path(asked)
    _ = description.weights_hash  # a first run has nothing to compare it with; the next one has
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, write_document(_KIND, {"asked": asked, "notes": description.notes}))


def backbone_files(name: str) -> list[Path] | None:
    """The local files that this backbone is made of, in order; None where only its library could tell.

    Args:
        name: as :func:`~brainenc.extract.backbone.load_backbone` takes it.
    """
    if names_preset(name) and not Path(name).is_dir():
        return backbone_files(find_preset(name).backbone)
    prefix, colon, rest = name.partition(":")
    if colon and prefix in ("open_clip", "timm", "torchvision"):
        path = Path(rest.removeprefix("local-dir:") if rest.startswith("local-dir:") else rest.partition("/")[2])
        return _files_below(path) if path.name else None
    path = Path(rest if colon and prefix == "transformers" else name)
    if path.exists():
        return _files_below(path)
    return _snapshot(str(path))


def _files_below(path: Path) -> list[Path] | None:
    if path.is_file():
        return [path]
    found = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else []
    return found if 0 < len(found) <= _MOST_FILES else None


def _snapshot(hub_id: str) -> list[Path] | None:
    """Files of a hub id in the hub's cache, as its own page of the layout describes it."""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    try:
        revision = (repository / "refs" / "main").read_text().strip()
    except OSError:
        return None
    return _files_below(repository / "snapshots" / revision) if revision and "/" not in revision else None


def _asked(config: ExtractConfig) -> dict[str, Any] | None:
    """Everything that the answers follow from; None if that cannot be told."""
    files = backbone_files(config.backbone)
    if files is None:
        return None
    try:
        return {
            "backbone": config.backbone, "slug": config.slug, "size_policy": config.size_policy,
            "image_size": config.image_size, "compute": config.compute, "folder": os.getcwd(),
            "files": digest(canonical({"files": list(_stamps(files))})),
            "code": digest(canonical({"files": list(_stamps(sorted(Path(__file__).parent.rglob("*.py"))))})),
            "libraries": [f"{name} {library_version(name)}" for name in _LIBRARIES],
        }  # fmt: skip
    except OSError:  # a file that vanished between two looks
        return None


def _stamps(files: Sequence[Path]) -> Iterator[list[Any]]:
    for file in files:
        stat = file.stat()
        yield [str(file), stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _path(asked: dict[str, Any]) -> Path:
    """One file for each thing asked for; a changed backbone takes the place of the old one."""
    what = {k: asked[k] for k in ("backbone", "slug", "size_policy", "image_size", "compute", "folder")}
    return cache_root() / "backbones" / f"{digest(canonical(what))}.json"


def _not_kept() -> Backbone:
    raise NotKept
