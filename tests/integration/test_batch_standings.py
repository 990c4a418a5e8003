"""Metrics of a worker that runs: what is in flight where, who holds lines back, what was taken over from the dead."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web

from batchgw.client.requests import Call, Flight
from batchgw.pace import PoolHeadroom
from batchgw.store import open_store
from batchgw.worker.headroom_pacer import HeadroomPacer
from batchgw.worker.pacer import Standing
from benchmarks.batch_engine import Engine, Fault, running
from benchmarks.batch_site import Process, Site, requests, site
from tests.batch_metrics import NEWS
from tests.envoy_stream import until

PATIENCE_S = 20.0


def flight(line: int) -> Flight:
    call = Call(
        batch_id="b", line=line, custom_id="c", url="/v1/completions", model="m", body=b"{}", tenant="t",
        deadline_s=1e12, prompt_bytes=8,
    )  # fmt: skip
    return Flight(call)


@asynccontextmanager
async def scheduler(news: PoolHeadroom) -> AsyncIterator[str]:
    """Says one word on the headroom and then nothing."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"event: headroom\ndata: " + msgspec.json.encode(news) + b"\n\n")
        await asyncio.sleep(PATIENCE_S)
        return response

    app = web.Application()
    app.router.add_get("/v1/headroom", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def test_a_schedulers_word_has_an_age_and_gives_room_until_it_is_stale() -> None:
    now_s = 100.0
    async with asyncio.timeout(PATIENCE_S), scheduler(NEWS) as url:
        pacer = HeadroomPacer(lambda model: url, most=40, stale_after_s=2.0, clock=lambda: now_s)
        await pacer.open()
        assert pacer.standings() == []
        pacer.starts("m", [flight(1)])
        assert pacer.standings() == [Standing(url, "unheard", 0, 40, 0)]
        await until(lambda: bool(pacer.headrooms))
        one = flight(2)
        one.endpoint = "e1:8000"
        pacer.started(one)
        now_s = 101.0
        assert pacer.standings() == [Standing(url, "", 1, 40, 39, heard_s=1.0)], "64 lines, of which 40 at most, less 1"
        now_s = 103.0
        assert pacer.standings() == [Standing(url, "unheard", 1, 40, 0, heard_s=3.0)]
        await pacer.close()


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Site]:
    async with (
        running(Engine(trouble=lambda asked: Fault("hang") if asked.body["model"] == "stuck" else None)) as engine,
        site(lambda: open_store(f"sqlite:///{tmp_path / 'batch.db'}"), tmp_path / "blobs", engine.url) as made,
    ):
        yield made


def value(process: Process, name: str, **labels: str) -> float | None:
    return process.metrics.registry.get_sample_value(name, labels)


async def test_lines_on_their_way_are_counted_when_asked_for(gateway: Site) -> None:
    async with gateway.worker(per_model=4, request_timeout_s=PATIENCE_S) as process:
        await gateway.submit(requests(10, model="stuck"))
        await until(lambda: value(process, "processor_inflight_requests") == 4)
        expected: list[tuple[str, dict[str, Any], float]] = [
            ("model_inflight_requests", {"model": "stuck"}, 4),
            ("batchgw_endpoint_inflight_lines", {"endpoint": "any"}, 4),
            ("batchgw_pace_inflight_lines", {"source": "stuck"}, 4),
            ("processor_max_inflight_concurrency", {}, 4),
            ("active_workers", {}, 1),
        ]
        assert [value(process, name, **labels) for name, labels, _ in expected] == [one for _, _, one in expected]
        process.worker.stop()


async def test_a_chunk_whose_worker_died_counts_as_taken_over(gateway: Site) -> None:
    batch = await gateway.submit(requests(8, model="m"))
    async with gateway.worker(name="planner", per_model=1) as first:
        await until(lambda: value(first, "jobs_processed_total", result="success", reason="none") == 1)
    assert value(first, "batch_startup_recovery_total", status="in_progress", action="resumed") == 0
    assert (await gateway.batch(batch.id)).status == "completed"

    stuck = await gateway.submit(requests(8, model="stuck"))
    dead = Process(gateway, "dead", request_timeout_s=PATIENCE_S)
    await dead.start()
    await until(lambda: value(dead, "active_workers") == 1)
    await dead.kill()
    async with gateway.worker(name="heir", request_timeout_s=PATIENCE_S) as heir:
        await until(lambda: value(heir, "batch_reconciler_orphans_recovered_total", action="resumed") == 1)
        await gateway.store.cancel_batch("t", stuck.id, stuck.created_s)
        await gateway.ended(stuck.id)
