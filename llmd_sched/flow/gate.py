"""Flow control on an event loop: ``await gate.admit(request)`` ends when the request may go, with where it goes.

There is no tick. The queue is looked at when something changes: a request comes, the owner calls ``wake`` (a request
ended, metrics were read, endpoints came or went), or the next deadline is due. A decision and its choice of endpoint
are one step, so the next decision sees what the last one charged. While nobody waits, or everybody is held back and
nothing changes, it does nothing.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Collection
from typing import Any

from llmd_sched.flow.controller import FlowControl
from llmd_sched.flow.dispatch import Dispatcher
from llmd_sched.flow.outcomes import refusal
from llmd_sched.flow.queues import Item
from llmd_sched.flow.reclaim import Reclaimer
from llmd_sched.types import Decision, Outcome, Request

DISPATCHES_PER_STEP = 16
"""Then the event loop has its turn: some milliseconds at the price of a real choice."""
TIMER_SLACK_S = 0.001
"""Timers are set this much late, as an event loop with millisecond timers may fire early."""

Choose = Callable[[Request, Collection[str] | None, float], Decision]


class _Waiter(asyncio.Future[Decision]):
    """Leaves the queue in the very moment it is cancelled, not when its task is next run."""

    def __init__(self, item: Item, left: Callable[[Item], None]) -> None:
        super().__init__(loop=asyncio.get_running_loop())
        self._item, self._left = item, left

    def cancel(self, msg: Any | None = None) -> bool:
        cancelled = super().cancel(msg)
        if cancelled:
            self._left(self._item)
        return cancelled


class Gate:
    """Belongs to one event loop; all methods are called on it."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        choose: Choose,
        *,
        abandon: Callable[[Decision], None],
        reclaimer: Reclaimer | None = None,
        evict: Callable[[str], bool] = lambda ticket: False,
        in_flight: Callable[[], int] = lambda: 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``choose``: decides and charges, at once; what it raises goes to the client. ``abandon``: a request was
        dispatched in the moment its client left, so nobody will send it. ``evict`` (with ``reclaimer``): break off the
        request of this ticket, False when that cannot be done. ``in_flight``: requests in the pool."""
        self.dispatcher = dispatcher
        self.reclaimer = reclaimer
        self.on_end: Callable[[Item], None] = lambda item: None
        """Told of each request once, when its stay in the queue has ended (``item.outcome``), refused ones too."""
        self.on_cycle: Callable[[float], None] | None = None
        """Told how many seconds each dispatch decision took."""
        self.errors = 0
        self.last_error = ""
        """Of a decision that failed: a bug, which must not take the queue down."""
        self._choose = choose
        self._abandon = abandon
        self._evict = evict
        self._in_flight = in_flight
        self._clock = clock
        self._waiters: dict[int, _Waiter] = {}
        self._soon: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = math.inf

    @property
    def flow(self) -> FlowControl:
        return self.dispatcher.flow

    async def admit(self, request: Request, subset: Collection[str] | None = None) -> Decision:
        """Where the request goes, once it may. Raises the RequestError of its refusal, or what ``choose`` raises."""
        begin_s = self._clock()
        item = self.flow.enqueue(request, begin_s, subset)
        item.enqueue_s = self._clock() - begin_s
        if item.outcome is not None:
            self.on_end(item)
            raise refusal(item)
        waiter = self._waiters[item.number] = _Waiter(item, self._client_left)
        self._drain()
        if waiter.done():
            return waiter.result()
        try:
            return await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled() and waiter.exception() is None:
                self._abandon(waiter.result())
            raise

    def finished(self, decision: Decision, outcome: Outcome) -> None:
        """A dispatched request ended. Call it after the charge was given back."""
        now_s = self._clock()
        self.flow.served(decision.request, 2.0 * (outcome.output_tokens or 0), now_s)
        if self.reclaimer is not None:
            self.reclaimer.finished(decision.ticket, now_s)
        self.wake()

    def wake(self) -> None:
        """Something changed that may let requests go. Cheap; several calls make one look."""
        if self._soon is None and self.flow:
            self._soon = asyncio.get_running_loop().call_soon(self._woken)

    def stop(self) -> None:
        """Everybody who waits is told that the scheduler stops; so is who comes later."""
        for item in self.flow.stop(self._clock()):
            self._refuse(item)
        for handle in (self._soon, self._timer):
            if handle is not None:
                handle.cancel()
        self._soon = self._timer = None
        self._timer_s = math.inf

    def _woken(self) -> None:
        self._soon = None
        self._drain()

    def _timed(self) -> None:
        self._timer, self._timer_s = None, math.inf
        self._drain()

    def _drain(self) -> None:
        """Expire, dispatch what may go, and see that this is done again when it must."""
        for item in self.flow.expired(self._clock()):
            self._refuse(item)
        try:
            for _ in range(DISPATCHES_PER_STEP):
                if not self._dispatch():
                    self._reclaim()
                    break
            else:
                self.wake()
        except Exception as e:
            self.errors += 1
            self.last_error = f"{type(e).__name__}: {e}"
        self._set_timer()

    def _dispatch(self) -> bool:
        """Whether one was dispatched."""
        now_s = self._clock()
        begin_s = time.perf_counter()
        item = self.dispatcher.step(now_s)
        if self.on_cycle is not None:
            self.on_cycle(time.perf_counter() - begin_s)
        if item is None:
            return False
        waiter = self._waiters.pop(item.number)
        try:
            decision = self._choose(item.request, item.subset, now_s)
        except Exception as e:
            waiter.set_exception(e)
        else:
            waiter.set_result(decision)
            self.dispatcher.sent(decision)
            if self.reclaimer is not None:
                self.reclaimer.started(decision.ticket, item.priority)
        self.on_end(item)
        return True

    def _reclaim(self) -> None:
        blocked = self.flow.blocked
        if self.reclaimer is None or blocked is None:
            return
        saturation = self.dispatcher.saturation
        for ticket in self.reclaimer.victims(blocked, saturation, self._in_flight(), self._clock()):
            if not self._evict(ticket):
                self.reclaimer.failed(ticket)

    def _client_left(self, item: Item) -> None:
        del self._waiters[item.number]
        if self.flow.cancel(item, self._clock()):
            self.on_end(item)

    def _refuse(self, item: Item) -> None:
        self._waiters.pop(item.number).set_exception(refusal(item))
        self.on_end(item)

    def _set_timer(self) -> None:
        """One timer, for the next deadline; one that is due too early stays, as moving it each time costs more."""
        due_s = self.flow.next_deadline_s()
        if self.reclaimer is not None and self.flow.blocked is not None:
            due_s = min(due_s, self.reclaimer.next_deadline_s(self._clock()))
        if due_s >= self._timer_s or due_s == math.inf:
            return
        if self._timer is not None:
            self._timer.cancel()
        delay_s = max(0.0, due_s - self._clock()) + TIMER_SLACK_S
        self._timer_s, self._timer = due_s, asyncio.get_running_loop().call_later(delay_s, self._timed)
