"""What the JSON bodies of all formats have in common."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from typing import Protocol, TypeVar

import msgspec

from llmd_sched.errors import BadRequest
from llmd_sched.parsers.tokens import take_lists
from llmd_sched.plugin import Parsed

ABSENT = msgspec.Raw()

T = TypeVar("T")


class WithIds(Protocol):
    """A body whose token ids have been taken out: what is left in their place."""

    ids: msgspec.Raw


B = TypeVar("B", bound=WithIds)


class Body(msgspec.Struct):
    """What the bodies of every format have in common."""

    model: str = ""
    stream: bool | None = None
    cache_salt: str | None = None


def decoded(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    """``body`` as the decoder's type. BadRequest says what is wrong, and where."""
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise BadRequest(f"error unmarshaling request bodyMap: {e}") from None


def taken_ids(
    decoder: msgspec.json.Decoder[B], body: bytes, name: str, *, flat: bool = False
) -> tuple[B, tuple[bytes, ...]] | None:
    """A body whose field ``name`` is token ids or, unless ``flat``, lists of them; and those.

    None for any other, of which a slower reader can say more.
    """
    lists = take_lists(body, name, flat=flat)
    if lists is None:
        return None
    try:
        b = decoder.decode(lists.rest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return (b, lists.prompts) if lists.were_in(b.ids) else None


def token_bytes(ids: Sequence[int], kind: str) -> bytes:
    """Token ids as little-endian uint32, so that four bytes are one token here too. ``kind`` is for the error."""
    try:
        words = array("I", ids)  # half the time of struct.pack
    except OverflowError:
        raise BadRequest(f"invalid {kind} request: token ids must be between 0 and 4294967295") from None
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()


def given(value: msgspec.Raw) -> bytes:
    """The JSON of an optional field; empty when it is absent or null."""
    text = bytes(value)
    return b"" if text == b"null" else text


def parsed_of(body: Body, prompts: tuple[bytes, ...], max_output_tokens: int | None, media: int = 0) -> Parsed:
    return Parsed(
        model=body.model,
        prompts=prompts,
        max_output_tokens=max_output_tokens,
        streaming=bool(body.stream),
        cache_salt=body.cache_salt or "",
        media=media,
    )
