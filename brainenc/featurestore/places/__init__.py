"""Where stores lie: local folders, mounted drives, object stores."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from brainenc.featurestore.places.base import Capabilities, Entry, Place, ShardCache, check_name

__all__ = ["Capabilities", "Entry", "Place", "ShardCache", "check_name", "open_place"]


def open_place(url: str | Path, *, create: bool = False, stage: bool | None = None) -> Place:
    """Open a folder, mount or fsspec URL.

    Args:
        url: a folder, ``file://`` or any other URL that fsspec knows.
        create: make the folder if it is not there.
        stage: copy whole files instead of writing and mapping in place; None decides by what the folder is on.

    Raises:
        NotAStore: the folder is not there and ``create`` is false.
        PlaceUnfit: the place cannot do what a store needs.
    """
    path = local_path(url)
    if path is None:
        from brainenc.featurestore.places.object import ObjectPlace

        return ObjectPlace.open(str(url), create=create)
    from brainenc.featurestore.places.mount import MountPlace, needs_staging

    if needs_staging(path) if stage is None else stage:
        return MountPlace.open(path, create=create)
    from brainenc.featurestore.places.local import LocalPlace

    return LocalPlace.open(path, create=create)


def local_path(url: str | Path) -> Path | None:
    """The local folder that ``url`` names, or None if it is a remote one. A Windows drive letter is no scheme."""
    if isinstance(url, Path):
        return url
    parts = urlsplit(url)
    if parts.scheme == "file":
        return Path(url2pathname(parts.path))
    if (len(parts.scheme) > 1 and "://" in url) or "::" in url:
        return None
    return Path(url)
