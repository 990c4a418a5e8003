"""Another model's name in a request body, and not a byte changed beside it."""

from __future__ import annotations

import msgspec

from llmd_sched.errors import BadRequest
from llmd_sched.parsers.body import ABSENT, decoded
from llmd_sched.parsers.tokens import offset


class _Model(msgspec.Struct):
    model: msgspec.Raw = ABSENT


_MODEL = msgspec.json.Decoder(_Model)

NEAR_END_BYTES = 4096
"""Where ``model`` is looked for first: some clients write it after the prompt, and then the prompt need not be read."""


def with_model(body: bytes, model: str) -> bytes:
    """``body`` with another value of its ``model``, and not a byte of it changed beside that; added when it has none.

    Of several fields of that name it is the last, which is the one that servers read. ``body`` is one that has been
    parsed; BadRequest for most others.
    """
    new = msgspec.json.encode(model)
    begin, end = _model_near_end(body) or _model(body)
    if begin < end:
        return body[:begin] + new + body[end:]
    end = body.rindex(b"}")
    comma = b"" if body[:end].rstrip(b" \t\r\n").endswith(b"{") else b","
    return body[:end] + comma + b'"model":' + new + body[end:]


def _model(body: bytes) -> tuple[int, int]:
    """Where the value of ``model`` begins and ends; twice the same when there is none."""
    value = decoded(_MODEL, body).model
    size = len(bytes(value))
    begin = offset(value, body) if size else 0
    return begin, begin + size


def _model_near_end(body: bytes) -> tuple[int, int] | None:
    """The same, when it can be found without reading all of ``body``.

    Of a field of this object, and not of an inner one, what follows it is an object when one brace is put before it.
    """
    at = body.rfind(b'"model"', max(0, len(body) - NEAR_END_BYTES))
    if at < 0:
        return None
    try:
        begin, end = _model(b"{" + body[at:])
    except BadRequest:
        return None
    return begin + at - 1, end + at - 1
