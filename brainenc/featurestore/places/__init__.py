"""Where stores lie: local folders, mounted drives, object stores."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from brainenc.featurestore.places.base import Capabilities, Entry, Place, ShardCache, check_name

__all__ = ["Capabilities", "Entry", "Place", "ShardCache", "check_name", "is_staged", "may_be_mapped", "open_place"]


def open_place(url: str | Path, *, create: bool = False, stage: bool | None = None) -> Place:
    """Open a folder, mount or fsspec URL.

    Args:
        url: a folder, ``file://`` or any other URL that fsspec knows.
        create: make the folder if it is not there.
        stage: copy whole files instead of writing and mapping in place; None: see :func:`is_staged`. What is chosen
            for a folder that is made or written to holds for those who open it later without a choice.

    Raises:
        NotAStore: the folder is not there and ``create`` is false.
        PlaceUnfit: the place cannot do what a store needs.
    """
    path = local_path(url)
    if path is None:
        from brainenc.featurestore.places.object import ObjectPlace

        return ObjectPlace.open(str(url), create=create)
    if is_staged(path, stage):
        from brainenc.featurestore.places.mount import STAGED_MARK, MountPlace, needs_staging

        place = MountPlace.open(path, create=create)
        if create and not needs_staging(path):
            (path / STAGED_MARK).touch()
        return place
    from brainenc.featurestore.places.local import LocalPlace

    return LocalPlace.open(path, create=create)


def is_staged(url: str | Path, stage: bool | None = None) -> bool:
    """Whether a place gets whole copies that count as handed over, and is never mapped.

    Args:
        url: a folder or URL.
        stage: what was chosen for a folder; None: if it is on a mount without a real flush, or was written as one.
    """
    path = local_path(url)
    if path is None:
        return False
    from brainenc.featurestore.places.mount import STAGED_MARK, needs_staging

    return (needs_staging(path) or (path / STAGED_MARK).exists()) if stage is None else stage


def may_be_mapped(folder: Path) -> bool:
    """Whether files of a folder may be memory-mapped: not on a network file system, nor on a FUSE mount.

    There an I/O error under a map (a server that is gone, a file that another machine removed) kills the process.
    """
    from brainenc.featurestore.places.mount import needs_staging
    from brainenc.mounts import network_file_system

    return network_file_system(folder) is None and not needs_staging(folder)


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
