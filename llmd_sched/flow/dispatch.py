"""One dispatch decision from the state of the pool; virtual time drives it as well as a clock does.

The caller acts on a decision (chooses an endpoint, which charges it, and says so with ``sent``) before it asks for the
next, so every decision sees the load of those before it.
"""

from __future__ import annotations

from collections.abc import Callable

from llmd_sched.errors import RequestError, Shed
from llmd_sched.flow.controller import FlowControl
from llmd_sched.flow.queues import Item
from llmd_sched.flow.saturation import Saturation, SaturationDetector, Stages
from llmd_sched.flow.unseen import Unseen
from llmd_sched.types import Candidates, Decision, Request

Look = Callable[[float], Candidates]
"""The whole pool at a time, with the columns the detector reads."""


class Dispatcher:
    """The queue, and how full the pool behind it is."""

    def __init__(self, flow: FlowControl, detector: SaturationDetector, look: Look) -> None:
        self.flow = flow
        self.detector = detector
        self.look = look
        self.saturation = 0.0
        """At the last decision."""
        self._stages = Stages(detector)
        self._unseen = Unseen()

    def measure(self, now_s: float) -> Saturation:
        """How full the pool is, for the gauges too."""
        return self._measure(self.look(now_s), now_s)

    def sent(self, decision: Decision) -> None:
        """What was made of the item of the last ``step``."""
        self._unseen.sent(decision.picked[0])

    def _measure(self, candidates: Candidates, now_s: float) -> Saturation:
        if self.detector.by_metrics:
            candidates = self._unseen.beside(candidates, now_s)
        return self._stages.measure(candidates)

    def step(self, now_s: float) -> Item | None:
        """The request to dispatch now, if any; nothing is computed while nobody waits."""
        if not self.flow:
            return None
        candidates = self.look(now_s)
        self.flow.observe(len(candidates) > 0, now_s)
        self.saturation = self._measure(candidates, now_s).effective
        return self.flow.next(self.saturation, now_s)


def shed(request: Request, saturation: Callable[[], float]) -> RequestError | None:
    """Admission without flow control: why the request is dropped, None when it is not. Only a sheddable one is ever
    dropped, so for others the pool is not looked at."""
    if request.priority < 0 and saturation() >= 1.0:
        return Shed("system saturated, sheddable request dropped")
    return None
