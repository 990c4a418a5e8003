"""All metrics of one process: what is observed, what is pulled, and the page Prometheus reads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.registry import Collector

from llmd_sched.telemetry.instruments import Bins, C, Count, Instrument, Level
from llmd_sched.telemetry.names import MEASURED, PREFIX, Kind, Row, help_of, row_of, twin_of
from llmd_sched.telemetry.pulled import Gauge, Pulled

LINES_AT_ONCE = 32
"""Of a page, each being one label set's; about a millisecond."""

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Book:
    """Instruments by their name in the tables, without the prefix; each is made when first asked for."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """``registry`` gets everything, for those who read one; ``page`` does not need it."""
        self.registry = registry
        self._pulled = CollectorRegistry()
        self._instruments: dict[str, Instrument[Any]] = {}
        self._register(ProcessCollector(registry=None))

    def counter(self, name: str) -> Instrument[Count]:
        """Raises KeyError for a name in no table, ValueError when it is no counter; so do the other two."""
        return self._tabled(name, "counter", Count)

    def gauge(self, name: str) -> Instrument[Level]:
        return self._tabled(name, "gauge", Level)

    def histogram(self, name: str) -> Instrument[Bins]:
        return self._tabled(name, "histogram", Bins)

    def measured(self, name: str) -> Instrument[Bins]:
        """A histogram of MEASURED, by its full name."""
        row = MEASURED[name]
        return self._keep(name, Instrument(Bins, name, f"[ALPHA] {row.text}", row))

    def _tabled(self, name: str, kind: Kind, child: type[C]) -> Instrument[C]:
        if name in self._instruments:
            return self._instruments[name]
        row: Row = row_of(name)
        if row.kind != kind:
            raise ValueError(f"{name} is a {row.kind}, not a {kind}")
        old = help_of(name, twin=True)
        return self._keep(name, Instrument(child, PREFIX + name, help_of(name), row, twin_of(name), old))

    def _keep(self, name: str, made: Instrument[C]) -> Instrument[C]:
        self._instruments[name] = made
        self.registry.register(made)
        return made

    def pull(self, read: Callable[[], Iterable[Gauge]]) -> None:
        """Have ``read`` called at every scrape, in the scraping thread: it only reads."""
        self._register(Pulled(read))

    def _register(self, collector: Collector) -> None:
        self.registry.register(collector)
        self._pulled.register(collector)

    def page(self) -> bytes:
        """What to serve, as CONTENT_TYPE. For any thread; a thousand kinds of request take about 0.3 s."""
        parts = []
        for one in list(self._instruments.values()):
            lines = one.lines()
            while part := "".join(islice(lines, LINES_AT_ONCE)):
                parts.append(part.encode(errors="replace"))
                time.sleep(0)  # the event loop waits for the interpreter no longer than for these lines
        return b"".join([*parts, generate_latest(self._pulled)])
