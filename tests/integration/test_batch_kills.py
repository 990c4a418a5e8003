"""Kills at any instant: no line lost, none answered twice in the output, counts conserved, no status that goes back."""

import asyncio
import json
import signal
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest

from batchgw.records import Result
from batchgw.store import open_store
from batchgw.store.base import LeaseLost, Store, StoreUnavailable
from benchmarks.batch_engine import Engine, Fault, running
from benchmarks.batch_site import Process, Site, requests, site, wrong
from benchmarks.bench_batch_kills import Kills
from tests.batch_stores import postgres, store_url  # noqa: F401  (fixtures)
from tests.envoy_stream import until


@pytest.mark.parametrize("seed", [1, 2])
async def test_no_line_is_lost_whatever_is_killed(store_url: str, tmp_path: Path, seed: int) -> None:  # noqa: F811
    (tmp_path / "blobs").mkdir()
    async with (
        running(Engine(tokens=3, token_s=0.001)) as engine,
        site(lambda: open_store(store_url), tmp_path / "blobs", engine.url) as gateway,
    ):
        report = await Kills(gateway, engine, seed, kills=12).run(batches=7, lines=40)
    assert not report.broken
    assert sum(report.kills.values()) == 12
    assert report.completed + report.failed == report.lines == 280
    assert set(report.ends) <= {"completed", "cancelled", "expired"}


async def _spawn(store_url: str, blobs: Path, engine_url: str, name: str) -> asyncio.subprocess.Process:  # noqa: F811
    where = (store_url, str(blobs), engine_url, name)
    return await asyncio.create_subprocess_exec(sys.executable, "-m", "benchmarks.batch_site", *where)


async def test_a_process_killed_in_the_middle_is_followed_by_one_that_resumes(
    store_url: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    async with (
        running(Engine(tokens=3, token_s=0.005)) as engine,
        site(lambda: open_store(store_url), blobs, engine.url) as gateway,
    ):
        submitted, answers = await gateway.submit(requests(300)), iter(range(250))
        engine.trouble = lambda asked: Fault("hang") if next(answers, None) is None else None
        for at in (1, 100):
            process = await _spawn(store_url, blobs, engine.url, f"w{at}")
            try:
                async with asyncio.timeout(60.0):
                    while (await gateway.batch(submitted.id)).completed < at:
                        await asyncio.sleep(0.01)
            finally:
                process.send_signal(signal.SIGKILL)
                await process.wait()
        done = [json.loads(result.output)["id"] async for result in gateway.store.results(submitted.id)]
        sent, engine.trouble = dict(engine.calls), None
        async with gateway.worker("last"):
            batch = await gateway.ended(submitted.id)
        assert not await wrong(gateway, batch, 300)
    assert batch.status == "completed"
    assert 100 <= len(done) < 300
    assert [id for id in done if engine.calls[id] != sent[id]] == [], "what had a result was not sent again"


class _Wrapped:
    """A store with verbs of its own before the real ones."""

    def __init__(self, store: Store, **verbs: Any) -> None:
        self._store = store
        self.__dict__.update(verbs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


@pytest.fixture
async def gateway(tmp_path: Path) -> Any:
    (tmp_path / "blobs").mkdir()
    async with (
        running(Engine()) as engine,
        site(lambda: open_store(f"sqlite:///{tmp_path}/batch.db"), tmp_path / "blobs", engine.url) as made,
    ):
        made.engine = engine
        made.worker = partial(made.worker, lease_s=30.0, request_timeout_s=30.0)  # a loaded machine holds these
        yield made


async def test_finished_lines_wait_for_a_database_that_is_away(gateway: Site) -> None:
    away = True

    async def add_results(*given: Any) -> int:
        if away:
            raise StoreUnavailable("away")
        return await gateway.store.add_results(*given)

    engine: Engine = gateway.engine  # type: ignore[attr-defined]
    store: Any = _Wrapped(gateway.store, add_results=add_results)
    async with gateway.worker(store=store):
        submitted = await gateway.submit(requests(100))
        await until(lambda: len(engine.asked) == 100)
        assert (await gateway.batch(submitted.id)).completed == 0
        away = False
        batch = await gateway.ended(submitted.id)
    assert not await wrong(gateway, batch, 100)
    assert set(engine.calls.values()) == {1}, "nothing was sent again"


async def test_a_write_that_took_effect_unheard_counts_once(gateway: Site) -> None:
    rng = Random(3)

    async def add_results(*given: Any) -> int:
        added = await gateway.store.add_results(*given)
        if rng.random() < 0.5:
            raise StoreUnavailable("the answer got lost")
        return added

    store: Any = _Wrapped(gateway.store, add_results=add_results)
    async with gateway.worker(store=store):
        batch = await gateway.ended((await gateway.submit(requests(120))).id)
    assert not await wrong(gateway, batch, 120)
    assert batch.usage.output_tokens == 600


async def test_a_worker_whose_lease_was_taken_drops_its_lines_and_adds_none(gateway: Site) -> None:
    engine: Engine = gateway.engine  # type: ignore[attr-defined]
    engine.token_s = 0.4
    written: list[Result] = []

    async def heartbeat(*given: Any) -> None:
        raise StoreUnavailable("cut off")

    async def add_results(claim: Any, results: Any, now_s: float) -> int:
        try:
            return await gateway.store.add_results(claim, results, now_s)
        except LeaseLost:
            written.extend(results)
            raise

    claims = iter([gateway.store.claim_chunk])

    async def claim_chunk(*given: Any) -> Any:
        verb = next(claims, None)
        return None if verb is None else await verb(*given)

    verbs: dict[str, Any] = {"heartbeat": heartbeat, "add_results": add_results, "claim_chunk": claim_chunk}
    cut_off: Any = _Wrapped(gateway.store, **verbs)
    async with gateway.worker("cut-off", store=cut_off, per_model=50, lease_s=1.0) as process:
        submitted = await gateway.submit(requests(50))
        await until(lambda: process.worker.in_flight == 50)
        async with asyncio.timeout(30.0):
            while await gateway.store.claim_chunk(submitted.id, "m", "thief", time.time(), 0.2) is None:
                await asyncio.sleep(0.05)
        engine.token_s = 0.001
        await until(lambda: process.metrics.lost_leases._value.get() == 1)
        async with gateway.worker("other"):
            batch = await gateway.ended(submitted.id)
    assert not await wrong(gateway, batch, 50)
    assert Counter(result.line for result in written), "it tried, and was refused"


async def test_a_finalizer_killed_at_any_call_is_followed_by_one_that_writes_the_same(gateway: Site) -> None:
    """One worker after the other dies at its next call but ``lives`` to the store."""
    submitted = await gateway.submit(requests(60))
    for lives in range(1, 30):
        left = iter(range(lives))

        def dying(verb: Any, left: Any = left) -> Any:
            async def call(*given: Any, **named: Any) -> Any:
                if next(left, None) is None:
                    await asyncio.sleep(3600)
                return await verb(*given, **named)

            return call

        verbs = ("claim_ending", "finish_batch", "claim_chunk", "add_results", "file", "start_batch")
        store: Any = _Wrapped(gateway.store, **{name: dying(getattr(gateway.store, name)) for name in verbs})
        process = Process(gateway, f"w{lives}", store=store)
        await process.start()
        try:
            await gateway.ended(submitted.id, limit_s=0.3)
        except TimeoutError:
            continue
        finally:
            await process.kill()
        break
    async with gateway.worker("last"):  # for a machine on which none got that far
        batch = await gateway.ended(submitted.id)
    assert not await wrong(gateway, batch, 60)
