"""How full the pool is: 1 = full. The detectors are filters too, which drop the endpoints that are full."""

from __future__ import annotations

from functools import lru_cache
from random import Random
from typing import ClassVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from llmd_sched.config import duration_s
from llmd_sched.flow.unseen import UNSEEN
from llmd_sched.plugin import Attribute, Filter, Reads, reads
from llmd_sched.types import Array, Candidates, Endpoint, Request

ROLE_LABEL = "llm-d.ai/role"
DECODE_ROLES = ("", "decode", "prefill-decode", "both", "encode-prefill-decode")
PREFILL_ROLES = ("prefill", "encode-prefill", "prefill-decode", "both", "encode-prefill-decode")
"""A role in both is counted in both stages; one in neither (encode, unheard-of ones) in none. No label is decode."""

IDLE_READ_S = 1.25
"""An idle endpoint's metrics are read once a second on purpose; with what a read takes, those no older than this are
as fresh as they get."""


class SaturationDetector(Filter, frozen=True):
    """Measures how full the endpoints are."""

    by_metrics: ClassVar[bool] = False
    """It goes by what is read of the engines, which shows a request only some time after it was sent."""

    def saturation(self, candidates: Candidates) -> float:
        """0 = idle, 1 = full, more is possible; 1 when there are no endpoints."""
        raise NotImplementedError

    def stale(self, candidates: Candidates) -> int:
        """How many endpoints it cannot judge, their metrics being too old."""
        return 0


class UtilizationDetector(SaturationDetector, frozen=True):
    """By what the engines report: per endpoint the larger of waiting requests / ``queueDepthThreshold`` and KV cache
    use / ``kvCacheUtilThreshold``, over the pool the mean.

    Metrics older than ``metricsStalenessThreshold`` count as a full endpoint, or with ``stalenessPolicy: ignore`` not
    at all (all of them stale: 0). Idle endpoints are read once a second, so up to 1.25 s old is never stale, whatever
    the threshold. Requests that were dispatched since an endpoint's metrics were read count as waiting there, so
    between two reads an endpoint is sent about ``queueDepthThreshold`` of them at most. As a filter: keeps endpoints
    that are fresh and below both thresholds x (1 + ``headroom``), and everybody when none is.
    """

    by_metrics = True

    queue_depth_threshold: int = 5
    kv_cache_util_threshold: float = 0.8
    metrics_staleness_threshold: str = "200ms"
    headroom: float = 0.0
    staleness_policy: str = "saturated"

    def check(self) -> None:
        if self.queue_depth_threshold <= 0:
            raise ValueError("queueDepthThreshold must be positive")
        if not 0 < self.kv_cache_util_threshold <= 1:
            raise ValueError("kvCacheUtilThreshold must be above 0 and at most 1")
        if not 0 <= self.headroom < float("inf"):
            raise ValueError("headroom must be a finite number, 0 or more")
        if self.staleness_policy not in ("saturated", "ignore"):
            raise ValueError(f"stalenessPolicy {self.staleness_policy!r}: accepted are saturated and ignore")
        try:
            threshold_s = duration_s(self.metrics_staleness_threshold)
        except ValueError as e:
            raise ValueError(f"metricsStalenessThreshold: {e}") from None
        if threshold_s <= 0:
            raise ValueError("metricsStalenessThreshold must be more than 0")

    def saturation(self, candidates: Candidates) -> float:
        if not len(candidates):
            return 1.0
        unseen = candidates.get(UNSEEN)
        load = np.maximum(
            (candidates.column("waiting") + (0.0 if unseen is None else unseen)) / self.queue_depth_threshold,
            candidates.column("kv_usage") / self.kv_cache_util_threshold,
        )
        stale = self._stale(candidates)
        if not stale.any():
            return float(load.mean())
        if self.staleness_policy == "saturated":
            return float(np.where(stale, 1.0, load).mean())
        return 0.0 if stale.all() else float(load[~stale].mean())

    def stale(self, candidates: Candidates) -> int:
        return int(self._stale(candidates).sum())

    def _stale(self, candidates: Candidates) -> NDArray[np.bool_]:
        return candidates.column("metrics_age_s") > max(_seconds(self.metrics_staleness_threshold), IDLE_READ_S)

    def keep(self, request: Request, candidates: Candidates, rng: Random) -> NDArray[np.bool_]:
        kept = ~self._stale(candidates)
        kept &= candidates.column("waiting") < self.queue_depth_threshold * (1 + self.headroom)
        kept &= candidates.column("kv_usage") < self.kv_cache_util_threshold * (1 + self.headroom)
        return kept if kept.any() else ~kept


class ConcurrencyDetector(SaturationDetector, frozen=True):
    """By what we ourselves have in flight, which is known at once and needs no metrics.

    ``concurrencyMode`` requests: in flight / (endpoints x ``maxConcurrency``); tokens: the same with
    ``maxTokenConcurrency``; hybrid: per endpoint the larger share, over the pool the mean. As a filter: keeps
    endpoints below the maximum x (1 + ``headroom``), which may be none.
    """

    max_concurrency: int = 100
    max_token_concurrency: int = 1_000_000
    concurrency_mode: str = "requests"
    headroom: float = 0.0
    in_flight_load_producer_name: str = ""

    def check(self) -> None:
        if self.max_concurrency <= 0 or self.max_token_concurrency <= 0:
            raise ValueError("maxConcurrency and maxTokenConcurrency must be positive")
        if self.concurrency_mode not in ("requests", "tokens", "hybrid"):
            raise ValueError(f"concurrencyMode {self.concurrency_mode!r}: accepted are requests, tokens and hybrid")
        if not 0 <= self.headroom < float("inf"):
            raise ValueError("headroom must be a finite number, 0 or more")

    def reads(self) -> tuple[Reads, ...]:
        return (reads(Attribute.INFLIGHT_LOAD, self.in_flight_load_producer_name),)

    def saturation(self, candidates: Candidates) -> float:
        if not len(candidates):
            return 1.0
        if self.concurrency_mode == "hybrid":
            return float(self._shares(candidates).mean())
        # Counts are summed before they are divided: rounding must not show a full pool as not quite full.
        most = self.max_concurrency if self.concurrency_mode == "requests" else self.max_token_concurrency
        return float(self._counted(self.concurrency_mode, candidates).sum()) / (len(candidates) * most)

    def keep(self, request: Request, candidates: Candidates, rng: Random) -> NDArray[np.bool_]:
        return self._shares(candidates) < 1 + self.headroom

    def _shares(self, candidates: Candidates) -> Array:
        requests = self._counted("requests", candidates) / self.max_concurrency
        tokens = self._counted("tokens", candidates) / self.max_token_concurrency
        match self.concurrency_mode:
            case "requests":
                return requests
            case "tokens":
                return tokens
            case _:  # hybrid: ``check`` let no other pass
                return np.maximum(requests, tokens)

    def _counted(self, unit: str, candidates: Candidates) -> Array:
        """No load when nobody counts it."""
        counted = candidates.get(f"inflight_{unit}/{self.reads()[0].producer}")
        return np.zeros(len(candidates)) if counted is None else counted


@lru_cache(maxsize=64)
def _seconds(text: str) -> float:
    return duration_s(text)


class Saturation(msgspec.Struct, frozen=True):
    """Per stage, and what counts: the fullest stage that has endpoints. None = the stage has none."""

    prefill: float | None
    decode: float | None
    effective: float
    stale: int = 0
    """Endpoints whose metrics are too old to judge."""


class Stages:
    """Measures prefill and decode on their own. Who is in which is found once per list of endpoints."""

    def __init__(self, detector: SaturationDetector) -> None:
        self.detector = detector
        self._members: list[Endpoint] | None = None
        self._prefill: NDArray[np.bool_] = np.zeros(0, dtype=bool)
        self._decode: NDArray[np.bool_] = np.zeros(0, dtype=bool)
        self._one_stage = False

    def measure(self, candidates: Candidates) -> Saturation:
        if candidates.endpoints is not self._members:
            self._part(candidates.endpoints)
        if self._one_stage and len(candidates):
            decode = self.detector.saturation(candidates)
            return Saturation(None, decode, decode, self.detector.stale(candidates))
        prefill, decode_or_none = (
            self._of(candidates.keep(stage[candidates.index])) for stage in (self._prefill, self._decode)
        )
        stages = [s for s in (prefill, decode_or_none) if s is not None]
        effective = max(stages) if stages else self.detector.saturation(candidates)
        return Saturation(prefill, decode_or_none, effective, self.detector.stale(candidates))

    def _of(self, stage: Candidates) -> float | None:
        return self.detector.saturation(stage) if len(stage) else None

    def _part(self, endpoints: list[Endpoint]) -> None:
        roles = [e.labels.get(ROLE_LABEL, "") for e in endpoints]
        self._members = endpoints
        self._prefill = np.array([role in PREFILL_ROLES for role in roles], dtype=bool)
        self._decode = np.array([role in DECODE_ROLES for role in roles], dtype=bool)
        self._one_stage = bool(self._decode.all()) and not self._prefill.any()


DETECTORS: dict[str, type[SaturationDetector]] = {
    "utilization-detector": UtilizationDetector,
    "concurrency-detector": ConcurrencyDetector,
}
