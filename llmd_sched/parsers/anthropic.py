"""Anthropic request bodies: the Messages API and its token counter.

The prompt is what the model will read, in its order: tools, system text, then role and content of each message. Text
counts four bytes to a token, as for OpenAI bodies.
"""

from __future__ import annotations

import msgspec

from llmd_sched.errors import BadRequest
from llmd_sched.parsers.body import ABSENT, Body, decoded, given, parsed_of
from llmd_sched.parsers.media import Sizes
from llmd_sched.parsers.prompt import MediaParser, Prompt
from llmd_sched.plugin import Parsed

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


class AnthropicParser(MediaParser, frozen=True):
    """The Messages API of Anthropic, and its token counter, which has a model but, since nothing is run, no prompt."""

    def read(self, path: str, body: bytes, sizes: Sizes) -> Parsed:
        if path.endswith(_COUNT_SUFFIX):
            return Parsed(model=decoded(_COUNT, body).model)
        b = decoded(_MESSAGES, body)
        if not b.messages:
            raise BadRequest("invalid messages request: must have valid messages field")
        prompt = Prompt(sizes)
        prompt.add(given(b.tools))
        _add_all(prompt, b.system, "system")
        for message in b.messages:
            prompt.add(message.role)
            _add_all(prompt, message.content, message.role)
        return parsed_of(b, (bytes(prompt),), b.max_tokens, prompt.media)


AnthropicParser.suffixes = ("messages", _COUNT_SUFFIX)


def _add_all(prompt: Prompt, content: str | list[_Part] | list[_Block] | None, role: str) -> None:
    if isinstance(content, str):
        prompt.add(content)
        return
    for part in content or ():
        if role != "system" or not (part.text or "").startswith(BILLING_MARK):
            _add(prompt, part)


def _add(prompt: Prompt, part: _Part) -> None:
    """A block of a kind that is not listed adds nothing."""
    if part.type == "text":
        prompt.add(part.text)
    elif part.type == "image":
        source = part.source if isinstance(part.source, _Source) else _Source(url=part.source)
        prompt.image(source.url or source.data or source.file_id or "", "" if source.url else source.data or "")
    elif isinstance(part, _Block):
        if part.type == "thinking":
            prompt.add(part.thinking)
        elif part.type == "tool_use":
            prompt.add((part.id or "") + (part.name or ""))
            prompt.add(given(part.input))
        elif part.type == "tool_result" and not isinstance(part.content, dict):
            _add_all(prompt, part.content, "tool")
