"""Admitters: refuse what may be shed (priority below 0) while the pool has no room for it."""

from __future__ import annotations

import math
from random import Random

import numpy as np

from llmd_sched.plugin import Admitter, Attribute, Reads, reads
from llmd_sched.types import Candidates, Request

COLD_KV_USAGE = 0.02
"""An engine with less of its KV cache in use has hardly begun, and predictions for it are no ground for refusing."""

UNKNOWN_AGE_S = 3600.0
"""Metrics this old tell nothing. Those never read are shown as far older."""


class LatencySloAdmitter(Admitter, frozen=True):
    """Refuses a request of negative priority that has an SLO no endpoint would keep.

    Only when there are predictions, and no endpoint is idle (nothing running, as scraped) or cold (less than 2 % of
    its KV cache in use).
    """

    latency_prediction_info_producer_name: str = ""

    def reads(self) -> tuple[Reads, ...]:
        return (reads(Attribute.LATENCY, self.latency_prediction_info_producer_name),)

    def refusal(self, request: Request, candidates: Candidates, rng: Random) -> str:
        has_slo = request.ttft_slo_ms is not None or request.tpot_slo_ms is not None
        if request.priority >= 0 or not has_slo or not len(candidates):
            return ""
        name = self.reads()[0].producer
        ttft = candidates.get(f"ttft_headroom_ms/{name}")
        if ttft is None:
            return ""
        keeps = (ttft >= 0) & (candidates.column(f"tpot_headroom_ms/{name}") >= 0)
        idle, cold = candidates.column("running") == 0, candidates.column("kv_usage") < COLD_KV_USAGE
        return "" if (keeps | idle | cold).any() else "no endpoint is predicted to keep its SLO"


class ProbabilisticAdmitter(Admitter, frozen=True):
    """Refuses requests of negative priority at random, more of them the fuller the pool is.

    With probability min(1, ``k`` * s ^ ``power``), where s is the mean over the endpoints of
    max(waiting / ``queueDepthThreshold``, kv_usage / ``kvCacheUtilThreshold``). An endpoint without metrics counts as
    full, 1.
    """

    queue_depth_threshold: float = 5.0
    kv_cache_util_threshold: float = 0.8
    power: float = 5.0
    k: float = 300.0

    def check(self) -> None:
        values = (self.queue_depth_threshold, self.kv_cache_util_threshold, self.power, self.k)
        if not all(0 < value < math.inf for value in values):
            raise ValueError("queueDepthThreshold, kvCacheUtilThreshold, power and k must be more than 0, and finite")
        if self.kv_cache_util_threshold > 1:
            raise ValueError("kvCacheUtilThreshold must be at most 1: it is a share")

    def refusal(self, request: Request, candidates: Candidates, rng: Random) -> str:
        if request.priority >= 0 or not len(candidates):
            return ""
        saturation = self.saturation(candidates)
        if rng.random() < self.probability(saturation):
            return f"priority {request.priority} is shed at a saturation of {saturation:.2f}"
        return ""

    def saturation(self, candidates: Candidates) -> float:
        queue = candidates.column("waiting") / self.queue_depth_threshold
        kv = candidates.column("kv_usage") / self.kv_cache_util_threshold
        unknown = candidates.column("metrics_age_s") >= UNKNOWN_AGE_S
        return float(np.where(unknown, 1.0, np.maximum(queue, kv)).mean())

    def probability(self, saturation: float) -> float:
        """By logarithms, as the power of a large saturation is no number any more."""
        if saturation <= 0:
            return 0.0
        return math.exp(min(0.0, math.log(self.k) + self.power * math.log(saturation)))


ADMITTERS: dict[str, type[Admitter]] = {
    "latency-slo-admitter": LatencySloAdmitter,
    "probabilistic-admitter": ProbabilisticAdmitter,
}
