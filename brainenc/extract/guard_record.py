"""Where the guard's record of extractions lies: who was short of memory, when, and what was done about it."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from brainenc.featurestore.places.scratch import cache_root
from brainenc.redact import redact


def guard_folder(store: str) -> Path:
    """The folder with ``guard.jsonl`` and the accounts of incidents of all extractions into a store from this machine,
    and with their figures (``metrics.jsonl``).

    Beside the caches, not in the store: that holds features alone, the same bytes whatever happened on the way, and
    may lie where nothing can be appended to.

    Args:
        store: folder or URL.
    """
    where = redact(store.rstrip("/")) if "://" in store else str(Path(store).expanduser().absolute())
    slug = re.sub(r"\W+", "-", where.rpartition("/")[2]).strip("-")[:40] or "store"
    return cache_root() / "guard" / f"{slug}-{hashlib.sha256(where.encode()).hexdigest()[:12]}"
