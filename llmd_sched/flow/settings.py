"""The ``flowControl`` block with every default filled in and every policy made."""

from __future__ import annotations

import math

import msgspec

from llmd_sched.flow.limits import StaticUsageLimit, UsageLimits
from llmd_sched.flow.policy import Fairness, FcfsOrdering, GlobalStrictFairness, Ordering

MAX_BANDS = 128
"""Priorities with a queue of their own; requests of any further one wait in band 0."""

DEFAULT_TTL_S = 60.0


class BandSettings(msgspec.Struct, frozen=True, kw_only=True):
    """One priority's queue: its caps and policies."""

    max_bytes: int = 1_000_000_000
    """Of request bodies."""
    max_requests: int = 5000
    fairness: Fairness = GlobalStrictFairness()
    ordering: Ordering = FcfsOrdering()

    def check(self) -> None:
        if self.max_bytes <= 0 or self.max_requests <= 0:
            raise ValueError("maxBytes and maxRequests of a band must be positive")


class FlowSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The whole of flow control. ``check`` raises ValueError with what is accepted."""

    bands: dict[int, BandSettings] = msgspec.field(default_factory=dict)
    """By priority, those that are configured."""
    default_band: BandSettings = BandSettings()
    """For priorities of 0 and more that are not configured."""
    default_negative_band: BandSettings | None = None
    """For negative ones; None = as the others."""
    max_bytes: int = 0
    """Of all bands together; 0 = no cap."""
    max_requests: int = 0
    ttl_s: float = DEFAULT_TTL_S
    """How long a request may be queued; inf = for ever."""
    no_endpoint_ttl_s: float | None = None
    """The same while the pool is empty; None = as ``ttl_s``, or 60 s when that is for ever."""
    usage_limits: UsageLimits = StaticUsageLimit()

    def check(self) -> None:
        if len(self.bands) > MAX_BANDS - 1:
            raise ValueError(f"priorityBands: {len(self.bands)} given; at most {MAX_BANDS - 1} are accepted")
        if self.max_bytes < 0 or self.max_requests < 0:
            raise ValueError("maxBytes and maxRequests must be 0 (no cap) or more")
        if not self.ttl_s > 0 or not self.no_endpoint_budget_s > 0:
            raise ValueError("defaultRequestTTL and noEndpointRequestTTL must be positive")
        for band in (*self.bands.values(), self.default_band, self.template(-1)):
            band.check()

    def template(self, priority: int) -> BandSettings:
        """What a band of this priority is like when it is not configured."""
        if priority < 0 and self.default_negative_band is not None:
            return self.default_negative_band
        return self.default_band

    @property
    def no_endpoint_budget_s(self) -> float:
        if self.no_endpoint_ttl_s is not None:
            return self.no_endpoint_ttl_s
        return self.ttl_s if self.ttl_s < math.inf else DEFAULT_TTL_S
