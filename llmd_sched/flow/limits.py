"""How full the pool may be before a priority has to wait: one ceiling on saturation per priority."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llmd_sched.plugin import Plugin

Ceilings = Callable[[Sequence[int], float], Sequence[float]]
"""(priorities in descending order, saturation) -> one ceiling each. Called once per dispatch decision."""


class UsageLimits(Plugin, frozen=True):
    """A band is dispatched from while saturation is below its ceiling."""

    def open(self) -> Ceilings:
        """What gives the ceilings; it may hold state, so it is opened once."""
        raise NotImplementedError


class StaticUsageLimit(UsageLimits, frozen=True):
    """The same ceiling, ``threshold``, for all priorities; 1 is a pool that is exactly full."""

    threshold: float = 1.0

    def check(self) -> None:
        if not 0 < self.threshold < float("inf"):
            raise ValueError("threshold must be a positive finite number")

    def open(self) -> Ceilings:
        return lambda priorities, saturation: (self.threshold,) * len(priorities)


class PriorityHoldback(UsageLimits, frozen=True):
    """Lower priorities leave room for higher ones: ``maxCeiling`` for the highest, down to ``minCeiling``.

    ``domain`` rank: even steps from band to band; value: in proportion to the priority numbers. A single priority has
    ``maxCeiling``. ``shape`` is linear.
    """

    min_ceiling: float
    max_ceiling: float = 1.0
    shape: str = "linear"
    domain: str = "rank"

    def check(self) -> None:
        if self.shape != "linear":
            raise ValueError(f"shape {self.shape!r}: accepted is linear")
        if self.domain not in ("rank", "value"):
            raise ValueError(f"domain {self.domain!r}: accepted are rank and value")
        if not 0 <= self.min_ceiling <= self.max_ceiling <= 1:
            raise ValueError("minCeiling and maxCeiling must be between 0 and 1, minCeiling not above maxCeiling")

    def open(self) -> Ceilings:
        return self._ceilings

    def _ceilings(self, priorities: Sequence[int], saturation: float) -> Sequence[float]:
        if len(priorities) < 2:
            return [self.max_ceiling] * len(priorities)
        top, bottom = (priorities[0], priorities[-1]) if self.domain == "value" else (len(priorities) - 1, 0)
        ranks = range(top, -1, -1) if self.domain == "rank" else priorities
        slope = (self.max_ceiling - self.min_ceiling) / (top - bottom)
        return [self.max_ceiling - slope * (top - rank) for rank in ranks]


class SoftReflectiveCeiling(UsageLimits, frozen=True):
    """The fuller the pool, the less often lower priorities are let through; the highest is never held back.

    The ceiling of the i-th of n priorities is 1 - i x saturation / (n - 1). One at or above its ceiling is opened in
    every round(saturation / (1 - saturation))-th dispatch decision; a full pool (1 or more) opens nothing.
    """

    def open(self) -> Ceilings:
        return _Reflective()


class _Reflective:
    def __init__(self) -> None:
        self._held: dict[int, int] = {}
        """Priority -> decisions since it was last open; as many as there are bands."""

    def __call__(self, priorities: Sequence[int], saturation: float) -> Sequence[float]:
        if saturation >= 1.0:
            return [0.0] * len(priorities)
        every = max(1, round(saturation / (1.0 - saturation)))
        steps = max(1, len(priorities) - 1)
        held = {}
        ceilings = []
        for i, priority in enumerate(priorities):
            ceiling = 1.0 - i * saturation / steps
            if saturation >= ceiling:
                held[priority] = self._held.get(priority, 0) + 1
                if held[priority] >= every:
                    held[priority], ceiling = 0, 1.0
            ceilings.append(ceiling)
        self._held = held
        return ceilings


LIMITS: dict[str, type[UsageLimits]] = {
    "static-usage-limit-policy": StaticUsageLimit,
    "priority-holdback-policy": PriorityHoldback,
    "soft-reflective-ceiling-policy": SoftReflectiveCeiling,
}
