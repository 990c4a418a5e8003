"""What can go wrong, as one tree; the class says the HTTP status and the reason a proxy's client is given.

SchedError
├── ConfigError              bad configuration: dies at start, names the path in the file
└── RequestError             refuses one request; becomes an immediate response
    ├── BadRequest           400
    ├── PayloadTooLarge      413
    ├── NotCached            412 (the client asked for a cached prompt or nothing)
    ├── NoCandidates         503, rejected-no-endpoints
    ├── NoneLeft             429, rejected-saturated (filters drained the candidates)
    ├── NotAdmitted          429, rejected-saturated (an admitter refused)
    ├── QueueFull            429, rejected-saturated (a cap on what may be queued)
    ├── QueuedTooLong        429, rejected-ttl-expired
    ├── ClientGone           503, rejected-context-cancelled (while it was queued)
    ├── ShuttingDown         503, rejected-shutting-down
    ├── FlowControlFailed    500 (a fault of ours)
    ├── Shed                 429, rejected-saturated (sheddable, and the pool is full)
    ├── Evicted              429, evicted (it was under way; flow control needed the room)
    ├── NoEndpoints          500 (a request without a body, and nowhere to send it)
    └── UnsupportedMode      500 (the proxy is configured in a way we do not speak)
"""

from __future__ import annotations


class SchedError(Exception):
    """Base of all errors this package raises on purpose."""


class ConfigError(SchedError):
    """The configuration cannot be used. ``path`` is where, as ``$.plugins[2].parameters.weight``."""

    def __init__(self, message: str, path: str = "$") -> None:
        super().__init__(f"{path}: {message}")
        self.path = path


class RequestError(SchedError):
    """One request is refused. ``code`` is the reference's error name, part of the reply's text."""

    status = 500
    code = "Internal"
    reason: str | None = None

    @property
    def body(self) -> str:
        return f"inference error: {self.code} - {self}"


class BadRequest(RequestError):
    """The request itself is wrong; sending it elsewhere would not help."""

    status, code = 400, "BadRequest"


class PayloadTooLarge(RequestError):
    """The body exceeds what this scheduler was started to accept."""

    status, code = 413, "PayloadTooLarge"


class NotCached(RequestError):
    """The client prefers no answer to one that has to be computed from the start."""

    status, code = 412, "PreconditionFailed"


class NoCandidates(RequestError):
    """The pool, or the subset the proxy asked for, is empty."""

    status, code, reason = 503, "ServiceUnavailable", "rejected-no-endpoints"


class NoneLeft(RequestError):
    """Every candidate was filtered out."""

    status, code, reason = 429, "ResourceExhausted", "rejected-saturated"


class NotAdmitted(RequestError):
    """An admitter refused. The reference answers 500, which clients take for a fault of the server's."""

    status, code, reason = 429, "ResourceExhausted", "rejected-saturated"


class QueueFull(RequestError):
    """A cap on queued requests or bytes is reached."""

    status, code, reason = 429, "ResourceExhausted", "rejected-saturated"


class QueuedTooLong(RequestError):
    """It was queued for as long as a request may be."""

    status, code, reason = 429, "ResourceExhausted", "rejected-ttl-expired"


class ClientGone(RequestError):
    """The client went away while its request was queued."""

    status, code, reason = 503, "ServiceUnavailable", "rejected-context-cancelled"


class ShuttingDown(RequestError):
    """The scheduler stops; nothing that is still queued will be served."""

    status, code, reason = 503, "ServiceUnavailable", "rejected-shutting-down"


class FlowControlFailed(RequestError):
    """A fault of ours in the queue."""


class Shed(RequestError):
    """Without flow control: the pool is full, and the request is one that may be dropped."""

    status, code, reason = 429, "ResourceExhausted", "rejected-saturated"


class Evicted(RequestError):
    """Ended while it was under way. The body is the message alone, as the reference sends it."""

    status, code, reason = 429, "ResourceExhausted", "evicted"

    def __init__(self) -> None:
        super().__init__("request evicted by flow control")

    @property
    def body(self) -> str:
        return str(self)


class NoEndpoints(RequestError):
    """A request without a body found the pool empty."""

    status, code = 500, "Internal"


class UnsupportedMode(RequestError):
    """The proxy sends bodies in a mode this scheduler does not speak."""
