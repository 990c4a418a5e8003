"""OpenAI request bodies.

A body is decoded once, into just the fields that matter; everything else is skipped without being built. Text is kept
as bytes: four of them count as one token (the reference's estimate), so no tokenizer is needed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import msgspec

from llmd_sched.errors import BadRequest
from llmd_sched.parsers.body import ABSENT, Body, decoded, given, parsed_of, taken_ids, token_bytes
from llmd_sched.parsers.media import Sizes
from llmd_sched.parsers.prompt import MediaParser, Prompt
from llmd_sched.plugin import Parsed


class _Completion(Body):
    prompt: str | list[str | int | list[int]] | None = None
    max_tokens: int | None = None


class _CompletionOfIds(Body, rename={"ids": "prompt"}):
    ids: msgspec.Raw = ABSENT
    max_tokens: int | None = None


class _Url(msgspec.Struct):
    url: str = ""


class _Audio(msgspec.Struct):
    data: str = ""


class _Part(msgspec.Struct):
    type: str = "text"
    text: str | None = None
    image_url: _Url | str | None = None
    video_url: _Url | str | None = None
    audio_url: _Url | str | None = None
    input_audio: _Audio | None = None


class _Function(msgspec.Struct):
    """``arguments`` is JSON in a string, or the JSON itself, which some servers take too."""

    name: str | None = None
    arguments: msgspec.Raw = ABSENT


class _Call(msgspec.Struct):
    function: _Function | None = None


class _Message(msgspec.Struct):
    role: str
    content: str | list[_Part] | None = None
    tool_calls: list[_Call] | None = None


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


class _EmbeddingOfIds(Body, rename={"ids": "input"}):
    ids: msgspec.Raw = ABSENT


class _Image(Body):
    prompt: str | None = None


class _Conversation(Body):
    items: msgspec.Raw = ABSENT


_COMPLETION = msgspec.json.Decoder(_Completion)
_COMPLETION_OF_IDS = msgspec.json.Decoder(_CompletionOfIds)
_CHAT = msgspec.json.Decoder(_Chat)
_INPUT = msgspec.json.Decoder(_Input)
_EMBEDDING = msgspec.json.Decoder(_Embedding)
_EMBEDDING_OF_IDS = msgspec.json.Decoder(_EmbeddingOfIds)
_IMAGE = msgspec.json.Decoder(_Image)
_CONVERSATION = msgspec.json.Decoder(_Conversation)
_STRING = msgspec.json.Decoder(str)
_TOKEN_IDS: msgspec.json.Decoder[list[Any]] = msgspec.json.Decoder(list[int | list[int]])


class OpenAIParser(MediaParser, frozen=True):
    """Chat completions, completions, embeddings, responses, conversations, image generations and the render paths."""

    def read(self, path: str, body: bytes, sizes: Sizes) -> Parsed:
        return next(read for suffix, read in _READERS.items() if path.endswith(suffix))(body, sizes)


def _completion(body: bytes, sizes: Sizes) -> Parsed:
    if taken := taken_ids(_COMPLETION_OF_IDS, body, "prompt"):
        return parsed_of(taken[0], taken[1], taken[0].max_tokens)
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


def _chat(body: bytes, sizes: Sizes) -> Parsed:
    b = decoded(_CHAT, body)
    if not b.messages:
        raise BadRequest("invalid chat completions request: must have valid messages field")
    prompt = Prompt(sizes)
    prompt.add(given(b.tools))
    for message in b.messages:
        prompt.add(message.role)
        if isinstance(message.content, str):
            prompt.add(message.content)
        else:
            for part in message.content or ():
                _add_part(prompt, part)
        for call in message.tool_calls or ():
            _add_call(prompt, call)
    return parsed_of(b, (bytes(prompt),), b.max_completion_tokens or b.max_tokens, prompt.media)


def _add_part(prompt: Prompt, part: _Part) -> None:
    """A part of a kind that is not listed adds nothing."""
    if part.text is not None:
        prompt.add(part.text)
    elif part.image_url is not None:
        prompt.image(_address(part.image_url))
    elif part.video_url is not None:
        prompt.video(_address(part.video_url))
    elif part.audio_url is not None:
        prompt.audio(_address(part.audio_url))
    elif part.input_audio is not None:
        prompt.audio(part.input_audio.data)


def _address(url: _Url | str) -> str:
    return url.url if isinstance(url, _Url) else url


def _add_call(prompt: Prompt, call: _Call) -> None:
    if call.function is not None:
        prompt.add(call.function.name)
        arguments = given(call.function.arguments)
        prompt.add(decoded(_STRING, arguments) if arguments.startswith(b'"') else arguments)


_EMPTY = re.compile(rb'[ \t\r\n]*(?:""|\[[ \t\r\n]*\])?[ \t\r\n]*')


def _is_empty(text: bytes) -> bool:
    """Whether JSON is absent, an empty string or an empty list."""
    return _EMPTY.fullmatch(text) is not None


def _input(body: bytes, sizes: Sizes) -> Parsed:
    b = decoded(_INPUT, body)
    parts = [given(p) for p in (b.instructions, b.tools, b.input)]
    if _is_empty(parts[-1]):
        raise BadRequest("invalid request: must have input field")
    return parsed_of(b, (b"".join(parts),), b.max_output_tokens)


def _embedding(body: bytes, sizes: Sizes) -> Parsed:
    if taken := taken_ids(_EMBEDDING_OF_IDS, body, "input"):
        return parsed_of(taken[0], taken[1], None)
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


def _image(body: bytes, sizes: Sizes) -> Parsed:
    b = decoded(_IMAGE, body)
    if not b.prompt:
        raise BadRequest("invalid images request: must have prompt field")
    return parsed_of(b, (b.prompt.encode(),), None)


def _conversation(body: bytes, sizes: Sizes) -> Parsed:
    b = decoded(_CONVERSATION, body)
    items = given(b.items)
    if _is_empty(items):
        raise BadRequest("invalid conversations request: must have items field")
    return parsed_of(b, (items,), None)


_READERS: dict[str, Callable[[bytes, Sizes], Parsed]] = {
    "chat/completions/render": _chat,
    "chat/completions": _chat,
    "completions/render": _completion,
    "completions": _completion,
    "embeddings": _embedding,
    "responses": _input,
    "conversations": _conversation,
    "images/generations": _image,
}
OpenAIParser.suffixes = tuple(_READERS)
