"""Token counts out of the end of a JSON reply, whole or streamed."""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec

T = TypeVar("T")


class Details(msgspec.Struct):
    """Of the prompt's tokens."""

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
    prompt_tokens_details: Details | None = None
    input_tokens_details: Details | None = None
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


class _MetaInfo(msgspec.Struct):
    """SGLang's own. It counts up from event to event and is complete once there is a reason to finish."""

    finish_reason: msgspec.Raw = msgspec.Raw(b"null")
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None


_USAGE = msgspec.json.Decoder(Usage)
_META_INFO = msgspec.json.Decoder(_MetaInfo)
_USAGE_KEY, _META_INFO_KEY = b'"usage"', b'"meta_info"'


def usage_in_tail(tail: bytes) -> Usage | None:
    """The last complete ``usage`` object in the final bytes of a reply, streamed or whole; None if there is none.

    Where the reply knows no such object, SGLang's ``meta_info`` of a finished reply.
    """
    found = _last(tail, _USAGE_KEY, _USAGE)
    if found is not None:
        return found
    info = _last(tail, _META_INFO_KEY, _META_INFO)
    if info is None or bytes(info.finish_reason) == b"null":
        return None
    cached = None if info.cached_tokens is None else Details(cached_tokens=info.cached_tokens)
    return Usage(
        prompt_tokens=info.prompt_tokens, completion_tokens=info.completion_tokens, prompt_tokens_details=cached
    )


def _last(tail: bytes, key: bytes, decoder: msgspec.json.Decoder[T]) -> T | None:
    """The last object called ``key`` that can be decoded."""
    at = tail.rfind(key)
    while at >= 0:
        text = tail[at + len(key) :].lstrip(b" :\r\n\t")
        if text.startswith(b"{") and (end := _object_end(text)):
            try:
                return decoder.decode(text[:end])
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                pass
        at = tail.rfind(key, 0, at)
    return None


_STRING_OR_BRACE = re.compile(rb'"(?:[^"\\]|\\.)*"|[{}]', re.DOTALL)


def _object_end(text: bytes) -> int:
    """Length of the JSON object ``text`` starts with; 0 if it is cut short."""
    depth = 0
    for found in _STRING_OR_BRACE.finditer(text):
        if found[0] == b"{":
            depth += 1
        elif found[0] == b"}":
            depth -= 1
            if not depth:
                return found.end()
    return 0
