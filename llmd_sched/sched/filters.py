"""Filters: which candidates stay. An empty result ends the request with 429."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from random import Random
from typing import ClassVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from llmd_sched.plugin import Attribute, Filter, Reads, reads
from llmd_sched.sched.labels import Requirement, check_key, check_value, matches
from llmd_sched.sched.scorers import prefix_share
from llmd_sched.types import Array, Candidates, Request

ROLE_LABEL = "llm-d.ai/role"


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


class LabelSelectorFilter(Filter, frozen=True):
    """Keep the endpoints whose labels a Kubernetes label selector matches.

    ``matchLabels``: labels that must have these values. ``matchExpressions``: entries of ``key``, ``operator`` (In,
    NotIn, Exists, DoesNotExist) and ``values``. All must hold; NotIn holds where the label is absent. Without any
    requirement everything stays.
    """

    match_labels: dict[str, str] = msgspec.field(default_factory=dict)
    match_expressions: tuple[Requirement, ...] = ()

    def check(self) -> None:
        for key, value in self.match_labels.items():
            check_key(key)
            check_value(value)
        for requirement in self.match_expressions:
            requirement.check()

    def keep(self, request: Request, candidates: Candidates, rng: Random) -> NDArray[np.bool_]:
        return _where(candidates, lambda labels: matches(self.match_labels, self.match_expressions, labels))


class ByLabel(Filter, frozen=True):
    """Keep the endpoints whose ``label`` has one of ``validValues``, or none with ``allowsNoLabel``.

    Deprecated by the reference: ``label-selector-filter`` says the same.
    """

    label: str
    valid_values: tuple[str, ...] = ()
    allows_no_label: bool = False

    def check(self) -> None:
        if not self.label:
            raise ValueError("label must not be empty")
        if not self.valid_values and not self.allows_no_label:
            raise ValueError("validValues must name at least one value, or allowsNoLabel be true: else nothing passes")

    def keep(self, request: Request, candidates: Candidates, rng: Random) -> NDArray[np.bool_]:
        return _with_label(candidates, self.label, self.valid_values, self.allows_no_label)


class _RoleFilter(Filter, frozen=True):
    roles: ClassVar[tuple[str, ...]] = ()
    allows_no_role: ClassVar[bool] = False

    def keep(self, request: Request, candidates: Candidates, rng: Random) -> NDArray[np.bool_]:
        return _with_label(candidates, ROLE_LABEL, self.roles, self.allows_no_role)


class DecodeFilter(_RoleFilter, frozen=True):
    """Keep the endpoints that decode, by the label ``llm-d.ai/role``; those without the label too."""

    roles = ("decode", "prefill-decode", "both", "encode-prefill-decode")
    allows_no_role = True


class PrefillFilter(_RoleFilter, frozen=True):
    """Keep the endpoints that prefill, by the label ``llm-d.ai/role``; not those without the label."""

    roles = ("prefill", "encode-prefill", "prefill-decode", "both", "encode-prefill-decode")


class EncodeFilter(_RoleFilter, frozen=True):
    """Keep the endpoints that encode images and sound, by the label ``llm-d.ai/role``; not those without the label."""

    roles = ("encode", "encode-prefill", "encode-prefill-decode")


def _with_label(candidates: Candidates, label: str, values: tuple[str, ...], allows_none: bool) -> NDArray[np.bool_]:
    # An absent label reads as empty, so an empty string among the values lets it pass: the reference does the same.
    return _where(candidates, lambda labels: labels.get(label, "") in values or (allows_none and label not in labels))


def _where(candidates: Candidates, holds: Callable[[Mapping[str, str]], bool]) -> NDArray[np.bool_]:
    """True for the candidates whose labels pass."""
    endpoints = candidates.endpoints
    return np.array([holds(endpoints[i].labels) for i in candidates.index.tolist()], dtype=bool)


SCRAPED_METRICS = {"running-requests": "running", "waiting-queue": "waiting", "kv-cache-utilization": "kv_usage"}
"""Names in a condition -> the pool's columns."""
ACTIVE_REQUESTS = "active-requests"


class Condition(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """A cap on one metric."""

    metric: str
    max_value: float

    def check(self) -> None:
        """Raises ValueError with what is accepted."""
        known = (ACTIVE_REQUESTS, *SCRAPED_METRICS)
        if self.metric not in known:
            raise ValueError(f"metric {self.metric!r} of a condition: accepted are {', '.join(known)}")
        if not 0 <= self.max_value < math.inf:
            raise ValueError(f"maxValue of {self.metric} must be a finite number, 0 or more")
        if self.metric == "kv-cache-utilization" and self.max_value > 1:
            raise ValueError("maxValue of kv-cache-utilization must be between 0 and 1: it is a share")


class UtilizationFilter(Filter, frozen=True):
    """Drop the endpoints that are above any of the ``conditions``, each a ``metric`` and its ``maxValue``.

    Metrics: ``active-requests`` (our own open requests, by the in-flight load producer), ``running-requests`` and
    ``waiting-queue`` (requests in the engine, as scraped), ``kv-cache-utilization`` (share in use, 0 to 1). Exactly
    the cap stays. With ``fallbackOnEmpty`` everything stays when nothing would; without, the request ends with 429.
    """

    conditions: tuple[Condition, ...]
    fallback_on_empty: bool = False
    in_flight_load_producer_name: str = ""

    def check(self) -> None:
        if not self.conditions:
            raise ValueError("conditions must have at least one entry, of metric and maxValue")
        for condition in self.conditions:
            condition.check()

    def reads(self) -> tuple[Reads, ...]:
        if not any(c.metric == ACTIVE_REQUESTS for c in self.conditions):
            return ()
        return (reads(Attribute.INFLIGHT_LOAD, self.in_flight_load_producer_name),)

    def keep(self, request: Request, candidates: Candidates, rng: Random) -> NDArray[np.bool_]:
        kept = np.ones(len(candidates), dtype=bool)
        for condition in self.conditions:
            values = self._values(condition.metric, candidates)
            if values is not None:
                kept &= values <= condition.max_value
        return ~kept if self.fallback_on_empty and not kept.any() else kept

    def _values(self, metric: str, candidates: Candidates) -> Array | None:
        """None when nobody counts it, which is no load."""
        if metric == ACTIVE_REQUESTS:
            return candidates.get(f"inflight_requests/{self.reads()[0].producer}")
        return candidates.column(SCRAPED_METRICS[metric])


FILTERS: dict[str, type[Filter]] = {
    "prefix-cache-affinity-filter": PrefixCacheAffinityFilter,
    "slo-headroom-tier-filter": SloHeadroomTierFilter,
    "label-selector-filter": LabelSelectorFilter,
    "by-label": ByLabel,
    "decode-filter": DecodeFilter,
    "prefill-filter": PrefillFilter,
    "encode-filter": EncodeFilter,
    "utilization-filter": UtilizationFilter,
}
"""``context-length-aware`` filters too; it stands among the scorers."""
