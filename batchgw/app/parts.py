"""Objects from settings: storage, and everything that works on batches."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import uuid
from collections.abc import AsyncIterator

from msgspec.structs import replace
from prometheus_client import CollectorRegistry

from batchgw.blobs import Blobs
from batchgw.client.gateway import Gateways
from batchgw.client.requests import Sender
from batchgw.client.traced import TracedSender
from batchgw.config import Pace, Settings
from batchgw.errors import ConfigError
from batchgw.gates import gate
from batchgw.seal import Seal
from batchgw.store import Store, open_store
from batchgw.tracing import Tracer
from batchgw.worker.finalize import Finalizer
from batchgw.worker.headroom_pacer import HeadroomPacer
from batchgw.worker.inputs import Inputs
from batchgw.worker.leases import Leases
from batchgw.worker.metrics import Metrics
from batchgw.worker.pacer import GatePacer, Pacer
from batchgw.worker.redis_source import RedisSettings, RedisSource
from batchgw.worker.upkeep import Upkeep
from batchgw.worker.webhooks import Teller
from batchgw.worker.worker import Worker

REDIS_TIMEOUT_S = 10.0


@contextlib.asynccontextmanager
async def storage(settings: Settings) -> AsyncIterator[tuple[Store, Blobs]]:
    """Opened, and the schema the newest. Raises ConfigError, StoreUnavailable, OSError."""
    try:
        settings.make_folder()
        blobs = Blobs.open(settings.blobs_url, settings.blob_options)
    except ValueError as e:
        raise ConfigError(str(e), "$.blobs") from None
    except OSError as e:
        raise ConfigError(f"cannot make the folder {e.filename}: {e.strerror}", "$.data") from None
    async with open_store(settings.store_url, pool_size=settings.store_connections) as store:
        yield store, blobs


def pacer_of(pace: Pace, worker: str) -> Pacer:
    if told := pace.headroom:
        return HeadroomPacer(
            lambda model: told.by_model.get(model, told.url),
            worker=worker, token=told.token, most=told.most, stale_after_s=told.stale_after_s,
        )  # fmt: skip
    written, tools = pace.gate_or_default, pace.tools
    return GatePacer(lambda model: gate(written, tools, "$.pace.gate"), pace.per_model, pace.total)


class Batching:
    """A worker, its upkeep and its source of further lines. ``run`` until ``stop``, which is graceful."""

    def __init__(
        self, settings: Settings, store: Store, blobs: Blobs, registry: CollectorRegistry, tracer: Tracer | None = None
    ) -> None:
        metrics, hooks = Metrics(registry), tuple(settings.webhooks)
        worker = _worker_id()
        leases = Leases(store, worker, settings.leases.lease_s, settings.leases.heartbeat_s)
        inputs = Inputs(store, blobs, Seal(settings.api.header_keys).open)
        results = replace(settings.results, webhooks=hooks)
        finalizer = Finalizer(store, blobs, inputs, leases, metrics, settings=results)
        upkeep = replace(settings.upkeep, webhooks=hooks)
        teller = Teller(store, settings.webhooks, metrics) if hooks else None
        self.upkeep = Upkeep(store, blobs, inputs, leases, finalizer, metrics, teller=teller, settings=upkeep)
        gateways = Gateways(settings.default_gateway, settings.gateways)
        self._sender = TracedSender(gateways, tracer) if tracer and settings.tracing else Sender(gateways)
        self._pacer = pacer = pacer_of(settings.pace, worker)
        if isinstance(pacer, HeadroomPacer):
            metrics.watch_headroom(lambda: pacer.headrooms)
        if tracer is not None:
            metrics.on_end = tracer.batch_ended
        self._redis, self._stop_s, self._stopping = settings.redis_source, settings.worker.stop_s, asyncio.Event()
        self._worker = Worker(
            store, inputs, self._sender, self._pacer, leases, metrics=metrics, settings=settings.worker
        )  # fmt: skip

    async def run(self) -> None:
        await self._sender.open()
        try:
            async with asyncio.TaskGroup() as group:
                upkeep, worker = group.create_task(self.upkeep.run()), group.create_task(self._worker.run())
                source = group.create_task(self._from_redis(self._redis)) if self._redis else None
                await self._stopping.wait()
                self._worker.stop()
                self.upkeep.stop()
                if source is not None:
                    source.cancel()
                await asyncio.wait([worker])
                await asyncio.wait([upkeep], timeout=self._stop_s)
                upkeep.cancel()
        finally:
            await self._sender.close()

    def stop(self) -> None:
        """Lines have the worker's ``stop_s`` to end; handing in and what upkeep is at may take as long again each."""
        self._stopping.set()

    async def _from_redis(self, settings: RedisSettings) -> None:
        from redis import asyncio as client  # an optional dependency

        timeouts = {"socket_timeout": REDIS_TIMEOUT_S, "socket_connect_timeout": REDIS_TIMEOUT_S}
        async with client.from_url(settings.url, **timeouts) as connected:
            await RedisSource(connected, self._sender, self._pacer, settings).run()


def _worker_id() -> str:
    """Never the same twice: a lease is its owner's alone."""
    return f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
