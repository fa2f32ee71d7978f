"""Local disk for what is on its way to a place that cannot be written in place: partials, verified copies."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from brainenc.atomic import partial_name


def cache_root() -> Path:
    """The local folder for everything that may be made again: ``$BRAINENC_CACHE``, else ``~/.cache/brainenc``.

    On a cluster set the variable to a disk of the node: a home folder is often on the network.
    """
    chosen = os.environ.get("BRAINENC_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "brainenc"


class Scratch:
    """Partials of one remote place, below a folder named by the hash of its address."""

    def __init__(self, url: str) -> None:
        self.folder = cache_root() / "partials" / hashlib.sha256(url.encode()).hexdigest()[:16]

    def partial(self, name: str) -> Path:
        """A path that no other writer uses, in a folder that exists."""
        path = partial_name(self.folder / name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def partials(self, prefix: str = "") -> Iterator[Path]:
        """All partials whose final names would begin with ``prefix``, of writers dead or alive."""
        for path in sorted(self.folder.glob("**/.*.partial")):
            final = path.parent / path.name[1:].rsplit(".", 2)[0]
            if final.relative_to(self.folder).as_posix().startswith(prefix):
                yield path
