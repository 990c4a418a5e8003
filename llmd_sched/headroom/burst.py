"""Is this a burst? Decided from arrivals alone: how many run depends on batch, arrivals do not.

Page's cumulative sum test (Biometrika 41, 1954) between two Poisson rates, both learned: evidence for the other mode
gains ln(busy / quiet) with an arrival and loses busy - quiet a second, or the other way round, and never falls below 0.
So six arrivals in a row say it where one a second is normal, and it takes milliseconds where hundreds a second come.
"""

from __future__ import annotations

import math

ONSET_EVIDENCE = 12.0
"""Nats that begin a burst. A false alarm costs the prefill of all batch on the engines: 8 had one in five minutes."""

END_EVIDENCE = 8.0

LEAST_S = 0.2
"""For so long there must have been evidence of a burst: a handful of requests sent at once is none."""

QUIET_PER_S = 1.0
BUSY_PER_S = 8.0
"""Rates before anything was learned."""

LEAST_RATIO = 4.0
"""Of the busy to the quiet rate: were the quiet one taken for higher, it would creep up until no burst is one."""

LEAST_QUIET_PER_S = 0.2
QUIET_TAU_S = 120.0
BUSY_TAU_S = 30.0
FORGET_TAU_S = 1800.0
"""... of a busy rate above BUSY_PER_S while it is quiet: one flood must not hide the bursts of another day."""

TAIL_SHARE = 0.6
"""A burst ends when no more than this share of its mean number of requests still runs."""

RUNNING_TAU_S = 20.0


class BurstDetector:
    """``on`` is the mode; ``arrived`` and ``look`` keep it up to date. Times must not go back."""

    def __init__(self) -> None:
        self.on = False
        self.quiet_per_s = QUIET_PER_S
        self.busy_per_s = BUSY_PER_S
        self._evidence = 0.0
        self._since_s = 0.0
        """When there was no evidence last."""
        self._running = 0.0
        """Mean over the burst."""
        self._at_s: float | None = None

    def arrived(self, now_s: float, running: float) -> None:
        """One interactive request; ``running`` is how many there are of them, this one not counted."""
        self._advance(now_s, running)
        quiet_per_s, busy_per_s = self._rates_per_s
        gain = math.log(busy_per_s / quiet_per_s)
        self._evidence = max(0.0, self._evidence + (-gain if self.on else gain))
        if self.on:
            self.busy_per_s += 1 / BUSY_TAU_S
        else:
            self.quiet_per_s += 1 / QUIET_TAU_S
        self._decide(now_s, running)

    def look(self, now_s: float, running: float) -> None:
        """Time passed; to be called a few times a second."""
        self._advance(now_s, running)
        self._decide(now_s, running)

    @property
    def _rates_per_s(self) -> tuple[float, float]:
        busy_per_s = max(self.busy_per_s, LEAST_RATIO * LEAST_QUIET_PER_S)
        return min(max(self.quiet_per_s, LEAST_QUIET_PER_S), busy_per_s / LEAST_RATIO), busy_per_s

    def _advance(self, now_s: float, running: float) -> None:
        dt_s = 0.0 if self._at_s is None else now_s - self._at_s
        self._at_s = now_s
        quiet_per_s, busy_per_s = self._rates_per_s
        drift = (busy_per_s - quiet_per_s) * dt_s
        if self.on:
            self._evidence = min(self._evidence + drift, END_EVIDENCE)
            self.busy_per_s *= math.exp(-dt_s / BUSY_TAU_S)
            self._running += (running - self._running) * -math.expm1(-dt_s / RUNNING_TAU_S)
        else:
            self._evidence = max(0.0, self._evidence - drift)
            if not self._evidence:
                self._since_s = now_s
            self.quiet_per_s *= math.exp(-dt_s / QUIET_TAU_S)
            self.busy_per_s += max(self.busy_per_s - BUSY_PER_S, 0.0) * math.expm1(-dt_s / FORGET_TAU_S)

    def _decide(self, now_s: float, running: float) -> None:
        if self._evidence < (END_EVIDENCE if self.on else ONSET_EVIDENCE):
            return
        if not self.on and now_s - self._since_s < LEAST_S:
            return
        if self.on and running > max(1.0, TAIL_SHARE * self._running):
            return
        self.on = not self.on
        self._evidence = 0.0
        if self.on:
            self._running = running
