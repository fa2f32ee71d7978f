"""Addresses and messages without credentials.

fsspec takes keys inside URLs (``s3://KEY:SECRET@bucket``), signed URLs carry them in the query, and clients quote
both in their errors. Whatever leaves this package as text goes through :func:`redact` (text), :func:`redacted` (values
that hold text) or :func:`bare_address` (addresses that are kept: the same tomorrow, when the signature is another).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"

# User information: up to the last "@" before the path; after a "user:" up to any "@", because secret keys hold slashes
# that people forget to escape. A port is no password.
_USERINFO = re.compile(
    r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]*://)"
    r"(?:[^/?#\s:@\"<>]*:(?!\d{1,5}/)[^\s@\"<>]*@)?(?:[^/?#\s\"<>]*@)?"
)
# The same where a path was made of the URL, which leaves one slash.
_FLAT_USERINFO = re.compile(
    r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]+:/)[^/?#\s:@\"<>]*:(?!\d{1,5}/)[^\s@\"<>]*@(?:[^/?#\s\"<>]*@)?"
)
_BRICK = r"::imgBrick\["  # what follows an address that names a row of an HDF5 file
_VALUE = rf"(?:(?!{_BRICK})[^&;\s'\"<>])+"
# Beside these words a name may hold others: X-Amz-Security-Token, aws_secret_access_key, AWSAccessKeyId, api_key.
_SECRET_NAME = (
    r"[\w.-]*(?:signature|credentials?|token|secret|passw(?:or)?d|passphrase|pwd|key|key-?(?:pair-?)?id|accessid|sig"
    r"|auth|authorization|jwt|policy)"
)
_QUERY = re.compile(rf"(?P<key>[?&;#]{_SECRET_NAME}=){_VALUE}", re.IGNORECASE)
# Without a question mark before it only names that mean nothing else.
_BARE = re.compile(
    rf"(?P<key>(?<![\w.-])(?:x-(?:amz|goog)-)?(?:signature|credential|sig|security-token|(?:access|refresh|id)_token"
    rf"|token)=){_VALUE}",
    re.IGNORECASE,
)
_HEADER = re.compile(
    r"(?P<key>\bAuthorization['\"]?\s*[:=]\s*['\"]?)(?:\w[\w-]*\s+)?[^\s'\",;]+|(?P<scheme>\bBearer\s+)[^\s'\",;]+",
    re.IGNORECASE,
)
_PAIR = re.compile(
    r"(?P<key>['\"]?(?<![\w.-])(?:[\w-]*[_-])?(?:secret(?:[_-]?access)?(?:[_-]?key)?|private[_-]key|api[_-]?key"
    r"|(?:refresh|access|session|security)[_-]?token|password|passwd)['\"]?\s*[:=]\s*)"
    r"(?:'[^']*'|\"(?:[^\"\\]|\\.)*\"|[^\s,;&}'\"]+)",
    re.IGNORECASE,
)
_SHAPES = re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|gh[opsur]_[A-Za-z0-9]{16,}|ya29\.[\w-]{8,})")

# What comes and goes with a signature: when it was made, for how long, by whom, of what.
_SIGNING = re.compile(
    rf"(?:{_SECRET_NAME}|x-(?:amz|goog)-[\w-]+|expires|googleaccessid|sv|ss|srt|sp|se|st|spr|sr|si|sip|sdd|scid|sk[\w]+)",
    re.IGNORECASE,
)
_SIGNED = re.compile(_SECRET_NAME, re.IGNORECASE)


def redact(text: str) -> str:
    """``"s3://AKIA:secret@bucket/x?token=1"`` -> ``"s3://bucket/x?token=***"``; also in the middle of a message.

    Redacting again changes nothing: what one pass leaves of addresses that run into one another may look like another
    address with a user in it, so passes are made until one finds nothing. Each shortens the text, or hides a value.
    """
    while (shown := _pass_over(text)) != text:
        text = shown
    return text


def _pass_over(text: str) -> str:
    for pattern in (_USERINFO, _FLAT_USERINFO):
        text = pattern.sub(r"\g<scheme>", text)
    text = _HEADER.sub(lambda found: f"{found['key'] or found['scheme']}{HIDDEN}", text)
    for pattern in (_QUERY, _BARE, _PAIR):
        text = pattern.sub(rf"\g<key>{HIDDEN}", text)
    return _SHAPES.sub(HIDDEN, text)


def redacted(value: Any) -> Any:
    """A value with every text in it redacted: keys and values of mappings, members of lists and tuples."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {redacted(key): redacted(inner) for key, inner in value.items()}
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(map(redacted, value))
    return value


def bare_address(address: str) -> str:
    """An address without user information, signature and what goes with it: what is kept, and compared another day.

    ``"https://h/a.png?v=2&X-Amz-Date=1&X-Amz-Signature=2"`` -> ``"https://h/a.png?v=2"``. Paths stay as they are.
    """
    if "://" not in address:
        return address
    address, brick, row = address.partition("::imgBrick[")
    address = _USERINFO.sub(r"\g<scheme>", address)
    address, mark, query = address.partition("?")
    if mark:
        query, hash_, fragment = query.partition("#")
        parts = re.split("[&;]", query)
        names = [part.partition("=")[0] for part in parts]
        if any(_SIGNED.fullmatch(name) for name in names):
            parts = [part for part, name in zip(parts, names, strict=True) if not _SIGNING.fullmatch(name)]
            query = "&".join(parts)
        query += hash_ + fragment
    return redact(address + (f"?{query}" if query else "")) + brick + row
