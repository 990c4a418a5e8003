"""What the worker counts, under the reference's names, and gauges of our own with the prefix ``batchgw_``."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from batchgw.planner import Slack
from batchgw.records import Batch, Usage, Waiting

_QUEUE_S = tuple(0.1 * 2**i for i in range(10))
_PROCESS_S = tuple(0.1 * 2**i for i in range(15))
_E2E_S = tuple(1.0 * 3**i for i in range(12))
_SIZES = ((100, "100"), (1_000, "1000"), (10_000, "10000"), (30_000, "30000"))


class Metrics:
    """One set per process; ``registry`` is served by the app."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        counter, histogram, gauge = self._counter, self._histogram, self._gauge
        self.jobs = counter("jobs_processed_total", "Batches that came to their end.", "result", "reason")
        self.processing_s = histogram(
            "job_processing_duration_seconds", "From start to end.", _PROCESS_S, "size_bucket"
        )
        self.queue_wait_s = histogram("job_queue_wait_duration_seconds", "From creation to the plan.", _QUEUE_S)
        self.plan_s = histogram("plan_build_duration_seconds", "Cutting a plan in chunks.", _QUEUE_S, "size_bucket")
        self.e2e_s = histogram("batch_job_e2e_latency_seconds", "From creation to the end.", _E2E_S, "status")
        self.cancellations = counter("batch_cancellation_total", "Batches cancelled.", "phase")
        self.in_flight = gauge("processor_inflight_requests", "Lines on their way.")
        self.model_in_flight = gauge("model_inflight_requests", "Lines on their way.", "model")
        self.execution_s = histogram(
            "model_request_execution_duration_seconds", "Of one line, retries too.", _PROCESS_S, "model"
        )
        self.request_errors = counter("request_errors_by_model_total", "Lines that failed.", "model")
        self.prompt_tokens = counter("batch_request_prompt_tokens_total", "Of answered lines.", "model")
        self.generation_tokens = counter("batch_request_generation_tokens_total", "Of answered lines.", "model")
        self.harvested = counter("batchgw_harvested_tokens_total", "Tokens as they came, answered or not.", "model")
        self.aborts = counter("batchgw_aborted_lines_total", "Lines cut short, to go on later.", "model")
        self.refusals = counter("batchgw_refusals_total", "Attempts refused or failed.", "model", "status", "reason")
        self.lost_leases = counter("batchgw_lost_leases_total", "Work dropped because it was another's.")
        self.recoveries = counter("batch_startup_recovery_total", "Work taken over.", "status", "action")
        self.deliveries = counter("batchgw_webhook_deliveries_total", "Webhook attempts.", "outcome")
        self.collected = counter("batchgw_collected_total", "What the collector deleted.", "kind")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name.removesuffix("_total"), text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, text, labels, registry=self.registry, buckets=buckets)

    def answered(self, model: str, ok: bool, usage: Usage, took_s: float) -> None:
        self.execution_s.labels(model).observe(took_s)
        self.prompt_tokens.labels(model).inc(usage.input_tokens)
        self.generation_tokens.labels(model).inc(usage.output_tokens)
        if not ok:
            self.request_errors.labels(model).inc()

    def ended(self, batch: Batch, now_s: float) -> None:
        """A batch reached its terminal status."""
        result = {"completed": "success", "expired": "expired", "cancelled": "skipped"}.get(batch.status, "failed")
        reason = {"completed": "none", "expired": "expired_execution", "cancelled": "none"}
        self.jobs.labels(result, reason.get(batch.status, "system_error")).inc()
        self.e2e_s.labels(batch.status).observe(now_s - batch.created_s)
        if batch.in_progress_s is not None:
            self.processing_s.labels(size_bucket(batch.total)).observe(now_s - batch.in_progress_s)
        if batch.status == "cancelled":
            self.cancellations.labels("queued" if batch.in_progress_s is None else "in_progress").inc()

    def watch(self, read: Callable[[], tuple[Iterable[Waiting], Iterable[Slack]]]) -> None:
        """Gauges that are read from the planner when asked for."""
        self.registry.register(_Queue(read))


class _Queue(Collector):
    """Depth and slack. By model, not by tenant or batch: those are without bound."""

    def __init__(self, read: Callable[[], tuple[Iterable[Waiting], Iterable[Slack]]]) -> None:
        self._read = read

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        waiting, slacks = self._read()
        depth: Tally[tuple[str, str]] = Tally()
        for row in waiting:
            depth[row.model, "queued"] += row.queued_lines
            depth[row.model, "leased"] += row.leased_lines
        least: dict[str, float] = {}
        late: Tally[str] = Tally()
        for slack in slacks:
            least[slack.model] = min(slack.slack_s, least.get(slack.model, slack.slack_s))
            late[slack.model] += slack.late
        yield _family("batchgw_queue_depth_lines", "Lines without result.", ("model", "state"), depth)
        yield _family("batchgw_deadline_slack_seconds", "Least time left over of any batch at the measured speed.",
                      ("model",), {(model,): s for model, s in least.items()})  # fmt: skip
        yield _family("batchgw_batches_at_risk", "Batches that will miss their window at the measured speed.",
                      ("model",), {(model,): count for model, count in late.items()})  # fmt: skip


def _family(name: str, text: str, labels: tuple[str, ...], values: Mapping[Any, float]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def size_bucket(lines: int) -> str:
    return next((name for most, name in _SIZES if lines <= most), "large")
