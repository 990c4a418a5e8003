"""All Prometheus names, and log set-up. Names, labels and buckets are the reference's where it has them.

Code that decides never counts: the driver observes each request once it is decided and once it has ended, and a
collector pulls the rest from live objects when it is scraped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

TTFT_S = (0.005, 0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1, 1.25, 1.5, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 45, 60, 120)
LATENCY_S = (*TTFT_S, 180, 240, 300, 360, 480, 600, 900, 1200, 1800, 2700, 3600)
TPOT_S = (0.0005, 0.00205, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.125, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 2)
LONG_TPOT_S = (*TPOT_S[:-1], 1.5, 2, 3, 4.5, 6, 12, 18, 24, 30, 36, 48, 60, 90, 120, 180, 270, 360)
PREDICTION_S = (0.0001, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
SHORT_S = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32778, 65536, 131072, 262144, 524288, 1048576)
SIZE_BYTES = tuple(2**i for i in range(6, 31))

MAX_LABEL_VALUES = 1000
"""Distinct model names and fairness ids a process tells apart; clients choose them, so later ones are ``other``."""

_M = ("model_name", "target_model_name")
_MFP = (*_M, "fairness_id", "priority")
_BY_PLUGIN = (*_M, "plugin_name", "plugin_type")

Gauge = tuple[str, str, tuple[str, ...], Iterable[tuple[tuple[str, ...], float]]]
"""Name, help, label names, and (label values, value) pairs. A name ending in ``_total`` is a counter."""


class _Capped:
    """At most MAX_LABEL_VALUES distinct strings; the rest become ``other``."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def __call__(self, value: str) -> str:
        if value in self._seen:
            return value
        if len(self._seen) >= MAX_LABEL_VALUES:
            return "other"
        self._seen.add(value)
        return value


class Telemetry:
    """Metrics the driver observes. One per process; give each test its own registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._model, self._fairness = _Capped(), _Capped()
        self._series: dict[tuple[str, ...], Series] = {}
        self.requests = Counter("llm_d_epp_request", "Requests received.", _MFP, registry=registry)
        self.errors = Counter(
            "llm_d_epp_request_error", "Requests that ended in an error.", (*_MFP, "error_code"), registry=registry
        )
        self.duration_s = _histogram(registry, "request_duration_seconds", "Request to end of reply.", LATENCY_S)
        self.ttft_s = _histogram(
            registry, "request_ttft_seconds", "Sent upstream to first token.", TTFT_S, (*_MFP, "streaming")
        )
        self.tpot_s = _histogram(registry, "request_streaming_tpot_seconds", "Time per output token.", TPOT_S)
        self.size_bytes = _histogram(registry, "request_size_bytes", "Request body.", SIZE_BYTES)
        self.response_bytes = _histogram(registry, "response_size_bytes", "Response body.", TOKENS[:15])
        self.input_tokens = _histogram(registry, "request_input_tokens", "Prompt tokens.", TOKENS)
        self.output_tokens = _histogram(registry, "request_output_tokens", "Output tokens.", TOKENS[:12])
        self.cached_tokens = _histogram(registry, "request_cached_tokens", "Prompt tokens from the cache.", TOKENS)
        self.scheduler_s = Histogram(
            "llm_d_epp_scheduler_e2e_duration_seconds", "Time to decide.", buckets=SHORT_S, registry=registry
        )
        self.attempts = Counter(
            "llm_d_epp_scheduler_attempts",
            "Scheduling attempts.",
            ("status", "target_model_name", "endpoint_name", "namespace", "port"),
            registry=registry,
        )
        self.predictions = PredictionMetrics(registry)
        self.ignored_headers = Counter(
            "llm_d_epp_ignored_header", "Headers whose value was unusable.", ("header",), registry=registry
        )

    def series(self, model: str, target_model: str, fairness_id: str, priority: int) -> Series:
        """The metrics of one kind of request; looked up once rather than once per metric."""
        labels = (self._model(model), self._model(target_model), self._fairness(fairness_id), str(priority))
        found = self._series.get(labels)
        if found is None:
            found = self._series[labels] = Series(self, labels)
        return found

    def pull(self, read: Callable[[], Iterable[Gauge]]) -> None:
        """Have ``read`` called at every scrape."""
        self.registry.register(Pulled(read))


class Series:
    """One label set's child of every per-request metric."""

    def __init__(self, t: Telemetry, labels: tuple[str, ...]) -> None:
        self.labels = labels
        self.requests = t.requests.labels(*labels)
        self.duration_s = t.duration_s.labels(*labels)
        self.ttft_s = {flag: t.ttft_s.labels(*labels, str(flag).lower()) for flag in (False, True)}
        self.tpot_s = t.tpot_s.labels(*labels)
        self.size_bytes = t.size_bytes.labels(*labels)
        self.response_bytes = t.response_bytes.labels(*labels)
        self.input_tokens = t.input_tokens.labels(*labels)
        self.output_tokens = t.output_tokens.labels(*labels)
        self.cached_tokens = t.cached_tokens.labels(*labels)
        self.predictions = t.predictions.of_model(*labels[:2])


PREDICTOR_TYPE = "predicted-latency-producer"


class PredictionMetrics:
    """Latency predictions, under the reference's names and their deprecated twins.

    Where names and twins differ only in labels, the twin is made of the other when it is scraped.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = _histogram(registry, name, text, buckets, _BY_PLUGIN)
            registry.register(_Twin(made, f"llm_d_epp_{name}", f"inference_objective_{name}", _M))
            return made

        self.predicted_s = {
            "ttft": histogram("request_predicted_ttft_seconds", "Predicted TTFT.", LATENCY_S),
            "tpot": histogram("request_predicted_tpot_seconds", "Predicted TPOT.", LONG_TPOT_S),
        }
        self.prediction_s = {
            target: histogram(f"request_{target}_prediction_duration_seconds", "Time to predict.", PREDICTION_S)
            for target in ("ttft", "tpot")
        }
        self.measured_s = {
            target: Histogram(
                f"inference_objective_request_{target}_seconds", text, _M, buckets=buckets, registry=registry
            )
            for target, text, buckets in (
                ("ttft", "[Deprecated: Use llm_d_epp_request_ttft_seconds] Time to first token.", LATENCY_S),
                ("tpot", "[Deprecated: Use llm_d_epp_request_streaming_tpot_seconds] Per output token.", LONG_TPOT_S),
            )
        }
        name = "request_slo_violation"
        self.violations = Counter(
            f"llm_d_epp_{name}", "Replies later than their SLO.", (*_BY_PLUGIN, "type"), registry=registry
        )
        twin = _Twin(self.violations, f"llm_d_epp_{name}", f"inference_objective_{name}", (*_M, "type"))
        registry.register(twin)
        self._models: dict[tuple[str, str], ModelPredictions] = {}
        registry.register(Pulled(self._last_values))

    def of_model(self, model: str, target_model: str) -> ModelPredictions:
        key = (model, target_model)
        if key not in self._models:
            self._models[key] = ModelPredictions(self, key)
        return self._models[key]

    def _last_values(self) -> Iterator[Gauge]:
        text = "Latest value of each kind."
        for name, labels in (("llm_d_epp", (*_BY_PLUGIN, "type")), ("inference_objective", (*_M, "type"))):
            values = [
                ((*key, *((plugin, PREDICTOR_TYPE) if name == "llm_d_epp" else ()), kind), value)
                for key, one in list(self._models.items())
                for (plugin, kind), value in list(one.latest.items())
            ]
            yield f"{name}_inference_request_metric", text, labels, dict(values).items()


class ModelPredictions:
    """One model's children of the prediction metrics, by plugin."""

    def __init__(self, metrics: PredictionMetrics, key: tuple[str, str]) -> None:
        self._metrics, self._key = metrics, key
        self.latest: dict[tuple[str, str], float] = {}
        """(plugin, kind) -> the value last seen."""
        self._children: dict[str, list[Histogram]] = {}
        self._measured_s = {name: histogram.labels(*key) for name, histogram in metrics.measured_s.items()}

    def observe(self, plugin: str, ttft_s: float, tpot_s: float, took_s: float) -> None:
        """A prediction, and how long it took (both targets at once)."""
        children = self._children.get(plugin)
        if children is None:
            m, labels = self._metrics, (*self._key, plugin, PREDICTOR_TYPE)
            four = (*m.predicted_s.values(), *m.prediction_s.values())
            children = self._children[plugin] = [metric.labels(*labels) for metric in four]
        for child, value in zip(children, (ttft_s, tpot_s, took_s, took_s), strict=True):
            child.observe(value)
        self.latest[plugin, "predicted_ttft"], self.latest[plugin, "predicted_tpot"] = ttft_s, tpot_s
        self.latest[plugin, "ttft_prediction_duration"] = self.latest[plugin, "tpot_prediction_duration"] = took_s

    def measure(self, plugin: str, target: str, measured_ms: float, slo_ms: float | None) -> None:
        """What was measured of a predicted request, and what had been asked for."""
        self._measured_s[target].observe(measured_ms / 1e3)
        self.latest[plugin, target] = measured_ms / 1e3
        if slo_ms is not None:
            violated = measured_ms > slo_ms
            kind = f"{target}_slo_violation"
            self.latest[plugin, kind] = float(violated)
            self._metrics.violations.labels(*self._key, plugin, PREDICTOR_TYPE, kind).inc(violated)


class _Twin(Collector):
    """A metric under its deprecated name, summed over the labels the old one did not have."""

    def __init__(self, source: Histogram | Counter, name: str, twin: str, labels: tuple[str, ...]) -> None:
        self._source, self._name, self._twin, self._labels = source, name, twin, labels

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        for metric in self._source.collect():
            text = f"[Deprecated: Use {self._name}] {metric.documentation}"
            totals: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
            for sample in metric.samples:
                kept = tuple((k, v) for k, v in sample.labels.items() if k in self._labels or k == "le")
                key = sample.name.removeprefix(self._name), kept
                if key[0] != "_created":
                    totals[key] = totals.get(key, 0.0) + sample.value
            twin = Metric(self._twin, text, metric.type)
            for (suffix, labels), value in totals.items():
                twin.add_sample(self._twin + suffix, dict(labels), value)
            yield twin


def _histogram(
    registry: CollectorRegistry, name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = _MFP
) -> Histogram:
    return Histogram(f"llm_d_epp_{name}", text, labels, buckets=buckets, registry=registry)


class Pulled(Collector):
    """Calls ``read`` at every scrape."""

    def __init__(self, read: Callable[[], Iterable[Gauge]]) -> None:
        self._read = read

    def describe(self) -> Iterator[GaugeMetricFamily]:
        return iter(())

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        for name, text, labels, values in self._read():
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            family = kind(name, text, labels=labels)
            for label_values, value in values:
                family.add_metric(label_values, value)
            yield family


def set_up_logging(verbosity: int) -> None:
    """``-v`` as the reference counts it: 0-2 info, 3 and more debug. To standard error."""
    logging.basicConfig(
        level=logging.DEBUG if verbosity >= 3 else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
