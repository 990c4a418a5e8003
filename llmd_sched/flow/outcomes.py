"""What a request is told that flow control did not let through."""

from __future__ import annotations

from llmd_sched.errors import (
    ClientGone,
    FlowControlFailed,
    NoCandidates,
    QueuedTooLong,
    QueueFull,
    RequestError,
    ShuttingDown,
)
from llmd_sched.flow.queues import Item, QueueOutcome


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
