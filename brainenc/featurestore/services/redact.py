"""Addresses and messages without credentials.

fsspec takes keys inside URLs (``s3://KEY:SECRET@bucket``), signed URLs carry them in the query, and clients quote
both in their errors. Whatever leaves this package as text goes through :func:`redact`.
"""

from __future__ import annotations

import re

_USERINFO = re.compile(r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]*://)[^/\s@]+@")
_QUERY = re.compile(
    r"(?P<key>[?&;](?:[A-Za-z-]*(?:signature|credential|token|secret|password|key|sig|auth))=)[^&;\s'\"]+",
    re.IGNORECASE,
)
_HEADER = re.compile(r"(?P<key>\b(?:Bearer|Basic|AWS4-HMAC-SHA256)\s+)[^\s'\",;]+", re.IGNORECASE)
_PAIR = re.compile(
    r"(?P<key>['\"]?\b(?:aws_)?(?:secret(?:_access)?(?:_key)?|private_key|refresh_token|access_token|password)\b['\"]?\s*[:=]\s*)"
    r"(?:'[^']*'|\"[^\"]*\"|[^\s,}]+)",
    re.IGNORECASE,
)
_HIDDEN = r"\g<key>***"


def redact(text: str) -> str:
    """``"s3://AKIA:secret@bucket/x?token=1"`` -> ``"s3://bucket/x?token=***"``; also in the middle of a message."""
    text = _USERINFO.sub(r"\g<scheme>", text)
    for pattern in (_QUERY, _HEADER, _PAIR):
        text = pattern.sub(_HIDDEN, text)
    return text
