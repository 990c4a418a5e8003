"""Room for a blocked request: which of those in flight are evicted, and how fast.

Only sheddable requests (priority below 0) of a lower priority than the blocked one are victims: lowest priority
first, newest first, as they have had the least work put into them. A few at a time: then wait until they are seen to
have ended, and until saturation has had the time to show it.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable

from llmd_sched.flow.controller import Blocked

MAX_PER_DECISION = 2
CONFIRM_WITHIN_S = 10.0
"""An eviction that had no effect by then is given up."""
MAX_EVICTABLE = 200_000
"""Requests followed at once; beyond it the oldest are let go."""

INFLIGHT_GRACE_S = 0.010
"""When saturation comes from our own counts, which change at once."""
SCRAPE_GRACE_S = 2.0 + 0.250
"""When it comes from metrics: their staleness and some slack; the refresh interval is to be added."""


class Reclaimer:
    """Stop-and-wait over the evictable requests in flight. Tickets are the decisions'."""

    def __init__(self, grace_s: float) -> None:
        self.grace_s = grace_s
        self.issued: Counter[int] = Counter()
        """Evictions begun, by the priority of the request that was blocked."""
        self.outcomes: Counter[str] = Counter()
        """Evictions that were ``confirmed``, ``timed_out`` or ``failed``."""
        self.target = 0.0
        """By how much saturation was to come down at the last decision."""
        self.on_confirmed: Callable[[float], None] = lambda seconds: None
        """Told how long an eviction took to show."""
        self._evictable: dict[int, OrderedDict[str, None]] = {}
        self._priority: OrderedDict[str, int] = OrderedDict()
        self._pending: dict[str, float] = {}
        self._quiet_until_s = -math.inf

    @property
    def pending(self) -> int:
        """Evictions that were begun and not yet seen to have worked."""
        return len(self._pending)

    def started(self, ticket: str, priority: int) -> None:
        """A request was dispatched; only a sheddable one is followed."""
        if priority >= 0:
            return
        if len(self._priority) >= MAX_EVICTABLE:
            self._forget(next(iter(self._priority)))
        self._evictable.setdefault(priority, OrderedDict())[ticket] = None
        self._priority[ticket] = priority

    def finished(self, ticket: str, now_s: float) -> None:
        """A request ended, evicted or not."""
        self._forget(ticket)
        issued_s = self._pending.pop(ticket, None)
        if issued_s is not None:
            self.outcomes["confirmed"] += 1
            self.on_confirmed(now_s - issued_s)
            self._quiet_until_s = max(self._quiet_until_s, now_s + self.grace_s)

    def failed(self, ticket: str) -> None:
        """It could not be evicted; the next decision need not wait for it."""
        if self._pending.pop(ticket, None) is not None:
            self.outcomes["failed"] += 1

    def victims(self, blocked: Blocked, saturation: float, in_flight: int, now_s: float) -> list[str]:
        """Tickets to evict now; they are issued by this call. ``in_flight``: all requests in the pool.

        Each of those holds saturation / in_flight; as many go as bring saturation back to the ceiling, at least one.
        """
        self._give_up(now_s)
        if self._pending or now_s < self._quiet_until_s:
            return []
        self.target = saturation - blocked.ceiling
        credit = saturation / max(1, in_flight)
        wanted = max(1, math.ceil(self.target / credit)) if credit > 0 else 1
        tickets: list[str] = []
        while len(tickets) < min(wanted, MAX_PER_DECISION) and (ticket := self._victim(blocked.priority)):
            self._forget(ticket)
            self._pending[ticket] = now_s
            tickets.append(ticket)
        self.issued[blocked.priority] += len(tickets)
        return tickets

    def next_deadline_s(self, now_s: float) -> float:
        """When to ask for victims again, had it just been in vain and nothing happens; inf = never."""
        if self._pending:
            return min(self._pending.values()) + CONFIRM_WITHIN_S
        return self._quiet_until_s if self._evictable and self._quiet_until_s > now_s else math.inf

    def _victim(self, above: int) -> str | None:
        priority = min(self._evictable, default=above)
        return next(reversed(self._evictable[priority])) if priority < above else None

    def _forget(self, ticket: str) -> None:
        priority = self._priority.pop(ticket, None)
        if priority is not None:
            del self._evictable[priority][ticket]
            if not self._evictable[priority]:
                del self._evictable[priority]

    def _give_up(self, now_s: float) -> None:
        for ticket in [t for t, issued_s in self._pending.items() if now_s - issued_s >= CONFIRM_WITHIN_S]:
            del self._pending[ticket]
            self.outcomes["timed_out"] += 1
