"""How long a claim takes when a million lines wait, with several claimers at once."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import defaultdict
from multiprocessing.connection import Connection

import numpy as np
import psutil

from batchgw.planner import Planner
from batchgw.records import Batch, Chunk, Claim, Result, Usage
from batchgw.store import Store, open_store
from batchgw.worker.leases import LEASE_S
from batchgw.worker.upkeep import CHUNK_LINES
from batchgw.worker.worker import WorkerSettings
from benchmarks.batch_processes import Child, run
from benchmarks.batch_site import CHAT

MODELS = 4
TENANTS = 10
DAY_S = 86400.0
OUTPUT = b'{"id": "batch_req_x", "custom_id": "c", "response": {"body": "%s"}, "error": null}\n' % (b"word " * 80)
WARM_UP = 10
"""Claims of each claimer that are not measured."""
LIMIT_S = 600.0

Times = dict[str, list[float]]


async def fill(store: Store, batches: int, lines: int) -> None:
    """Batches in progress, of several models and tenants; each one transaction, as the planner of batches does it."""
    now_s = time.time()
    for i in range(batches):
        batch = Batch(
            id=f"batch_{uuid.uuid4().hex}", tenant=f"t{i % TENANTS}", endpoint=CHAT, input_file_id=f"file-{i}",
            completion_window="24h", created_s=now_s, deadline_s=now_s + DAY_S + i,
        )  # fmt: skip
        await store.add_batch(batch)
        claim = await store.claim_validating("filler", time.time(), LEASE_S)
        assert claim is not None
        starts = range(0, lines, CHUNK_LINES)
        chunks = [
            Chunk(batch_id=claim.batch.id, number=n, model=f"m{n * MODELS // len(starts)}", start=start,
                  stop=min(lines, start + CHUNK_LINES), prefix=n)
            for n, start in enumerate(starts)
        ]  # fmt: skip
        await store.start_batch(claim, chunks, lines, None, time.time())


class Claimer:
    """Does as a worker does: looks at what waits, chooses, claims, writes the results of what it claimed.

    ``late`` is how long the machine lets it wait when its sleep is over: no other time can be better than that.
    """

    def __init__(self, store: Store, name: str, first: int) -> None:
        self._store, self._name, self._first = store, name, first
        self._planner, self._looked_s = Planner(), 0.0
        self.times_s: Times = defaultdict(list)

    async def run(self, claims: int, rate_per_s: float) -> None:
        """At most ``rate_per_s`` claims a second."""
        began_s = time.monotonic()
        for i in range(claims):
            due_s = began_s + i / rate_per_s
            if due_s > time.monotonic():
                await asyncio.sleep(due_s - time.monotonic())
                self.times_s["late"].append(time.monotonic() - due_s)
            await self._look()
            claim = await self._claim(f"m{(self._first + i) % MODELS}")
            if claim is not None:
                await self._write(claim)

    async def _look(self) -> None:
        now_s = time.time()
        if now_s - self._looked_s < WorkerSettings().poll_s:
            return
        began_s, self._looked_s = time.perf_counter(), now_s
        waiting = await self._store.waiting(now_s)
        self.times_s["waiting"].append(time.perf_counter() - began_s)
        self._planner.see(waiting, now_s)

    async def _claim(self, model: str) -> Claim | None:
        began_s = time.perf_counter()
        row = self._planner.choose(model, (), time.time())
        assert row is not None, "all is claimed: fewer claims, or more lines"
        chose_s = time.perf_counter()
        claim = await self._store.claim_chunk(row.batch_id, model, self._name, time.time(), LEASE_S)
        self.times_s["choose"].append(chose_s - began_s)
        self.times_s["claim"].append(time.perf_counter() - chose_s)
        self._planner.claimed(row, claim.chunk.stop - claim.chunk.start if claim else 0, time.time())
        return claim

    async def _write(self, claim: Claim) -> None:
        results = [
            Result(line, True, OUTPUT, Usage(100, 0, 80, 0)) for line in range(claim.chunk.start, claim.chunk.stop)
        ]
        began_s = time.perf_counter()
        await self._store.add_results(claim, results, time.time())
        self.times_s["write"].append(time.perf_counter() - began_s)


def serve_claimers(store_url: str, first: int, count: int, claims: int, rate_per_s: float, told: Connection) -> None:
    """Tells that it is warm, then the times and by how many bytes it grew over the second half."""
    run(_claimers(store_url, first, count, claims, rate_per_s, told))


async def _claimers(store_url: str, first: int, count: int, claims: int, rate_per_s: float, told: Connection) -> None:
    async with open_store(store_url) as store:
        claimers = [Claimer(store, f"w{first + i}", first + i) for i in range(count)]
        for claimer in claimers:
            await claimer.run(WARM_UP, rate_per_s)
            claimer.times_s.clear()
        told.send("warm")
        memory = []
        for part in (claims // 2, claims - claims // 2):
            await asyncio.gather(*(claimer.run(part, rate_per_s) for claimer in claimers))
            memory.append(psutil.Process().memory_info().rss)
        told.send(([dict(claimer.times_s) for claimer in claimers], memory[1] - memory[0]))


async def queue(
    store_url: str, batches: int, lines: int, claimers: int, claims: int, rate_per_s: float
) -> dict[str, float]:
    """Times in ms. On PostgreSQL each claimer is a process, as with many replicas; on SQLite they share one."""
    async with open_store(store_url) as store:
        began_s = time.perf_counter()
        await fill(store, batches, lines)
        filled_s = time.perf_counter() - began_s
    shared = store_url.startswith("sqlite")
    groups = [(0, claimers)] if shared else [(i, 1) for i in range(claimers)]
    children = [Child(serve_claimers, store_url, *group, claims // claimers, rate_per_s) for group in groups]
    try:
        await asyncio.gather(*(child.start() for child in children))
        began_s = time.perf_counter()
        told = [await child.told(LIMIT_S) for child in children]
        took_s = time.perf_counter() - began_s
    finally:
        for child in children:
            await child.kill()
    figures = {
        "lines": float(batches * lines),
        "batches": float(batches),
        "claimers": float(claimers),
        "fill_s": filled_s,
    }
    for name in ("claim", "choose", "waiting", "write", "late"):
        times_ms = 1e3 * np.array([time_s for times, _ in told for one in times for time_s in one.get(name, ())])
        if len(times_ms):
            figures |= {f"{name}_p{p}_ms": float(np.percentile(times_ms, p)) for p in (50, 99)}
    figures["claims_per_s"] = claims / took_s
    figures["memory_growth_mb"] = max(growth for _, growth in told) / 1e6
    return figures
