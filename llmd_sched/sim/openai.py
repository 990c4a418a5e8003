"""The OpenAI side of a simulated server: bodies in, replies out. Bytes to values and back, no I/O.

A token is four bytes: of the prompt's UTF-8 text, or one id as little-endian uint32. So one block of 16 tokens is 64
bytes, equal prefixes are equal blocks, and no tokenizer is needed. Every token we generate is four ASCII characters.
"""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Iterator
from typing import Any, NoReturn, TypeVar

import msgspec

TOKEN_BYTES = 4
BLOCK_BYTES = 64
MEAN_OUTPUT_TOKENS = 200
"""Of replies whose length the client left to the model."""

WORDS = tuple(f" {a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "lmnrst")
"""The vocabulary: 360 words of four characters, all safe in JSON."""


class ApiError(Exception):
    """A request refused: HTTP status and what the client is told."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status

    def body(self) -> bytes:
        kind = {400: "BadRequestError", 404: "NotFoundError", 503: "ServiceUnavailableError"}.get(self.status, "Error")
        error = {"message": str(self), "type": kind, "param": None, "code": self.status}
        return msgspec.json.encode({"error": error})


class StreamOptions(msgspec.Struct):
    include_usage: bool = False


class _Body(msgspec.Struct):
    """What completions and chat have in common. Fields we do not model are ignored, as sampling parameters are."""

    model: str | None = None
    max_tokens: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    priority: int = 0
    cache_salt: str | None = None
    n: int | None = None


_B = TypeVar("_B", bound=_Body)


class _CompletionBody(_Body):
    prompt: str | list[Any] = ""


class _Message(msgspec.Struct):
    role: str
    content: str | list[Any] | None = None


class _ChatBody(_Body):
    messages: list[_Message] = []
    max_completion_tokens: int | None = None


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """One request, understood: the prompt as bytes and how the reply is wanted."""

    chat: bool
    model: str | None
    prompt: bytes
    max_tokens: int | None
    ignore_eos: bool
    stream: bool
    include_usage: bool
    priority: int
    cache_salt: str

    @property
    def prompt_tokens(self) -> int:
        return -(-len(self.prompt) // TOKEN_BYTES)

    @property
    def seed(self) -> int:
        """The same for the same prompt, in every process."""
        return zlib.crc32(self.prompt)

    def output_tokens(self, room_tokens: int) -> tuple[int, str]:
        """How long the reply will be, and why it ends: ``max_tokens`` as asked; else up to ``room_tokens`` when the
        end is to be ignored; else a length drawn from the prompt."""
        if self.max_tokens is not None:
            return self.max_tokens, "length"
        if self.ignore_eos:
            return max(1, room_tokens), "length"
        drawn = 1 + int(random.Random(self.seed).expovariate(1 / (MEAN_OUTPUT_TOKENS - 0.5)))
        return max(1, min(drawn, room_tokens)), "stop" if drawn <= room_tokens else "length"


def parse_completion(raw: bytes) -> Ask:
    """POST /v1/completions. ApiError 400 says what is wrong."""
    body = _decode(raw, _CompletionBody)
    return _ask(body, _completion_prompt(body.prompt), 16 if body.max_tokens is None else body.max_tokens, chat=False)


def parse_chat(raw: bytes) -> Ask:
    """POST /v1/chat/completions. The prompt is each message's role and text, one after the other, no separators."""
    body = _decode(raw, _ChatBody)
    prompt = "".join(message.role + _text(message.content) for message in body.messages)
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return _ask(body, _utf8(prompt), limit, chat=True)


def block_hashes(prompt: bytes, cache_salt: str = "") -> list[int]:
    """Chained 64-bit hashes of the prompt's full blocks; good in this process only. 0.2 µs per block."""
    chain = hash(cache_salt)
    whole = len(prompt) - len(prompt) % BLOCK_BYTES
    hashes = []
    for (block,) in struct.iter_unpack(f"{BLOCK_BYTES}s", memoryview(prompt)[:whole]):
        chain = hash((chain, block))
        hashes.append(chain)
    return hashes


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


class Wording:
    """Renders one reply. A streamed token costs one concatenation: all but its four characters is made beforehand."""

    def __init__(self, ask: Ask, reply_id: str, model: str, created: int) -> None:
        self.reply_id = reply_id
        self._chat = ask.chat
        self._seed = ask.seed
        kind = ("chat.completion" if ask.chat else "text_completion") + (".chunk" if ask.chat and ask.stream else "")
        self._head = {"id": reply_id, "object": kind, "created": created, "model": model}
        self._before, self._after = self._frame(None)

    def event(self, index: int) -> bytes:
        """The SSE event of a token that is neither the first nor the last, framed as an HTTP chunk."""
        return self._before + _WORD_BYTES[(self._seed + index) % len(_WORD_BYTES)] + self._after

    def edge_event(self, index: int, finish_reason: str | None) -> bytes:
        """The event of the first token, which says the role, or of the last, which says why the reply ends."""
        before, after = self._frame(finish_reason, role=index == 0)
        return before + _WORD_BYTES[(self._seed + index) % len(_WORD_BYTES)] + after

    def closing(self, tally: dict[str, Any] | None) -> bytes:
        """The usage event, if wanted, and the end mark; not framed."""
        events = [] if tally is None else [msgspec.json.encode({**self._head, "choices": [], "usage": tally})]
        return b"".join(b"data: %b\n\n" % event for event in (*events, b"[DONE]"))

    def whole(self, tokens: int, finish_reason: str, tally: dict[str, Any]) -> bytes:
        """The reply in one piece."""
        text = "".join(WORDS[(self._seed + index) % len(WORDS)] for index in range(tokens))
        content = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason, "stop_reason": None}
        return msgspec.json.encode({**self._head, "choices": [choice], "usage": tally})

    def _frame(self, finish_reason: str | None, role: bool = False) -> tuple[bytes, bytes]:
        blank = "?" * TOKEN_BYTES
        delta = {"delta": {**({"role": "assistant"} if role else {}), "content": blank}}
        content = delta if self._chat else {"text": blank}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}
        event = b"data: " + msgspec.json.encode({**self._head, "choices": [choice]}) + b"\n\n"
        before, _, after = _chunk(event).rpartition(blank.encode())
        return before, after


_WORD_BYTES = tuple(word.encode() for word in WORDS)


def _chunk(payload: bytes) -> bytes:
    """One chunk of HTTP/1.1 chunked transfer coding."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def _decode(raw: bytes, kind: type[_B]) -> _B:
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.DecodeError as error:
        raise ApiError(400, f"the body is not a valid request: {error}") from error


def _ask(body: _Body, prompt: bytes, max_tokens: int | None, *, chat: bool) -> Ask:
    if not prompt:
        _refuse(f"{'messages' if chat else 'prompt'} must not be empty")
    if max_tokens is not None and max_tokens < 1:
        _refuse(f"max_tokens must be at least 1, not {max_tokens}")
    if body.n not in (None, 1):
        _refuse(f"n must be 1, not {body.n}")
    return Ask(
        chat=chat,
        model=body.model,
        prompt=prompt,
        max_tokens=max_tokens,
        ignore_eos=body.ignore_eos,
        stream=body.stream,
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
        priority=body.priority,
        cache_salt=body.cache_salt or "",
    )


def _completion_prompt(prompt: str | list[Any]) -> bytes:
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return _utf8(prompt)
    try:
        return struct.pack(f"<{len(prompt)}I", *prompt)
    except struct.error:
        _refuse("prompt must be one string or one list of token ids (unsigned 32-bit), not several prompts")


def _text(content: str | list[Any] | None) -> str:
    if isinstance(content, str):
        return content
    return "".join(_texts(content or []))


def _texts(parts: list[Any]) -> Iterator[str]:
    for part in parts:
        text = part.get("text") if isinstance(part, dict) else None
        if isinstance(text, str):
            yield text


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _refuse(message: str) -> NoReturn:
    raise ApiError(400, message)
