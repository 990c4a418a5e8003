"""Latency predictions, under the reference's names and their deprecated twins."""

from __future__ import annotations

from collections.abc import Iterator

from llmd_sched.telemetry.book import Book
from llmd_sched.telemetry.instruments import Bins
from llmd_sched.telemetry.pulled import Gauge, pulled

PREDICTOR_TYPE = "predicted-latency-producer"
_TARGETS = ("ttft", "tpot")


class PredictionMetrics:
    """By model; the predictor's own state is in ``predict.gauges``."""

    def __init__(self, book: Book) -> None:
        self.predicted_s = {one: book.histogram(f"request_predicted_{one}_seconds") for one in _TARGETS}
        self.prediction_s = {one: book.histogram(f"request_{one}_prediction_duration_seconds") for one in _TARGETS}
        self.measured_s = {one: book.measured(f"inference_objective_request_{one}_seconds") for one in _TARGETS}
        self.violations = book.counter("request_slo_violation_total")
        self._models: dict[tuple[str, str], ModelPredictions] = {}
        book.pull(self._last_values)

    def of_model(self, model: str, target_model: str) -> ModelPredictions:
        key = (model, target_model)
        if key not in self._models:
            self._models[key] = ModelPredictions(self, key)
        return self._models[key]

    def _last_values(self) -> Iterator[Gauge]:
        values = [
            ((*key, plugin, PREDICTOR_TYPE, kind), value)
            for key, one in list(self._models.items())
            for (plugin, kind), value in list(one.latest.items())
        ]
        return pulled("inference_request_metric", values)


class ModelPredictions:
    """One model's children of the prediction metrics, by plugin."""

    def __init__(self, metrics: PredictionMetrics, key: tuple[str, str]) -> None:
        self._metrics, self._key = metrics, key
        self.latest: dict[tuple[str, str], float] = {}
        """(plugin, kind) -> the value last seen."""
        self._children: dict[str, list[Bins]] = {}
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
