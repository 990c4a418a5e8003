"""One line of a batch input: its shape, the text a model will read first, and that text's prefix chain. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

import msgspec

BLOCK_BYTES = 256
BLOCKS = 4
"""Blocks of the chain: lines that agree for longer run together anyway, in the order of the file."""
LINK_BYTES = 8
MEDIA_BYTES = 4096
"""What an embedded image or sound counts as: about a thousand tokens, whatever its size."""
MAX_NUMBER_RUN = 1 << 20
"""Numbers of one prompt that are looked at one by one: more tokens than any model reads."""


class Body(msgspec.Struct):
    """The fields of a request's body that matter here; all others are the engine's business."""

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
    """Code, message and parameter of what is wrong with a line that is JSON but no ``Line``.

    Raises as msgspec does where it is no JSON after all: it may be broken behind the first wrong type.
    """
    line = msgspec.json.decode(raw)
    if not isinstance(line, dict):
        return "invalid_json_line", f"This line is {_kind(line)}; a JSON object is expected.", None
    body = line.get("body")
    inner = body if isinstance(body, dict) else {}
    fields = [("custom_id", line, str), ("method", line, str), ("url", line, str), ("body", line, dict)]
    for name, holder, kind in [*fields, ("body.model", inner, str)]:
        value = holder.get(name.removeprefix("body."))
        if value is None:
            return "missing_required_parameter", f"{name} is missing; {_EXPECTED[kind]} is expected.", name
        if not isinstance(value, kind):
            return "invalid_type", f"{name} is {_kind(value)}; {_EXPECTED[kind]} is expected.", name
    return "invalid_json_line", "This line is not a request: custom_id, method, url and body are expected.", None


_EXPECTED: dict[type, str] = {str: "a string", dict: "an object"}
_KINDS: dict[type, str] = {**_EXPECTED, bool: "a boolean", int: "a number", float: "a number", list: "an array"}


def _kind(value: object) -> str:
    return _KINDS.get(type(value), "null")


def prompt(body: Body) -> tuple[bytes, int]:
    """The start of the prompt in one canonical form (text alone or as one text part is the same), and its size."""
    parts: list[str] = []
    kept = size = 0
    for text in _texts([body.instructions, body.messages, body.prompt, body.input]):
        if text.startswith("data:") and ";base64," in text[:100]:
            size += MEDIA_BYTES
        else:
            size += len(text) if text.isascii() else len(text.encode())
        if kept < BLOCK_BYTES * BLOCKS:
            parts.append(text)
            kept += len(text)
    return "".join(parts).encode()[: BLOCK_BYTES * BLOCKS], min(size, 0xFFFFFFFF)


def chain(model: str, tools: bytes, text: bytes) -> bytes:
    """``BLOCKS`` links of ``LINK_BYTES``, each over its block and the link before it; zeros where the text ends.

    The model and its tools seed it: templates put tools before all messages.
    """
    link = blake2b(model.encode() + b"\0" + tools, digest_size=LINK_BYTES).digest()
    links = []
    for start in range(0, max(1, len(text)), BLOCK_BYTES):
        link = blake2b(link + text[start : start + BLOCK_BYTES], digest_size=LINK_BYTES).digest()
        links.append(link)
    return b"".join(links).ljust(BLOCKS * LINK_BYTES, b"\0")


def embedding_inputs(value: object) -> int:
    """How many texts an embeddings request asks for: a list of token ids is one."""
    return len(value) if isinstance(value, list) and value and isinstance(value[0], str | list) else 1


def _texts(value: object) -> Iterator[str]:
    """Every string within, in the order a template reads them; a stack, as input may nest deeper than Python calls."""
    stack, numbers = [value], 0
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, list):
            stack.extend(reversed(item))
        elif isinstance(item, dict):
            stack.extend(item[key] for key in sorted(item, reverse=True) if key not in ("role", "type"))
            if "role" in item:
                stack.append(item["role"])
        elif isinstance(item, int) and not isinstance(item, bool) and numbers < MAX_NUMBER_RUN:
            numbers += 1
            yield f"{item} "
