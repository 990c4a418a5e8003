"""Where lines are sent, and the rules for sending them again."""

from __future__ import annotations

import ssl
from random import Random

import msgspec

THROTTLED = 429
BUSY = (502, 503, 504)

RETRY_AFTER_JITTER = 0.25
"""A time the server named is waited in full, and up to this share longer, so that all do not come back at once."""


class Gateway(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """An inference gateway (or a bare engine): ``url`` without the path of a line.

    ``priority``: the number to put into each body, for engines run with priority scheduling (higher = later).
    ``stream``: lines whose whole reply can be put together from a stream are streamed, so that they can be aborted and
    resumed. ``running_usage``: ask for token counts with each event; off for servers that refuse the field.
    ``retry_ttl_expired``: a request that waited too long in the router's queue is sent again while its batch has time
    left, not given up as expired.
    """

    url: str
    api_key: str = ""
    objective: str = "batch"
    send_fairness_id: bool = True
    priority: int | None = None
    stream: bool = True
    running_usage: bool = True
    retry_ttl_expired: bool = False
    request_timeout_s: float = 300.0
    """Of a whole reply, or between two events of a stream."""
    max_retries: int = 3
    initial_backoff_s: float = 1.0
    max_backoff_s: float = 60.0
    insecure_skip_verify: bool = False
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""

    def check(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url must begin with http:// or https://, not {self.url!r}")
        if self.request_timeout_s <= 0 or not 0 < self.initial_backoff_s <= self.max_backoff_s:
            raise ValueError("requestTimeoutS must be above 0, and 0 < initialBackoffS <= maxBackoffS")
        if not 0 <= self.max_retries <= 100:
            raise ValueError(f"maxRetries must be within 0..100, not {self.max_retries}")

    def tls(self) -> ssl.SSLContext:
        """Raises OSError when a file cannot be read, ssl.SSLError when it is no certificate."""
        context = ssl.create_default_context(cafile=self.ca_file or None)
        if self.insecure_skip_verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if self.cert_file:
            context.load_cert_chain(self.cert_file, self.key_file or None)
        return context


class Gateways:
    """The gateway of each model; ``default`` for those that have none of their own, and None refuses those."""

    def __init__(self, default: Gateway | None, by_model: dict[str, Gateway] | None = None) -> None:
        self._default = default
        self._by_model = by_model or {}

    def of(self, model: str) -> Gateway | None:
        return self._by_model.get(model, self._default)


def retryable(status: int) -> bool:
    return status == THROTTLED or status >= 500


def wait_s(gateway: Gateway, status: int | None, attempt: int, retry_after_s: float | None, rng: Random) -> float:
    """Before the attempt after ``attempt`` (the first is 0); ``status`` None: there was no HTTP answer.

    Doubling from the initial wait, three times that when throttled; a busy server is asked again within half the
    longest wait. Plus or minus half.
    """
    if retry_after_s is not None:
        return retry_after_s * (1 + RETRY_AFTER_JITTER * rng.random())
    base_s = gateway.initial_backoff_s * (3 if status == THROTTLED else 1)
    longest_s = gateway.max_backoff_s / (2 if status in BUSY else 1)
    return min(longest_s, base_s * 2.0**attempt) * rng.uniform(0.5, 1.5)
