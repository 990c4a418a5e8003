"""What a model server's reply tells about itself: status, first token, token counts. Fed chunk by chunk."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from llmd_sched.extproc.messages import whole_number
from llmd_sched.headers import CONTENT_TYPE
from llmd_sched.parsers.grpc import ReplyFrames
from llmd_sched.parsers.usage import Usage, usage_in_tail
from llmd_sched.types import End, Outcome

TAIL_BYTES = 2048
"""Kept of the end of a reply: ``usage`` ends a whole reply, and is a stream's second to last event."""

HEAD_BYTES = 2048
"""Kept of the beginning of a stream: Anthropic's first event has the input and cached tokens, its last the output's."""

START_MARK = b"event: message_start\ndata: "
"""Begins that first event; with its line break, for the same reason as below."""

EVENT_MARK = b"\ndata: "
"""Starts an event; with its line break, because a text may contain the word, and JSON has no raw line breaks."""
DONE_MARK = b"data: [DONE]"


class NameBack:
    """Gives a reply the model name its client asked for, where the request was sent under another.

    Replaces ``"model":"<target>"`` (also with one space), wherever a chunk is cut: what may be the beginning of a
    match is held back until the next chunk, so at most the length of the pattern is.
    """

    def __init__(self, target: str, asked: str) -> None:
        name, asked_name = msgspec.json.encode(target), msgspec.json.encode(asked)
        self._replacements = tuple((mark + name, mark + asked_name) for mark in (b'"model":', b'"model": '))
        self._held = b""

    def feed(self, chunk: bytes, *, end: bool) -> bytes:
        text = self._held + chunk
        for pattern, replacement in self._replacements:
            text = text.replace(pattern, replacement)
        keep = 0 if end else max(_begun(text, pattern) for pattern, _ in self._replacements)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _begun(text: bytes, pattern: bytes) -> int:
    """Length of the longest end of ``text`` with which ``pattern`` begins."""
    lengths = range(min(len(text), len(pattern) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(pattern[:n])), 0)


MAX_KEPT_BYTES = 1 << 18
"""Of a reply whose text is to be learnt; its beginning is as good as the whole."""


class ReplyReader:
    """One reply on the duplex path. ``sent_s`` is when its request was handed back to Envoy, ``keep`` whether its
    beginning is wanted as it came."""

    def __init__(self, *, streaming: bool, sent_s: float, keep: bool = False) -> None:
        self.streaming = streaming
        self.kept = bytearray()
        self._keep = keep
        self._asked_to_stream = streaming
        self._frames: ReplyFrames | None = None
        """Of a gRPC reply."""
        self._sent_s = sent_s
        self._status = 0
        self._first_s: float | None = None
        self._head = b""
        self._tail = b""
        self._bytes = 0
        self._events = 0
        self._cut = b"\n"
        """The end of the last chunk, in which a mark may have begun. A reply starts like a line."""

    def headers(self, headers: Mapping[str, str]) -> None:
        self._status = whole_number(headers.get(":status", "")) or 0
        content_type = headers.get(CONTENT_TYPE, "")
        self.streaming = "text/event-stream" in content_type
        if content_type.startswith("application/grpc"):
            self.streaming, self._frames = self._asked_to_stream, ReplyFrames()

    def body(self, chunk: bytes, now_s: float) -> bool:
        """True for the first chunk of a successful stream: the first token."""
        first = self._first_s is None
        if first:
            self._first_s = now_s
        self._bytes += len(chunk)
        if self._keep and len(self.kept) < MAX_KEPT_BYTES:
            self.kept += chunk
        if self._frames is not None:
            self._frames.feed(chunk)
        self._tail = (self._tail + chunk)[-TAIL_BYTES:]
        if self.streaming:
            if len(self._head) < HEAD_BYTES:
                self._head += chunk[: HEAD_BYTES - len(self._head)]
            text = self._cut + chunk
            self._events += text.count(EVENT_MARK)
            self._cut = text[1 - len(EVENT_MARK) :]
        return first and self.streaming and self._status == 200

    def outcome(self, end: End, now_s: float) -> Outcome:
        outcome = read_outcome(
            end,
            status=self._status,
            streamed=self.streaming,
            first_ms=None if self._first_s is None else (self._first_s - self._sent_s) * 1e3,
            e2e_ms=(now_s - self._sent_s) * 1e3,
            tail=self._tail,
            events=self._events,
            response_bytes=self._bytes,
            head=self._head,
        )
        usage = self._frames.usage if self._frames is not None else None
        return outcome if usage is None else _with(outcome, usage)


def _with(outcome: Outcome, usage: Usage) -> Outcome:
    return msgspec.structs.replace(
        outcome, prompt_tokens=usage.prompt, cached_tokens=usage.cached, output_tokens=usage.output
    )


def read_outcome(
    end: End,
    *,
    status: int,
    streamed: bool,
    first_ms: float | None,
    e2e_ms: float,
    tail: bytes,
    events: int | None,
    response_bytes: int,
    head: bytes = b"",
) -> Outcome:
    """Both paths end here: token counts from ``usage``, else one token per event (None: not counted).

    ``head`` is the beginning of a stream where it was seen, in which Anthropic says what the tail does not.
    """
    first, last = _first_usage(head) or _first_usage(tail), _last_usage(tail)
    tokens = last.output
    if tokens is None and events is not None and streamed and status == 200:
        tokens = max(0, events - (DONE_MARK in tail))
    return Outcome(
        end=end,
        status=status,
        ttft_ms=first_ms if streamed else None,
        e2e_ms=max(0.0, e2e_ms),
        prompt_tokens=first.prompt if first and last.prompt is None else last.prompt,
        cached_tokens=first.cached if first and last.cached is None else last.cached,
        output_tokens=tokens,
        streamed=streamed,
        response_bytes=response_bytes,
    )


def _first_usage(text: bytes) -> Usage | None:
    """What Anthropic's first event says; None when ``text`` does not hold that event's usage."""
    begin, end = _first_event(text)
    return usage_in_tail(text[begin:end])


def _last_usage(tail: bytes) -> Usage:
    """What the end of a reply says. The first event's output tokens are no count: it comes before them."""
    _, end = _first_event(tail)
    return usage_in_tail(tail[end:]) or Usage()


def _first_event(text: bytes) -> tuple[int, int]:
    """Where Anthropic's first event begins and ends in ``text``, which may cut it short; (0, 0) without one."""
    begin = text.find(START_MARK)
    if begin < 0:
        return 0, 0
    end = text.find(b"\n", begin + len(START_MARK))
    return begin, end if end >= 0 else len(text)
