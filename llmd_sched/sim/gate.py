"""Flow control in virtual time: the queue and the decisions that serve, without the event loop around them."""

from __future__ import annotations

from collections.abc import Callable

from llmd_sched.errors import RequestError
from llmd_sched.flow.dispatch import Dispatcher
from llmd_sched.flow.outcomes import refusal
from llmd_sched.sim.scenario import Arrival
from llmd_sched.types import Decision, Outcome


class VirtualGate:
    """Holds arrivals back until they may go.

    Its owner calls ``drain`` when something has changed that may let requests go, and at ``due_s`` at the latest.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        dispatch: Callable[[Arrival], Decision | None],
        refuse: Callable[[Arrival, RequestError], None],
    ) -> None:
        """``dispatch`` chooses and sends; None when that was refused."""
        self._dispatcher, self._flow = dispatcher, dispatcher.flow
        self._dispatch, self._refuse = dispatch, refuse
        self._waiting: dict[int, Arrival] = {}

    @property
    def due_s(self) -> float:
        """When somebody's time will be up; inf when nobody waits."""
        return self._flow.next_deadline_s()

    def arrive(self, one: Arrival, now_s: float) -> None:
        item = self._flow.enqueue(one.request, now_s)
        if item.outcome is not None:
            self._refuse(one, refusal(item))
            return
        self._waiting[item.number] = one
        self.drain(now_s)

    def drain(self, now_s: float) -> None:
        for late in self._flow.expired(now_s):
            self._refuse(self._waiting.pop(late.number), refusal(late))
        while (item := self._dispatcher.step(now_s)) is not None:
            decision = self._dispatch(self._waiting.pop(item.number))
            if decision is not None:
                self._dispatcher.sent(decision)

    def finished(self, decision: Decision, outcome: Outcome, now_s: float) -> None:
        """As ``flow.gate.Gate.finished``."""
        self._flow.served(decision.request, 2.0 * (outcome.output_tokens or 0), now_s)
