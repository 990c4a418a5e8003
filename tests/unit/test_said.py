"""What a reply adds to the next turn's prompt."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llmd_sched.parsers.said import said

CHAT, TEXT, MESSAGES = "/v1/chat/completions", "/v1/completions?x=1", "/v1/messages"


def stream(*events: Any) -> bytes:
    lines = [f"data: {json.dumps(event)}\n\n" for event in events]
    return "".join([*lines, "data: [DONE]\n\n"]).encode()


def delta(text: str | None, index: int = 0) -> dict[str, Any]:
    return {"choices": [{"index": index, "delta": {"content": text}}]}


@pytest.mark.parametrize(
    ("path", "streamed", "reply", "expected"),
    [
        (CHAT, False, {"choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}}]}, b"assistanthi"),
        (TEXT, False, {"choices": [{"index": 0, "text": "hi"}]}, b"hi"),
        (MESSAGES, False, {"content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}, b"assistanthi"),
        (MESSAGES, False, {"content": [{"type": "tool_use", "name": "f", "input": {}}]}, b""),
        ("/v1/embeddings", False, {"choices": [{"text": "hi"}]}, b""),
        (CHAT, False, {"choices": [{"index": 0, "message": {"content": None}}]}, b""),
    ],
)
def test_a_whole_reply(path: str, streamed: bool, reply: dict[str, Any], expected: bytes) -> None:
    assert said(path, json.dumps(reply).encode(), streamed=streamed) == expected


@pytest.mark.parametrize(
    ("path", "events", "expected"),
    [
        (CHAT, [delta(None), delta("h"), delta("ä"), {"choices": [], "usage": {}}], "assistanthä"),
        (TEXT, [{"choices": [{"index": 0, "text": "h"}]}, {"choices": [{"index": 0, "text": "i"}]}], "hi"),
        (
            MESSAGES,
            [
                {"type": "message_start", "message": {}},
                {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "hi"}},
                {"type": "message_delta", "delta": {"stop_reason": "end_turn"}},
            ],
            "assistanthi",
        ),
        (CHAT, [delta("one"), delta("two", index=1), delta("three")], "assistantone"),
    ],
)
def test_a_stream(path: str, events: list[Any], expected: str) -> None:
    assert said(path, stream(*events), streamed=True) == expected.encode()


def test_a_stream_that_was_cut_gives_what_came_before() -> None:
    reply = stream(delta("all of "), delta("this"))
    cut = reply[: reply.index(b"this")]
    assert said(CHAT, cut, streamed=True) == b"assistantall of "


@pytest.mark.parametrize("reply", [b"", b"{", b"[]", b"\xff", b'{"choices": 3}'])
def test_what_cannot_be_read_says_nothing(reply: bytes) -> None:
    assert said(CHAT, reply, streamed=False) == said(CHAT, reply, streamed=True) == b""
