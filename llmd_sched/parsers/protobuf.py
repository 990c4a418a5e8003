"""Just enough of protobuf to read a few fields of a message, without the code that is generated for all of them.

Encoding: protobuf.dev/programming-guides/encoding. A message is fields, each a tag (its number and a wire type) and a
value. Unknown fields are for the reader to pass over; every length is checked against what is there.
"""

from __future__ import annotations

from collections.abc import Iterator

MAX_FIELDS = 1 << 16
"""Of one message; a body of nothing but tiny fields would take seconds."""

_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5
_FIXED_BYTES = {_EIGHT_BYTES: 8, _FOUR_BYTES: 4}


class Malformed(ValueError):
    """Not a protobuf message, or none of the expected kind."""


def fields(message: bytes | memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field: a whole number, or the bytes of a text, a message or a packed list.

    Fields of 4 and 8 bytes (floats) are passed over. Malformed says what is wrong, at which byte.
    """
    text = memoryview(message)
    at = 0
    for _ in range(MAX_FIELDS):
        if at == len(text):
            return
        tag, at = _varint(text, at)
        number, kind = tag >> 3, tag & 7
        if not number:
            raise Malformed(f"field number 0 before byte {at}")
        if kind == _VARINT:
            value, at = _varint(text, at)
            yield number, value
        elif kind == _LENGTH:
            size, at = _varint(text, at)
            yield number, text[at : _end(text, at, size)]
            at += size
        elif kind in _FIXED_BYTES:
            at = _end(text, at, _FIXED_BYTES[kind])
        else:
            raise Malformed(f"wire type {kind} before byte {at}")
    if at != len(text):
        raise Malformed(f"more than {MAX_FIELDS} fields")


def part(value: int | memoryview) -> memoryview:
    """A value that has to be bytes."""
    if isinstance(value, int):
        raise Malformed("a number where bytes are expected")
    return value


def number(value: int | memoryview) -> int:
    """A value that has to be a number of 32 bits."""
    if not isinstance(value, int) or value > 0xFFFFFFFF:
        raise Malformed("no number of 32 bits where one is expected")
    return value


def _end(text: memoryview, at: int, size: int) -> int:
    if size > len(text) - at:
        raise Malformed(f"{size} bytes announced at byte {at}, {len(text) - at} left")
    return at + size


def _varint(text: memoryview, at: int) -> tuple[int, int]:
    """The number at ``at``, and where it ends."""
    value = 0
    for i, byte in enumerate(text[at : at + 10]):
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value, at + i + 1
    raise Malformed(f"a number without an end at byte {at}")
