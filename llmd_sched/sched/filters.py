"""Filters: which candidates stay. An empty result ends the request with 429."""

from __future__ import annotations

from random import Random

import msgspec
import numpy as np
from numpy.typing import NDArray

from llmd_sched.plugin import Attribute, Filter, Reads, reads
from llmd_sched.sched.scorers import prefix_share
from llmd_sched.types import Candidates, Request


class PrefixCacheAffinityFilter(Filter, frozen=True):
    """Stay with endpoints that hold the prompt's prefix, until they are too far behind.

    Endpoints with at least ``affinityThreshold`` of the prompt are kept alone, unless the best of them would answer
    more than ``maxTTFTPenaltyMs`` later than the best of the others (0 = always stay), or with
    ``explorationProbability``. TTFT is in-flight tokens / ``peakPrefillThroughput`` (tokens/s), or the prediction
    with ``ttftSource: latencyPredictor``. A threshold of 0 or less switches the filter off.
    """

    affinity_threshold: float = 0.80
    exploration_probability: float = 0.0
    max_ttft_penalty_ms: float = msgspec.field(default=18000.0, name="maxTTFTPenaltyMs")
    ttft_source: str = "prefillThroughput"
    peak_prefill_throughput: float = 15928.0
    prefix_match_info_producer_name: str = ""
    in_flight_load_producer_name: str = ""
    latency_prediction_info_producer_name: str = ""

    def check(self) -> None:
        if self.affinity_threshold > 1:
            raise ValueError("affinityThreshold must be at most 1")
        if not 0 <= self.exploration_probability <= 1:
            raise ValueError("explorationProbability must be between 0 and 1")
        if self.max_ttft_penalty_ms < 0:
            raise ValueError("maxTTFTPenaltyMs must be 0 or more")
        if self.ttft_source not in ("prefillThroughput", "latencyPredictor"):
            raise ValueError("ttftSource must be prefillThroughput or latencyPredictor")
        if self.ttft_source == "prefillThroughput" and self.peak_prefill_throughput <= 0:
            raise ValueError("peakPrefillThroughput must be positive")

    def reads(self) -> tuple[Reads, ...]:
        prefix = reads(Attribute.PREFIX_MATCH, self.prefix_match_info_producer_name)
        if self.ttft_source == "latencyPredictor":
            return (prefix, reads(Attribute.LATENCY, self.latency_prediction_info_producer_name))
        return (prefix, reads(Attribute.INFLIGHT_LOAD, self.in_flight_load_producer_name))

    def keep(self, request: Request, candidates: Candidates, rng: Random) -> NDArray[np.bool_]:
        everything = np.ones(len(candidates), dtype=bool)
        if len(candidates) <= 1 or self.affinity_threshold <= 0:
            return everything
        if self.exploration_probability and rng.random() < self.exploration_probability:
            return everything
        sticky = prefix_share(candidates, self.reads()[0].producer) >= self.affinity_threshold
        if not sticky.any() or sticky.all():
            return everything
        if self.max_ttft_penalty_ms > 0:
            ttft_ms = self._ttft_ms(candidates)
            if ttft_ms[sticky].min() - ttft_ms[~sticky].min() > self.max_ttft_penalty_ms:
                return everything
        return sticky

    def _ttft_ms(self, candidates: Candidates) -> NDArray[np.float64]:
        name = self.reads()[1].producer
        if self.ttft_source == "latencyPredictor":
            predicted = candidates.get(f"ttft_ms/{name}")
            return np.zeros(len(candidates)) if predicted is None else predicted
        tokens = candidates.get(f"inflight_tokens/{name}")
        return np.zeros(len(candidates)) if tokens is None else tokens / self.peak_prefill_throughput * 1000.0


class SloHeadroomTierFilter(Filter, frozen=True):
    """Prefer endpoints that keep both SLOs; with probability ``epsilonExploreNeg`` take the others."""

    epsilon_explore_neg: float = 0.01
    latency_prediction_info_producer_name: str = ""

    def check(self) -> None:
        if not 0 <= self.epsilon_explore_neg <= 1:
            raise ValueError("epsilonExploreNeg must be between 0 and 1")

    def reads(self) -> tuple[Reads, ...]:
        return (reads(Attribute.LATENCY, self.latency_prediction_info_producer_name),)

    def keep(self, request: Request, candidates: Candidates, rng: Random) -> NDArray[np.bool_]:
        name = self.reads()[0].producer
        ttft = candidates.get(f"ttft_headroom_ms/{name}")
        if len(candidates) <= 1 or ttft is None:
            return np.ones(len(candidates), dtype=bool)
        positive = (ttft >= 0) & (candidates.column(f"tpot_headroom_ms/{name}") >= 0)
        if positive.all() or not positive.any():
            return np.ones(len(candidates), dtype=bool)
        return ~positive if rng.random() < self.epsilon_explore_neg else positive


FILTERS: dict[str, type[Filter]] = {
    "prefix-cache-affinity-filter": PrefixCacheAffinityFilter,
    "slo-headroom-tier-filter": SloHeadroomTierFilter,
}
