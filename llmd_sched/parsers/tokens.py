"""Token ids out of request bodies, as little-endian uint32: four bytes are one token, as they are for text.

A megabyte of ids would become 150,000 Python numbers, which takes longer than everything else that is done with the
request; so kernels read the digits (JSON) or varints (protobuf) straight into an array. They are strict, and give up on
anything that is not plainly token ids; what to say about it is for the caller.
"""

from __future__ import annotations

import itertools
import re
from functools import lru_cache
from typing import NamedTuple

import msgspec
import numpy as np
from numba import njit
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

_MAX_ID = 0xFFFFFFFF
_MARK = b"null"
_SPACE = b" \t\r\n"


class Lists(NamedTuple):
    """Lists of token ids taken out of a JSON object: ``rest`` is that object with ``null`` in their place."""

    prompts: tuple[bytes, ...]
    """One for ``[1, 2]``, one each for ``[[1], [2, 3]]``."""
    rest: bytes
    at: int

    def were_in(self, field: msgspec.Raw) -> bool:
        """Whether ``field``, decoded from ``rest``, is where they were taken from, and no other of the same name."""
        return bytes(field) == _MARK and offset(field, self.rest) == self.at


def take_lists(body: bytes, name: str, *, flat: bool = False) -> Lists | None:
    """The first value called ``name``, when it is token ids or, unless ``flat``, lists of them, none empty.

    Where in the object it stands is not looked at: decode ``rest`` and ask ``were_in``.
    """
    found = _field(name, flat).search(body)
    if found is None:
        return None
    begin = found.end()
    prompts, end = _lists(body, begin)
    return Lists(prompts, body[:begin] + _MARK + body[end:], begin) if prompts else None


def lists_in(text: bytes) -> tuple[bytes, ...]:
    """The prompts of ``[1, 2]`` or ``[[1], [2, 3]]``; none when ``text`` is anything else."""
    prompts, end = _lists(text, 0)
    return () if text[end:].strip(_SPACE) else prompts


def packed_ids(message: bytes | memoryview, field: int) -> bytes | None:
    """A ``repeated uint32`` of a protobuf message, packed or not; None when the message is malformed."""
    text = np.frombuffer(message, np.uint8)
    ids = np.empty(len(text), np.uint32)
    count = _read_message(text, field, ids)
    return None if count < 0 else _little_endian(ids[:count])


def offset(part: msgspec.Raw, whole: bytes) -> int:
    """Where in ``whole`` lies ``part``, which was decoded from it and is a view of its bytes."""
    addresses = [np.frombuffer(one, np.uint8).ctypes.data for one in (part, whole)]
    return addresses[0] - addresses[1]


def warm_up() -> None:
    """Compiles or loads the kernels, which takes a second or two and would hold up the first request."""
    lists_in(b"[[1],[2]]")
    packed_ids(b"\x10\x01", 2)


@lru_cache(maxsize=16)
def _field(name: str, flat: bool) -> re.Pattern[bytes]:
    """Inside a text the quotes would be escaped, so this is the name of a field, of this object or an inner one."""
    within = rb"[ \t\r\n]*[0-9]" if flat else b""
    return re.compile(rb'"' + name.encode() + rb'"[ \t\r\n]*:[ \t\r\n]*(?=\[' + within + rb")")


def _lists(text: bytes, at: int) -> tuple[tuple[bytes, ...], int]:
    """The prompts of the value at ``at``, none when it is no token ids, and where it ends."""
    text = text.rstrip(_SPACE)
    if text[-1:] not in (b"]", b"}"):
        return (), at
    most = (len(text) - at) // 2 + 1  # an id takes two characters with its comma
    ids, ends = np.empty(most, np.uint32), np.empty(most, np.uint32)
    lists, end = _read_lists(np.frombuffer(text, np.uint8), at, ids, ends)
    return _prompts(ids, ends[:lists]), end


def _prompts(ids: NDArray[np.uint32], ends: NDArray[np.uint32]) -> tuple[bytes, ...]:
    if len(ends) == 1:
        return (_little_endian(ids[: ends[0]]),)
    text = _little_endian(ids[: ends[-1]]) if len(ends) else b""
    bounds = [0, *(4 * ends.astype(np.int64)).tolist()]
    return tuple(text[a:b] for a, b in itertools.pairwise(bounds))


def _little_endian(ids: NDArray[np.uint32]) -> bytes:
    return ids.astype("<u4", copy=False).tobytes()


@njit
def _after_space(text, at):  # type: ignore[no-untyped-def]
    while text[at] == 0x20 or text[at] == 0x0A or text[at] == 0x0D or text[at] == 0x09:
        at += 1
    return at


@njit
def _read_list(text, at, ids, count):  # type: ignore[no-untyped-def]
    """One list from its bracket on; returns where it ends, -1 when it is not one of token ids, and the ids by now."""
    while True:
        at = _after_space(text, at + 1)  # beyond the bracket or a comma
        begin = at
        value = np.int64(0)
        digit = np.int64(text[at]) - 0x30
        while 0 <= digit <= 9:
            value = 10 * value + digit
            at += 1
            digit = np.int64(text[at]) - 0x30
        digits = at - begin
        if digits == 0 or digits > 10 or value > _MAX_ID or (digits > 1 and text[begin] == 0x30):
            return -1, count
        ids[count] = value
        count += 1
        at = _after_space(text, at)
        if text[at] == 0x5D:
            return at + 1, count
        if text[at] != 0x2C:
            return -1, count


@njit(cache=True)
def _read_lists(text, at, ids, ends):  # type: ignore[no-untyped-def]
    """A list of ids, or a list of such lists; returns how many lists and where the value ends, 0 when it is neither.

    ``text`` must end in a bracket or a brace: neither digits nor space, so no loop runs beyond it.
    ``ends``: for each list, the ids up to its end.
    """
    at = _after_space(text, at)
    if text[at] != 0x5B or at + 1 == len(text):
        return 0, at
    inner = _after_space(text, at + 1)
    if text[inner] != 0x5B:
        at, count = _read_list(text, at, ids, 0)
        ends[0] = count
        return np.int64(at > 0), at
    lists, count = 0, 0
    while text[inner] == 0x5B and inner + 1 < len(text):
        at, count = _read_list(text, inner, ids, count)
        if at < 0 or at == len(text):
            break
        ends[lists] = count
        lists += 1
        at = _after_space(text, at)
        if text[at] == 0x5D:
            return lists, at + 1
        if text[at] != 0x2C:
            break
        inner = _after_space(text, at + 1)
    return 0, at


@njit
def _varint(text, at, end):  # type: ignore[no-untyped-def]
    """Returns its value and where it ends, -1 when it is cut short or has more than 63 bits."""
    value, shift = np.int64(0), 0
    while at < end and shift < 63:
        byte = np.int64(text[at])
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    return value, -1


@njit(cache=True)
def _read_message(text, field, ids):  # type: ignore[no-untyped-def]
    """Collects the ids of ``field``; returns how many, -1 when the message is malformed or an id has over 32 bits.

    Encoding: protobuf.dev/programming-guides/encoding. Wire types: 0 varint, 1 and 5 of 8 and 4 bytes, 2 with a length.
    """
    at, count, size = 0, 0, len(text)
    while at < size:
        tag, at = _varint(text, at, size)
        wanted, kind = tag >> 3 == field, tag & 7
        if at < 0 or not 8 <= tag <= _MAX_ID:
            return -1
        if kind == 1 or kind == 5:
            at += 8 if kind == 1 else 4
            continue
        value, end = _varint(text, at, size)
        if end < 0 or (kind != 0 and kind != 2):
            return -1
        if kind == 2:
            at, end = end, end + value
            if value > size - at:
                return -1
        while wanted and at < end:
            value, at = _varint(text, at, end)
            if at < 0 or value > _MAX_ID:
                return -1
            ids[count] = value
            count += 1
        at = end
    return count if at == size else -1
