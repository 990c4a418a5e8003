"""Workloads made of others: side by side, one after the other, and with latency objectives."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator

from msgspec.structs import replace

from benchmarks.workloads.shapes import Workload
from llmd_sched.sim.scenario import Arrival


class Mixed(Workload, frozen=True, kw_only=True):
    """Several tenants at once, each with its share of the rate. Requests keep their tenant's ``fairness_id``."""

    parts: tuple[tuple[Workload, float], ...]

    def __post_init__(self) -> None:
        _check_names(*(part.name for part, _ in self.parts))
        total = sum(share for _, share in self.parts)
        if abs(total - 1) > 1e-9 or min(share for _, share in self.parts) <= 0:
            raise ValueError(f"{self.name}: the shares must be positive and add up to 1, not {total:g}")

    def arrivals(self, rate_per_s: float, duration_s: float, seed: int) -> Iterator[Arrival]:
        streams = [part.arrivals(share * rate_per_s, duration_s, seed) for part, share in self.parts]
        return heapq.merge(*streams, key=lambda one: one.at_s)


class Shifted(Workload, frozen=True, kw_only=True):
    """One workload for the first half of the time, another for the second."""

    before: Workload
    after: Workload
    before_factor: float = 1.0
    """The rate is that of ``after``; ``before`` comes at this many times that."""

    def __post_init__(self) -> None:
        _check_names(self.before.name, self.after.name)

    def arrivals(self, rate_per_s: float, duration_s: float, seed: int) -> Iterator[Arrival]:
        half_s = duration_s / 2
        yield from self.before.arrivals(self.before_factor * rate_per_s, half_s, seed)
        for one in self.after.arrivals(rate_per_s, half_s, seed):
            yield replace(one, at_s=half_s + one.at_s)


class WithSlos(Workload, frozen=True, kw_only=True):
    """Another workload, a random ``share`` of whose requests carry latency objectives."""

    of: Workload
    share: float = 0.5
    ttft_slo_ms: float
    tpot_slo_ms: float

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"{self.name}: the share must be 0 to 1, not {self.share:g}")

    def arrivals(self, rate_per_s: float, duration_s: float, seed: int) -> Iterator[Arrival]:
        rng = random.Random(f"{seed} {self.name} slo")
        slos = {"ttft_slo_ms": self.ttft_slo_ms, "tpot_slo_ms": self.tpot_slo_ms}
        for one in self.of.arrivals(rate_per_s, duration_s, seed):
            asked = rng.random() < self.share
            yield replace(one, request=replace(one.request, **slos)) if asked else one


def _check_names(*names: str) -> None:
    """Equal names would mean equal texts and request ids."""
    if len(set(names)) < len(names):
        raise ValueError(f"the workloads put together must have names of their own, not {', '.join(names)}")
