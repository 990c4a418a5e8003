"""The gate aimd: a congestion window, as TCP has it, over the refusals of the router."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from batchgw.gates.base import Gate, Open, Spec, Tools

CAPACITY = (429, 503)
TTL_EXPIRED = "rejected-ttl-expired"
EVICTED = "evicted"


class Aimd(Spec, frozen=True):
    """At most the window in flight. It doubles each round of answers up to its slow-start threshold, then grows by
    ``inc`` a round; a refusal for capacity (429, 503) multiplies it by ``dec``, once for all lines that were in flight
    then; a time-out in the router's queue by 0.9. An evicted line and other errors change nothing. Retry-After closes
    the gate for that long, and slow start follows. After a cut it does not grow for ``hold_s``.

    ``min`` and ``max`` bound the window, in lines.
    """

    min: int = 1
    max: int = 256
    inc: float = 1.0
    dec: float = 0.5
    hold_s: float = 1.0

    def check(self, tools: Tools) -> None:
        if not 1 <= self.min <= self.max:
            raise ValueError("1 <= min <= max must hold")
        if self.inc <= 0 or not 0 < self.dec < 1 or self.hold_s < 0:
            raise ValueError("inc must be above 0, dec within (0, 1), holdS not negative")

    def make(self, tools: Tools) -> Gate:
        return Window(self)


class Window(Open):
    def __init__(self, spec: Aimd, clock: Callable[[], float] = time.monotonic) -> None:
        self._spec, self._clock = spec, clock
        self.window = float(spec.min)
        self.threshold = float(spec.max)
        self.increases = 0
        self.decreases: Counter[str] = Counter()
        """Cuts by the status that made them."""
        self._started: dict[str, int] = {}
        """Lines in flight by the order of their start."""
        self._next = 0
        self._recovery = 0
        """Refusals of lines that started before this one belong to the cut that was made."""
        self._grow_from_s = self._closed_until_s = float("-inf")

    def budget(self) -> float:
        return 0.0 if self._clock() < self._closed_until_s else self.window / self._spec.max

    def windows(self) -> Sequence[Any]:
        return [self]

    def room(self, max_concurrency: int, in_flight: int) -> int:
        return 0 if self._clock() < self._closed_until_s else int(self.window) - in_flight

    async def admit(self, id: str, tenant: str) -> bool:
        if self._clock() < self._closed_until_s or (id not in self._started and len(self._started) >= int(self.window)):
            return False
        if id not in self._started:
            self._started[id] = self._next
            self._next += 1
        return True

    def release(self, id: str) -> None:
        self._started.pop(id, None)

    def answered(self, id: str, status: int | None, reason: str, retry_after_s: float | None) -> None:
        if reason.startswith(EVICTED) or status is None:
            return
        if status not in CAPACITY:
            if status < 400:
                self._grow()
            return
        first = self._started.get(id, self._next) >= self._recovery
        if first:
            self._cut(0.9 if reason == TTL_EXPIRED else self._spec.dec)
            self.decreases[str(status)] += 1
        if retry_after_s:
            self._closed_until_s = max(self._closed_until_s, self._clock() + retry_after_s)
            self.window = float(self._spec.min)

    def _grow(self) -> None:
        if self._clock() < self._grow_from_s:
            return
        self.increases += 1
        step = 1.0 if self.window < self.threshold else self._spec.inc / self.window
        self.window = min(float(self._spec.max), self.window + step)

    def _cut(self, factor: float) -> None:
        self.threshold = self.window = max(float(self._spec.min), self.window * factor)
        self._recovery = self._next
        self._grow_from_s = self._clock() + self._spec.hold_s
