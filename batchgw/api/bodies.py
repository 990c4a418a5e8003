"""JSON bodies of requests: read within a limit, decoded into structs; unknown fields are ignored, as OpenAI does."""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec
from fastapi import Request

from batchgw.api.settings import EXPIRY_S
from batchgw.errors import InvalidRequest, MissingParameter

T = TypeVar("T")

_MISSING = re.compile(r"Object missing required field `(\w+)`")
_PATH = re.compile(r" - at `\$\.?([^`]*)`$")


class ExpiresAfter(msgspec.Struct, frozen=True):
    anchor: str
    seconds: int


async def read_json(request: Request, kind: type[T], limit_bytes: int) -> T:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit_bytes:
            raise InvalidRequest(f"The request's body exceeds {limit_bytes} bytes.", code="body_too_large")
    try:
        return msgspec.json.decode(body or b"{}", type=kind)
    except msgspec.ValidationError as e:
        raise refusal(str(e)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise InvalidRequest(f"The request's body is not valid JSON: {e}", code="invalid_json") from None


def refusal(message: str) -> InvalidRequest:
    """msgspec's complaint, which ends in the path, as a refusal that names the parameter."""
    found = _PATH.search(message)
    path = found[1].replace("...", "") if found else ""
    what = _PATH.sub("", message)
    if missing := _MISSING.fullmatch(what):
        return MissingParameter(".".join(filter(None, (path, missing[1]))), "it has no default")
    return InvalidRequest(f"Invalid value for '{path or 'body'}': {what}", path or None, "invalid_type")


def expiry_s(wanted: ExpiresAfter | None, name: str = "expires_after") -> int | None:
    """Raises InvalidRequest."""
    if wanted is None:
        return None
    if wanted.anchor != "created_at":
        shown = repr(wanted.anchor[:80])
        raise InvalidRequest(f"Invalid value for '{name}.anchor': {shown}; accepted is 'created_at'", f"{name}.anchor")
    least, most = EXPIRY_S
    if not least <= wanted.seconds <= most:
        raise InvalidRequest(
            f"Invalid value for '{name}.seconds': {wanted.seconds}; {least} to {most} are accepted", f"{name}.seconds"
        )
    return wanted.seconds


def expiry_of_form(fields: dict[str, str]) -> int | None:
    """``expires_after[anchor]`` and ``expires_after[seconds]`` of a form: both or neither. Raises InvalidRequest."""
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    if anchor is None or seconds is None:
        absent = "anchor" if anchor is None else "seconds"
        raise MissingParameter(f"expires_after[{absent}]", "anchor and seconds come together")
    if not re.fullmatch(r"\d{1,9}", seconds, re.ASCII):
        raise InvalidRequest(
            f"Invalid value for 'expires_after[seconds]': {seconds[:80]!r}; an integer is expected",
            "expires_after[seconds]",
        )
    return expiry_s(ExpiresAfter(anchor, int(seconds)))
