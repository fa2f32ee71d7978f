"""Whether the hub of models can be reached; if not, its cache is asked at once instead of after half a minute."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


@contextlib.contextmanager
def cache_only_if_unreachable() -> Iterator[bool]:
    """While the block runs, the hub's client does not ask a hub whose name cannot be resolved; it gives whether so.

    The client would try each file six times over half a minute before it looks into its cache.
    """
    import huggingface_hub.constants as settings

    before = settings.HF_HUB_OFFLINE
    settings.HF_HUB_OFFLINE = before or not _can_be_named(settings.ENDPOINT)
    try:
        yield settings.HF_HUB_OFFLINE
    finally:
        settings.HF_HUB_OFFLINE = before


@functools.cache
def _can_be_named(endpoint: str) -> bool:
    if any(os.environ.get(name) for name in _PROXIES):
        return True  # the proxy knows names that we do not
    address = urlsplit(endpoint)
    try:
        socket.getaddrinfo(address.hostname, address.port or 443)
    except OSError:
        return False
    return True
