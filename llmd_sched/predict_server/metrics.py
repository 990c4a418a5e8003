"""The Prometheus page: the reference's names where they mean something here, then the names of ``predict.gauges``,
so that one dashboard reads a scheduler and this server."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import generate_latest

from llmd_sched.predict.base import TargetName
from llmd_sched.predict.gauges import predictor_gauges
from llmd_sched.predict_server.rows import POD_TYPES
from llmd_sched.predict_server.service import STATE_NAME, Service
from llmd_sched.telemetry import PREDICTION_S, Gauge, Pulled
from llmd_sched.types import QUANTILES

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """What the routes count, and what is read from the service when it is scraped."""

    def __init__(self, service: Service) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(Pulled(lambda: (*_reference(service), *_ours(service))))
        self._requests = Counter("predict_server_requests", "By answer.", ("route", "status"), registry=self._registry)
        self._rows = Counter("predict_server_rows", "Rows to predict, by fate.", ("fate",), registry=self._registry)
        text = "From the last byte of a body to its predictions."
        name = "predict_server_prediction_seconds"
        self._prediction_s = Histogram(name, text, buckets=PREDICTION_S, registry=self._registry)

    def count(self, route: str, status: int) -> None:
        """A request was answered."""
        self._requests.labels(route, str(status)).inc()

    def predicted(self, rows: int, took_s: float, refused: int = 0) -> None:
        """One body's rows."""
        self._rows.labels("predicted").inc(rows)
        self._rows.labels("refused").inc(refused)
        self._prediction_s.observe(took_s)

    def page(self) -> bytes:
        return generate_latest(self._registry)


def _reference(service: Service) -> Iterable[Gauge]:
    settings = service.settings
    yield "model_type", "1.", ("type",), [(("lightgbm",), 1.0)]
    yield "objective_type", "1.", ("type",), [((settings.objective,), 1.0)]
    yield "model_quantile", "The quantile predicted.", (), [((), settings.quantile)]
    yield "target_coverage_percent", "Share of outcomes meant to be covered.", (), [((), 100.0 * settings.quantile)]
    held = {"ttft": service.held("ttft"), "tpot": service.held("tpot")}
    rows = [((name, POD_TYPES[one]), float(n)) for name, h in held.items() for one, n in h.rows_by_class.items()]
    yield "training_samples_count", "Labels in the window.", ("model", "pod_type"), rows
    level = QUANTILES.index(settings.quantile)
    for name, error in (("ttft", service.accuracy.ttft), ("tpot", service.accuracy.tpot)):
        covered = error.coverage_pct[level]
        yield f"{name}_live_coverage_percent", "Newest outcomes within the quantile.", (), [((), covered)]
        yield f"{name}_live_violation_rate", "Newest outcomes beyond it, 0..1.", (), [((), 1.0 - covered / 100.0)]
        yield f"{name}_live_mape_percent", "Error of the point forecast, newest outcomes.", (), [((), error.mape_pct)]
        yield f"{name}_live_sample_count", "Outcomes judged.", (), [((), float(error.count))]


def _ours(service: Service) -> Iterable[Gauge]:
    held = {name: service.held(name) for name in get_args(TargetName)}
    now_s = time.monotonic()
    yield from predictor_gauges(STATE_NAME, service.model, service.trainer, held, service.accuracy, POD_TYPES, now_s)
    fed = service.fed
    for name, text, value in (
        ("entries", "Training entries received.", fed.entries),
        ("entries_unlabelled", "Training entries in which nothing was observed.", fed.unlabelled),
        ("labels", "Labels in training entries.", fed.labels),
    ):
        yield f"predict_server_{name}_total", text, (), [((), float(value))]
