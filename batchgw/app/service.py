"""A running process: what listens and what works, started together and stopped in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Literal

from prometheus_client import CollectorRegistry, ProcessCollector

from batchgw.api.app import create_app, create_ops_app
from batchgw.api.metrics import ApiMetrics
from batchgw.app.listener import Listener, bound
from batchgw.app.measured import StorageMetrics
from batchgw.app.parts import Batching, storage
from batchgw.blobs import Blobs
from batchgw.config import Settings, address
from batchgw.store import Store
from batchgw.tracing import Tracer, tracer

log = logging.getLogger(__name__)

Role = Literal["serve", "api", "worker"]

OPS_STOP_S = 1.0


class Service:
    """``run`` until ``stop``: not ready any more, no new connections and no new lines, what runs ends or is handed
    back, probes and metrics go last."""

    def __init__(
        self, settings: Settings, store: Store, blobs: Blobs, *,
        api: socket.socket | None, ops: socket.socket, works: bool, tracer: Tracer | None = None,
    ) -> None:  # fmt: skip
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._stopping = asyncio.Event()
        storage = StorageMetrics(registry, component(api is not None, works))
        store, blobs = storage.store(store), storage.files(blobs)
        self._batching = Batching(settings, store, blobs, registry, tracer) if works else None
        self._api: Listener | None = None
        if api is not None:
            app = create_app(
                settings.api, store, blobs, metrics=ApiMetrics(registry), serving=self._serving,
                tracer=tracer if settings.tracing else None,
            )  # fmt: skip
            self._api = Listener(app, api, settings.worker.stop_s, settings.tls)
        self._ops = Listener(create_ops_app(registry, store, self._serving), ops, OPS_STOP_S)
        self._gateway = settings.default_gateway.url

    def _serving(self) -> bool:
        return not self._stopping.is_set()

    def __str__(self) -> str:
        """Where it listens."""
        parts = [f"API {self._api.url}/v1 (docs: {self._api.url}/docs)"] if self._api else []
        parts += [f"lines go to {self._gateway}"] if self._batching else []
        return ", ".join([*parts, f"metrics {self._ops.url}/metrics"])

    async def run(self) -> None:
        """Raises what any part died of."""
        async with asyncio.TaskGroup() as group:
            ops = group.create_task(self._ops.run())
            parts = [part for part in (self._api, self._batching) if part]
            running = [group.create_task(part.run()) for part in parts]
            await self._stopping.wait()
            log.info("stopping")
            for part in parts:
                part.stop()
            await asyncio.wait(running)
            self._ops.stop()
            await ops

    def stop(self) -> None:
        self._stopping.set()


async def serve(settings: Settings, role: Role, started: Callable[[str], None]) -> None:
    """Until SIGTERM or SIGINT, the second of which ends it at once (CancelledError); ``started`` is told where.

    Raises ConfigError, StoreUnavailable, and what any part died of.
    """
    at, path = (settings.worker_ops, "$.workerOps") if role == "worker" else (settings.ops, "$.ops")
    async with contextlib.AsyncExitStack() as stack:
        api = None if role == "worker" else stack.enter_context(bound(address(settings.listen), "$.listen"))
        ops = stack.enter_context(bound(address(at), path))
        store, blobs = await stack.enter_async_context(storage(settings))
        tracing = tracer(settings.tracing)
        stack.push_async_callback(asyncio.to_thread, tracing.close)
        service = Service(settings, store, blobs, api=api, ops=ops, works=role != "api", tracer=tracing)
        stack.enter_context(_signals(service.stop))
        started(str(service))
        await service.run()


def component(has_api: bool, works: bool) -> str:
    """Of a process, as the reference names them."""
    return {(True, False): "apiserver", (False, True): "processor"}.get((has_api, works), "serve")


@contextlib.contextmanager
def _signals(stop: Callable[[], None]) -> Iterator[None]:
    """The first asks to stop, the second cancels the task that waits here."""
    loop, waiting, asked = asyncio.get_running_loop(), asyncio.current_task(), iter([stop])
    assert waiting is not None
    for one in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(one, lambda: next(asked, waiting.cancel)())
    try:
        yield
    finally:
        for one in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(one)
