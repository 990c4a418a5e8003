"""OpenAI request bodies, and token usage out of replies.

A body is decoded once, into just the fields that matter; everything else is skipped without being built. Text is kept
as bytes: four of them count as one token (the reference's estimate), so no tokenizer is needed.
"""

from __future__ import annotations

import sys
import zlib
from array import array
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

from llmd_sched.errors import BadRequest
from llmd_sched.plugin import Parsed, Parser

IMAGE_TOKENS = 225
"""An image of unknown size: 640 x 360 pixels at 1024 pixels per token."""


MAX_IMAGES = 256
"""Images of one request that count; each stands for IMAGE_TOKENS of prompt, however short its address is."""

ABSENT = msgspec.Raw()

T = TypeVar("T")


class Body(msgspec.Struct):
    """What the bodies of every format have in common."""

    model: str = ""
    stream: bool | None = None
    cache_salt: str | None = None


class _Completion(Body):
    prompt: str | list[str | int | list[int]] | None = None
    max_tokens: int | None = None


class _Url(msgspec.Struct):
    url: str = ""


class _Part(msgspec.Struct):
    type: str = "text"
    text: str | None = None
    image_url: _Url | str | None = None


class _Message(msgspec.Struct):
    role: str
    content: str | list[_Part] | None = None


class _Chat(Body):
    messages: list[_Message] | None = None
    tools: msgspec.Raw = ABSENT
    max_completion_tokens: int | None = None
    max_tokens: int | None = None


class _Input(Body):
    input: msgspec.Raw = ABSENT
    instructions: msgspec.Raw = ABSENT
    tools: msgspec.Raw = ABSENT
    max_output_tokens: int | None = None


class _Embedding(Body):
    input: msgspec.Raw = ABSENT


class _Image(Body):
    prompt: str | None = None


class _Conversation(Body):
    items: msgspec.Raw = ABSENT


_COMPLETION = msgspec.json.Decoder(_Completion)
_CHAT = msgspec.json.Decoder(_Chat)
_INPUT = msgspec.json.Decoder(_Input)
_EMBEDDING = msgspec.json.Decoder(_Embedding)
_IMAGE = msgspec.json.Decoder(_Image)
_CONVERSATION = msgspec.json.Decoder(_Conversation)
_TOKEN_IDS: msgspec.json.Decoder[list[Any]] = msgspec.json.Decoder(list[int | list[int]])


class OpenAIParser(Parser, frozen=True):
    """Chat completions, completions, embeddings, responses, conversations, image generations and the render paths."""

    def parse(self, path: str, body: bytes) -> Parsed:
        kind = next(k for s, k in _KINDS.items() if path.endswith(s))
        return _READERS[kind](body)


_KINDS = {
    "chat/completions/render": "chat",
    "chat/completions": "chat",
    "completions/render": "completion",
    "completions": "completion",
    "embeddings": "embedding",
    "responses": "input",
    "conversations": "conversation",
    "images/generations": "image",
}
OpenAIParser.suffixes = tuple(_KINDS)


def decoded(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    """``body`` as the decoder's type. BadRequest says what is wrong, and where."""
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise BadRequest(f"error unmarshaling request bodyMap: {e}") from None


def _completion(body: bytes) -> Parsed:
    b = decoded(_COMPLETION, body)
    if not b.prompt:
        raise BadRequest("invalid completions request: must have prompt field")
    return parsed_of(b, _prompts(b.prompt), b.max_tokens)


def _prompts(prompt: str | list[Any]) -> tuple[bytes, ...]:
    if isinstance(prompt, str):
        return (prompt.encode(),)
    kinds = {type(p) for p in prompt}
    if kinds == {str}:
        return tuple(p.encode() for p in prompt)
    if kinds == {int}:
        return (token_bytes(prompt, "completions"),)
    if kinds == {list}:
        return tuple(token_bytes(ids, "completions") for ids in prompt)
    raise BadRequest("invalid completions request: prompt must be a string, strings, token ids or lists of token ids")


def token_bytes(ids: Sequence[int], kind: str) -> bytes:
    """Token ids as little-endian uint32, so that four bytes are one token here too. ``kind`` is for the error."""
    try:
        words = array("I", ids)  # half the time of struct.pack
    except OverflowError:
        raise BadRequest(f"invalid {kind} request: token ids must be between 0 and 4294967295") from None
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()


def _chat(body: bytes) -> Parsed:
    b = decoded(_CHAT, body)
    if not b.messages:
        raise BadRequest("invalid chat completions request: must have valid messages field")
    prompt = bytearray(given(b.tools))
    images = 0
    for message in b.messages:
        prompt += message.role.encode()
        if isinstance(message.content, str):
            prompt += message.content.encode()
            continue
        for part in message.content or ():
            images += part.image_url is not None
            _append_part(prompt, part, images)
    return parsed_of(b, (bytes(prompt),), b.max_completion_tokens or b.max_tokens)


def _append_part(prompt: bytearray, part: _Part, images: int) -> None:
    if part.text is not None:
        prompt += part.text.encode()
    elif part.image_url is not None and images <= MAX_IMAGES:
        append_image(prompt, part.image_url.url if isinstance(part.image_url, _Url) else part.image_url)


def append_image(prompt: bytearray, address: str) -> None:
    """``address`` is a URL, or the image itself in base64."""
    # An image must not shift what follows: align, then stand-in tokens that differ from image to image.
    prompt += bytes(-len(prompt) % 4)
    prompt += zlib.crc32(address.encode()).to_bytes(4, "little") * IMAGE_TOKENS


def given(value: msgspec.Raw) -> bytes:
    """The JSON of an optional field; empty when it is absent or null."""
    text = bytes(value)
    return b"" if text == b"null" else text


def _is_empty(text: bytes) -> bool:
    """Whether JSON is absent, an empty string or an empty list."""
    return text.translate(None, b" \t\r\n") in (b"", b'""', b"[]")


def _input(body: bytes) -> Parsed:
    b = decoded(_INPUT, body)
    parts = [given(p) for p in (b.instructions, b.tools, b.input)]
    if _is_empty(parts[-1]):
        raise BadRequest("invalid request: must have input field")
    return parsed_of(b, (b"".join(parts),), b.max_output_tokens)


def _embedding(body: bytes) -> Parsed:
    b = decoded(_EMBEDDING, body)
    text = given(b.input)
    if _is_empty(text):
        raise BadRequest("invalid request: must have input field")
    return parsed_of(b, _token_prompts(text) or (text,), None)


def _token_prompts(text: bytes) -> tuple[bytes, ...]:
    """One prompt for ``[1, 2]``, one each for ``[[1], [2, 3]]``; none when the JSON holds anything but token ids."""
    try:
        ids = _TOKEN_IDS.decode(text)  # stops at the first character of a text, and at the first text of a list
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ()
    kinds = {type(one) for one in ids}
    if len(kinds) > 1:
        return ()
    return tuple(token_bytes(one, "embeddings") for one in (ids if kinds == {list} else [ids]))


def _image(body: bytes) -> Parsed:
    b = decoded(_IMAGE, body)
    if not b.prompt:
        raise BadRequest("invalid images request: must have prompt field")
    return parsed_of(b, (b.prompt.encode(),), None)


def _conversation(body: bytes) -> Parsed:
    b = decoded(_CONVERSATION, body)
    items = given(b.items)
    if _is_empty(items):
        raise BadRequest("invalid conversations request: must have items field")
    return parsed_of(b, (items,), None)


_READERS = {
    "completion": _completion,
    "chat": _chat,
    "input": _input,
    "embedding": _embedding,
    "image": _image,
    "conversation": _conversation,
}


def parsed_of(body: Body, prompts: tuple[bytes, ...], max_output_tokens: int | None) -> Parsed:
    return Parsed(
        model=body.model,
        prompts=prompts,
        max_output_tokens=max_output_tokens,
        streaming=bool(body.stream),
        cache_salt=body.cache_salt or "",
    )


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    """The ``usage`` object of a reply.

    ``input_tokens`` and ``output_tokens`` are the names of the Responses API and of Anthropic; ``cache_...`` are
    Anthropic's, whose ``input_tokens`` are only those neither read from the cache nor written to it.
    """

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None

    @property
    def prompt(self) -> int | None:
        if self.prompt_tokens is not None or self.input_tokens is None:
            return self.prompt_tokens
        return self.input_tokens + (self.cache_read_input_tokens or 0) + (self.cache_creation_input_tokens or 0)

    @property
    def output(self) -> int | None:
        return self.completion_tokens if self.completion_tokens is not None else self.output_tokens

    @property
    def cached(self) -> int | None:
        details = self.prompt_tokens_details or self.input_tokens_details
        return details.cached_tokens if details else self.cache_read_input_tokens


_USAGE = msgspec.json.Decoder(Usage)
_USAGE_KEY = b'"usage"'


def usage_in_tail(tail: bytes) -> Usage | None:
    """The last complete ``usage`` object in the final bytes of a reply, streamed or whole; None if there is none."""
    at = tail.rfind(_USAGE_KEY)
    while at >= 0:
        text = tail[at + len(_USAGE_KEY) :].lstrip(b" :\r\n\t")
        if text.startswith(b"{") and (end := _object_end(text)):
            try:
                return _USAGE.decode(text[:end])
            except (msgspec.DecodeError, RecursionError):
                pass
        at = tail.rfind(_USAGE_KEY, 0, at)
    return None


def _object_end(text: bytes) -> int:
    """Length of the JSON object ``text`` starts with; 0 if it is cut short. Usage holds no strings with braces."""
    depth = 0
    for i, c in enumerate(text):
        if c == 0x7B:
            depth += 1
        elif c == 0x7D:
            depth -= 1
            if not depth:
                return i + 1
    return 0


_OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])


def with_model(body: bytes, model: str) -> bytes:
    """``body`` with another ``model``. All other values keep their very bytes, and the order stays.

    BadRequest when it cannot be read that far.
    """
    fields = decoded(_OBJECT, body)
    fields["model"] = msgspec.Raw(msgspec.json.encode(model))
    return b"{" + b",".join(msgspec.json.encode(k) + b":" + bytes(v) for k, v in fields.items()) + b"}"
