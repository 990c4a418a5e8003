"""Runs an engine against the wall clock.

The engine's schedule is planned time: a step starts where the one before was planned to end, however late the timer
fired, so overshoot never adds up. Only when the host is ``MAX_BEHIND_S`` late does the schedule give up the difference.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from llmd_sched.sim.engine import Engine, Refusal, SimRequest, Step

MAX_BEHIND_S = 0.25
"""Wall seconds the host may lag before the schedule is moved."""


class RealTime:
    """One engine in real time, or ``speedup`` times as fast. ``on_step`` is called when a step's tokens come out."""

    def __init__(self, engine: Engine, speedup: float, on_step: Callable[[Step], None]) -> None:
        if speedup <= 0:
            raise ValueError(f"speedup must be positive, not {speedup}")
        self._engine = engine
        self._speedup = speedup
        self._on_step = on_step
        self._origin_s = time.monotonic()
        self._wake = asyncio.Event()
        self.behind_s = 0.0
        """Wall seconds by which the last step's tokens came out late."""
        self.behind_total_s = 0.0
        """Wall seconds the schedule had to give up since the start."""

    def now_s(self) -> float:
        """Engine time: seconds since the start, times the speedup."""
        return (time.monotonic() - self._origin_s) * self._speedup

    def submit(self, request: SimRequest) -> Refusal | None:
        self._wake.set()
        return self._engine.submit(request)

    def abort(self, request_id: str) -> None:
        self._wake.set()
        self._engine.abort(request_id)

    async def run(self) -> None:
        """Step the engine for ever; cancel to stop."""
        at_s = 0.0
        while True:
            step = self._engine.step(at_s)
            if step is None:
                at_s = max(at_s, await self._next_ready_s())
                continue
            at_s = await self._reach(step.end_s)
            self._on_step(step)

    async def _next_ready_s(self) -> float:
        """Sleep until a request can be scheduled; returns exactly when that was planned."""
        while (ready_s := self._engine.next_ready_s) is None:
            self._wake.clear()
            await self._wake.wait()
        await asyncio.sleep((ready_s - self.now_s()) / self._speedup)
        return ready_s

    async def _reach(self, end_s: float) -> float:
        """Sleep until engine time ``end_s``; returns when the next step starts: then, or now if hopelessly late."""
        # Even when late: the loop's other tasks, the HTTP side, must run between two steps.
        await asyncio.sleep((end_s - self.now_s()) / self._speedup)
        now_s = self.now_s()
        self.behind_s = max(0.0, now_s - end_s) / self._speedup
        if self.behind_s < MAX_BEHIND_S:
            return end_s
        self.behind_total_s += self.behind_s
        return now_s
