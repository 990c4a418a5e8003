"""The predicted-latency producer: a row per candidate, both targets, and what is left of the request's SLOs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from llmd_sched.config import duration_s
from llmd_sched.plugin import Attribute, Producer, ProducerPlugin, Reads, reads
from llmd_sched.predict import features
from llmd_sched.predict.base import COLD_START
from llmd_sched.predict.calibrate import Calibrator, group_of
from llmd_sched.predict.features import EngineClasses
from llmd_sched.predict.ledger import Ledger
from llmd_sched.predict.model import Model
from llmd_sched.predict.price import prices
from llmd_sched.predict.slos import RunningSlos, losses
from llmd_sched.types import QUANTILES, Array, Candidates, Decision, End, Endpoint, Outcome, Prediction, Request, Sample

FIRST_OUTPUT_GUESS_TOKENS = 256.0
MIN_UNDER_WAY = 8
"""Requests that must be generating for what they have generated to say anything."""
OUTPUT_MEMORY = 500
"""The mean output length forgets at this many replies."""
MAX_ADAPTERS = 1000
"""LoRA adapters remembered, so that one that is loaded nowhere at the moment is still known to be one."""
FROM_IN_FLIGHT = (
    "inflight_requests", "inflight_prefill_tokens", "admission_wait_ms", "resident_tokens", "uncached_tokens",
    "generated_tokens", "prefilling_requests",
)  # fmt: skip
CLASS_LABELS = (
    "llm-d.ai/accelerator",
    "llm-d.ai/engine-type",
    "inference.optimization/acceleratorName",
    "nvidia.com/gpu.product",
)


class PredictedLatencyProducer(ProducerPlugin, frozen=True):
    """Predicts TTFT and TPOT of the request on every candidate with models trained from live traffic.

    ``streamingMode``: TPOT counts too (else only TTFT decides). ``sloBufferFactor`` scales the TPOT limit. Endpoints
    whose ``endpointRoleLabel`` is ``prefill`` have no TPOT. ``predictInProduce: false`` only trains. ``preset`` names
    the coefficients used before the first sample. ``headroomQuantile`` 0.5 or 0.9 measures SLO headrooms at that
    quantile of the prediction instead of the prediction itself. ``classLabels``: endpoints that differ in the value
    of one of these labels are engines of different classes, learned apart. ``samplingMean`` and
    ``maxDecodeTokenSamplesForPrediction`` are accepted and unused, as in the reference.
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
    headroom_quantile: float | None = None
    class_labels: tuple[str, ...] = CLASS_LABELS

    def check(self) -> None:
        if not self.slo_buffer_factor > 0:
            raise ValueError("sloBufferFactor must be positive")
        if self.use_encoder_cache_features:
            raise ValueError("useEncoderCacheFeatures is not supported yet")
        if self.preset not in COLD_START:
            raise ValueError(f"preset {self.preset!r} is unknown; known: {', '.join(sorted(COLD_START))}")
        if self.headroom_quantile is not None and self.headroom_quantile not in QUANTILES:
            known = " or ".join(map(str, QUANTILES))
            raise ValueError(f"headroomQuantile {self.headroom_quantile} is not kept; accepted: {known}")
        duration_s(self.context_ttl)

    def reads(self) -> tuple[Reads, ...]:
        return (
            reads(Attribute.PREFIX_MATCH, self.prefix_match_info_producer_name),
            reads(Attribute.INFLIGHT_LOAD, self.in_flight_load_producer_name),
        )

    def open(self, name: str) -> PredictedLatency:
        return PredictedLatency(name, self)


class _Known(NamedTuple):
    """What only depends on the endpoints and the model: looked up once rather than per request."""

    endpoints: list[Endpoint]
    model: Model
    engine_class: Array
    log_bias: NDArray[np.float64]
    """(2, n), TTFT first."""


class _Last(NamedTuple):
    """The request being decided."""

    rows: NDArray[np.float64]
    ttft_ms: Array
    tpot_ms: Array
    took_s: float


class PredictedLatency(Producer):
    """The live side. Columns: ``ttft_ms``, ``tpot_ms``, their headrooms, ``dispatched`` (our requests there); in
    detail also what the request costs others (``price.Prices``), ``expected_output_tokens`` and ``slo_losses``.

    ``model`` is replaced by whoever trains; ``on_sample`` gets every labelled row.
    """

    def __init__(self, name: str, params: PredictedLatencyProducer) -> None:
        super().__init__(name)
        self.params = params
        self.model = Model.cold(params.preset)
        self.classes = EngineClasses(params.class_labels)
        self.calibrator = Calibrator()
        self.ledger = Ledger(ttl_s=duration_s(params.context_ttl))
        self.on_sample: Callable[[Sample], None] = lambda sample: None
        self.timer: Callable[[], float] = lambda: 0.0
        """Seconds, for how long a prediction took; there is no clock in here."""
        self._in_flight = params.reads()[1].producer
        self._known: _Known | None = None
        self._last: _Last | None = None
        self._adapters: dict[str, None] = {}
        self._mean_output_tokens = FIRST_OUTPUT_GUESS_TOKENS
        self._replies = 0
        self._running_slos = RunningSlos()

    def state(self) -> dict[str, object]:
        return {
            "model_version": self.model.version,
            "open": len(self.ledger),
            "outcomes": dict(self.ledger.counts),
            "mean_output_tokens": self._mean_output_tokens,
            "engine_classes": list(self.classes.names),
        }

    def publish(self, model: Model) -> None:
        """Use ``model`` from the next request on."""
        self.model = model
        self.calibrator.publish(model)

    def restore(self, model: Model) -> None:
        """Begin with a model of an earlier life; its numbers of the engine classes hold on."""
        self.classes = EngineClasses(self.params.class_labels, model.classes)
        self._known = None
        self.publish(model)

    def warm_up(self) -> None:
        """Compile the kernel before the first request needs it."""
        self.model.predict(np.zeros((1, len(features.FEATURES))))

    def endpoints_changed(self, endpoints: list[Endpoint]) -> None:
        self._running_slos.leave(endpoints)

    def produce(self, request: Request, candidates: Candidates, now_s: float) -> dict[str, Array]:
        self._last, began_s = None, self.timer()
        known = self._what_is_known(candidates.endpoints)
        columns = dict(candidates.columns)
        for column in FROM_IN_FLIGHT:
            columns[column] = columns[f"{column}/{self._in_flight}"]
        columns |= {"engine_class": known.engine_class, "lora": self._lora(request, candidates)}
        view = Candidates(candidates.endpoints, columns)
        rows = features.rows(request, view, self._expected_output_tokens(request, columns))
        ttft_ms, tpot_ms = self.model.predict(rows, known.log_bias)
        self._last = _Last(rows, ttft_ms, tpot_ms, self.timer() - began_s)
        if not self.params.predict_in_produce:
            return {}
        ttft_headroom_ms, tpot_headroom_ms = self._headrooms(request, candidates.endpoints, self._last)
        return {
            f"ttft_ms/{self.name}": ttft_ms,
            f"tpot_ms/{self.name}": tpot_ms,
            f"ttft_headroom_ms/{self.name}": ttft_headroom_ms,
            f"tpot_headroom_ms/{self.name}": tpot_headroom_ms,
            f"dispatched/{self.name}": columns["inflight_requests"],
            **(self._prices(request, known, self._last) if self.detailed else {}),
        }

    def _prices(self, request: Request, known: _Known, last: _Last) -> dict[str, Array]:
        """Expected output, what the request costs others, and the SLOs it costs, where there are any."""
        output = last.rows[:, features.EXPECTED_OUTPUT]
        found = prices(self.model, last.rows, known.log_bias, last.tpot_ms)
        columns = {"expected_output_tokens": output, **found._asdict()}
        if self._running_slos or request.ttft_slo_ms is not None or request.tpot_slo_ms is not None:
            running = self._running_slos.counts(known.endpoints)
            columns["slo_losses"] = losses(request, last.ttft_ms, last.tpot_ms, found, output, running)
        return {f"{column}/{self.name}": values for column, values in columns.items()}

    def _what_is_known(self, endpoints: list[Endpoint]) -> _Known:
        known = self._known
        if known is None or known.endpoints is not endpoints or known.model is not self.model:
            engine_class = np.array([self.classes.code(e.labels) for e in endpoints], dtype=np.float64)
            known = _Known(endpoints, self.model, engine_class, self.model.bias([e.key for e in endpoints]))
            self._known = known
        return known

    def _lora(self, request: Request, candidates: Candidates) -> Array:
        """1 where the adapter asked for is loaded, 2 where it would have to be, 0 for a model that is no adapter."""
        wanted = request.target_model
        loaded = np.array([wanted in adapters.running for adapters in candidates.adapters], dtype=bool)
        if loaded.any():
            self._adapters[wanted] = None
            if len(self._adapters) > MAX_ADAPTERS:
                del self._adapters[next(iter(self._adapters))]
        elif wanted not in self._adapters:
            return np.zeros(len(candidates.endpoints))
        return np.where(loaded, 1.0, 2.0) if len(loaded) else np.full(len(candidates.endpoints), 2.0)

    def _expected_output_tokens(self, request: Request, columns: Mapping[str, Array]) -> float:
        """What the client allows, or the mean so far if that is less: to a power of two, for a number that creeps
        with time would be a clock in the row, and the trees would read it.

        Replies that go on for long have not ended yet, so at first the mean is of the short ones. Those under way have
        had half of theirs on the average: twice what they have generated is believed if that is more.
        """
        decoding = float((columns["inflight_requests"] - columns["prefilling_requests"]).sum())
        under_way = 2.0 * float(columns["generated_tokens"].sum()) / decoding if decoding >= MIN_UNDER_WAY else 0.0
        usual = 2.0 ** round(math.log2(max(self._mean_output_tokens, under_way, 1.0)))
        return usual if request.max_output_tokens is None else min(usual, float(request.max_output_tokens))

    def _headrooms(self, request: Request, endpoints: list[Endpoint], last: _Last) -> tuple[Array, Array]:
        """SLO minus prediction. Without any SLO minus the prediction, so that the lowest is best; with only one
        given, the other asks for nothing and is 0."""
        ttft_slo, tpot_slo = request.ttft_slo_ms, request.tpot_slo_ms
        any_slo = ttft_slo is not None or tpot_slo is not None
        ttft_ms, tpot_ms = self._at_quantile(last)
        nothing = np.zeros(len(ttft_ms))
        ttft = nothing if any_slo and ttft_slo is None else (ttft_slo or 0.0) - ttft_ms
        if not self.params.streaming_mode or (any_slo and tpot_slo is None):
            return ttft, nothing
        if tpot_slo is None:
            tpot = -tpot_ms
        else:
            tpot = (
                np.minimum(tpot_slo, self._running_slos.tightest_ms(endpoints)) * self.params.slo_buffer_factor
                - tpot_ms
            )
        label = self.params.endpoint_role_label
        if label:
            tpot = np.where([e.labels.get(label) == "prefill" for e in endpoints], 0.0, tpot)
        return ttft, tpot

    def _at_quantile(self, last: _Last) -> tuple[Array, Array]:
        quantile = self.params.headroom_quantile
        if quantile is None:
            return last.ttft_ms, last.tpot_ms
        level = QUANTILES.index(quantile)
        return (
            last.ttft_ms * self.calibrator.factor("ttft", level, last.rows, last.ttft_ms),
            last.tpot_ms * self.calibrator.factor("tpot", level, last.rows, last.tpot_ms),
        )

    def predicted(self, candidates: Candidates, position: int, prefill: int | None = None) -> Prediction | None:
        if self._last is None:
            return None
        rows, ttft_ms, tpot_ms, took_s = self._last
        first = position if prefill is None else prefill
        row, ttft, tpot = rows[position], float(ttft_ms[first]), float(tpot_ms[position])
        ttft_factors = self.calibrator.factors("ttft", group_of(rows[first], ttft))
        tpot_factors = self.calibrator.factors("tpot", group_of(row, tpot))
        return Prediction(
            row=tuple(row.tolist()),
            ttft_ms=ttft,
            tpot_ms=tpot,
            model_version=self.model.version,
            ttft_quantiles_ms=tuple(ttft * factor for factor in ttft_factors),
            tpot_quantiles_ms=tuple(tpot * factor for factor in tpot_factors),
            endpoint=candidates.endpoints[position].key,
            producer=self.name,
            prefill_row=tuple(rows[first].tolist()) if first != position else None,
            prefill_endpoint=candidates.endpoints[first].key if first != position else "",
            took_s=took_s,
        )

    def chosen(self, decision: Decision, candidates: Candidates, position: int, now_s: float) -> None:
        if decision.prediction is None:
            return
        self.ledger.open(decision.ticket, decision.prediction, now_s, decision.explored)
        if decision.request.tpot_slo_ms is not None:
            key = candidates.endpoints[position].key
            self._running_slos.add(decision.ticket, key, decision.request.tpot_slo_ms)

    def first_token_seen(self, ticket: str, ttft_ms: float, now_s: float) -> None:
        sample = self.ledger.first_token(ticket, ttft_ms, now_s)
        if sample is not None:
            self._learn(sample)

    def _learn(self, sample: Sample) -> None:
        self.calibrator.learn(sample)
        self.on_sample(sample)

    def finished(self, ticket: str, outcome: Outcome, now_s: float) -> None:
        self._running_slos.remove(ticket)
        if outcome.output_tokens and outcome.status == 200 and outcome.end is End.FINISHED:
            self._replies = min(self._replies + 1, OUTPUT_MEMORY)
            self._mean_output_tokens += (outcome.output_tokens - self._mean_output_tokens) / self._replies
        for sample in self.ledger.settle(ticket, outcome, now_s):
            self._learn(sample)
