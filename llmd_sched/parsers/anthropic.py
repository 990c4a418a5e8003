"""Anthropic request bodies: the Messages API and its token counter.

The prompt is what the model will read, in its order: tools, system text, then role and content of each message. Text
counts four bytes to a token, as for OpenAI bodies.
"""

from __future__ import annotations

import msgspec

from llmd_sched.errors import BadRequest
from llmd_sched.parsers.openai import ABSENT, MAX_IMAGES, Body, append_image, decoded, given, parsed_of
from llmd_sched.plugin import Parsed, Parser

BILLING_MARK = "x-anthropic-billing-header"
"""Begins a system block of Claude Code. It differs from request to request, and servers drop it: no common prefix."""


class _Source(msgspec.Struct):
    url: str | None = None
    data: str | None = None
    file_id: str | None = None


class _Part(msgspec.Struct):
    """A block inside a tool's result."""

    type: str = "text"
    text: str | None = None
    source: _Source | str | None = None


class _Block(_Part):
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: msgspec.Raw = ABSENT
    content: str | list[_Part] | dict[str, msgspec.Raw] | None = None


class _Message(msgspec.Struct):
    role: str
    content: str | list[_Block] | None = None


class _Messages(Body):
    messages: list[_Message] | None = None
    system: str | list[_Part] | None = None
    tools: msgspec.Raw = ABSENT
    max_tokens: int | None = None


_MESSAGES = msgspec.json.Decoder(_Messages)
_COUNT = msgspec.json.Decoder(Body)

_COUNT_SUFFIX = "messages/count_tokens"


class AnthropicParser(Parser, frozen=True):
    """The Messages API of Anthropic, and its token counter, which has a model but, since nothing is run, no prompt."""

    def parse(self, path: str, body: bytes) -> Parsed:
        if path.endswith(_COUNT_SUFFIX):
            return Parsed(model=decoded(_COUNT, body).model)
        b = decoded(_MESSAGES, body)
        if not b.messages:
            raise BadRequest("invalid messages request: must have valid messages field")
        return parsed_of(b, (_prompt(b, b.messages),), b.max_tokens)


AnthropicParser.suffixes = ("messages", _COUNT_SUFFIX)


def _prompt(body: _Messages, messages: list[_Message]) -> bytes:
    prompt = bytearray(given(body.tools))
    images = _append_all(prompt, body.system, "system", 0)
    for message in messages:
        prompt += message.role.encode()
        images = _append_all(prompt, message.content, message.role, images)
    return bytes(prompt)


def _append_all(prompt: bytearray, content: str | list[_Part] | list[_Block] | None, role: str, images: int) -> int:
    """Returns how many images the prompt has by now."""
    if isinstance(content, str):
        prompt += content.encode()
        return images
    for part in content or ():
        if role == "system" and part.text is not None and part.text.startswith(BILLING_MARK):
            continue
        images = _append(prompt, part, images)
    return images


def _append(prompt: bytearray, part: _Part, images: int) -> int:
    """A block of a kind that is not listed adds nothing. Returns how many images the prompt has by now."""
    if part.type == "text":
        prompt += (part.text or "").encode()
    elif part.type == "image":
        images += 1
        if images <= MAX_IMAGES:
            append_image(prompt, _address(part.source))
    elif isinstance(part, _Block):
        if part.type == "thinking":
            prompt += (part.thinking or "").encode()
        elif part.type == "tool_use":
            prompt += (part.id or "").encode() + (part.name or "").encode() + given(part.input)
        elif part.type == "tool_result" and not isinstance(part.content, dict):
            images = _append_all(prompt, part.content, "tool", images)
    return images


def _address(source: _Source | str | None) -> str:
    """What tells one image from another."""
    if isinstance(source, _Source):
        return source.url or source.data or source.file_id or ""
    return source or ""
