"""Seeded kills of workers, API servers, database calls and the engine, and whether any line was lost.

``python -m benchmarks.bench_batch_kills --json OUT``: 200 kills over 20 batches of 500 lines on SQLite, or the database
of ``--store``. A worker that is killed hands nothing in or back, and another one starts; a database kill fails a share
of all calls, before or after they took effect; an engine kill refuses, resets, cuts or hangs. API servers are processes
that the kernel kills, while clients upload, create with an idempotency key, list and cancel, and ask again. Some
batches are cancelled or run out of their window meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random
from typing import Any, cast

import msgspec

from batchgw.records import TERMINAL, Batch, Result
from batchgw.store import open_store
from batchgw.store.base import Store, StoreUnavailable
from batchgw.worker.sweep import sweep
from benchmarks.batch_clients import Client, Servers, clients, half_written, made_twice, orphans
from benchmarks.batch_engine import Asked, Engine, Fault, running, sometimes
from benchmarks.batch_site import Process, Site, requests, site, went_back, wrong
from benchmarks.results import table, write_json

WORKERS = 3
IDLERS = 2
"""Clients that keep the API busy."""
TENANTS = ["t0", "t1", "t2"]
KINDS = ("worker", "database", "engine", "api")
PAUSE_S = (0.02, 0.15)
TROUBLE_S = (0.05, 0.25)
LOOK_S = 0.03
LIMIT_S = 300.0


class Flaky:
    """A store of which a share of the calls fails: half of those have taken effect."""

    def __init__(self, store: Store, rng: Random) -> None:
        self._store, self._rng = store, rng
        self.share, self.failed = 0.0, 0

    def __getattr__(self, name: str) -> Any:
        verb = getattr(self._store, name)

        async def call(*given: Any, **named: Any) -> Any:
            self._fail()
            answer = await verb(*given, **named)
            self._fail()
            return answer

        return call

    async def results(self, batch_id: str) -> AsyncIterator[Result]:
        async for result in self._store.results(batch_id):
            if self._rng.random() < 0.01:
                self._fail()
            yield result

    def _fail(self) -> None:
        if self._rng.random() < self.share / 2:
            self.failed += 1
            raise StoreUnavailable("killed by the benchmark")


class Report(msgspec.Struct, kw_only=True):
    seed: int
    kills: dict[str, int]
    batches: int
    lines: int
    ends: dict[str, int]
    completed: int
    failed: int
    sent: int
    sent_again: int
    """Calls beyond one a line: what a kill costs the engine."""
    failed_store_calls: int
    answers: dict[str, int]
    """Of the API: answered, 5xx, broken_off."""
    took_s: float
    after_last_kill_s: float
    orphans: int
    """Blobs that killed API servers left without a row; the sweep removes them."""
    broken: list[str]


class Kills:
    """One run. ``rng`` decides everything but the interleaving. Without ``api`` batches are put into the store, and
    three kinds of kills are left. ``folder``: of the blobs."""

    def __init__(
        self,
        gateway: Site,
        engine: Engine,
        seed: int,
        kills: int,
        api: tuple[Servers, Client] | None = None,
        folder: Path = Path(),
    ) -> None:
        self._gateway, self._engine, self._rng, self._kills = gateway, engine, Random(seed), kills
        self._seed, self._api = seed, api
        self._folder = folder
        self._kinds = KINDS if api else KINDS[:-1]
        self._going: set[str] = set()
        self._to_cancel: list[Batch] = []
        self._store = Flaky(gateway.store, self._rng)
        self._workers: list[Process] = []
        self._started = 0
        self._crashes: list[str] = []
        """Workers that ended by themselves."""
        self._seen: dict[str, list[Batch]] = defaultdict(list)
        engine.trouble = self._trouble
        self._engine_share = 0.0
        self._faults = sometimes(1.0, self._rng)

    def _trouble(self, asked: Asked) -> Fault | None:
        return self._faults(asked) if self._rng.random() < self._engine_share else None

    async def run(self, batches: int, lines: int) -> Report:
        began_s = time.monotonic()
        submitting = asyncio.gather(*(self._submit(i, lines) for i in range(batches)))
        if self._api is None:
            await submitting  # all at once, and then the kills
        idlers = [asyncio.create_task(self._api[1].idle_about(t)) for t in TENANTS[:IDLERS]] if self._api else []
        for _ in range(WORKERS):
            await self._start()
        watch = asyncio.create_task(self._watch(submitting))
        kills = await self._kill_all()
        last_kill_s = time.monotonic()
        try:
            async with asyncio.timeout(LIMIT_S):
                await watch
        finally:
            submitting.cancel()
            for task in (watch, *idlers):
                task.cancel()
            await asyncio.gather(*idlers, return_exceptions=True)
            for worker in self._workers:
                await self._end(worker)
        ended = [await self._gateway.batch(id) for id in await submitting]
        left, broken_api = await self._broken_api()
        return Report(
            seed=self._seed,
            kills=dict(kills),
            batches=batches,
            lines=lines * batches,
            ends=dict(Counter(batch.status for batch in ended)),
            completed=sum(batch.completed for batch in ended),
            failed=sum(batch.failed for batch in ended),
            sent=sum(self._engine.calls.values()),
            sent_again=sum(count - 1 for count in self._engine.calls.values()),
            failed_store_calls=self._store.failed,
            answers=dict(self._api[1].answers) if self._api else {},
            took_s=time.monotonic() - began_s,
            after_last_kill_s=time.monotonic() - last_kill_s,
            orphans=left,
            broken=self._crashes + [text for batch in ended for text in await self._broken(batch, lines)]
            + broken_api,
        )  # fmt: skip

    async def _submit(self, number: int, lines: int) -> str:
        """Every seventh batch is cancelled on the way, and every seventh has a window it cannot meet."""
        data, tenant = requests(lines, model=["a", "b"]), TENANTS[number % len(TENANTS)]
        window_s = 2.0 if number % 7 == 5 else 3600.0
        if self._api is None:
            batch = await self._gateway.submit(data, window_s=window_s, tenant=tenant)
        else:
            await asyncio.sleep(self._rng.uniform(0.0, self._kills * PAUSE_S[1] / 2))
            batch = await self._gateway.batch(await self._api[1].submit(data, window_s, tenant, f"key-{number}"))
        self._going.add(batch.id)
        if number % 7 == 3:
            self._to_cancel.append(batch)
        return batch.id

    async def _start(self) -> None:
        self._started += 1
        name, store = f"worker-{self._started}", cast(Store, self._store)
        worker = Process(self._gateway, name, store=store, seed=self._rng.randrange(1 << 30), request_timeout_s=0.3)
        await worker.start()
        self._workers.append(worker)

    async def _end(self, worker: Process) -> None:
        self._crashes += [repr(error) for error in worker.crashed()]
        await worker.kill()

    async def _kill_all(self) -> Counter[str]:
        kinds: Counter[str] = Counter()
        for i in range(self._kills):
            await asyncio.sleep(self._rng.uniform(*PAUSE_S))
            kind = self._rng.choice(self._kinds)
            kinds[kind] += 1
            await self._kill(kind)
            if self._to_cancel and i >= self._kills // 4:
                await self._cancel(self._to_cancel.pop())
        return kinds

    async def _cancel(self, batch: Batch) -> None:
        if self._api is None:
            await self._gateway.store.cancel_batch(batch.tenant, batch.id, time.time())
        else:
            await self._api[1].cancel(batch.id, batch.tenant)

    async def _kill(self, kind: str) -> None:
        if kind == "worker":
            await self._end(self._workers.pop(self._rng.randrange(len(self._workers))))
            await self._start()
            return
        if kind == "api" and self._api:
            await self._api[0].kill(self._rng)
            return
        share = self._rng.uniform(0.1, 1.0)
        if kind == "database":
            self._store.share = share
        else:
            self._engine_share = share
        await asyncio.sleep(self._rng.uniform(*TROUBLE_S))
        self._store.share = self._engine_share = 0.0

    async def _watch(self, submitting: asyncio.Future[list[str]]) -> None:
        """Notes each batch as users see it, until all are submitted and have ended."""
        while self._going or not submitting.done():
            for id in list(self._going):
                batch = await self._gateway.batch(id)
                self._seen[id].append(batch)
                if batch.status in TERMINAL:
                    self._going.discard(id)
            await asyncio.sleep(LOOK_S)

    async def _broken_api(self) -> tuple[int, list[str]]:
        """How many blobs are nobody's once all servers are dead, and what is broken: a sweep must leave none."""
        if self._api is None:
            return 0, []
        servers, client = self._api
        await servers.stop()
        twice = await made_twice(self._gateway, TENANTS, client.keys)
        halves = await half_written(self._gateway, TENANTS)
        left = await orphans(self._gateway, TENANTS, self._folder)
        await sweep(self._gateway.store, self._gateway.blobs, time.time() + 1.0)
        swept = [f"{path.name} is left" for path in await orphans(self._gateway, TENANTS, self._folder)]
        lost = await half_written(self._gateway, TENANTS)
        return len(left), client.broken + twice + halves + swept + lost

    async def _broken(self, batch: Batch, lines: int) -> list[str]:
        seen = self._seen[batch.id]
        found = await wrong(self._gateway, batch, lines)
        if went_back([one.status for one in seen]):
            found.append(f"status went back: {[one.status for one in seen]}")
        counted = [one.completed for one in seen]
        if counted != sorted(counted):
            found.append("completed lines became fewer")
        return [f"{batch.id}: {text}" for text in found]


async def bench(store_url: str, folder: Path, seed: int, kills: int, batches: int, lines: int) -> Report:
    blobs = folder / "blobs"
    blobs.mkdir(exist_ok=True)
    store_url = store_url or f"sqlite:///{folder}/batch.db"
    async with (
        running(Engine(tokens=4, token_s=0.001)) as engine,
        site(lambda: open_store(store_url), blobs, engine.url) as gateway,
        clients(store_url, blobs, Random(seed)) as api,
    ):
        return await Kills(gateway, engine, seed, kills, api, blobs).run(batches, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--store", default="", help="URL of an empty database; SQLite in a temporary folder by default")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--lines", type=int, default=500)
    args = parser.parse_args()
    logging.basicConfig(level=logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        report = asyncio.run(bench(args.store, Path(folder), args.seed, args.kills, args.batches, args.lines))
    figures = flat(report)
    table(figures)
    for text in report.broken:
        print(f"broken: {text}", file=sys.stderr)
    if args.json:
        store = args.store.partition(":")[0] or "sqlite"
        write_json(args.json, {"store": store, "kills": args.kills}, args.seed, figures)


def flat(report: Report) -> dict[str, float]:
    counted = {f"{kind}_kills_count": float(count) for kind, count in sorted(report.kills.items())}
    counted |= {f"{status}_batches_count": float(count) for status, count in sorted(report.ends.items())}
    counted |= {f"api_{what}_count": float(count) for what, count in sorted(report.answers.items())}
    return counted | {
        "lines_count": float(report.lines),
        "completed_lines_count": float(report.completed),
        "failed_lines_count": float(report.failed),
        "calls_count": float(report.sent),
        "repeated_calls_count": float(report.sent_again),
        "failed_store_calls_count": float(report.failed_store_calls),
        "broken_count": float(len(report.broken)),
        "orphaned_blobs_count": float(report.orphans),
        "took_s": report.took_s,
        "after_last_kill_s": report.after_last_kill_s,
    }


if __name__ == "__main__":
    main()
