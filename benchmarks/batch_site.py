"""A whole batch gateway without its API, for tests and benchmarks: a store, blobs, workers with their upkeep."""

from __future__ import annotations

import asyncio
import json
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

from batchgw import blobs as keys
from batchgw.blobs import Blobs
from batchgw.client.gateway import Gateway, Gateways
from batchgw.client.requests import Sender
from batchgw.gates.base import Open
from batchgw.lines import Limits, Scanner
from batchgw.records import TERMINAL, Batch, File
from batchgw.store import open_store
from batchgw.store.base import Store
from batchgw.worker.finalize import Finalizer, FinalizerSettings
from batchgw.worker.inputs import Inputs, OpenHeaders, no_headers
from batchgw.worker.leases import Leases
from batchgw.worker.metrics import Metrics
from batchgw.worker.pacer import GatePacer, Pacer
from batchgw.worker.upkeep import Upkeep, UpkeepSettings
from batchgw.worker.worker import Worker, WorkerSettings

LEASE_S, HEARTBEAT_S = 1.0, 0.2
LOOK_S = 0.02
CHAT = "/v1/chat/completions"


def requests(count: int, model: str | Sequence[str] = "m", url: str = CHAT, **body: Any) -> bytes:
    """An input file of ``count`` lines ``c0 c1 ...``, models taken in turn."""
    models = [model] if isinstance(model, str) else model
    lines = []
    for i in range(count):
        asked = {"model": models[i % len(models)], "messages": [{"role": "user", "content": f"line {i}"}], **body}
        lines.append({"custom_id": f"c{i}", "method": "POST", "url": url, "body": asked})
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


class Site:
    """Where batches are put and ended ones looked at."""

    def __init__(self, store: Store, blobs: Blobs, engine_url: str) -> None:
        self.store, self.blobs, self.engine_url = store, blobs, engine_url

    async def upload(self, data: bytes, tenant: str = "t") -> File:
        scanner = Scanner(Limits())
        scanner.feed(data)
        scan, plan = scanner.finish()
        id = f"file-{uuid.uuid4().hex}"
        blob, plan_blob = keys.key(tenant, f"{id}.jsonl"), keys.key(tenant, f"{id}.plan")
        await self.blobs.put(blob, _pieces([data]), 1 << 30)
        if not scan.error_count:
            await self.blobs.put(plan_blob, _pieces([plan.tobytes()]), 1 << 30)
        file = File(id=id, tenant=tenant, purpose="batch", filename="in.jsonl", bytes=len(data), created_s=time.time(),
                    blob=blob, scan=scan, plan_blob=None if scan.error_count else plan_blob)  # fmt: skip
        await self.store.add_file(file)
        return file

    async def submit(self, data: bytes, window_s: float = 3600.0, tenant: str = "t", **fields: Any) -> Batch:
        file, now_s = await self.upload(data, tenant), time.time()
        batch = Batch(id=f"batch_{uuid.uuid4().hex}", tenant=tenant, endpoint=CHAT, input_file_id=file.id,
                      completion_window="1h", created_s=now_s, deadline_s=now_s + window_s, **fields)  # fmt: skip
        return await self.store.add_batch(batch)

    async def ended(self, batch_id: str, limit_s: float = 30.0) -> Batch:
        """Raises TimeoutError."""
        async with asyncio.timeout(limit_s):
            while True:
                batch = await self.batch(batch_id)
                if batch.status in TERMINAL:
                    return batch
                await asyncio.sleep(0.02)

    async def batch(self, batch_id: str) -> Batch:
        found = await self.store.batch(None, batch_id)
        assert found is not None
        return found

    async def lines(self, batch: Batch, file_id: str | None) -> list[dict[str, Any]]:
        """Of an output or error file; none without one."""
        file = await self.store.file(batch.tenant, file_id) if file_id else None
        if file is None:
            return []
        data = b"".join([piece async for piece in self.blobs.stream(file.blob)])
        assert len(data) == file.bytes
        return [json.loads(line) for line in data.splitlines()]

    @asynccontextmanager
    async def worker(self, name: str = "w", **given: Any) -> AsyncIterator[Process]:
        """One that stops gracefully at the end."""
        made = Process(self, name, **given)
        await made.start()
        try:
            yield made
        finally:
            await made.stop()


class _Known(Gateways):
    """One gateway for all models that it knows."""

    def __init__(self, known: Callable[[str], bool], gateway: Gateway) -> None:
        super().__init__(gateway)
        self._known = known

    def of(self, model: str) -> Gateway | None:
        return super().of(model) if self._known(model) else None


class Process:
    """One worker with its upkeep, as ``batchgw worker`` runs it. ``kill`` leaves everything as it is."""

    def __init__(
        self,
        site: Site,
        name: str,
        *,
        store: Store | None = None,
        pacer: Pacer | None = None,
        per_model: int = 20,
        settings: WorkerSettings | None = None,
        finalizer: FinalizerSettings | None = None,
        seed: int = 1,
        lease_s: float = LEASE_S,
        heartbeat_s: float = HEARTBEAT_S,
        look_s: float = LOOK_S,
        open_headers: OpenHeaders = no_headers,
        known: Callable[[str], bool] = lambda model: True,
        **gateway: Any,
    ) -> None:
        store = store or site.store
        usual = {"initial_backoff_s": 0.002, "max_backoff_s": 0.05, "request_timeout_s": 0.5, "max_retries": 20}
        self.sender = Sender(_Known(known, Gateway(url=site.engine_url, **{**usual, **gateway})), Random(seed))
        self.metrics = Metrics()
        leases, inputs = Leases(store, name, lease_s, heartbeat_s), Inputs(store, site.blobs, open_headers)
        ends = Finalizer(store, site.blobs, inputs, leases, self.metrics, settings=finalizer)
        upkeep = UpkeepSettings(look_s=look_s)
        self.upkeep = Upkeep(store, site.blobs, inputs, leases, ends, self.metrics, settings=upkeep)
        settings = settings or WorkerSettings(poll_s=look_s, flush_s=0.05, stop_s=2.0)
        pacer = pacer or GatePacer(lambda model: Open(), per_model=per_model)
        self.worker = Worker(store, inputs, self.sender, pacer, leases, metrics=self.metrics, settings=settings)
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        await self.sender.open()
        self._tasks = [asyncio.create_task(self.worker.run()), asyncio.create_task(self.upkeep.run())]

    async def serve(self) -> None:
        """For ever."""
        await self.start()
        await asyncio.gather(*self._tasks)

    async def stop(self) -> None:
        """Raises what the worker died of."""
        work, upkeep = self._tasks
        self.worker.stop()
        try:
            await work
        finally:
            upkeep.cancel()
            await asyncio.gather(upkeep, return_exceptions=True)
            await self.sender.close()

    def crashed(self) -> list[BaseException]:
        """What ended its tasks before anybody asked them to."""
        ended = [task for task in self._tasks if task.done() and not task.cancelled()]
        return [error for error in (task.exception() for task in ended) if error is not None]

    async def kill(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.sender.close()


async def wrong(site: Site, batch: Batch, count: int) -> list[str]:
    """Which invariants an ended batch of ``count`` lines breaks; none is as it should be."""
    output = await site.lines(batch, batch.output_file_id)
    errors = await site.lines(batch, batch.error_file_id)
    ids = [line["custom_id"] for line in (*output, *errors)]
    found = {
        f"status {batch.status}": batch.status not in TERMINAL,
        f"{batch.completed} completed and {batch.failed} failed of {batch.total}": not (
            batch.completed + batch.failed == batch.total == count
        ),
        f"{len(set(ids))} of {count} lines in the files": set(ids) != {f"c{i}" for i in range(count)},
        f"{len(ids) - len(set(ids))} lines twice": len(ids) != len(set(ids)),
        f"{len(output)} lines of output, {batch.completed} counted": len(output) != batch.completed,
        "lines out of order": any(lines != sorted(lines, key=_number) for lines in (output, errors)),
    }
    return [text for text, broken in found.items() if broken]


def _number(line: dict[str, Any]) -> int:
    return int(line["custom_id"][1:])


ORDER = {"validating": 0, "in_progress": 1, "cancelling": 2, "finalizing": 2}


def went_back(statuses: Iterable[str]) -> bool:
    """True when a status followed one that comes after it."""
    ranks = [ORDER.get(status, 3) for status in statuses]
    return ranks != sorted(ranks)


async def _pieces(data: Iterable[bytes]) -> AsyncIterator[bytes]:
    for piece in data:
        yield piece


async def _serve(store_url: str, folder: str, engine_url: str, name: str) -> None:
    async with open_store(store_url) as store:
        await Process(Site(store, Blobs.open(folder), engine_url), name).serve()


@asynccontextmanager
async def site(opened: Callable[[], Any], folder: Path, engine_url: str) -> AsyncIterator[Site]:
    """``opened`` gives an async context of a store."""
    async with opened() as store:
        yield Site(store, Blobs.open(str(folder)), engine_url)


if __name__ == "__main__":  # a worker to be killed: store URL, blob folder, engine URL, name
    asyncio.run(_serve(*sys.argv[1:5]))
