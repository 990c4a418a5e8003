"""What to send and when: items read from a trace or drawn from a seed, their bodies rendered only when sent.

A token is four bytes of ASCII text everywhere here. Text comes from one seeded buffer of 1 MiB: a span of a prompt is
a key and a length, equal keys give equal text, and a shorter span is a prefix of a longer one with its key. So an
item is small until `Item.body` is called (a span is about 100 bytes; chat and Azure items have few, a Mooncake item
one per 512 tokens), and in memory at once are the buffer, the item being waited for, and the bodies of the requests
in flight, each at most 4 bytes times ``MAX_INPUT_TOKENS``.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import json
import math
import random
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

BYTES_PER_TOKEN = 4
MAX_INPUT_TOKENS = 1_048_576
"""Longest prompt a trace may ask for: a body of 4 MiB."""
_TEXT_BYTES = 1 << 20


class Span(NamedTuple):
    """A stretch of prompt text: the first ``tokens`` tokens of the text that belongs to ``key``."""

    key: str
    tokens: int

    def text(self) -> bytes:
        """ASCII that needs no escape in JSON, ``4 * tokens`` bytes. Begins with a digest and the key itself."""
        size_bytes = BYTES_PER_TOKEN * self.tokens
        digest = zlib.crc32(self.key.encode())
        start = BYTES_PER_TOKEN * (digest % (_TEXT_BYTES // BYTES_PER_TOKEN))
        buffer = _text_buffer()
        filler = buffer[start : start + size_bytes]
        if len(filler) < size_bytes:
            filler += (buffer * (size_bytes // _TEXT_BYTES + 1))[: size_bytes - len(filler)]
        return (f"{digest:08x} {self.key} ".encode() + filler)[:size_bytes]


class Item(msgspec.Struct, frozen=True, kw_only=True):
    """One request of a workload. ``at_s`` counts from the start of the replay."""

    at_s: float
    session: str
    """Who asks: the conversation, or one row of a trace that knows no sessions."""
    prompt: tuple[Span, ...]
    roles: tuple[str, ...] = ()
    """One role per span makes it a chat; empty makes it a completion of all spans joined."""
    output_tokens: int
    streaming: bool = True

    @property
    def input_tokens(self) -> int:
        """Tokens of text; what a chat template adds is not in it."""
        return sum(span.tokens for span in self.prompt)

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.roles else "/v1/completions"

    def body(self, model: str) -> bytes:
        """The JSON to send. Costs one copy of the text; hold it no longer than the request lives."""
        options: dict[str, object] = {"model": model, "max_tokens": self.output_tokens, "ignore_eos": True}
        options["stream"] = self.streaming
        if self.streaming:
            options["stream_options"] = {"include_usage": True}
        return b"".join((json.dumps(options)[:-1].encode(), b", ", self._prompt_json(), b"}"))

    def _prompt_json(self) -> bytes:
        if not self.roles:
            return b"".join((b'"prompt": "', *(span.text() for span in self.prompt), b'"'))
        messages = (
            b"".join((b'{"role": "', role.encode(), b'", "content": "', span.text(), b'"}'))
            for role, span in zip(self.roles, self.prompt, strict=True)
        )
        return b'"messages": [' + b", ".join(messages) + b"]"


WORDS = ("the", "and", "for", "was", "not", "his", "but", "are", "had", "one", "you", "her", "all", "she", "him", "has")
"""Three letters and a blank are four bytes, and to a real tokenizer one token (``tiny_vllm`` knows them all)."""


@functools.cache
def _text_buffer() -> bytes:
    """1 MiB of three-letter words, always the same."""
    words = random.Random(0).choices(WORDS, k=_TEXT_BYTES // BYTES_PER_TOKEN)
    return (" ".join(words) + " ").encode()


class LogNormal(NamedTuple):
    """A log-normal number with this mean and standard deviation before it is clamped to ``[low, high]``.

    The moments give the underlying normal: sigma² = ln(1 + (sd / mean)²) and mu = ln(mean) - sigma² / 2.
    """

    mean: float
    sd: float
    low: float
    high: float

    def draw(self, rng: random.Random) -> float:
        variance = math.log1p((self.sd / self.mean) ** 2)
        value = rng.lognormvariate(math.log(self.mean) - variance / 2, math.sqrt(variance))
        return min(max(value, self.low), self.high)


class ChatShape(msgspec.Struct, frozen=True, kw_only=True):
    """What the built-in chat looks like. A conversation ends after ``turns``, or before at ``context_tokens_max``."""

    groups: int = 6
    """Applications, each with a system prompt of its own that all its users share."""
    system_tokens: int = 1000
    question_tokens: LogNormal = LogNormal(mean=100, sd=120, low=4, high=2000)
    output_tokens: LogNormal = LogNormal(mean=150, sd=120, low=4, high=800)
    turns: LogNormal = LogNormal(mean=4, sd=2.5, low=1, high=15)
    think_s: LogNormal = LogNormal(mean=10, sd=10, low=1, high=60)
    assumed_tpot_s: float = 0.03
    """A user starts to think when the reply would have ended at this pace; the real pace is not known in advance."""
    context_tokens_max: int = 8000


class _Talk(NamedTuple):
    """A conversation before its next question. Orders by when the user is ready to ask it."""

    ready_s: float
    session: str
    history: tuple[Span, ...]
    turns_left: int


def chat(seed: int, rate_per_s: float, duration_s: float, shape: ChatShape | None = None) -> Iterator[Item]:
    """Multi-turn chat of many users, the same for the same seed: requests are a Poisson process of ``rate_per_s``.

    Each arrival is the next turn of the conversation that has waited longest since its user finished reading and
    thinking, or the first turn of a new one when nobody is ready. A turn's prompt is the system prompt, all earlier
    turns and the new question. What a server will reply is not known in advance, so the history holds placeholder text
    of the reply's length instead. A cache can thus hold a prompt up to and with its previous question; the placeholder
    after it is new to the server once, and part of the shared prefix from the next turn on. Arrivals do not wait for
    replies (open loop), so an overloaded server may be asked the next turn early.

    Memory: one conversation, a few spans per turn, for each user who reads or thinks: on average at most ``rate_per_s``
    times the mean of reply and think time. ValueError for a rate that is not positive.
    """
    if rate_per_s <= 0:
        raise ValueError(f"the request rate is {rate_per_s:g} /s, and must be positive")
    shape = shape or ChatShape()
    rng = random.Random(seed)
    thinking: list[_Talk] = []
    at_s = 0.0
    for serial in itertools.count():
        at_s += rng.expovariate(rate_per_s)
        if at_s >= duration_s:
            return
        ready = thinking and thinking[0].ready_s <= at_s
        talk = heapq.heappop(thinking) if ready else _new_talk(rng, shape, seed, serial)
        item = _ask(rng, shape, talk, at_s)
        yield item
        if talk.turns_left > 1 and item.input_tokens + item.output_tokens < shape.context_tokens_max:
            reply = Span(f"{talk.session}-reply-{talk.turns_left}", item.output_tokens)
            ready_s = at_s + item.output_tokens * shape.assumed_tpot_s + shape.think_s.draw(rng)
            heapq.heappush(thinking, _Talk(ready_s, talk.session, (*item.prompt, reply), talk.turns_left - 1))


def _new_talk(rng: random.Random, shape: ChatShape, seed: int, serial: int) -> _Talk:
    group = rng.randrange(shape.groups)
    system = Span(f"chat-{seed}-system-{group}", shape.system_tokens)
    return _Talk(0.0, f"chat-{seed}-{group}-{serial}", (system,), round(shape.turns.draw(rng)))


def _ask(rng: random.Random, shape: ChatShape, talk: _Talk, at_s: float) -> Item:
    question = Span(f"{talk.session}-question-{talk.turns_left}", round(shape.question_tokens.draw(rng)))
    prompt = (*talk.history, question)
    roles = ("system", *itertools.islice(itertools.cycle(("user", "assistant")), len(prompt) - 1))
    output_tokens = round(shape.output_tokens.draw(rng))
    return Item(at_s=at_s, session=talk.session, prompt=prompt, roles=roles, output_tokens=output_tokens)
