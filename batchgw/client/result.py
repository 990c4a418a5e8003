"""One line of an output or error file: OpenAI's shape, made once and stored as it is."""

from __future__ import annotations

import uuid
from typing import Any

import msgspec

from batchgw.records import Result, Usage

EXPIRED = ("batch_expired", "This request could not be executed before the completion window expired.")
CANCELLED = ("batch_cancelled", "This request was not executed because the batch was cancelled.")
FAILED = ("batch_failed", "This request was not executed because the batch failed.")

NULL_ERROR_END = b',"error":null}\n'
"""How a line with an HTTP answer ends; the switch ``llm-d`` sends these to the output file whatever their status."""

Error = tuple[str, str]
"""Code and message."""


class _Response(msgspec.Struct):
    status_code: int
    request_id: str
    body: Any


class _Error(msgspec.Struct):
    code: str
    message: str


class _Line(msgspec.Struct):
    id: str
    custom_id: str
    response: _Response | None
    error: _Error | None


def request_id(batch_id: str, custom_id: str) -> str:
    """The same whenever the line is sent, so that a repeated one is recognised."""
    return f"batch_req_{uuid.uuid5(uuid.NAMESPACE_OID, f'{batch_id}{chr(0)}{custom_id}')}"


def answered(batch_id: str, line: int, custom_id: str, status: int, body: bytes, served_as: str = "") -> Result:
    """The engine side's answer, whatever its status; a ``body`` that is no JSON is kept as text.

    ``served_as``: the id the answer carried; ours when it carried none.
    """
    id = request_id(batch_id, custom_id)
    ok = 200 <= status < 300
    response = _Response(status, served_as or id, _one_line(body))
    output = msgspec.json.encode(_Line(id, custom_id, response, None)) + b"\n"
    return Result(line=line, ok=ok, output=output, usage=usage_of(body) if ok else NO_USAGE)


def unanswered(batch_id: str, line: int, custom_id: str, error: Error) -> Result:
    """A line that has no HTTP answer."""
    made = _Line(request_id(batch_id, custom_id), custom_id, None, _Error(*error))
    return Result(line=line, ok=False, output=msgspec.json.encode(made) + b"\n", usage=NO_USAGE)


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _OutputDetails(msgspec.Struct):
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct):
    """Chat, completions and embeddings say prompt and completion, responses say input and output."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None
    input_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _OutputDetails | None = None
    output_tokens_details: _OutputDetails | None = None


class _Used(msgspec.Struct):
    usage: _Usage | None = None


NO_USAGE = Usage(0, 0, 0, 0)
_used = msgspec.json.Decoder(_Used)


def usage_of(body: bytes) -> Usage:
    """Tokens an answer says it took; zeros where it does not say, or says it in a shape that nobody uses."""
    try:
        usage = _used.decode(body).usage or _Usage()
    except msgspec.DecodeError:
        return NO_USAGE
    prompt = usage.prompt_tokens_details or usage.input_tokens_details or _PromptDetails()
    output = usage.completion_tokens_details or usage.output_tokens_details or _OutputDetails()
    return Usage(
        input_tokens=usage.prompt_tokens or usage.input_tokens or 0,
        cached_tokens=prompt.cached_tokens or 0,
        output_tokens=usage.completion_tokens or usage.output_tokens or 0,
        reasoning_tokens=output.reasoning_tokens or 0,
    )


def _one_line(body: bytes) -> Any:
    """As JSON without line breaks, copied where it is that already; as a string where it is no JSON."""
    try:
        value = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return body.decode(errors="replace")
    return value if b"\n" in body or b"\r" in body else msgspec.Raw(body)
