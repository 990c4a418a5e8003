"""Storage that is timed: each verb of the store, each operation on blobs."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

from prometheus_client import CollectorRegistry, Counter, Histogram

from batchgw.blobs import BlobMissing, Blobs, BlobsUnavailable
from batchgw.store import Store
from batchgw.store.base import LeaseLost, StoreError, StoreUnavailable

BUCKETS_S = tuple(0.0005 * 2**i for i in range(15))
OPERATIONS = {"put": "store", "delete": "delete", "older": "list", "remove_cut": "list"}
"""Of blobs, by the reference's names; all others retrieve."""

Seen = Callable[[str, float | None, BaseException | None], None]
"""Told a verb, its seconds (None for one that is read bit by bit) and what it raised."""


class StorageMetrics:
    """``component``: what the process does, as the reference labels it."""

    def __init__(self, registry: CollectorRegistry, component: str) -> None:
        self._component = component
        self.store_s = Histogram(
            "batchgw_store_duration_seconds", "Of the database.", ("verb",), registry=registry, buckets=BUCKETS_S
        )
        self.store_errors = Counter("batchgw_store_errors", "Of the database.", ("verb", "kind"), registry=registry)
        self.conflicts = Counter(
            "batch_reconciler_cas_conflicts", "Writes refused: the work is another's.", registry=registry
        )
        self.blobs_s = Histogram(
            "batchgw_blobs_duration_seconds", "Of the files.", ("operation",), registry=registry, buckets=BUCKETS_S
        )
        named = ("operation", "component", "status")
        self.blobs = Counter("file_storage_operations", "success, or exhausted retries.", named, registry=registry)

    def store(self, store: Store) -> Store:
        return cast("Store", _Measured(store, self._store_seen))

    def files(self, blobs: Blobs) -> Blobs:
        return cast("Blobs", _Measured(blobs, self._blobs_seen))

    def _store_seen(self, verb: str, took_s: float | None, error: BaseException | None) -> None:
        if took_s is not None:
            self.store_s.labels(verb).observe(took_s)
        if isinstance(error, LeaseLost):
            self.conflicts.inc()
        elif isinstance(error, StoreUnavailable):
            self.store_errors.labels(verb, "unavailable").inc()
        elif error is not None and not isinstance(error, StoreError):  # the others are answers
            self.store_errors.labels(verb, "failed").inc()

    def _blobs_seen(self, verb: str, took_s: float | None, error: BaseException | None) -> None:
        operation = OPERATIONS.get(verb, "retrieve")
        if took_s is not None:
            self.blobs_s.labels(operation).observe(took_s)
        if isinstance(error, BlobsUnavailable):
            self.blobs.labels(operation, self._component, "exhausted").inc()
        elif error is None or isinstance(error, BlobMissing):  # all others are of who gave the bytes
            self.blobs.labels(operation, self._component, "success").inc()


class _Measured:
    """Passes everything on, and tells how long each coroutine took. A cancelled one tells nothing."""

    def __init__(self, inner: Any, seen: Seen) -> None:
        self._inner, self._seen = inner, seen

    def __getattr__(self, name: str) -> Any:
        verb = getattr(self._inner, name)
        if inspect.iscoroutinefunction(verb):
            verb = self._timed(name, verb)
        elif inspect.isasyncgenfunction(verb):
            verb = self._counted(name, verb)
        setattr(self, name, verb)
        return verb

    def _timed(self, name: str, verb: Callable[..., Any]) -> Callable[..., Any]:
        async def call(*given: Any, **named: Any) -> Any:
            began_s = time.perf_counter()
            try:
                answer = await verb(*given, **named)
            except Exception as e:
                self._seen(name, time.perf_counter() - began_s, e)
                raise
            self._seen(name, time.perf_counter() - began_s, None)
            return answer

        return call

    def _counted(self, name: str, verb: Callable[..., Any]) -> Callable[..., Any]:
        async def each(*given: Any, **named: Any) -> AsyncIterator[Any]:
            async with contextlib.aclosing(verb(*given, **named)) as items:
                try:
                    async for item in items:
                        yield item
                except Exception as e:
                    self._seen(name, None, e)
                    raise
            self._seen(name, None, None)

        return each
