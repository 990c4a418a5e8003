"""What is read from live objects when Prometheus asks, and how it is put under the reference's names."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from llmd_sched.telemetry.names import PREFIX, help_of, row_of, twin_of

log = logging.getLogger(__name__)

Values = Iterable[tuple[tuple[str, ...], float]]
"""Label values, in the table's order, and the value."""

Gauge = tuple[str, str, tuple[str, ...], Values]
"""Name, help, label names, and values. A name ending in ``_total`` is a counter."""


class Pulled(Collector):
    """Calls ``read`` at every scrape. When it fails, what it had yielded so far is served, and the error logged."""

    def __init__(self, read: Callable[[], Iterable[Gauge]]) -> None:
        self._read = read

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        try:
            for name, text, labels, values in self._read():
                kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
                family = kind(name, text, labels=labels)
                for label_values, value in values:
                    family.add_metric(label_values, value)
                if family.samples:
                    yield family
        except Exception:
            log.exception("a metric could not be read")


def pulled(name: str, values: Values) -> Iterator[Gauge]:
    """The metric of this name (without its prefix) and its twin. Raises KeyError for a name in no table."""
    row, twin = row_of(name), twin_of(name)
    values = list(values)
    yield PREFIX + name, help_of(name), row.labels, values
    if twin is not None:
        kept = twin.kept(row.labels)
        merged: dict[tuple[str, ...], float] = {}
        for labels, value in values:
            key = tuple([labels[i] for i in kept])
            merged[key] = twin.merge(merged[key], value) if key in merged else value
        yield twin.name, help_of(name, twin=True), twin.labels or (), merged.items()


class _Keyed(Protocol):
    @property
    def key(self) -> str: ...


def pool_gauges(
    pool_name: str,
    columns: Mapping[str, NDArray[np.float64]],
    fresh: NDArray[np.bool_],
    endpoints: Sequence[_Keyed],
) -> Iterator[Gauge]:
    """The pool as a whole and each endpoint's queue; columns and ``fresh`` are aligned with ``endpoints``.

    Means and (population) standard deviations are over fresh endpoints, and 0 where there are none.
    """
    name = (pool_name,)
    yield from pulled("ready_endpoints", [(name, float(fresh.sum()))])
    for metric, column in (
        ("kv_cache_utilization", "kv_usage"),
        ("queue_size", "waiting"),
        ("running_requests", "running"),
    ):
        values = columns[column][fresh]
        mean, spread = (float(values.mean()), float(values.std())) if len(values) else (0.0, 0.0)
        yield from pulled(f"average_{metric}", [(name, mean)])
        yield from pulled(f"std_dev_{metric}", [(name, spread)])
    waiting = zip(endpoints, columns["waiting"].tolist(), strict=True)
    yield from pulled("per_endpoint_queue_size", [((pool_name, e.key), queue) for e, queue in waiting])
