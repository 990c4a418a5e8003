"""The metrics of requests, and the bounds on what clients can make them hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from prometheus_client import CollectorRegistry

from llmd_sched.telemetry.book import Book
from llmd_sched.telemetry.names import OTHER
from llmd_sched.telemetry.predictions import PredictionMetrics
from llmd_sched.telemetry.pulled import Gauge, pulled

MAX_LABEL_VALUES = 1000
"""Distinct model names and fairness ids a process tells apart; clients choose them, so later ones are ``other``."""

MAX_LABEL_CHARS = 256
"""... and as much of one as is kept."""

MAX_LABEL_SETS = 2000
"""Combinations of model, target model, fairness id and priority; later ones lose their fairness id first."""

Timing = tuple[str, str, str, float, float]
"""Extension point (``Filter``, ``Scorer``, ``Picker`` ...), plugin type, plugin name, began_s, took_s."""


class _Capped:
    """At most MAX_LABEL_VALUES distinct strings; the rest become ``other``."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._pinned: set[str] = set()

    def pin(self, values: Iterable[str]) -> None:
        self._pinned.update(value[:MAX_LABEL_CHARS] for value in values)

    def __call__(self, value: str) -> str:
        value = value[:MAX_LABEL_CHARS]
        if value in self._seen or value in self._pinned:
            return value
        if len(self._seen) >= MAX_LABEL_VALUES:
            return OTHER
        self._seen.add(value)
        return value


class Described(Protocol):
    """As much of a request as its labels need."""

    @property
    def model(self) -> str: ...
    @property
    def target_model(self) -> str: ...
    @property
    def fairness_id(self) -> str: ...
    @property
    def priority(self) -> int: ...


class Telemetry(Book):
    """What the driver observes of requests. One per process; give each test its own registry.

    A feature with metrics of its own asks for them by name, once: ``telemetry.histogram("prefix_indexer_hit_ratio")
    .labels(name, type)`` has ``observe``, a counter's child ``inc``, a gauge's ``set``, ``inc`` and ``dec``. What can
    be read from live objects is better pulled: ``telemetry.pull(read)``, with ``read`` yielding from
    ``pulled("flow_control_queue_size", [(label values, value), ...])``. Either way the twin comes by itself.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self._model, self._fairness = _Capped(), _Capped()
        self._series: dict[tuple[str, ...], Series] = {}
        self.requests = self.counter("request_total")
        self.errors = self.counter("request_error_total")
        self.duration_s = self.histogram("request_duration_seconds")
        self.ttft_s = self.histogram("request_ttft_seconds")
        self.tpot_s = self.histogram("request_streaming_tpot_seconds")
        self.itl_s = self.histogram("request_streaming_itl_seconds")
        self.ntpot_s = self.histogram("request_ntpot_seconds")
        self.size_bytes = self.histogram("request_size_bytes")
        self.response_bytes = self.histogram("response_size_bytes")
        self.input_tokens = self.histogram("request_input_tokens")
        self.output_tokens = self.histogram("request_output_tokens")
        self.cached_tokens = self.histogram("request_cached_tokens")
        self.request_processing_s = self.histogram("request_processing_duration_seconds").labels()
        self.response_processing_s = self.histogram("response_processing_duration_seconds").labels()
        self.scheduler_s = self.histogram("scheduler_e2e_duration_seconds").labels()
        self.attempts = self.counter("scheduler_attempts_total")
        self.predictions = PredictionMetrics(self)
        self.ignored_headers = self.counter("ignored_header_total")

    def pin(self, models: Iterable[str]) -> None:
        """Model names that are never ``other``: those an operator configured."""
        self._model.pin(models)

    def labels(self, model: str, target_model: str, fairness_id: str, priority: int) -> tuple[str, str, str, str]:
        """The label values these become, within the bounds."""
        labels = (self._model(model), self._model(target_model), self._fairness(fairness_id), str(priority))
        if labels in self._series or len(self._series) < MAX_LABEL_SETS:
            return labels
        fewer = (*labels[:2], OTHER, labels[3])
        if fewer in self._series or len(self._series) < MAX_LABEL_SETS + MAX_LABEL_VALUES:
            return fewer
        return OTHER, OTHER, OTHER, labels[3]

    def series(self, model: str, target_model: str, fairness_id: str, priority: int) -> Series:
        """The metrics of one kind of request; looked up once rather than once per metric."""
        labels = self.labels(model, target_model, fairness_id, priority)
        found = self._series.get(labels)
        if found is None:
            found = self._series[labels] = Series(self, labels)
        return found

    def running(self, requests: Iterable[Described]) -> Iterator[Gauge]:
        """How many requests of each kind are upstream. Kinds that were seen once stay, at 0: autoscalers read this."""
        counts = dict.fromkeys(list(self._series), 0.0)
        for one in requests:
            labels = self.labels(one.model, one.target_model, one.fairness_id, one.priority)
            counts[labels] = counts.get(labels, 0.0) + 1.0
        return pulled("request_running", counts.items())

    def observe_plugins(self, timings: Iterable[Timing]) -> None:
        """How long plugins took in one decision; for a sample of the decisions, as it doubles their cost."""
        histogram = self.histogram("plugin_duration_seconds")
        for point, plugin_type, name, _, took_s in timings:
            histogram.labels(point, plugin_type, name).observe(took_s)


class Series:
    """One label set's child of every per-request metric."""

    def __init__(self, t: Telemetry, labels: tuple[str, ...]) -> None:
        self.labels = labels
        self.requests = t.requests.labels(*labels)
        self.duration_s = t.duration_s.labels(*labels)
        self.ttft_s = {flag: t.ttft_s.labels(*labels, str(flag).lower()) for flag in (False, True)}
        self.tpot_s = t.tpot_s.labels(*labels)
        self.itl_s = t.itl_s.labels(*labels)
        self.ntpot_s = t.ntpot_s.labels(*labels)
        self.size_bytes = t.size_bytes.labels(*labels)
        self.response_bytes = t.response_bytes.labels(*labels)
        self.input_tokens = t.input_tokens.labels(*labels)
        self.output_tokens = t.output_tokens.labels(*labels)
        self.cached_tokens = t.cached_tokens.labels(*labels)
        self.predictions = t.predictions.of_model(*labels[:2])
