"""Seeded kills of workers, database calls and the engine, and whether any line was lost.

``python -m benchmarks.bench_batch_kills --json OUT``: 200 kills over 20 batches of 500 lines on SQLite, or the database
of ``--store``. A worker that is killed hands nothing in or back, and another one starts; a database kill fails a share
of all calls, before or after they took effect; an engine kill refuses, resets, cuts or hangs. Some batches are
cancelled or run out of their window meanwhile.
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
from benchmarks.batch_engine import Asked, Engine, Fault, running, sometimes
from benchmarks.batch_site import Process, Site, requests, site, went_back, wrong
from benchmarks.results import table, write_json

WORKERS = 3
KINDS = ("worker", "database", "engine")
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
    took_s: float
    after_last_kill_s: float
    broken: list[str]


class Kills:
    """One run. ``rng`` decides everything but the interleaving."""

    def __init__(self, gateway: Site, engine: Engine, seed: int, kills: int) -> None:
        self._gateway, self._engine, self._rng, self._kills = gateway, engine, Random(seed), kills
        self._seed = seed
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
        # Every seventh batch is cancelled on the way, and every seventh has a window it cannot meet.
        windows = [2.0 if i % 7 == 5 else 3600.0 for i in range(batches)]
        submitted = [
            await self._gateway.submit(requests(lines, model=["a", "b"]), window_s=s, tenant=f"t{i % 3}")
            for i, s in enumerate(windows)
        ]
        for _ in range(WORKERS):
            await self._start()
        watch = asyncio.create_task(self._watch([batch.id for batch in submitted]))
        kills = await self._kill_all([batch for i, batch in enumerate(submitted) if i % 7 == 3])
        last_kill_s = time.monotonic()
        try:
            async with asyncio.timeout(LIMIT_S):
                await watch
        finally:
            watch.cancel()
            for worker in self._workers:
                await self._end(worker)
        ended = [await self._gateway.batch(batch.id) for batch in submitted]
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
            took_s=time.monotonic() - began_s,
            after_last_kill_s=time.monotonic() - last_kill_s,
            broken=self._crashes + [text for batch in ended for text in await self._broken(batch, lines)],
        )

    async def _start(self) -> None:
        self._started += 1
        name, store = f"worker-{self._started}", cast(Store, self._store)
        worker = Process(self._gateway, name, store=store, seed=self._rng.randrange(1 << 30), request_timeout_s=0.3)
        await worker.start()
        self._workers.append(worker)

    async def _end(self, worker: Process) -> None:
        self._crashes += [repr(error) for error in worker.crashed()]
        await worker.kill()

    async def _kill_all(self, to_cancel: list[Batch]) -> Counter[str]:
        kinds: Counter[str] = Counter()
        for i in range(self._kills):
            await asyncio.sleep(self._rng.uniform(*PAUSE_S))
            kind = self._rng.choice(KINDS)
            kinds[kind] += 1
            await self._kill(kind)
            if to_cancel and i >= self._kills // 4:
                batch = to_cancel.pop()
                await self._gateway.store.cancel_batch(batch.tenant, batch.id, time.time())
        return kinds

    async def _kill(self, kind: str) -> None:
        if kind == "worker":
            await self._end(self._workers.pop(self._rng.randrange(len(self._workers))))
            await self._start()
            return
        share = self._rng.uniform(0.1, 1.0)
        if kind == "database":
            self._store.share = share
        else:
            self._engine_share = share
        await asyncio.sleep(self._rng.uniform(*TROUBLE_S))
        self._store.share = self._engine_share = 0.0

    async def _watch(self, ids: list[str]) -> None:
        """Notes each batch as users see it, until all have ended."""
        going = set(ids)
        while going:
            for id in list(going):
                batch = await self._gateway.batch(id)
                self._seen[id].append(batch)
                if batch.status in TERMINAL:
                    going.discard(id)
            await asyncio.sleep(LOOK_S)

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
    (folder / "blobs").mkdir(exist_ok=True)
    async with (
        running(Engine(tokens=4, token_s=0.001)) as engine,
        site(lambda: open_store(store_url or f"sqlite:///{folder}/batch.db"), folder / "blobs", engine.url) as gateway,
    ):
        return await Kills(gateway, engine, seed, kills).run(batches, lines)


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
    return counted | {
        "lines_count": float(report.lines),
        "completed_lines_count": float(report.completed),
        "failed_lines_count": float(report.failed),
        "calls_count": float(report.sent),
        "repeated_calls_count": float(report.sent_again),
        "failed_store_calls_count": float(report.failed_store_calls),
        "broken_count": float(len(report.broken)),
        "took_s": report.took_s,
        "after_last_kill_s": report.after_last_kill_s,
    }


if __name__ == "__main__":
    main()
