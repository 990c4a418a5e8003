"""What a request is told that flow control did not let through, or took back."""

from __future__ import annotations

from llmd_sched.errors import NoCandidates, RequestError
from llmd_sched.flow.queues import Item, QueueOutcome


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


def refusal(item: Item) -> RequestError:
    """What the client of a request that was not dispatched is told."""
    match item.outcome:
        case QueueOutcome.REJECTED_CAPACITY:
            return QueueFull(item.detail)
        case QueueOutcome.REJECTED_NO_ENDPOINTS:
            return NoCandidates(f"no endpoints available: {item.detail}")
        case QueueOutcome.EVICTED_TTL:
            return QueuedTooLong(f"request timed out in queue: after {item.waited_s:.3f} s")
        case QueueOutcome.EVICTED_NO_ENDPOINTS:
            return NoCandidates(f"no endpoints available: none appeared in {item.waited_s:.3f} s")
        case QueueOutcome.EVICTED_CONTEXT_CANCELLED:
            return ClientGone(f"client disconnected: after {item.waited_s:.3f} s in queue")
        case QueueOutcome.REJECTED_OTHER | QueueOutcome.EVICTED_OTHER:
            return ShuttingDown("the scheduler is shutting down")
        case QueueOutcome.DISPATCHED | None:
            return FlowControlFailed("internal flow control error")
