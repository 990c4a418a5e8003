"""Scorers: one score per candidate, higher is better. Formulas are the reference's; edge cases are in the tests."""

from __future__ import annotations

import math
import re
from functools import lru_cache
from random import Random

import msgspec
import numpy as np
from numpy.typing import NDArray

from llmd_sched.plugin import Attribute, Filter, Reads, Scorer, reads
from llmd_sched.types import Adapters, Array, Candidates, Request

DEFAULT_QUEUE_THRESHOLD_REQUESTS = 128
OUT_OF_RANGE_SCORE = 0.3
"""What a prompt of the right length scores more than, and one of another length at most."""


def lower_is_better(values: Array) -> Array:
    """(max - v) / (max - min); all equal -> 1."""
    low, high = values.min(), values.max()
    return np.ones(len(values)) if high == low else (high - values) / (high - low)


class QueueScorer(Scorer, frozen=True):
    """Fewer requests waiting in the engine."""

    def score(self, request: Request, candidates: Candidates) -> Array:
        return lower_is_better(candidates.column("waiting"))


class RunningRequestsSizeScorer(Scorer, frozen=True):
    """Fewer requests running in the engine, as scraped."""

    def score(self, request: Request, candidates: Candidates) -> Array:
        return lower_is_better(candidates.column("running"))


class LoadAwareScorer(Scorer, frozen=True):
    """Fewer requests waiting in the engine, against a fixed length: 0.5 * (1 - min(waiting, threshold) / threshold).

    The most is 0.5, for an empty queue. ``threshold`` is in requests; 0 or less means the default.
    """

    threshold: int = DEFAULT_QUEUE_THRESHOLD_REQUESTS

    def score(self, request: Request, candidates: Candidates) -> Array:
        threshold = float(self.threshold if self.threshold > 0 else DEFAULT_QUEUE_THRESHOLD_REQUESTS)
        return 0.5 * (1.0 - np.minimum(candidates.column("waiting"), threshold) / threshold)


class KvCacheUtilizationScorer(Scorer, frozen=True):
    """More free KV cache: 1 - usage."""

    def score(self, request: Request, candidates: Candidates) -> Array:
        return 1.0 - candidates.column("kv_usage")


class PrefixCacheScorer(Scorer, frozen=True):
    """More of the prompt in the endpoint's prefix cache.

    w * min(1, matched_tokens / S)^2 + (1 - w) * matched / total, with w = ``matchLengthWeight`` and
    S = ``matchLengthScaleTokens``. No match information scores 0.
    """

    prefix_match_info_producer_name: str = ""
    match_length_weight: float = 0.0
    match_length_scale_tokens: float = 8192

    def check(self) -> None:
        if not 0 <= self.match_length_weight <= 1:
            raise ValueError("matchLengthWeight must be between 0 and 1")
        if self.match_length_weight > 0 and not self.match_length_scale_tokens > 0:
            raise ValueError("matchLengthScaleTokens must be positive when matchLengthWeight is")

    def reads(self) -> tuple[Reads, ...]:
        return (reads(Attribute.PREFIX_MATCH, self.prefix_match_info_producer_name),)

    def score(self, request: Request, candidates: Candidates) -> Array:
        share = prefix_share(candidates, self.reads()[0].producer)
        if not self.match_length_weight:
            return share
        name = self.reads()[0].producer
        match = candidates.get(f"prefix_match_blocks/{name}")
        if match is None:
            return share
        tokens = match * candidates.column(f"prefix_block_tokens/{name}")
        length = np.minimum(1.0, tokens / self.match_length_scale_tokens) ** 2
        w = self.match_length_weight
        return np.where(share > 0, w * length + (1 - w) * share, 0.0)


def prefix_share(candidates: Candidates, producer: str) -> Array:
    """matched / total blocks; 0 without information or without blocks."""
    match = candidates.get(f"prefix_match_blocks/{producer}")
    if match is None:
        return np.zeros(len(candidates))
    total = candidates.column(f"prefix_total_blocks/{producer}")
    return np.divide(match, total, out=np.zeros(len(candidates)), where=total > 0)


class TokenLoadScorer(Scorer, frozen=True):
    """Fewer prompt tokens to compute: those in flight plus this request's uncached ones.

    1 - min(t, threshold) / threshold, with ``queueThresholdTokens``; nothing to compute -> 1.
    """

    queue_threshold_tokens: float = 4194304
    in_flight_load_producer_name: str = ""

    def reads(self) -> tuple[Reads, ...]:
        return (reads(Attribute.INFLIGHT_LOAD, self.in_flight_load_producer_name),)

    def score(self, request: Request, candidates: Candidates) -> Array:
        name = self.reads()[0].producer
        in_flight = candidates.get(f"inflight_tokens/{name}")
        if in_flight is None:
            return np.ones(len(candidates))
        tokens = np.maximum(0.0, in_flight + candidates.column(f"uncached_tokens/{name}"))
        threshold = self.queue_threshold_tokens if self.queue_threshold_tokens > 0 else 4194304.0
        return 1.0 - np.minimum(tokens, threshold) / threshold


class ActiveRequestScorer(Scorer, frozen=True):
    """Fewer of our own open requests.

    Up to ``idleThreshold`` -> 1; else (max - count) / max * ``maxBusyScore``. ``requestTimeout`` is accepted, unused.
    """

    idle_threshold: int = 0
    max_busy_score: float = 1.0
    request_timeout: str | None = None
    in_flight_load_producer_name: str = ""

    def reads(self) -> tuple[Reads, ...]:
        return (reads(Attribute.INFLIGHT_LOAD, self.in_flight_load_producer_name),)

    def score(self, request: Request, candidates: Candidates) -> Array:
        counts = candidates.get(f"inflight_requests/{self.reads()[0].producer}")
        if counts is None:
            return np.ones(len(candidates))
        busiest = counts.max(initial=0.0)
        scale = self.max_busy_score if 0 <= self.max_busy_score <= 1 else 1.0
        busy = (busiest - counts) / busiest * scale if busiest > 0 else np.ones(len(counts))
        return np.where(counts <= self.idle_threshold, 1.0, busy)


class LatencyScorer(Scorer, frozen=True):
    """Lowest predicted latency, or tightest fit to the request's SLOs.

    Endpoints that keep both SLOs are scored alone if there are any; else idle endpoints; else the first non-empty of
    those missing only TPOT, only TTFT, both. In the set the absolute headrooms are min-max normalised and blended by
    ``ttftWeight`` and ``tpotWeight``; ``headroomSelectionStrategy`` least packs (smallest headroom wins) and most
    spreads. Without any prediction: a blend of free KV cache, queue and prefix match.
    """

    ttft_weight: float = 0.8
    tpot_weight: float = 0.2
    headroom_selection_strategy: str = "least"
    composite_kv_weight: float = msgspec.field(default=1.0, name="compositeKVWeight")
    composite_queue_weight: float = 1.0
    composite_prefix_weight: float = 1.0
    latency_prediction_info_producer_name: str = ""
    prefix_match_info_producer_name: str = ""

    def check(self) -> None:
        if self.headroom_selection_strategy not in ("least", "most"):
            raise ValueError("headroomSelectionStrategy must be least or most")
        weights = (
            *(self.ttft_weight, self.tpot_weight),
            *(self.composite_kv_weight, self.composite_queue_weight, self.composite_prefix_weight),
        )
        if not all(math.isfinite(w) and w >= 0 for w in weights):
            raise ValueError("weights must be finite and 0 or more")

    def reads(self) -> tuple[Reads, ...]:
        return (
            reads(Attribute.LATENCY, self.latency_prediction_info_producer_name),
            reads(Attribute.PREFIX_MATCH, self.prefix_match_info_producer_name, required=False),
        )

    def score(self, request: Request, candidates: Candidates) -> Array:
        name = self.reads()[0].producer
        ttft = candidates.get(f"ttft_headroom_ms/{name}")
        if ttft is None:
            return self._composite(candidates)
        tpot = candidates.column(f"tpot_headroom_ms/{name}")
        chosen, strategy = self._best_set(ttft, tpot, candidates.column(f"dispatched/{name}"))
        scores = np.zeros(len(candidates))
        scores[chosen] = self._in_set(np.abs(ttft[chosen]), np.abs(tpot[chosen]), strategy)
        return scores

    def _best_set(self, ttft: Array, tpot: Array, dispatched: Array) -> tuple[np.ndarray, str]:
        keeps_ttft, keeps_tpot = ttft >= 0, tpot >= 0
        if (keeps_ttft & keeps_tpot).any():
            return keeps_ttft & keeps_tpot, self.headroom_selection_strategy
        for group in (dispatched == 0, keeps_ttft, keeps_tpot):
            if group.any():
                return group, "least"
        return np.ones(len(ttft), dtype=bool), "least"

    def _in_set(self, a: Array, b: Array, strategy: str) -> Array:
        """Scores 0.01 .. 1.01 in steps of 0.01, as the reference rounds them."""
        na, a_varies = _unit_range(a)
        nb, b_varies = _unit_range(b)
        total = self.ttft_weight + self.tpot_weight
        wa, wb = (self.ttft_weight / total, self.tpot_weight / total) if total > 0 else (1.0, 0.0)
        if a_varies != b_varies:
            wa, wb = (1.0, 0.0) if a_varies else (0.0, 1.0)
        c = wa * na + wb * nb
        return (np.floor((1 - c if strategy == "least" else c) * 100) + 1) / 100

    def _composite(self, candidates: Candidates) -> Array:
        weights = np.array([self.composite_kv_weight, self.composite_queue_weight, self.composite_prefix_weight])
        weights = weights / weights.sum() if weights.sum() > 0 else np.array([1.0, 0.0, 0.0])
        waiting = candidates.column("waiting")
        longest = waiting.max(initial=0.0)
        queue = (longest - waiting) / longest if longest > 0 else np.ones(len(waiting))
        share = prefix_share(candidates, self.reads()[1].producer)
        blend = weights[0] * (1 - candidates.column("kv_usage")) + weights[1] * queue + weights[2] * share
        return np.asarray(np.floor(100 * blend + 0.5) / 100)


def _unit_range(values: Array) -> tuple[Array, bool]:
    """Min-max normalised, and whether there was a range at all (else 0.5 each)."""
    low, high = values.min(), values.max()
    if high - low <= 1e-9:
        return np.full(len(values), 0.5), False
    return (values - low) / (high - low), True


class LoraAffinityScorer(Scorer, frozen=True):
    """The LoRA adapter asked for is in use there (1), or there is room for it (0.8), or it waits there (0.6); else 0.

    There is room while fewer adapters are in use or waiting than the engine's ``max_lora``. The adapter is the model
    name sent upstream.
    """

    def score(self, request: Request, candidates: Candidates) -> Array:
        adapters = candidates.adapters
        if not adapters:
            return np.zeros(len(candidates))
        affinities = [_lora_affinity(request.target_model, adapters[i]) for i in candidates.index.tolist()]
        return np.array(affinities, dtype=np.float64)


def _lora_affinity(adapter: str, there: Adapters) -> float:
    if adapter in there.running:
        return 1.0
    # One that runs and waits, as vLLM reports it for two requests, takes one place.
    if len(there.running | there.waiting) < there.most:
        return 0.8
    return 0.6 if adapter in there.waiting else 0.0


class ContextLengthAware(Scorer, Filter, frozen=True):
    """Endpoints made for prompts of this length, by a label ``min-max`` in tokens, both ends included.

    In range 0.3 + 0.7 * (0.7 / (1 + width / 10000) + 0.3 * (max - length) / width), 1 without width: narrower ranges
    and more headroom score higher. Outside 0.3 / (1 + distance / 1000). No label 0.5, one that is no range 0. With
    ``enableFiltering`` it is a filter as well: only the range and endpoints without the label stay. ``label`` names
    the label; the length is the prompt's estimated tokens, 0 when unknown.
    """

    label: str = "llm-d.ai/context-length-range"
    enable_filtering: bool = False

    def check(self) -> None:
        if not self.label:
            raise ValueError("label must not be empty: it names the label with the range, such as 0-2048")

    def keep(self, request: Request, candidates: Candidates, rng: Random) -> NDArray[np.bool_]:
        if not self.enable_filtering:
            return np.ones(len(candidates), dtype=bool)
        return np.array([_takes(text, request.input_tokens) for text in self._labels(candidates)], dtype=bool)

    def score(self, request: Request, candidates: Candidates) -> Array:
        scores = [_range_score(text, request.input_tokens) for text in self._labels(candidates)]
        return np.array(scores, dtype=np.float64)

    def _labels(self, candidates: Candidates) -> list[str | None]:
        return [candidates.endpoints[i].labels.get(self.label) for i in candidates.index.tolist()]


_RANGE = re.compile(r"\s*(\d{1,18})\s*-\s*(\d{1,18})\s*", re.ASCII)


@lru_cache(maxsize=1024)
def token_range(text: str) -> tuple[int, int] | None:
    """``min-max`` as numbers; None for anything else, and for a range that ends before it begins."""
    found = _RANGE.fullmatch(text)
    if not found:
        return None
    low, high = int(found[1]), int(found[2])
    return (low, high) if low <= high else None


def _takes(text: str | None, tokens: int) -> bool:
    if text is None:
        return True
    bounds = token_range(text)
    return bounds is not None and bounds[0] <= tokens <= bounds[1]


def _range_score(text: str | None, tokens: int) -> float:
    if text is None:
        return 0.5
    bounds = token_range(text)
    if bounds is None:
        return 0.0
    low, high = bounds
    if not low <= tokens <= high:
        distance = max(low - tokens, tokens - high)
        return OUT_OF_RANGE_SCORE / (1.0 + distance / 1000.0)
    width = high - low
    if not width:
        return 1.0
    fit = 0.7 / (1.0 + width / 10000.0) + 0.3 * (high - tokens) / width
    return OUT_OF_RANGE_SCORE + (1.0 - OUT_OF_RANGE_SCORE) * fit


SCORERS: dict[str, type[Scorer]] = {
    "queue-scorer": QueueScorer,
    "running-requests-size-scorer": RunningRequestsSizeScorer,
    "load-aware-scorer": LoadAwareScorer,
    "kv-cache-utilization-scorer": KvCacheUtilizationScorer,
    "prefix-cache-scorer": PrefixCacheScorer,
    "token-load-scorer": TokenLoadScorer,
    "active-request-scorer": ActiveRequestScorer,
    "latency-scorer": LatencyScorer,
    "lora-affinity-scorer": LoraAffinityScorer,
    "context-length-aware": ContextLengthAware,
}
