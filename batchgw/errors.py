"""What can go wrong, as one tree; a refusal knows its HTTP status, OpenAI's type and a code to program against.

What storage raises stands with its protocol (``store.base``, ``blobs``).

GatewayError
├── ConfigError              bad configuration: dies at start, names the path in the file
└── Refusal                  one request of a user is refused; becomes OpenAI's error envelope
    ├── InvalidRequest       400
    │   └── MissingParameter 400, missing_required_parameter
    ├── InvalidKey           401, invalid_api_key
    ├── Forbidden            403
    ├── NotFound             404
    ├── MethodNotAllowed     405
    ├── TooSlow              408, the client stopped sending
    ├── Conflict             409, permanent: the client must not retry
    ├── RangeNotSatisfiable  416
    ├── OverQuota            429, code says which quota; the client must not retry at once
    ├── Internal             500 (a fault of ours)
    └── Unavailable          503, passes by itself
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class GatewayError(Exception):
    """Base of all errors this package raises on purpose."""


class ConfigError(GatewayError):
    """The configuration cannot be used. ``path`` is where, as ``$.api.limits.maxLineCount``."""

    def __init__(self, message: str, path: str = "$") -> None:
        super().__init__(f"{path}: {message}")
        self.path = path


class Refusal(GatewayError):
    """One request is refused: ``param`` names the offending field, ``code`` what a program tells it by."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str | None] = None
    default_headers: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.default_code
        self.headers = {**self.default_headers, **(headers or {})}


class InvalidRequest(Refusal):
    """The request itself is wrong; sending it again would not help."""

    status, type = 400, "invalid_request_error"


class MissingParameter(InvalidRequest):
    """A field that has no default is absent."""

    default_code = "missing_required_parameter"

    def __init__(self, param: str, accepted: str) -> None:
        super().__init__(f"Missing required parameter: '{param}' ({accepted})", param)


class InvalidKey(Refusal):
    """No API key, or one that is unknown or revoked."""

    status, type, default_code = 401, "authentication_error", "invalid_api_key"
    default_headers: ClassVar = {"www-authenticate": "Bearer"}


class Forbidden(Refusal):
    """Who asks may not ask this."""

    status, type = 403, "permission_error"


class NotFound(Refusal):
    """No such thing, or it is another tenant's: the two cannot be told apart."""

    status, type = 404, "not_found_error"


class MethodNotAllowed(Refusal):
    """The path exists, this verb on it does not."""

    status, type = 405, "api_error"


class TooSlow(Refusal):
    """The client sent nothing for as long as it may."""

    status, type, default_code = 408, "api_error", "request_timeout"


class Conflict(Refusal):
    """The state of the thing forbids it. OpenAI's clients retry every 409 that does not tell them not to."""

    status, type = 409, "api_error"
    default_headers: ClassVar = {"x-should-retry": "false"}


class RangeNotSatisfiable(Refusal):
    """No byte of the asked range exists."""

    status, type, default_code = 416, "api_error", "range_not_satisfiable"


class OverQuota(Refusal):
    """A quota of the tenant is used up; it frees by work ending or files going, not within a client's retries."""

    status, type = 429, "rate_limit_error"
    default_headers: ClassVar = {"x-should-retry": "false"}


class Internal(Refusal):
    """A fault of ours."""

    default_code = "internal_error"


class Unavailable(Refusal):
    """Storage does not answer now."""

    status, default_code = 503, "unavailable"
    default_headers: ClassVar = {"retry-after": "1"}
