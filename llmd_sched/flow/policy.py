"""Who is next: the order within a flow, and the turns among the flows of a band.

Every band opens its fairness policy once; the live object holds the band's items. ``program-aware-fairness`` has a
file of its own, ``program``.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort

from llmd_sched.flow.queues import Heap, Item
from llmd_sched.plugin import Plugin
from llmd_sched.types import Request

FAR_FUTURE_S = 3600.0


class Ordering(Plugin, frozen=True):
    """Order within a flow."""

    def key(self, request: Request, enqueued_s: float, ttl_s: float) -> float:
        """Lower goes first, equal ones in order of arrival. ``ttl_s``: how long the request may wait."""
        raise NotImplementedError


class FcfsOrdering(Ordering, frozen=True):
    """First come, first served."""

    def key(self, request: Request, enqueued_s: float, ttl_s: float) -> float:
        return 0.0


class EdfOrdering(Ordering, frozen=True):
    """Earliest deadline first: the time it was queued plus the time it may wait, as they were when it came."""

    def key(self, request: Request, enqueued_s: float, ttl_s: float) -> float:
        return enqueued_s + ttl_s


class SloDeadlineOrdering(Ordering, frozen=True):
    """Earliest TTFT deadline first: the time it was queued plus its TTFT SLO, fractions of a millisecond included.

    A request without a usable SLO counts as one that may take an hour, and no SLO counts for more. So it goes after
    those that have one, and no request that comes an hour later overtakes it.
    """

    def key(self, request: Request, enqueued_s: float, ttl_s: float) -> float:
        slo_s = (request.ttft_slo_ms or 0.0) / 1e3
        return enqueued_s + (min(slo_s, FAR_FUTURE_S) if slo_s > 0 else FAR_FUTURE_S)  # NaN is not above 0


class Lineup:
    """The queued items of one band, given out in the order its fairness policy finds right."""

    def __len__(self) -> int:
        raise NotImplementedError

    def add(self, item: Item) -> None:
        raise NotImplementedError

    def remove(self, item: Item, now_s: float) -> None:
        """Take out one that is queued here, wherever it stands."""
        raise NotImplementedError

    def pop(self, now_s: float) -> Item:
        """Take out the next; IndexError when there is none."""
        raise NotImplementedError

    def served(self, fairness_id: str, tokens: float, now_s: float) -> None:
        """A request of this flow ended; ``tokens`` is what it cost beyond its prompt."""


class Fairness(Plugin, frozen=True):
    """Turns among the flows of one band."""

    def open(self) -> Lineup:
        """A live queue for one band."""
        raise NotImplementedError


class GlobalStrictFairness(Fairness, frozen=True):
    """No turns: of all flows of the band, the request that is first by the ordering policy."""

    def open(self) -> Lineup:
        return _OneLine()


class RoundRobinFairness(Fairness, frozen=True):
    """One request of each flow in turn; flows in order of their id."""

    def open(self) -> Lineup:
        return _Turns()


class _OneLine(Lineup):
    def __init__(self) -> None:
        self._heap = Heap()

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, item: Item) -> None:
        self._heap.push(item)

    def remove(self, item: Item, now_s: float) -> None:
        self._heap.remove(item)

    def pop(self, now_s: float) -> Item:
        return self._heap.pop()


class _Turns(Lineup):
    """``_ids`` is sorted: a flow that opens or closes moves pointers, some microseconds for 5,000 flows."""

    def __init__(self) -> None:
        self._flows: dict[str, Heap] = {}
        self._ids: list[str] = []
        self._last = ""
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, item: Item) -> None:
        fairness_id = item.request.fairness_id
        flow = self._flows.get(fairness_id)
        if flow is None:
            flow = self._flows[fairness_id] = Heap()
            insort(self._ids, fairness_id)
        flow.push(item)
        self._count += 1

    def remove(self, item: Item, now_s: float) -> None:
        self._flows[item.request.fairness_id].remove(item)
        self._left(item.request.fairness_id)

    def pop(self, now_s: float) -> Item:
        after = bisect_right(self._ids, self._last)
        self._last = self._ids[after if after < len(self._ids) else 0]
        item = self._flows[self._last].pop()
        self._left(self._last)
        return item

    def _left(self, fairness_id: str) -> None:
        self._count -= 1
        if not self._flows[fairness_id]:
            del self._flows[fairness_id], self._ids[bisect_left(self._ids, fairness_id)]


ORDERING: dict[str, type[Ordering]] = {
    "fcfs-ordering-policy": FcfsOrdering,
    "edf-ordering-policy": EdfOrdering,
    "slo-deadline-ordering-policy": SloDeadlineOrdering,
}
