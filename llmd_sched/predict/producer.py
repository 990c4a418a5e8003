"""The predicted-latency producer: a row per candidate, both targets, and what is left of the request's SLOs."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np

from llmd_sched.config import duration_s
from llmd_sched.plugin import Attribute, Producer, ProducerPlugin, Reads, reads
from llmd_sched.predict import features
from llmd_sched.predict.base import COLD_START
from llmd_sched.predict.ledger import Ledger
from llmd_sched.predict.model import Model
from llmd_sched.types import Array, Candidates, Decision, Endpoint, Outcome, Prediction, Request, Sample

FIRST_OUTPUT_GUESS_TOKENS = 200.0
OUTPUT_MEMORY = 500
"""The mean output length forgets at this many replies."""


class PredictedLatencyProducer(ProducerPlugin, frozen=True):
    """Predicts TTFT and TPOT of the request on every candidate with models trained from live traffic.

    ``streamingMode``: TPOT counts too (else only TTFT decides). ``sloBufferFactor`` scales the TPOT limit. Endpoints
    whose ``endpointRoleLabel`` is ``prefill`` have no TPOT. ``predictInProduce: false`` only trains. ``preset`` names
    the coefficients used before the first sample. ``samplingMean`` and ``maxDecodeTokenSamplesForPrediction`` are
    accepted and unused, as in the reference.
    """

    provides = Attribute.LATENCY

    slo_buffer_factor: float = 1.0
    context_ttl: str = msgspec.field(default="5m", name="contextTTL")
    streaming_mode: bool = False
    endpoint_role_label: str = ""
    predict_in_produce: bool = True
    use_encoder_cache_features: bool = False
    prefix_match_info_producer_name: str = ""
    in_flight_load_producer_name: str = ""
    encoder_cache_match_info_producer_name: str = ""
    sampling_mean: float = 1000.0
    max_decode_token_samples_for_prediction: int = 0
    preset: str = "default"

    def check(self) -> None:
        if not self.slo_buffer_factor > 0:
            raise ValueError("sloBufferFactor must be positive")
        if self.use_encoder_cache_features:
            raise ValueError("useEncoderCacheFeatures is not supported yet")
        if self.preset not in COLD_START:
            raise ValueError(f"preset {self.preset!r} is unknown; known: {', '.join(sorted(COLD_START))}")
        duration_s(self.context_ttl)

    def reads(self) -> tuple[Reads, ...]:
        return (
            reads(Attribute.PREFIX_MATCH, self.prefix_match_info_producer_name),
            reads(Attribute.INFLIGHT_LOAD, self.in_flight_load_producer_name),
        )

    def open(self, name: str) -> PredictedLatency:
        return PredictedLatency(name, self)


class PredictedLatency(Producer):
    """The live side. Columns: ``ttft_ms``, ``tpot_ms``, their headrooms, ``dispatched`` (our requests there).

    ``model`` is replaced by whoever trains; ``on_sample`` gets every labelled row.
    """

    def __init__(self, name: str, params: PredictedLatencyProducer) -> None:
        super().__init__(name)
        self.params = params
        self.model = Model.cold(params.preset)
        self.ledger = Ledger(ttl_s=duration_s(params.context_ttl))
        self.on_sample: Callable[[Sample], None] = lambda sample: None
        self._in_flight = params.reads()[1].producer
        self._last: tuple[Array, Array, Array] | None = None
        """Rows and both predictions of the request being decided."""
        self._mean_output_tokens = FIRST_OUTPUT_GUESS_TOKENS
        self._replies = 0
        self._running_slos: dict[str, dict[str, float]] = {}
        self._endpoint_of: dict[str, str] = {}

    def publish(self, model: Model) -> None:
        """Use ``model`` from the next request on."""
        self.model = model

    def warm_up(self) -> None:
        """Compile the kernel before the first request needs it."""
        self.model.predict(np.zeros((1, len(features.FEATURES))))

    def endpoints_changed(self, endpoints: list[Endpoint]) -> None:
        self._running_slos = {e.key: self._running_slos.get(e.key, {}) for e in endpoints}

    def produce(self, request: Request, candidates: Candidates, now_s: float) -> dict[str, Array]:
        self._last = None
        columns = dict(candidates.columns)
        for column in ("inflight_requests", "inflight_prefill_tokens", "resident_tokens", "uncached_tokens"):
            columns[column] = columns[f"{column}/{self._in_flight}"]
        view = Candidates(candidates.endpoints, columns)
        rows = features.rows(request, view, self._expected_output_tokens(request))
        ttft_ms, tpot_ms = self.model.predict(rows)
        self._last = (rows, ttft_ms, tpot_ms)
        if not self.params.predict_in_produce:
            return {}
        ttft_headroom_ms, tpot_headroom_ms = self._headrooms(request, candidates.endpoints, ttft_ms, tpot_ms)
        return {
            f"ttft_ms/{self.name}": ttft_ms,
            f"tpot_ms/{self.name}": tpot_ms,
            f"ttft_headroom_ms/{self.name}": ttft_headroom_ms,
            f"tpot_headroom_ms/{self.name}": tpot_headroom_ms,
            f"dispatched/{self.name}": columns["inflight_requests"],
        }

    def _expected_output_tokens(self, request: Request) -> float:
        if request.max_output_tokens is None:
            return self._mean_output_tokens
        return min(self._mean_output_tokens, float(request.max_output_tokens))

    def _headrooms(
        self, request: Request, endpoints: list[Endpoint], ttft_ms: Array, tpot_ms: Array
    ) -> tuple[Array, Array]:
        """SLO minus prediction. Without any SLO minus the prediction, so that the lowest is best; with only one
        given, the other asks for nothing and is 0."""
        ttft_slo, tpot_slo = request.ttft_slo_ms, request.tpot_slo_ms
        any_slo = ttft_slo is not None or tpot_slo is not None
        nothing = np.zeros(len(ttft_ms))
        ttft = nothing if any_slo and ttft_slo is None else (ttft_slo or 0.0) - ttft_ms
        if not self.params.streaming_mode or (any_slo and tpot_slo is None):
            return ttft, nothing
        if tpot_slo is None:
            tpot = -tpot_ms
        else:
            tightest = [min(self._running_slos[e.key].values(), default=np.inf) for e in endpoints]
            tpot = np.minimum(tpot_slo, tightest) * self.params.slo_buffer_factor - tpot_ms
        label = self.params.endpoint_role_label
        if label:
            tpot = np.where([e.labels.get(label) == "prefill" for e in endpoints], 0.0, tpot)
        return ttft, tpot

    def predicted(self, candidates: Candidates, position: int) -> Prediction | None:
        if self._last is None:
            return None
        rows, ttft_ms, tpot_ms = self._last
        return Prediction(
            row=tuple(rows[position].tolist()),
            ttft_ms=float(ttft_ms[position]),
            tpot_ms=float(tpot_ms[position]),
            model_version=self.model.version,
        )

    def chosen(self, decision: Decision, candidates: Candidates, position: int, now_s: float) -> None:
        if decision.prediction is None:
            return
        self.ledger.open(decision.ticket, decision.prediction, now_s, decision.explored)
        if decision.request.tpot_slo_ms is not None:
            key = candidates.endpoints[position].key
            self._running_slos[key][decision.ticket] = decision.request.tpot_slo_ms
            self._endpoint_of[decision.ticket] = key

    def finished(self, ticket: str, outcome: Outcome, now_s: float) -> None:
        key = self._endpoint_of.pop(ticket, None)
        if key is not None:
            self._running_slos.get(key, {}).pop(ticket, None)
        if outcome.output_tokens and outcome.status == 200:
            self._replies = min(self._replies + 1, OUTPUT_MEMORY)
            self._mean_output_tokens += (outcome.output_tokens - self._mean_output_tokens) / self._replies
        sample = self.ledger.settle(ticket, outcome, now_s)
        if sample is not None:
            self.on_sample(sample)
