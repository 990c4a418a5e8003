"""Counters, gauges and histograms made for two things: an observation costs well under a microsecond, and the page of
a thousand label sets is written in a fraction of a second, the deprecated twins made on the way.

One thread observes (the event loop); any thread may read. Numbers are written as Go's client writes them.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import accumulate
from typing import Generic, NamedTuple, TypeVar

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from llmd_sched.telemetry.names import OTHER, Row, Twin

MAX_CHILDREN = 20_000
"""Label sets of one metric; the next ones are all ``other``. A last resort, for labels nobody else bounds."""

Text = str | int
"""A number ready to be written."""


class Count:
    """One label set of a counter."""

    __slots__ = ("value",)
    shown = True

    def __init__(self, row: Row) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1.0) -> None:
        self.value += amount

    def add(self, other: Count) -> None:
        self.value += other.value

    def texts(self) -> tuple[Text, ...]:
        """Its samples, in the order of ``_samples``."""
        return (number(self.value),)


class Level(Count):
    """One label set of a gauge."""

    __slots__ = ()

    def dec(self, amount: float = 1.0) -> None:
        self.value -= amount

    def set(self, value: float) -> None:
        self.value = value


class Bins:
    """One label set of a histogram."""

    __slots__ = ("counts", "edges", "sum")

    def __init__(self, row: Row) -> None:
        self.edges = row.buckets
        self.counts = [0] * (len(row.buckets) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.edges, value)] += 1
        self.sum += value

    def add(self, other: Bins) -> None:
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.sum += other.sum

    def texts(self) -> tuple[Text, ...]:
        totals = tuple(accumulate(self.counts))
        return (*totals, number(self.sum), totals[-1])

    @property
    def shown(self) -> bool:
        """Looked up and never observed is not there, as in the reference."""
        return any(self.counts)


C = TypeVar("C", bound=Count | Bins)


class Exposed(NamedTuple, Generic[C]):
    """A metric under one of its names."""

    name: str
    text: str
    labels: tuple[str, ...]
    children: Iterable[tuple[tuple[str, ...], C]]


class Instrument(Collector, Generic[C]):
    """A row of the table with its children by label values, and its twin."""

    def __init__(self, child: type[C], name: str, text: str, row: Row, twin: Twin | None = None, old: str = "") -> None:
        """``name`` and ``text`` are as served, ``old`` is the help text of the twin."""
        self.name, self.text, self.row = name, text, row
        self._twin, self._old = twin, old
        self._child = child
        self._children: dict[tuple[str, ...], C] = {} if row.labels else {(): child(row)}

    def labels(self, *values: str) -> C:
        """The child of these label values, in the table's order. Raises ValueError when their number is wrong."""
        found = self._children.get(values)
        return self._new(values) if found is None else found

    def _new(self, values: tuple[str, ...]) -> C:
        if len(values) != len(self.row.labels):
            raise ValueError(f"{self.name} takes {self.row.labels}, not {len(values)} values")
        if len(self._children) >= MAX_CHILDREN:
            values = (OTHER,) * len(values)
        return self._children.setdefault(values, self._child(self.row))

    def exposed(self) -> Iterator[Exposed[C]]:
        """Under its name and, if it has one, under the deprecated one."""
        children = [(v, child) for v, child in list(self._children.items()) if child.shown or not v]
        yield Exposed(self.name, self.text, self.row.labels, children)
        if self._twin is not None:
            labels = self._twin.labels or ()
            yield Exposed(self._twin.name, self._old, labels, self._merged(self._twin, children))

    def _merged(self, twin: Twin, children: list[tuple[tuple[str, ...], C]]) -> Iterable[tuple[tuple[str, ...], C]]:
        """Summed over the labels that the twin does not have."""
        kept = twin.kept(self.row.labels)
        if len(kept) == len(self.row.labels):
            return children
        merged: dict[tuple[str, ...], C] = {}
        for values, child in children:
            key = tuple([values[i] for i in kept])
            if key not in merged:
                merged[key] = self._child(self.row)
            merged[key].add(child)  # type: ignore[arg-type]
        return merged.items()

    def lines(self) -> Iterator[str]:
        """The text format, version 0.0.4."""
        for one in self.exposed():
            if one.children:
                yield f"# HELP {one.name} {one.text}\n# TYPE {one.name} {self.row.kind}\n"
                template = _template(one.name, bool(one.labels), self.row.buckets)
                names = [f'{label}="' for label in one.labels]
                for values, child in one.children:
                    labels = ",".join([f'{name}{escaped(value)}"' for name, value in zip(names, values, strict=True)])
                    yield template.replace(_LABELS, labels.replace("%", "%%")) % child.texts()

    def collect(self) -> Iterator[Metric]:
        """The same for a registry of prometheus_client; many times slower than ``lines``."""
        samples = _samples(self.row.buckets)
        for one in self.exposed():
            metric = Metric(one.name.removesuffix("_total"), one.text, self.row.kind)
            for values, child in one.children:
                labels = dict(zip(one.labels, values, strict=True))
                for (suffix, edge), text in zip(samples, child.texts(), strict=True):
                    metric.add_sample(one.name + suffix, {**labels, "le": edge} if edge else labels, float(text))
            yield metric

    def describe(self) -> Iterator[Metric]:
        return iter(())


_LABELS = "\0"


@cache
def _samples(buckets: tuple[float, ...]) -> tuple[tuple[str, str], ...]:
    """Suffix and upper edge of each sample of one child; there are as many kinds as the tables have."""
    if not buckets:
        return (("", ""),)
    edges = (*map(number, buckets), "+Inf")
    return (*(("_bucket", edge) for edge in edges), ("_sum", ""), ("_count", ""))


@cache
def _template(name: str, labelled: bool, buckets: tuple[float, ...]) -> str:
    """The lines of one child: ``_LABELS`` where its labels go, %s where its numbers go."""
    lines = []
    for suffix, edge in _samples(buckets):
        inside = [_LABELS] * labelled + [f'le="{edge}"'] * bool(edge)
        lines.append(f"{name}{suffix}{'{' + ','.join(inside) + '}' if inside else ''} %s\n")
    return "".join(lines)


def escaped(value: str) -> str:
    """A label value between quotation marks."""
    if "\\" in value or '"' in value or "\n" in value:
        return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
    return value


def number(value: float) -> str:
    """The shortest text that reads back as this number, with an exponent from 1e+06 on and below 1e-04."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        return repr(float(value)).removesuffix(".0")
    digits = next(d for d in range(18) if float(f"{value:.{d}e}") == value)
    return f"{value:.{digits}e}"
