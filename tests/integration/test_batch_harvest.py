"""End to end: a scheduler, two engines behind it, and a batch worker that goes by its headroom."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from batchgw.store import open_store
from batchgw.worker.headroom_pacer import HeadroomPacer
from benchmarks.batch_engine import Engine
from benchmarks.batch_engine import running as serving
from benchmarks.batch_site import Process, Site, requests, site, wrong
from llmd_sched import headers
from llmd_sched.app import Scheduler, ServeSettings
from llmd_sched.headroom.producer import BatchHeadroom
from llmd_sched.stack import free_ports
from llmd_sched.types import End, Outcome, Request
from tests.builders import CONFIG_HEAD, HARVEST
from tests.envoy_stream import soon, until

CONFIG = HARVEST.replace("100000", "60000")
LINES, WORDS, WORD_S = 40, 60, 0.03


class Proxy:
    """Asks the scheduler's router as Envoy asks the scheduler, and passes bytes on."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.router = scheduler.router
        self.went: list[tuple[str, str]] = []
        """Of batch: where it was to go, and where it went."""

    async def answer(self, http: web.Request) -> web.StreamResponse:
        named = http.headers.get(headers.DESTINATION_SUBSET, "")
        batch = http.headers.get(headers.OBJECTIVE[0]) == "batch"
        asked = Request(
            id="r", input_tokens=50, priority=-batch, headers={headers.DESTINATION_SUBSET: named} if named else {}
        )
        decision = self.router.choose(asked, None, time.monotonic())
        if batch:
            self.went.append((named, decision.destination))
        chunks, end = 0, End.ABORTED
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        try:
            url = f"http://{decision.destination}{http.path}"
            async with aiohttp.ClientSession() as session, session.post(url, data=await http.read()) as reply:
                await response.prepare(http)
                async for chunk in reply.content.iter_any():
                    if not chunks:
                        self.router.first_token(decision.ticket, time.monotonic())
                    chunks += 1
                    await response.write(chunk)
            end = End.FINISHED
        finally:
            outcome = Outcome(end=end, status=200, output_tokens=chunks, streamed=True)
            self.router.finish(decision.ticket, outcome, time.monotonic())
        return response


@asynccontextmanager
async def proxying(proxy: Proxy) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post("/{path:.*}", proxy.answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.05, handler_cancellation=True)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


class World:
    def __init__(self, scheduler: Scheduler, engines: list[Engine], gateway: Site, proxy: Proxy) -> None:
        self.scheduler, self.engines, self.gateway, self.proxy = scheduler, engines, gateway, proxy
        self.admin = f"http://127.0.0.1:{scheduler.settings.metrics_port}"

    @property
    def board(self) -> BatchHeadroom:
        (found,) = [one for one in self.scheduler.router.producers if isinstance(one, BatchHeadroom)]
        return found

    @property
    def batch_running(self) -> int:
        return sum(load.batch.running for load in self.board.board.loads.values())

    async def users(self, count: int) -> None:
        """Interactive requests, one each 20 ms, that last as long as lines do."""
        body = json.dumps({"model": "m", "stream": True, "messages": [{"role": "user", "content": "hello"}]})

        async def one(session: aiohttp.ClientSession) -> None:
            async with session.post("/v1/chat/completions", data=body) as reply:
                assert reply.status == 200
                await reply.read()

        async with aiohttp.ClientSession(self.gateway.engine_url) as session, asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(one(session))
                await asyncio.sleep(0.02)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    engines = [Engine(tokens=WORDS, token_s=WORD_S) for _ in range(2)]
    (tmp_path / "blobs").mkdir()
    async with AsyncExitStack() as stack:
        for engine in engines:
            await stack.enter_async_context(serving(engine))
        listed = [
            {"name": f"pod-{i}", "address": "127.0.0.1", "port": int(engine.url.rpartition(":")[2])}
            for i, engine in enumerate(engines)
        ]
        (tmp_path / "endpoints.json").write_text(json.dumps({"endpoints": listed}))
        grpc_port, health_port, metrics_port = free_ports(3)
        scheduler = Scheduler(
            ServeSettings(
                host="127.0.0.1", grpc_port=grpc_port, health_port=health_port, metrics_port=metrics_port,
                config_text=CONFIG_HEAD + CONFIG, endpoints_file=str(tmp_path / "endpoints.json"), secure_serving=False,
                drain_timeout_s=0.0, scrape_interval_s=3600.0, metrics_stale_after_s=3600.0, seed=1,
            )
        )  # fmt: skip
        await scheduler.start()
        stack.push_async_callback(lambda: soon(scheduler.stop()))
        proxy = Proxy(scheduler)
        url = await stack.enter_async_context(proxying(proxy))
        store = f"sqlite:///{tmp_path}/batch.db"
        gateway = await stack.enter_async_context(site(lambda: open_store(store), tmp_path / "blobs", url))
        yield World(scheduler, engines, gateway, proxy)


@asynccontextmanager
async def working(world: World) -> AsyncIterator[tuple[Process, HeadroomPacer]]:
    pacer = HeadroomPacer(lambda model: world.admin)
    async with world.gateway.worker(pacer=pacer, request_timeout_s=10.0) as process:
        yield process, pacer


async def test_batch_fills_idle_engines_and_is_out_of_the_way_of_a_burst_and_resumed_after_it(world: World) -> None:
    async with working(world) as (process, pacer):
        batch = await world.gateway.submit(requests(LINES))
        await until(lambda: world.batch_running >= 0.8 * LINES)
        assert all(load.batch.running for load in world.board.board.loads.values())
        burst = asyncio.create_task(world.users(50))
        await until(lambda: world.board.news.mode == "burst")
        await until(lambda: world.batch_running <= sum(1.1 * one.n_star + 2 for one in world.board.news.endpoints))
        assert process.metrics.registry.get_sample_value("batchgw_aborted_lines_total", {"model": "m"}) >= LINES / 4
        assert not pacer.held
        await burst
        ended = await world.gateway.ended(batch.id)
    assert (ended.status, ended.completed, ended.failed) == ("completed", LINES, 0)
    assert not await wrong(world.gateway, ended, LINES)
    output = await world.gateway.lines(ended, ended.output_file_id)
    said = {line["response"]["body"]["choices"][0]["message"]["content"] for line in output}
    assert said == {"".join(f" w{i}" for i in range(WORDS))}, "no token is missing, none is there twice"
    assert ended.usage.output_tokens == LINES * WORDS
    named = [(asked, went) for asked, went in world.proxy.went if asked]
    assert len(named) == len(world.proxy.went)
    assert all(asked == went for asked, went in named)


async def test_while_the_scheduler_is_away_nothing_starts_and_no_line_is_lost(world: World) -> None:
    feed, producer = world.scheduler.headroom, world.scheduler.headroom.producer
    async with working(world) as (process, pacer):
        feed.producer = None  # its answer is 404 from now on
        batch = await world.gateway.submit(requests(8))
        await until(lambda: "status 404" in pacer.held.get(world.admin, ""))
        await until(lambda: process.worker.planner.rows() != [])
        await asyncio.sleep(0.1)
        assert world.proxy.went == []
        feed.producer = producer
        ended = await world.gateway.ended(batch.id)
    assert (ended.status, ended.completed) == ("completed", 8)
