"""The live endpoints and what was last read of them, as columns.

An endpoint whose metrics are missing or stale never looks idle: it is shown with the worst value among the endpoints
that were read in time, or its own last value if that is worse. One that refuses connections is left out while any
other can be reached.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

import msgspec
import numpy as np
from numpy.typing import NDArray

from llmd_sched.types import Adapters, Array, Candidates, Endpoint

STALE_AFTER_S = 2.0
UNREACHABLE_AFTER_FAILURES = 2
NEVER_READ_AGE_S = 1e6

GAUGES = ("waiting", "running", "kv_usage")
FACTS = ("block_tokens", "cache_blocks")
NO_ADAPTERS = Adapters()


class Load(msgspec.Struct, frozen=True):
    """What one scrape said. None = the page did not have it, so the last value stands."""

    waiting: float | None = None
    running: float | None = None
    kv_usage: float | None = None
    block_tokens: float | None = None
    cache_blocks: float | None = None
    adapters: frozenset[str] | None = None
    """LoRA adapters that are loaded."""
    waiting_adapters: frozenset[str] | None = None
    """LoRA adapters some of whose requests wait."""
    max_adapters: float | None = None
    """How many may be loaded at once; finite."""
    custom: Mapping[str, float] | None = None
    """Columns beyond the usual ones -> value; finite. Their names are the configuration's."""


class Pool:
    """Endpoints in the order they were discovered. Not thread safe: one event loop owns it."""

    def __init__(self, stale_after_s: float = STALE_AFTER_S) -> None:
        self.stale_after_s = stale_after_s
        self.endpoints: list[Endpoint] = []
        self.on_change: list[Callable[[list[Endpoint]], None]] = []
        self.on_read: list[Callable[[], None]] = []
        """Told when an endpoint's metrics were read, or could not be."""
        self._position: dict[str, int] = {}
        self._columns: dict[str, Array] = {name: np.zeros(0) for name in GAUGES + FACTS}
        self._custom: dict[str, Array] = {}
        """Columns that some engine has; NaN for an endpoint whose page never had it."""
        self._custom_at_s: Array = np.zeros(0)
        """When a page had any of them last."""
        self._read_at_s: Array = np.zeros(0)
        self._adapters: list[Adapters] = []
        self._serves_adapters = False
        self._failures: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._all_reachable = True

    def __len__(self) -> int:
        return len(self.endpoints)

    def apply(self, endpoints: Iterable[Endpoint]) -> None:
        """Make these the members. One that keeps its identity and address keeps what is known of it."""
        old, old_position = self.endpoints, self._position
        self.endpoints = list({e.key: e for e in endpoints}.values())
        self._position = {e.key: i for i, e in enumerate(self.endpoints)}
        source = np.array(
            [
                old_position[e.key]
                if e.key in old_position and old[old_position[e.key]].hostport == e.hostport
                else len(old)
                for e in self.endpoints
            ],
            dtype=np.intp,
        )
        self._columns = {name: np.append(column, 0.0)[source] for name, column in self._columns.items()}
        self._custom = {name: np.append(column, np.nan)[source] for name, column in self._custom.items()}
        self._custom_at_s = np.append(self._custom_at_s, -np.inf)[source]
        adapters = [*self._adapters, NO_ADAPTERS]
        self._adapters = [adapters[i] for i in source]
        self._serves_adapters = any(a != NO_ADAPTERS for a in self._adapters)
        self._read_at_s = np.append(self._read_at_s, -np.inf)[source]
        self._failures = np.append(self._failures, 0)[source]
        self._all_reachable = bool((self._failures < UNREACHABLE_AFTER_FAILURES).all())
        for tell in self.on_change:
            tell(self.endpoints)

    def position(self, key: str) -> int | None:
        return self._position.get(key)

    def record(self, endpoint: Endpoint, load: Load, now_s: float) -> None:
        """A page was read. Metrics count as fresh only if it had at least one of the gauges."""
        i = self._current(endpoint)
        if i is None:
            return
        if self._failures[i]:
            self._failures[i] = 0
            self._all_reachable = bool((self._failures < UNREACHABLE_AFTER_FAILURES).all())
        for name in GAUGES + FACTS:
            value = getattr(load, name)
            if value is not None:
                self._columns[name][i] = value
        if load.custom:
            self._record_custom(i, load.custom, now_s)
        self._record_adapters(i, load)
        if any(getattr(load, name) is not None for name in GAUGES):
            self._read_at_s[i] = now_s
        for tell in self.on_read:
            tell()

    def _record_custom(self, i: int, values: Mapping[str, float], now_s: float) -> None:
        for name, value in values.items():
            if name not in self._custom:
                self._custom[name] = np.full(len(self.endpoints), np.nan)
            self._custom[name][i] = value
        self._custom_at_s[i] = now_s

    def _record_adapters(self, i: int, load: Load) -> None:
        before = self._adapters[i]
        now = Adapters(
            before.running if load.adapters is None else load.adapters,
            before.waiting if load.waiting_adapters is None else load.waiting_adapters,
            before.most if load.max_adapters is None else int(load.max_adapters),
        )
        if now != before:
            self._adapters[i] = now
            self._serves_adapters = True

    def record_failure(self, endpoint: Endpoint) -> None:
        """The endpoint could not be connected to."""
        i = self._current(endpoint)
        if i is not None:
            self._failures[i] += 1
            self._all_reachable = self._all_reachable and self._failures[i] < UNREACHABLE_AFTER_FAILURES
        for tell in self.on_read:
            tell()

    def _current(self, endpoint: Endpoint) -> int | None:
        """Its position, unless it was replaced by one at another address meanwhile."""
        i = self._position.get(endpoint.key)
        return i if i is not None and self.endpoints[i].hostport == endpoint.hostport else None

    def fresh(self, now_s: float) -> NDArray[np.bool_]:
        return now_s - self._read_at_s <= self.stale_after_s

    def candidates(self, subset: Collection[str] | None, now_s: float) -> Candidates:
        """The endpoints a request may go to. ``subset`` holds ``ip:port`` or ``ip`` (None = no restriction)."""
        columns = self.columns(now_s)
        adapters = self._adapters if self._serves_adapters else ()
        if subset is None and self._all_reachable:
            return Candidates(self.endpoints, columns, None, adapters)
        keep = self._failures < UNREACHABLE_AFTER_FAILURES
        if subset is not None:
            allowed = np.array([e.hostport in subset or e.address in subset for e in self.endpoints], dtype=bool)
            keep &= allowed
            keep = keep if keep.any() else allowed
        elif not keep.any():
            keep = np.ones(len(self.endpoints), dtype=bool)
        view = Candidates(self.endpoints, columns, None, adapters)
        return view if keep.all() else view.keep(keep).compact()

    def columns(self, now_s: float) -> dict[str, Array]:
        """Every column of every endpoint, pessimistic where nothing fresh is known. Not to be written to, nor kept.

        Of a custom column nobody can say which value is the worst: it is NaN there.
        """
        age_s = now_s - self._read_at_s
        columns = {**self._columns, "metrics_age_s": age_s}
        if self._custom:
            known = now_s - self._custom_at_s <= self.stale_after_s
            columns |= {name: np.where(known, values, np.nan) for name, values in self._custom.items()}
        if age_s.max(initial=0.0) > self.stale_after_s:
            columns["metrics_age_s"] = np.minimum(age_s, NEVER_READ_AGE_S)
            fresh = age_s <= self.stale_after_s
            for name in GAUGES:
                values = self._columns[name]
                columns[name] = np.where(fresh, values, np.maximum(values, self._worst(name, values, fresh)))
        return columns

    @staticmethod
    def _worst(name: str, values: Array, fresh: NDArray[np.bool_]) -> float:
        if fresh.any():
            return float(values[fresh].max())
        # Nothing at all is known of the pool: full and queueing, rather than free and idle.
        return 1.0 if name == "kv_usage" else max(1.0, float(values.max(initial=0.0)))
