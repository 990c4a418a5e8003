"""Gauges that are read off the worker when somebody asks: they cost nothing in between.

Models, tenants and endpoints are named by others, so only the MOST_NAMED largest of each have a label of their own;
the rest is summed up as ``other``.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from batchgw.pace import Headroom, PoolHeadroom
from batchgw.planner import Slack
from batchgw.records import Waiting
from batchgw.worker.pacer import ANYWHERE, HELD, Standing

MOST_NAMED = 100
OTHER = "other"
ANY = "any"
"""Endpoint of lines whose router has the choice."""

Labels = tuple[str, ...]


class View(NamedTuple):
    """A worker at one moment. ``speeds`` are lines/s by model over all workers, ``flights`` counts lines by model and
    endpoint, ``unwritten`` are finished ones that the database does not have yet."""

    waiting: Sequence[Waiting]
    slacks: Sequence[Slack]
    speeds: Mapping[str, float]
    flights: Mapping[tuple[str, str], int]
    unwritten: int = 0
    standings: Sequence[Standing] = ()


class WorkerGauges(Collector):
    def __init__(self, read: Callable[[], View]) -> None:
        self._read = read

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        view = self._read()
        yield from queue(view)
        yield from in_flight(view)
        yield from pace(view.standings)


class HeadroomGauges(Collector):
    """What schedulers say; ``read`` gives the latest word of each."""

    def __init__(self, read: Callable[[], Mapping[str, PoolHeadroom]]) -> None:
        self._read = read

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        named = {one.endpoint: one for news in self._read().values() for one in news.endpoints}
        kept = [named[name] for name in sorted(named)[:MOST_NAMED]]
        told: Sequence[tuple[str, str, Callable[[Headroom], float | None]]] = (
            ("lines", "Batch lines that may be in flight there.", lambda one: one.n_star),
            ("prefill_tokens", "Batch prompt tokens that may wait for their first.", lambda one: one.prefill_tokens),
            ("burst", "1 while interactive requests come.", lambda one: one.mode == "burst"),
            ("step_budget_seconds", "What a step may take for interactive users.",
             lambda one: None if one.step_budget_ms is None else one.step_budget_ms / 1000),
            ("interactive_step_seconds", "Time between interactive tokens, were there no batch.",
             lambda one: one.assumed.step_ms / 1000),
            ("interactive_requests", "Interactive requests that run.", lambda one: one.assumed.running),
            ("interactive_arrivals_per_second", "Interactive requests that come.",
             lambda one: one.assumed.arrivals_per_s),
        )  # fmt: skip
        for name, text, of in told:
            values = {(one.endpoint,): value for one in kept if (value := of(one)) is not None}
            yield gauge(f"batchgw_headroom_{name}", text, ("endpoint",), values)


def queue(view: View) -> Iterator[Metric]:
    depth: Tally[Labels] = Tally()
    tenants: Tally[Labels] = Tally()
    for row in view.waiting:
        depth[row.model, "queued"] += row.queued_lines
        depth[row.model, "leased"] += row.leased_lines
        tenants[row.tenant,] += row.queued_lines + row.leased_lines
    least: dict[Labels, float] = {}
    late: Tally[Labels] = Tally()
    for slack in view.slacks:
        key = (slack.model,)
        least[key] = min(slack.slack_s, least.get(key, slack.slack_s))
        late[key] += slack.late
    model = ("model",)
    yield gauge("batchgw_queue_depth_lines", "Lines without result.", ("model", "state"), largest(depth))
    yield gauge("batchgw_tenant_queue_lines", "Lines without result.", ("tenant",), largest(tenants))
    yield gauge("batchgw_deadline_slack_seconds", "Least time left over of any batch at the measured speed; below 0 it "
                "comes too late.", model, smallest(least))  # fmt: skip
    yield gauge("batchgw_batches_at_risk", "Batches that will miss their window at the measured speed.", model,
                largest(late))  # fmt: skip
    yield gauge("batchgw_speed_lines_per_second", "Lines answered by all workers.", model,
                largest({(name,): speed for name, speed in view.speeds.items()}))  # fmt: skip
    yield gauge("batchgw_unwritten_lines", "Answered lines that the database does not have yet.", (),
                {(): view.unwritten})  # fmt: skip


def in_flight(view: View) -> Iterator[Metric]:
    models: Tally[Labels] = Tally()
    endpoints: Tally[Labels] = Tally()
    for (model, endpoint), lines in view.flights.items():
        models[model,] += lines
        endpoints[ANY if endpoint == ANYWHERE else endpoint,] += lines
    total = sum(view.flights.values())
    yield gauge("processor_inflight_requests", "Lines on their way.", (), {(): total})
    yield gauge("model_inflight_requests", "Lines on their way.", ("model",), largest(models))
    yield gauge("batchgw_endpoint_inflight_lines", "Lines on their way.", ("endpoint",), largest(endpoints))
    yield gauge("total_workers", "1: the sum over processes counts them.", (), {(): 1})
    yield gauge("active_workers", "1 while lines are on their way.", (), {(): total > 0})


def pace(standings: Sequence[Standing]) -> Iterator[Metric]:
    """Who holds lines back: by model for gates, by address for schedulers."""
    kept = sorted(standings, key=lambda one: -one.in_flight)[:MOST_NAMED]
    most = sum(one.most for one in standings)
    yield gauge("processor_max_inflight_concurrency", "Lines that may be on their way at most.", (), {(): most})
    held = {(one.source, word): one.held == word for one in kept for word in HELD}
    yield gauge("batchgw_pace_held", "1 while nothing starts, and why.", ("source", "reason"), held)
    told: Sequence[tuple[str, str, Callable[[Standing], float | None]]] = (
        ("room_lines", "Lines that might have started when it was last asked.", lambda one: one.room),
        ("inflight_lines", "Lines on their way.", lambda one: one.in_flight),
        ("budget_ratio", "A gate's share of the concurrency.", lambda one: one.budget),
        ("heard_seconds", "Since a scheduler's last word.", lambda one: one.heard_s),
    )
    for name, text, of in told:
        values = {(one.source,): value for one in kept if (value := of(one)) is not None}
        yield gauge(f"batchgw_pace_{name}", text, ("source",), values)
    yield from windows(kept)


def windows(standings: Sequence[Standing]) -> Iterator[Metric]:
    """Under the reference's names; its endpoint is our model."""
    by_model = {one.source: one.windows for one in standings if one.windows}
    limits = {(model,): min(one.window for one in of) for model, of in by_model.items()}
    grown = {(model,): sum(one.increases for one in of) for model, of in by_model.items()}
    cut: Tally[Labels] = Tally()
    for model, of in by_model.items():
        for one in of:
            cut.update({(model, signal): count for signal, count in one.decreases.items()})
    name = "batch_processor_aimd"
    yield gauge(f"{name}_concurrency_limit", "The congestion window.", ("endpoint",), limits)
    yield counter(f"{name}_increases_total", "Times it grew.", ("endpoint",), grown)
    yield counter(f"{name}_decreases_total", "Times it was cut, and by which status.", ("endpoint", "signal"), cut)


def largest(values: Mapping[Labels, float], most: int = MOST_NAMED) -> dict[Labels, float]:
    """Those of the ``most`` first labels with the largest sum; the others added up. Labels after the first are ours."""
    sums: dict[str, float] = defaultdict(float)
    for labels, value in values.items():
        sums[labels[0]] += value
    named = set(sorted(sums, key=lambda first: -sums[first])[:most])
    kept: dict[Labels, float] = {}
    for labels, value in values.items():
        key = labels if labels[0] in named else (OTHER, *labels[1:])
        kept[key] = kept.get(key, 0) + value
    return kept


def smallest(values: Mapping[Labels, float], most: int = MOST_NAMED) -> dict[Labels, float]:
    """The ``most`` smallest."""
    return dict(sorted(values.items(), key=lambda one: one[1])[:most])


def gauge(name: str, text: str, labels: Labels, values: Mapping[Any, float]) -> Metric:
    return _filled(GaugeMetricFamily(name, text, labels=labels), values)


def counter(name: str, text: str, labels: Labels, values: Mapping[Any, float]) -> Metric:
    return _filled(CounterMetricFamily(name, text, labels=labels), values)


def _filled(family: GaugeMetricFamily | CounterMetricFamily, values: Mapping[Any, float]) -> Metric:
    for key, value in values.items():
        family.add_metric(key, float(value))
    return family


def summed(family: str, text: str, labels: Labels, source: Iterable[Metric]) -> Metric:
    """A counter that adds up another's samples over all labels but these."""
    totals: dict[Labels, float] = defaultdict(float)
    for metric in source:
        for sample in metric.samples:
            if sample.name.endswith("_total"):
                totals[tuple(sample.labels[label] for label in labels)] += sample.value
    return counter(family, text, labels, totals)
