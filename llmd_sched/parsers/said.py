"""The text of a reply as the next turn's prompt will spell it: role and text, as the parsers put prompts together.

Only what is certain: one answer, text only. A reply that was cut short gives what there is of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

_EVENT = b"data: "


class _Text(msgspec.Struct):
    content: str | None = None
    text: str | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    message: _Text | None = None
    delta: _Text | None = None
    text: str | None = None


class _Block(msgspec.Struct):
    type: str = ""
    text: str | None = None


class _Reply(msgspec.Struct):
    """Of OpenAI (``choices``), or of Anthropic: ``content`` when whole, ``delta`` of ``content_block_delta`` events."""

    choices: list[_Choice] = []
    content: list[_Block] | None = None
    delta: _Block | None = None


_REPLY = msgspec.json.Decoder(_Reply)
_ASSISTANT = b"assistant"


def said(path: str, reply: bytes, *, streamed: bool) -> bytes:
    """Empty for a path whose prompts do not go on with their replies, and for a reply that cannot be read."""
    path = path.partition("?")[0]
    chat = path.endswith(("chat/completions", "/messages"))
    if not chat and not path.endswith("completions"):
        return b""
    text = "".join(_texts(reply, streamed)).encode()
    return _ASSISTANT + text if text and chat else text


def _texts(reply: bytes, streamed: bool) -> Iterator[str]:
    bodies = (line[len(_EVENT) :] for line in reply.splitlines() if line.startswith(_EVENT)) if streamed else (reply,)
    for body in bodies:
        try:
            one = _REPLY.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            if streamed and body.strip() == b"[DONE]":
                continue
            return  # what follows a piece that was lost is not what follows the prompt
        if any(choice.index for choice in one.choices):
            return
        yield from (part for part in _parts(one) if part)


def _parts(one: _Reply) -> Iterator[Any]:
    for choice in one.choices:
        yield choice.text
        yield from (part.content for part in (choice.message, choice.delta) if part is not None)
    yield from (block.text for block in (one.content or ()) if block.type == "text")
    if one.delta is not None and one.delta.type == "text_delta":
        yield one.delta.text
