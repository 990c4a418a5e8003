"""The replies a simulated server is giving: engine steps in, SSE events and observations out.

Streamed tokens are written straight to the connection's transport as ready-made HTTP chunks. Going through
``StreamResponse.write`` costs a coroutine and the chunk framing for each of some ten thousand tokens per second.
"""

from __future__ import annotations

import asyncio
from itertools import count

from llmd_sched.sim.engine import Step
from llmd_sched.sim.exposition import Exposition
from llmd_sched.sim.openai import Ask, Wording, usage

MAX_UNSENT_BYTES = 1 << 20
"""A client that reads so slowly that more is waiting for it loses its connection."""


class Reply:
    """One reply under way. Times are engine seconds."""

    __slots__ = (
        "arrival_s",
        "ask",
        "cached_tokens",
        "done",
        "emitted",
        "finish_reason",
        "first_s",
        "id",
        "last_s",
        "output_tokens",
        "scheduled_s",
        "transport",
        "wording",
    )

    def __init__(self, reply_id: str, ask: Ask, wording: Wording, output_tokens: int, finish_reason: str) -> None:
        self.id = reply_id
        self.ask = ask
        self.wording = wording
        self.output_tokens = output_tokens
        self.finish_reason = finish_reason
        self.transport: asyncio.WriteTransport | None = None
        """Where tokens go; None while headers are not out, and for whole replies."""
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.arrival_s = self.scheduled_s = self.first_s = self.last_s = 0.0
        self.cached_tokens = 0
        self.emitted = 0

    def usage(self) -> dict[str, object]:
        return usage(self.ask.prompt_tokens, self.emitted, self.cached_tokens)

    def emit(self, transport: asyncio.WriteTransport) -> None:
        """Write the next token's event, unless the client has gone (its handler is about to be cancelled)."""
        if transport.is_closing():
            return
        index = self.emitted
        if 0 < index < self.output_tokens - 1:
            transport.write(self.wording.event(index))
        else:
            last = index == self.output_tokens - 1
            transport.write(self.wording.edge_event(index, self.finish_reason if last else None))
        if transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            transport.abort()


class Replies:
    """All replies under way, by id, and what is observed of them."""

    def __init__(self, exposition: Exposition, speedup: float, overhead_s: float) -> None:
        self._exposition = exposition
        self._speedup = speedup
        self._overhead_s = overhead_s
        self._by_id: dict[str, Reply] = {}
        self._numbers = count(1)

    def next_id(self, chat: bool) -> str:
        return f"{'chatcmpl' if chat else 'cmpl'}-{next(self._numbers)}"

    def add(self, reply: Reply) -> None:
        self._by_id[reply.id] = reply

    def drop(self, reply: Reply) -> bool:
        """Forget a reply, whose client is served or gone; True when it was cut short."""
        if self._by_id.pop(reply.id, None) is None:
            return False
        self._exposition.finished["abort"] += 1
        return True

    def on_step(self, step: Step) -> None:
        """A step has ended: its tokens go out."""
        replies = self._by_id
        for reply_id, cached_tokens in step.admitted:
            if reply_id in replies:
                replies[reply_id].scheduled_s = step.start_s
                replies[reply_id].cached_tokens = cached_tokens
        start_s, end_s, steady = step.start_s, step.end_s, 0
        for reply_id in step.tokens:
            reply = replies.get(reply_id)
            if reply is None:
                continue
            if reply.last_s == start_s and reply.emitted:
                steady += 1
            else:
                self._observe_token(reply, end_s)
            if reply.transport is not None:
                reply.emit(reply.transport)
            reply.emitted += 1
            reply.last_s = end_s
        # Most tokens follow one of the step before, so they share an interval and are counted at once.
        self._exposition.inter_token_s.observe((end_s - start_s) / self._speedup, steady)
        self._exposition.iteration_tokens.observe(step.scheduled_tokens)
        for reply_id in step.finished:
            if reply_id in replies:
                self._finish(replies.pop(reply_id))

    def _observe_token(self, reply: Reply, now_s: float) -> None:
        if reply.emitted:
            self._exposition.inter_token_s.observe((now_s - reply.last_s) / self._speedup)
        else:
            reply.first_s = now_s
            self._exposition.ttft_s.observe((now_s - reply.arrival_s) / self._speedup)

    def _finish(self, reply: Reply) -> None:
        seen, speedup = self._exposition, self._speedup
        queued_s = reply.scheduled_s - reply.arrival_s - self._overhead_s
        seen.finished[reply.finish_reason] += 1
        seen.e2e_s.observe((reply.last_s - reply.arrival_s) / speedup)
        seen.queue_s.observe(max(0.0, queued_s) / speedup)
        seen.inference_s.observe((reply.last_s - reply.scheduled_s) / speedup)
        seen.prefill_s.observe((reply.first_s - reply.scheduled_s) / speedup)
        seen.decode_s.observe((reply.last_s - reply.first_s) / speedup)
        seen.prompt_tokens.observe(reply.ask.prompt_tokens)
        seen.generation_tokens.observe(reply.emitted)
        if reply.emitted > 1:
            seen.mean_token_s.observe((reply.last_s - reply.first_s) / (reply.emitted - 1) / speedup)
        if not reply.done.done():
            reply.done.set_result(None)
