"""The queue in front of the scheduler: who may wait, for how long, and who is next. No clock and no I/O.

    enqueue(request, now)        an Item that waits, or one with the outcome of its refusal
    next(saturation, now)        one dispatch decision: an Item, or None and ``blocked`` says why
    cancel, expired, stop        the other ways out

Every item leaves exactly once; ``Item.outcome`` says how. Cost is O(log n) per operation, plus O(bands) per decision.

All queued requests have the same budget, which changes only when the pool becomes empty or ceases to be, and is
measured from the later of that moment and their arrival. So they expire in order of arrival, and whoever came first
has the next deadline.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable

import msgspec

from llmd_sched.flow.queues import Item, QueueOutcome, Sizes
from llmd_sched.flow.settings import MAX_BANDS, BandSettings, FlowSettings
from llmd_sched.types import Request

IDLE_BAND_S = 600.0
"""A band that is neither configured nor wanted by an objective goes after it was empty for this long."""
SWEEP_BANDS_S = 60.0
"""How often, with traffic, such bands are looked for."""


class Blocked(msgspec.Struct, frozen=True):
    """The highest priority that waits is held back: saturation has reached its ceiling."""

    priority: int
    ceiling: float


class Band:
    """The queue of one priority."""

    def __init__(self, priority: int, settings: BandSettings, now_s: float) -> None:
        self.priority = priority
        self.settings = settings
        self.lineup = settings.fairness.open()
        self.requests = 0
        self.size_bytes = 0
        self.outcomes: Counter[QueueOutcome] = Counter()
        self.wanted = True
        self.idle_since_s = now_s

    def is_idle(self, now_s: float) -> bool:
        return not self.wanted and not self.requests and now_s - self.idle_since_s >= IDLE_BAND_S


class FlowControl:
    """All bands. One owner; calls must not overlap, and ``now_s`` must not run backwards."""

    def __init__(self, settings: FlowSettings, now_s: float = 0.0) -> None:
        settings.check()
        self.settings = settings
        self.bands: dict[int, Band] = {}
        """By priority, highest first."""
        self.sizes = Sizes()
        self.size_bytes = 0
        self.blocked: Blocked | None = None
        """Why the last decision was to wait; None when it was not, or nothing waits."""
        self.has_endpoints = True
        self.stopped = False
        self.bands_refused = 0
        """Priorities that got no band of their own, there being MAX_BANDS already."""
        self._flipped_s = -math.inf
        self._waiting: OrderedDict[int, Item] = OrderedDict()
        self._arrivals = 0
        self._ceilings = settings.usage_limits.open()
        self._priorities: tuple[int, ...] = ()
        self._sweep_at_s = now_s + SWEEP_BANDS_S
        self.provide((), now_s)

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    def provide(self, priorities: Iterable[int], now_s: float) -> None:
        """Have bands for these priorities, those of all objectives there are. Others go once they are long empty."""
        wanted = {0, *self.settings.bands, *priorities}
        for priority, band in self.bands.items():
            band.wanted = priority in wanted
        self._drop_idle_bands(now_s)
        for priority in sorted(wanted - self.bands.keys(), reverse=True):
            if len(self.bands) < MAX_BANDS:
                settings = self.settings.bands.get(priority) or self.settings.template(priority)
                self.bands[priority] = Band(priority, settings, now_s)
            else:
                self.bands_refused += 1
        self._sort_bands()

    def _drop_idle_bands(self, now_s: float) -> None:
        idle = [priority for priority, band in self.bands.items() if band.is_idle(now_s)]
        for priority in idle:
            del self.bands[priority]
        if idle:
            self._sort_bands()
        self._sweep_at_s = now_s + SWEEP_BANDS_S

    def _sort_bands(self) -> None:
        self.bands = dict(sorted(self.bands.items(), reverse=True))
        self._priorities = tuple(self.bands)

    def observe(self, has_endpoints: bool, now_s: float) -> None:
        """Whether the pool has any endpoint. When that changes, everybody's budget starts anew."""
        if has_endpoints != self.has_endpoints:
            self.has_endpoints = has_endpoints
            self._flipped_s = now_s

    @property
    def budget_s(self) -> float:
        return self.settings.ttl_s if self.has_endpoints else self.settings.no_endpoint_budget_s

    def enqueue(self, request: Request, now_s: float, subset: Collection[str] | None = None) -> Item:
        """The item waits unless it has an outcome. A priority without a band waits in band 0."""
        if now_s >= self._sweep_at_s:
            self._drop_idle_bands(now_s)
        band = self.bands.get(request.priority) or self.bands[0]
        self._arrivals += 1
        item = Item(request, subset, self._arrivals, band.priority, now_s)
        if self.stopped:
            return self._ended(item, QueueOutcome.REJECTED_OTHER, now_s)
        item.detail = self._full(band, request.size_bytes)
        if item.detail:
            outcome = QueueOutcome.REJECTED_CAPACITY if self.has_endpoints else QueueOutcome.REJECTED_NO_ENDPOINTS
            return self._ended(item, outcome, now_s)
        item.key = band.settings.ordering.key(request, now_s, self.budget_s)
        band.lineup.add(item)
        self._waiting[item.number] = item
        band.requests += 1
        band.size_bytes += request.size_bytes
        self.size_bytes += request.size_bytes
        self.sizes.add(item)
        return item

    def _full(self, band: Band, size_bytes: int) -> str:
        """Which cap the request would exceed; empty when none."""
        caps = (
            ("flow control", "bytes", self.size_bytes + size_bytes, self.settings.max_bytes),
            ("flow control", "requests", len(self) + 1, self.settings.max_requests),
            (f"priority {band.priority}", "bytes", band.size_bytes + size_bytes, band.settings.max_bytes),
            (f"priority {band.priority}", "requests", band.requests + 1, band.settings.max_requests),
        )
        for whose, unit, needed, most in caps:
            if most and needed > most:
                return f"the queue of {whose} would hold {needed} {unit}; at most {most} are accepted"
        return ""

    def next(self, saturation: float, now_s: float) -> Item | None:
        """Take out the request to dispatch now, if any. Ask ``expired`` first.

        The highest band where somebody waits decides: held back, it holds back those below it too.
        """
        self.blocked = None
        if not self._waiting or not self.has_endpoints:
            return None
        ceilings = self._ceilings(self._priorities, saturation)
        for band, ceiling in zip(self.bands.values(), ceilings, strict=True):
            if not band.requests:
                continue
            if saturation >= ceiling:
                self.blocked = Blocked(band.priority, ceiling)
                return None
            return self._left(band.lineup.pop(now_s), QueueOutcome.DISPATCHED, now_s)
        return None

    def cancel(self, item: Item, now_s: float) -> bool:
        """Its client is gone. False when it was not queued any more."""
        if not item.queued:
            return False
        self._take_out(item, QueueOutcome.EVICTED_CONTEXT_CANCELLED, now_s)
        return True

    def expired(self, now_s: float) -> list[Item]:
        """Take out all whose time is up, oldest first."""
        outcome = QueueOutcome.EVICTED_TTL if self.has_endpoints else QueueOutcome.EVICTED_NO_ENDPOINTS
        items = []
        while self.next_deadline_s() <= now_s:
            items.append(self._take_out(next(iter(self._waiting.values())), outcome, now_s))
        return items

    def next_deadline_s(self) -> float:
        """When ``expired`` will find somebody if nothing changes; inf = never."""
        if not self._waiting:
            return math.inf
        oldest = next(iter(self._waiting.values()))
        return max(oldest.enqueued_s, self._flipped_s) + self.budget_s

    def stop(self, now_s: float) -> list[Item]:
        """Take out everybody; whoever comes later is refused."""
        self.stopped = True
        return [self._take_out(i, QueueOutcome.EVICTED_OTHER, now_s) for i in list(self._waiting.values())]

    def served(self, request: Request, tokens: float, now_s: float) -> None:
        """A dispatched request ended; ``tokens`` is what it cost beyond its prompt, for fairness."""
        band = self.bands.get(request.priority) or self.bands[0]
        band.lineup.served(request.fairness_id, tokens, now_s)

    def _take_out(self, item: Item, outcome: QueueOutcome, now_s: float) -> Item:
        self.bands[item.priority].lineup.remove(item, now_s)
        return self._left(item, outcome, now_s)

    def _left(self, item: Item, outcome: QueueOutcome, now_s: float) -> Item:
        band = self.bands[item.priority]
        del self._waiting[item.number]
        band.requests -= 1
        band.size_bytes -= item.request.size_bytes
        self.size_bytes -= item.request.size_bytes
        self.sizes.remove(item, now_s)
        band.idle_since_s = now_s
        return self._ended(item, outcome, now_s)

    def _ended(self, item: Item, outcome: QueueOutcome, now_s: float) -> Item:
        item.outcome = outcome
        item.waited_s = now_s - item.enqueued_s
        self.bands[item.priority].outcomes[outcome] += 1
        return item
