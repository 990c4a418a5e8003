"""Session tokens that clients cannot make up: which endpoint a session is bound to, signed.

    base64url(namespace/name) "." base64url(HMAC-SHA256(secret, namespace/name), first 16 bytes)

The reference's token is base64 of ``namespace/name`` alone, so any client can choose its model server. Ours can still
be read by whoever holds it; it cannot be made.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Sequence

MAX_TOKEN_CHARS = 512
MAX_KEY_BYTES = 320
"""A Kubernetes namespace (63) and name (253) with a slash between fit."""

MAC_BYTES = 16
MIN_SECRET_BYTES = 16
MAX_SECRETS = 16
DOMAIN = b"llmd-sched session token 1\0"
"""Keeps a signature made for something else with the same secret from passing here."""


def secrets_of(text: str) -> tuple[bytes, ...]:
    """The secrets of a file, one a line: the first signs, all verify, so a new one goes on top and the old one stays
    below until its sessions are over. Raises ValueError."""
    secrets = tuple(line.strip().encode() for line in text.splitlines() if line.strip())
    if not 1 <= len(secrets) <= MAX_SECRETS:
        raise ValueError(f"{len(secrets)} session secrets; 1 to {MAX_SECRETS} are accepted, one a line")
    short = next((i for i, secret in enumerate(secrets) if len(secret) < MIN_SECRET_BYTES), None)
    if short is not None:
        raise ValueError(f"session secret {short + 1} is shorter than {MIN_SECRET_BYTES} bytes")
    return secrets


def sign(endpoint_key: str, secret: bytes) -> str:
    """The token of ``namespace/name``. Raises ValueError beyond MAX_KEY_BYTES."""
    key = endpoint_key.encode()
    if len(key) > MAX_KEY_BYTES:
        raise ValueError(f"the endpoint's namespace/name has {len(key)} bytes; at most {MAX_KEY_BYTES} are accepted")
    mac = hmac.digest(secret, DOMAIN + key, "sha256")[:MAC_BYTES]
    return f"{_encoded(key)}.{_encoded(mac)}"


def read(token: str, secrets: Sequence[bytes], *, accept_unsigned: bool = False) -> str | None:
    """The endpoint's ``namespace/name``; None for a token that nobody who knows a secret has made.

    ``accept_unsigned`` also takes the reference's own tokens, for as long as clients still hold some.
    """
    if len(token) > MAX_TOKEN_CHARS or not token.isascii():
        return None
    encoded, signed, _ = token.partition(".")
    if not signed:
        return _key(token, b"+/") if accept_unsigned else None
    key = _key(encoded + "=" * (-len(encoded) % 4), b"-_")
    if key is None:
        return None
    # Whole tokens are compared, with every secret: it takes as long whichever fits, and only one spelling passes.
    matches = sum(hmac.compare_digest(token, sign(key, secret)) for secret in secrets)
    return key if matches else None


def _encoded(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _key(encoded: str, altchars: bytes) -> str | None:
    try:
        key = base64.b64decode(encoded, altchars, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return None
    namespace, _, name = key.partition("/")
    return key if namespace and name and key.isprintable() and len(key.encode()) <= MAX_KEY_BYTES else None
