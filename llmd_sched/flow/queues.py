"""What waits: items, and heaps of them."""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Collection, Iterator
from heapq import heapify, heappop, heappush

from llmd_sched.types import Request

IDLE_FLOW_S = 300.0
"""A flow whose queue is empty is shown with 0 for this long, then forgotten."""
MAX_IDLE_FLOWS = 1000
"""Empty flows that are still shown; beyond it the longest empty go first."""


class QueueOutcome(enum.StrEnum):
    """How a request's stay in the queue ended; the values are the reference's metric labels."""

    DISPATCHED = "Dispatched"
    """Handed to the scheduler, whatever that made of it."""
    REJECTED_CAPACITY = "RejectedCapacity"
    """A cap on requests or bytes was reached."""
    REJECTED_NO_ENDPOINTS = "RejectedNoEndpoints"
    """A cap was reached while the pool was empty."""
    REJECTED_OTHER = "RejectedOther"
    """It came after the stop."""
    EVICTED_TTL = "EvictedTTL"
    """It waited for as long as it may."""
    EVICTED_NO_ENDPOINTS = "EvictedNoEndpoints"
    """It waited for as long as it may for an endpoint to appear."""
    EVICTED_CONTEXT_CANCELLED = "EvictedContextCancelled"
    """Its client went away."""
    EVICTED_OTHER = "EvictedOther"
    """It was still queued at the stop."""


class Item:
    """One request in the queue, or after it."""

    __slots__ = (
        "detail", "enqueue_s", "enqueued_s", "key", "number", "outcome", "priority", "queued", "request", "subset",
        "waited_s",
    )  # fmt: skip

    def __init__(
        self, request: Request, subset: Collection[str] | None, number: int, priority: int, enqueued_s: float
    ) -> None:
        self.request = request
        self.subset = subset
        self.number = number
        """Unique; counts arrivals."""
        self.priority = priority
        """Of the band it is in, which need not be the request's own."""
        self.enqueued_s = enqueued_s
        self.key = 0.0
        """Its place by the ordering policy: lower first, equal ones by arrival."""
        self.queued = False
        self.outcome: QueueOutcome | None = None
        """None while it waits."""
        self.waited_s = 0.0
        """Time in the queue; final once there is an outcome."""
        self.enqueue_s = 0.0
        """How long queueing it took; filled in by whoever has a clock."""
        self.detail = ""
        """For a refused one: which cap."""


class Heap:
    """Items by key, then arrival; O(log n).

    Removing one only marks it. The marked are swept out when they outnumber the rest, so they never take more room
    than what is queued.
    """

    __slots__ = ("_dead", "_entries")

    def __init__(self) -> None:
        self._entries: list[tuple[float, int, Item]] = []
        self._dead = 0

    def __len__(self) -> int:
        return len(self._entries) - self._dead

    def push(self, item: Item) -> None:
        item.queued = True
        heappush(self._entries, (item.key, item.number, item))

    def head(self) -> Item:
        """The first; IndexError when there is none."""
        while not self._entries[0][2].queued:
            heappop(self._entries)
            self._dead -= 1
        return self._entries[0][2]

    def pop(self) -> Item:
        """Takes out the first; IndexError when there is none."""
        item = self.head()
        heappop(self._entries)
        item.queued = False
        return item

    def remove(self, item: Item) -> None:
        """``item`` must be queued here."""
        item.queued = False
        self._dead += 1
        if 2 * self._dead > len(self._entries):
            self._entries = [entry for entry in self._entries if entry[2].queued]
            heapify(self._entries)
            self._dead = 0


FlowKey = tuple[str, int, str, str]
"""Fairness id, priority of the band, model, target model: the labels a queue's size is reported under."""


class Sizes:
    """Requests and bytes in the queue per flow and model, for the gauges. An empty flow stays a while, as 0."""

    def __init__(self) -> None:
        self._sizes: dict[FlowKey, tuple[int, int]] = {}
        self._idle: OrderedDict[FlowKey, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sizes)

    def add(self, item: Item) -> None:
        key = _flow_key(item)
        requests, size_bytes = self._sizes.get(key, (0, 0))
        self._sizes[key] = (requests + 1, size_bytes + item.request.size_bytes)
        self._idle.pop(key, None)

    def remove(self, item: Item, now_s: float) -> None:
        key = _flow_key(item)
        requests, size_bytes = self._sizes[key]
        self._sizes[key] = (requests - 1, size_bytes - item.request.size_bytes)
        if requests == 1:
            self._idle[key] = now_s
            self.forget_idle(now_s)

    def forget_idle(self, now_s: float) -> None:
        while self._idle:
            key, since_s = next(iter(self._idle.items()))
            if len(self._idle) <= MAX_IDLE_FLOWS and now_s - since_s < IDLE_FLOW_S:
                return
            del self._idle[key], self._sizes[key]

    def items(self, now_s: float) -> Iterator[tuple[FlowKey, tuple[int, int]]]:
        """(flow, (requests, bytes)) of every flow that is shown."""
        self.forget_idle(now_s)
        return iter(list(self._sizes.items()))


def _flow_key(item: Item) -> FlowKey:
    request = item.request
    return request.fairness_id, item.priority, request.model, request.target_model
