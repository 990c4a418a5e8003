"""Values as bytes that say what they are and whether they are whole: a first line, a checksum, msgpack."""

from __future__ import annotations

import zlib
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")

_DIGEST_BYTES = 4
_ARRAYS = ("<i4", "<i8", "<f8", "<u8", "|u1")


def seal(magic: bytes, value: Any) -> bytes:
    """``value`` (a msgspec struct, NumPy arrays in it allowed) under its format's first line ``magic``."""
    body = msgspec.msgpack.encode(value, enc_hook=_encode_array)
    return magic + _digest(body) + body


def unseal(magic: bytes, blob: bytes, kind: type[T]) -> T:
    """The reverse. ValueError for bytes that are foreign, damaged or of another shape; it says which."""
    if not blob.startswith(magic):
        raise ValueError(f"it should begin with {magic!r}")
    digest, body = blob[len(magic) :][:_DIGEST_BYTES], blob[len(magic) + _DIGEST_BYTES :]
    if _digest(body) != digest:
        raise ValueError("it is damaged: its checksum does not match")
    return msgspec.msgpack.decode(body, type=kind, dec_hook=_decode_array)


def _digest(body: bytes) -> bytes:
    """CRC-32: against accidents, and a fifth of what a cryptographic hash costs the process that serves."""
    return zlib.crc32(body).to_bytes(_DIGEST_BYTES, "big")


def _encode_array(value: Any) -> tuple[str, tuple[int, ...], bytes]:
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    raise NotImplementedError(f"cannot encode {type(value).__name__}")


def _decode_array(_kind: type, value: Any) -> NDArray[Any]:
    kind, shape, data = value
    if kind not in _ARRAYS:
        raise ValueError(f"unexpected array of {kind}")
    return np.frombuffer(data, dtype=kind).reshape(shape).copy()
