"""The size of an image in base64, by its first bytes: PNG, GIF, WebP and JPEG."""

from __future__ import annotations

import binascii
import struct

MAX_HEAD_CHARACTERS = 96 << 10
"""Of an image in base64, read for its size: a JPEG may have 64 KB of other things before it says that."""

MAX_SIDE = 1 << 20
"""Pixels of a width or a height that we believe."""


def data_of(address: str) -> str:
    """The base64 of a ``data:image/...;base64,`` URL; empty for any other."""
    if not address.startswith("data:image/"):
        return ""
    kind, _, data = address[:256].partition("base64,")
    return address[len(kind) + len("base64,") :] if data else ""


def image_size(base64: str) -> tuple[int, int] | None:
    """Width and height in pixels of a PNG, GIF, WebP or JPEG, by its first bytes; None when they do not say."""
    head = _decoded(base64[:64])
    if head.startswith(b"\xff\xd8"):
        head = _decoded(base64[:MAX_HEAD_CHARACTERS])
    try:
        size = next((read(head) for magic, read in _FORMATS.items() if head.startswith(magic)), None)
    except (struct.error, IndexError):
        return None
    return believed(*size) if size else None


def believed(width: int, height: int) -> tuple[int, int] | None:
    """None when no image has such a size."""
    return (width, height) if 0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE else None


def _decoded(base64: str) -> bytes:
    try:
        return binascii.a2b_base64(base64[: len(base64) // 4 * 4])
    except (binascii.Error, ValueError):
        return b""


def _png(head: bytes) -> tuple[int, int]:
    width, height = struct.unpack_from(">II", head, 16)
    return width, height


def _gif(head: bytes) -> tuple[int, int]:
    width, height = struct.unpack_from("<HH", head, 6)
    return width, height


def _webp(head: bytes) -> tuple[int, int] | None:
    """RFC 9649: a simple lossy or lossless file, or an extended one, which says the size of its canvas."""
    kind = head[8:16]
    if kind == b"WEBPVP8 ":
        width, height = struct.unpack_from("<HH", head, 26)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"WEBPVP8L":
        (bits,) = struct.unpack_from("<I", head, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"WEBPVP8X" and len(head) >= 30:
        return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
    return None


_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""ITU-T T.81, table B.1: those that begin a frame, which says the size."""


def _jpeg(head: bytes) -> tuple[int, int] | None:
    at = 2
    while head[at] == 0xFF:
        marker = head[at + 1]
        if marker == 0xFF:  # a marker may have any number of these before it
            at += 1
            continue
        length, _, height, width = struct.unpack_from(">HBHH", head, at + 2)
        if marker in _FRAME_MARKERS:
            return width, height
        at += 2 + length
    return None


_FORMATS = {b"\x89PNG\r\n\x1a\n": _png, b"GIF87a": _gif, b"GIF89a": _gif, b"RIFF": _webp, b"\xff\xd8": _jpeg}
