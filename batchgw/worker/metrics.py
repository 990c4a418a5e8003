"""What the worker counts, under the reference's names, and what is ours with the prefix ``batchgw_``.

Models are named by users and reasons by routers: the first MOST_NAMED of each have a label, later ones are ``other``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from batchgw.client.reply import resumable
from batchgw.client.requests import Flight, body_of
from batchgw.pace import PoolHeadroom
from batchgw.records import Batch, Usage
from batchgw.worker.gauges import MOST_NAMED, OTHER, HeadroomGauges, View, WorkerGauges, summed

_QUEUE_S = tuple(0.1 * 2**i for i in range(10))
_PROCESS_S = tuple(0.1 * 2**i for i in range(15))
_CYCLE_S = tuple(0.1 * 3**i for i in range(10))
_E2E_S = tuple(1.0 * 3**i for i in range(12))
BYTES_PER_TOKEN = 4
"""Of prompts whose tokens nobody has counted."""

RESULTS = {"completed": "success", "expired": "expired", "cancelled": "skipped"}
REASONS = {"completed": "none", "expired": "expired_execution", "cancelled": "none"}
FAILED = "system_error"
"""Results and reasons of batches by their status, as the reference names them."""

_SIZES = ((100, "100"), (1_000, "1000"), (10_000, "10000"), (30_000, "30000"))


class Metrics:
    """One set per process; ``registry`` is served by the app."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        counter, histogram = self._counter, self._histogram
        self._models, self._reasons = Names(), Names()
        self.on_end: Callable[[Batch, float], None] | None = None
        """Who else is told of each batch that came to its end."""
        self.jobs = counter("jobs_processed_total", "Batches that came to their end.", "result", "reason")
        self.processing_s = histogram(
            "job_processing_duration_seconds", "From start to end.", _PROCESS_S, "size_bucket"
        )
        self.queue_wait_s = histogram("job_queue_wait_duration_seconds", "From creation to the plan.", _QUEUE_S)
        self.plan_s = histogram("plan_build_duration_seconds", "Cutting a plan in chunks.", _QUEUE_S, "size_bucket")
        self.e2e_s = histogram("batch_job_e2e_latency_seconds", "From creation to the end.", _E2E_S, "status")
        self.cancellations = counter("batch_cancellation_total", "Batches cancelled.", "phase")
        self.execution_s = histogram(
            "model_request_execution_duration_seconds", "Of one line, retries too.", _PROCESS_S, "model"
        )
        self.request_errors = counter("request_errors_by_model_total", "Lines that failed.", "model")
        self.prompt_tokens = counter("batch_request_prompt_tokens_total", "Of answered lines.", "model")
        self.generation_tokens = counter("batch_request_generation_tokens_total", "Of answered lines.", "model")
        self.answered_tokens = counter("batchgw_answered_tokens_total", "Of answered lines.", "model", "kind")
        self.harvested = counter("batchgw_harvested_tokens_total", "Tokens as they came, answered or not.", "model")
        self.aborts = counter("batchgw_aborted_lines_total", "Lines cut short, to go on later.", "model")
        self.wasted = counter(
            "batchgw_wasted_tokens_total", "To be computed once more: prompts (estimated), and output.", "model", "kind"
        )
        self.refusals = counter("batchgw_refusals_total", "Attempts refused or failed.", "model", "status", "reason")
        self.lost_leases = counter("batchgw_lost_leases_total", "Work dropped because it was another's.")
        self.recoveries = counter("batch_startup_recovery_total", "Work taken over.", "status", "action")
        self.deliveries = counter("batchgw_webhook_deliveries_total", "Webhook attempts.", "outcome")
        self.collected = counter("batchgw_collected_total", "What the collector deleted.", "kind")
        self.cycle_s = histogram("batch_reconciler_cycle_duration_seconds", "Of a collection.", _CYCLE_S)
        self.chore_errors = counter("batch_reconciler_errors_total", "Chores that failed, to be done again.")
        self.registry.register(_SameAs(self))
        self._begin()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name.removesuffix("_total"), text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, text, labels, registry=self.registry, buckets=buckets)

    def _begin(self) -> None:
        """At 0: what alerts look at must be seen to rise."""
        for status, action in (("validating", "planned"), ("in_progress", "resumed"), ("finalizing", "finalized")):
            self.recoveries.labels(status, action)
        for outcome in ("delivered", "failed"):
            self.deliveries.labels(outcome)
        for status, result in RESULTS.items():
            self.jobs.labels(result, REASONS.get(status, FAILED))
        self.jobs.labels("failed", FAILED)

    def came(self, model: str, tokens: int) -> None:
        """Of a line in flight."""
        self.harvested.labels(self._models.of(model)).inc(tokens)

    def aborted(self, flight: Flight) -> None:
        """Is about to be cut, and goes on later."""
        self.aborts.labels(self._models.of(flight.call.model)).inc()
        self._waste(flight)

    def refused(self, flight: Flight, status: int | None, reason: str) -> None:
        """An attempt is over without a reply; ``status`` None: it broke off."""
        model = self._models.of(flight.call.model)
        self.refusals.labels(model, str(status or "none"), self._reasons.of(reason)).inc()
        if status is None:
            self._waste(flight)

    def _waste(self, flight: Flight) -> None:
        """Once it has a token, its prompt was computed; and what it has is of use only where it can go on from it."""
        tokens, call = flight.tokens, flight.call
        if not tokens:
            return
        kept = flight.assembly is None or resumable(call.url, body_of(call))
        model = self._models.of(call.model)
        prompt = call.prompt_bytes // BYTES_PER_TOKEN + (tokens if kept else 0)
        self.wasted.labels(model, "prompt").inc(prompt)
        self.wasted.labels(model, "output").inc(0 if kept else tokens)

    def answered(self, model: str, ok: bool, usage: Usage, took_s: float) -> None:
        model = self._models.of(model)
        kinds = ("input", usage.input_tokens), ("cached", usage.cached_tokens), ("output", usage.output_tokens)
        for kind, tokens in (*kinds, ("reasoning", usage.reasoning_tokens)):
            if tokens:
                self.answered_tokens.labels(model, kind).inc(tokens)
        self.execution_s.labels(model).observe(took_s)
        self.prompt_tokens.labels(model).inc(usage.input_tokens)
        self.generation_tokens.labels(model).inc(usage.output_tokens)
        if not ok:
            self.request_errors.labels(model).inc()

    def ended(self, batch: Batch, now_s: float) -> None:
        """A batch reached its terminal status."""
        self.jobs.labels(RESULTS.get(batch.status, "failed"), REASONS.get(batch.status, FAILED)).inc()
        self.e2e_s.labels(batch.status).observe(now_s - batch.created_s)
        if batch.in_progress_s is not None:
            self.processing_s.labels(size_bucket(batch.total)).observe(now_s - batch.in_progress_s)
        if batch.status == "cancelled":
            self.cancellations.labels("queued" if batch.in_progress_s is None else "in_progress").inc()
        if self.on_end is not None:
            self.on_end(batch, now_s)

    def chore(self, name: str, took_s: float, *, failed: bool = False) -> None:
        """One round of what keeps the store in order; ``collect`` is the reference's reconciler."""
        if name == "collect":
            self.cycle_s.observe(took_s)
        if failed:
            self.chore_errors.inc()

    def watch(self, read: Callable[[], View]) -> None:
        """Gauges that are read off the worker when asked for."""
        self.registry.register(WorkerGauges(read))

    def watch_headroom(self, read: Callable[[], Mapping[str, PoolHeadroom]]) -> None:
        self.registry.register(HeadroomGauges(read))


class Names:
    """Label values that others make up: the first MOST_NAMED are kept."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def of(self, name: str) -> str:
        if name in self._known:
            return name
        if len(self._known) >= MOST_NAMED:
            return OTHER
        self._known.add(name)
        return name


class _SameAs(Collector):
    """What the reference's reconciler counts is done by all our workers, and counted there."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        recovered, collected = self._metrics.recoveries.collect(), self._metrics.collected.collect()
        yield summed("batch_reconciler_orphans_recovered_total", "Work taken over.", ("action",), recovered)
        yield summed("batch_reconciler_stale_cleanup_total", "What the collector deleted.", (), collected)


def size_bucket(lines: int) -> str:
    return next((name for most, name in _SIZES if lines <= most), "large")
