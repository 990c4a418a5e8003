"""What a line of a batch asks: its fields, the text of its prompt, and a chain of hashes of the prompt's head."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import Any

import msgspec

MEDIA_BYTES = 1024
"""What an image, a sound or a file counts for, whatever its size: a tokenizer does not see its base64."""
TOKEN_BYTES = 4
"""Of a prompt given as token ids."""
BLOCK_BYTES = 256
LINKS = 4
"""Blocks of a prompt that the chain covers."""
DEEPEST = 6
"""Lists and objects in one another that are read for text; messages have 4."""

_MEDIA = ("image_url", "input_image", "input_audio", "audio_url", "video_url", "file", "input_file")


class Body(msgspec.Struct):
    """The part of a request's body that a batch looks at; all else passes unread."""

    model: str
    stream: Any = None
    messages: Any = None
    prompt: Any = None
    input: Any = None
    instructions: Any = None
    tools: msgspec.Raw = msgspec.Raw(b"")


class Line(msgspec.Struct):
    custom_id: str
    method: str
    url: str
    body: Body


def explain(raw: bytes) -> tuple[str, str, str | None]:
    """(code, message, param) of a line that is JSON and no request."""
    try:
        line = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return "invalid_json_line", "This line is not parseable as valid JSON.", None
    if not isinstance(line, dict):
        return "invalid_json_line", "This line is JSON but no object; {...} is expected.", None
    for name, kind in (("custom_id", str), ("method", str), ("url", str), ("body", dict)):
        wrong = _wrong(line, name, kind, name)
        if wrong is not None:
            return wrong
    return _wrong(line["body"], "model", str, "body.model") or ("invalid_request", "This line is no request.", None)


def _wrong(holder: dict[str, Any], name: str, kind: type, param: str) -> tuple[str, str, str] | None:
    expected = "an object" if kind is dict else "a string"
    if name not in holder:
        return "missing_required_parameter", f"{param} is missing; {expected} is expected.", param
    if not isinstance(holder[name], kind):
        return "invalid_type", f"{param} is of the wrong type; {expected} is expected.", param
    return None


def prompt(body: Body) -> tuple[bytes, int]:
    """The head of the prompt's text, as far as ``chain`` reads, and the size of all of it in bytes."""
    head, size = bytearray(), 0
    for part in _parts(body):
        size += len(part) if isinstance(part, bytes) else part
        if isinstance(part, bytes) and len(head) < BLOCK_BYTES * LINKS:
            head += part[: BLOCK_BYTES * LINKS - len(head)]
    return bytes(head), size


def _parts(body: Body) -> Iterator[bytes | int]:
    """Text, or the bytes that something without text counts for."""
    for value in (body.instructions, body.messages, body.prompt, body.input):
        yield from _text(value)


def _text(value: Any, depth: int = DEEPEST) -> Iterator[bytes | int]:
    if not depth:
        return
    match value:
        case str():
            yield value.encode("utf-8", "surrogatepass")
        case bool() | None:
            return
        case int():
            yield TOKEN_BYTES
        case list():
            for one in value:
                yield from _text(one, depth - 1)
        case {"type": kind} if kind in _MEDIA:
            yield MEDIA_BYTES
        case dict():
            for name in ("role", "text", "content"):
                yield from _text(value.get(name), depth - 1)


def chain(model: str, tools: bytes, head: bytes) -> bytes:
    """``LINKS`` hashes of 8 bytes; equal up to link n where model, tools and the first n + 1 blocks are.

    A last block that is not full is hashed as it is; links beyond the prompt's end repeat the last one.
    """
    link = blake2b(model.encode() + b"\0" + tools, digest_size=8).digest()
    links = bytearray()
    for at in range(0, BLOCK_BYTES * LINKS, BLOCK_BYTES):
        block = head[at : at + BLOCK_BYTES]
        if block:
            link = blake2b(link + block, digest_size=8).digest()
        links += link
    return bytes(links)


def embedding_inputs(value: Any) -> int:
    """How many texts ``input`` holds: a string or a list of token ids is one."""
    if not isinstance(value, list) or not _many(value):
        return 1
    return len(value)


def _many(values: Iterable[Any]) -> bool:
    return any(isinstance(one, str | list) for one in values)
