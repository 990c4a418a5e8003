"""A client's pass-through headers at rest: encrypted with AES-256-GCM."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Mapping, Sequence

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_BYTES = 32
NONCE_BYTES = 12
PLAIN, ENCRYPTED = b"\0", b"\1"


class Seal:
    """``keys``: base64 of 32 bytes each; the first seals, all open. Without keys headers are kept as they are."""

    def __init__(self, keys: Sequence[str] = ()) -> None:
        self._ciphers = [AESGCM(_key(text)) for text in keys]

    def seal(self, headers: Mapping[str, str]) -> bytes:
        text = msgspec.json.encode(dict(headers))
        if not self._ciphers:
            return PLAIN + text
        nonce = os.urandom(NONCE_BYTES)
        return ENCRYPTED + nonce + self._ciphers[0].encrypt(nonce, text, None)

    def open(self, sealed: bytes) -> dict[str, str]:
        """Raises ValueError when no key fits."""
        kind, rest = sealed[:1], sealed[1:]
        if kind == PLAIN:
            return msgspec.json.decode(rest, type=dict[str, str])
        for cipher in self._ciphers if kind == ENCRYPTED else ():
            try:
                text = cipher.decrypt(rest[:NONCE_BYTES], rest[NONCE_BYTES:], None)
            except (InvalidTag, ValueError):
                continue
            return msgspec.json.decode(text, type=dict[str, str])
        raise ValueError("the pass-through headers open with none of the configured keys")


def _key(text: str) -> bytes:
    try:
        decoded = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        decoded = b""
    if len(decoded) != KEY_BYTES:
        raise ValueError(f"a header key must be the base64 of {KEY_BYTES} random bytes")
    return decoded
