"""All Prometheus names, and log set-up. Names, labels and buckets are the reference's where it has them.

Code that decides never counts: the driver observes each request once it is decided and once it has ended, and a
collector pulls the rest from live objects when it is scraped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

TTFT_S = (0.005, 0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1, 1.25, 1.5, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 45, 60, 120)
LATENCY_S = (*TTFT_S, 180, 240, 300, 360, 480, 600, 900, 1200, 1800, 2700, 3600)
TPOT_S = (0.0005, 0.00205, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.125, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 2)
SHORT_S = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32778, 65536, 131072, 262144, 524288, 1048576)
SIZE_BYTES = tuple(2**i for i in range(6, 31))

MAX_LABEL_VALUES = 1000
"""Distinct model names and fairness ids a process tells apart; clients choose them, so later ones are ``other``."""

_MFP = ("model_name", "target_model_name", "fairness_id", "priority")

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
        self.predicted_ttft_s = _histogram(registry, "request_predicted_ttft_seconds", "Predicted TTFT.", LATENCY_S)
        self.predicted_tpot_s = _histogram(registry, "request_predicted_tpot_seconds", "Predicted TPOT.", TPOT_S)
        self.scheduler_s = Histogram(
            "llm_d_epp_scheduler_e2e_duration_seconds", "Time to decide.", buckets=SHORT_S, registry=registry
        )
        self.attempts = Counter(
            "llm_d_epp_scheduler_attempts",
            "Scheduling attempts.",
            ("status", "target_model_name", "endpoint_name", "namespace", "port"),
            registry=registry,
        )
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
        self.registry.register(_Pulled(read))


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
        self.predicted_ttft_s = t.predicted_ttft_s.labels(*labels)
        self.predicted_tpot_s = t.predicted_tpot_s.labels(*labels)


def _histogram(
    registry: CollectorRegistry, name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = _MFP
) -> Histogram:
    return Histogram(f"llm_d_epp_{name}", text, labels, buckets=buckets, registry=registry)


class _Pulled(Collector):
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
