"""The headroom on the wire: the scheduler's admin port, who listens to it, and a worker that goes by it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import aiohttp
import msgspec
import pytest

from batchgw.client.requests import Call, Flight
from batchgw.pace import PoolHeadroom
from batchgw.worker.headroom_pacer import HeadroomPacer
from llmd_sched.admin.server import AdminServer
from llmd_sched.app import headroom
from llmd_sched.app.headroom import PATH
from llmd_sched.headroom.producer import BatchHeadroom
from llmd_sched.router import Router
from tests.builders import HARVEST, asking, endpoints, pool_of, prompt, router_of
from tests.envoy_stream import until

PATIENCE_S = 20.0
USER = asking(prompt(4))
MODEL = "m"


class Serving:
    """A router over two endpoints, its feed, and an admin port that can be stopped and started again."""

    def __init__(self, config: str = HARVEST) -> None:
        self.router: Router = router_of(config, pool_of(endpoints(2)))
        self.router.pool.stale_after_s = 1e9
        self.port = 0
        self.leads: Callable[[], bool] = lambda: True

    async def start(self) -> None:
        self.feed = headroom.headroom_feed(self.router, lambda: self.leads())
        self.admin = AdminServer(lambda: b"", routes={PATH: self.feed.answer}, patient=(PATH,))
        self.port = await self.admin.start("127.0.0.1", self.port)
        self.feed.start()

    async def stop(self) -> None:
        await self.feed.stop()
        await self.admin.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def burst(self) -> None:
        """Interactive requests of a quarter of a second, at once as far as the wire is concerned."""
        now_s = time.monotonic() + 0.01
        for i in range(60):
            self.router.choose(USER, None, now_s + i / 240)
        assert self.board.news.mode == "burst"

    @property
    def board(self) -> BatchHeadroom:
        assert self.feed.producer is not None
        return self.feed.producer


@asynccontextmanager
async def serving(config: str = HARVEST) -> AsyncIterator[Serving]:
    async with asyncio.timeout(PATIENCE_S):
        made = Serving(config)
        await made.start()
        try:
            yield made
        finally:
            await made.stop()


@pytest.fixture
async def live() -> AsyncIterator[Serving]:
    async with serving() as made:
        yield made


@pytest.fixture
async def http(live: Serving) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(live.url) as session:
        yield session


def waiting(count: int, prompt_bytes: int = 400) -> list[Flight]:
    usual: dict[str, Any] = {"url": "/v1/chat/completions", "model": MODEL, "body": b"{}", "tenant": "t"}
    return [
        Flight(Call(batch_id="b", line=i, custom_id=f"c{i}", deadline_s=1e12, prompt_bytes=prompt_bytes, **usual))
        for i in range(count)
    ]


@asynccontextmanager
async def pacing(url: str, **options: Any) -> AsyncIterator[HeadroomPacer]:
    made = HeadroomPacer(lambda model: url, rng=Random(1), **options)
    await made.open()
    try:
        made.starts(MODEL, [])  # the first question makes it listen
        yield made
    finally:
        await made.close()


def start(pacer: HeadroomPacer, flights: list[Flight]) -> list[Flight]:
    """As the worker does; returns those started, whose first token has come."""
    started = []
    for one in pacer.starts(MODEL, flights):
        flight = flights[one.position]
        flight.endpoint, flight.sent_s = one.endpoint, 1.0
        pacer.started(flight)
        pacer.tokens(flight, 1)
        started.append(flight)
    for flight in started:
        flights.remove(flight)
    return started


async def fill(pacer: HeadroomPacer, flights: list[Flight], count: int) -> list[Flight]:
    started: list[Flight] = []

    def enough() -> bool:
        started.extend(start(pacer, flights))
        return len(started) >= count

    await until(enough)
    return started


# ------------------------------------------------------------------------------------------------------------ asking


async def test_the_headroom_of_each_endpoint_is_json(live: Serving, http: aiohttp.ClientSession) -> None:
    async with http.get(PATH) as reply:
        assert (reply.status, reply.content_type) == (200, "application/json")
        news = msgspec.json.decode(await reply.read(), type=PoolHeadroom)
    assert [one.endpoint for one in news.endpoints] == ["10.0.0.1:8000", "10.0.0.2:8000"]
    assert all(one.n_star > 10 for one in news.endpoints)


async def test_who_waits_is_answered_when_a_burst_begins_and_not_before(
    live: Serving, http: aiohttp.ClientSession
) -> None:
    await until(lambda: live.board.news.version > 2)
    async with http.get(PATH) as reply:
        version = (await reply.json())["version"]
    asked = asyncio.create_task(http.get(PATH, params={"wait_s": 20, "version": version}))
    await until(lambda: live.feed.listeners == 1)
    await until(lambda: live.board.news.version > version + 2)
    assert not asked.done()
    live.burst()
    async with await asked as reply:
        assert (await reply.json())["mode"] == "burst"


async def test_who_waits_in_vain_is_answered_all_the_same(live: Serving, http: aiohttp.ClientSession) -> None:
    async with http.get(PATH, params={"wait_s": 0.05}) as reply:
        assert (await reply.json())["mode"] == "idle"
    assert live.feed.listeners == 0


async def test_a_version_of_a_process_that_is_gone_waits_for_nothing(http: aiohttp.ClientSession) -> None:
    async with http.get(PATH, params={"wait_s": 20, "version": 10**9}) as reply:
        assert reply.status == 200


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("since=3", "'since' is none of version, wait_s, worker"),
        ("version=-1", "version='-1' is not a whole number"),
        ("wait_s=soon", "wait_s='soon' is not a number from 0 to 60"),
        ("wait_s=61", "wait_s='61' is not a number from 0 to 60"),
        ("wait_s=nan", "wait_s='nan' is not a number from 0 to 60"),
        (f"worker={'x' * 129}", "worker must be at most 128 printable ASCII characters"),
    ],
)
async def test_a_question_that_cannot_be_meant_is_told_what_is_accepted(
    http: aiohttp.ClientSession, query: str, said: str
) -> None:
    async with http.get(f"{PATH}?{query}") as reply:
        assert (reply.status, (await reply.text()).strip()) == (400, said)


async def test_without_a_board_the_answer_says_which_plugin_makes_one() -> None:
    async with serving("plugins: [{type: random-picker}]") as live, aiohttp.ClientSession(live.url) as http:
        for accept in ("application/json", "text/event-stream"):
            async with http.get(PATH, headers={"Accept": accept}) as reply:
                assert reply.status == 404
                assert "add {type: batch-headroom-producer} to plugins" in await reply.text()


async def test_a_replica_that_does_not_lead_says_nothing_and_who_listens_to_it_is_let_go() -> None:
    live, leads = Serving(), [True]
    live.leads = lambda: leads[0]
    await live.start()
    try:
        async with pacing(live.url, stale_after_s=0.3) as pacer:
            await until(lambda: not pacer.held)
            leads[0] = False
            await until(lambda: "status 503" in pacer.held.get(live.url, ""))
            assert "does not lead" in pacer.held[live.url]
            assert live.feed.listeners == 0
    finally:
        await live.stop()


async def test_more_listeners_than_there_may_be_are_told_to_come_back(
    live: Serving, http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(headroom, "MAX_LISTENERS", 1)
    events = {"Accept": "text/event-stream"}
    async with http.get(PATH, headers=events) as first:
        assert first.status == 200
        async with http.get(PATH, headers=events) as second:
            assert (second.status, second.headers["Retry-After"]) == (503, "5")
        async with http.get(PATH) as question:
            assert question.status == 200
    await until(lambda: live.feed.listeners == 0)


async def test_a_listener_that_takes_nothing_is_let_go(live: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headroom, "WRITE_S", 0.2)
    monkeypatch.setattr(live.feed, "_words", lambda producer: (b"", b"x" * (16 << 20)))
    _, writer = await asyncio.open_connection("127.0.0.1", live.port, limit=1024)
    try:
        writer.write(f"GET {PATH} HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n\r\n".encode())
        await until(lambda: live.feed.listeners == 1)
        await until(lambda: live.feed.listeners == 0)
    finally:
        writer.close()


async def test_a_look_that_fails_is_told_and_the_next_one_is_made(
    live: Serving, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(live.board, "look", lambda candidates, now_s: 1 / 0)
        await until(lambda: "the headroom of batch could not be told" in caplog.text)
    version = live.board.news.version
    await until(lambda: live.board.news.version > version)


# ------------------------------------------------------------------------------------------------------------ listening


async def test_a_pacer_starts_nothing_before_it_has_heard_and_fills_each_endpoint_then(live: Serving) -> None:
    async with pacing(live.url) as pacer:
        assert pacer.starts(MODEL, waiting(5)) == () or not pacer.starts(MODEL, waiting(5))
        assert "no word on the headroom" in pacer.held[live.url]
        lines = waiting(200)
        started = await fill(pacer, lines, 60)
        await until(lambda: not pacer.held)
        n_star = {one.endpoint: one.n_star for one in live.board.news.endpoints}
        for endpoint, most in n_star.items():
            assert 0 < sum(flight.endpoint == endpoint for flight in started) <= most


async def test_an_onset_reaches_the_pacer_and_it_aborts_the_least_computed_lines(live: Serving) -> None:
    async with pacing(live.url) as pacer:
        started = await fill(pacer, waiting(100), 60)
        far = {flight.endpoint: flight for flight in started}.values()
        for flight in far:
            pacer.tokens(flight, 1000)
        live.burst()
        aborted: set[str] = set()
        await until(lambda: bool(aborted.update(pacer.aborts(MODEL)) or aborted))
        assert len(aborted) >= 40
        assert not aborted & {flight.key for flight in far}
        assert not pacer.aborts(MODEL), "each is named once"
        for flight in started:
            if flight.key in aborted:
                pacer.ended(flight, aborted=True)
        assert not pacer.starts(MODEL, [flight for flight in started if flight.key in aborted])


async def test_lines_that_are_not_streamed_hold_back_others_for_a_while_only(live: Serving) -> None:
    now_s = [0.0]
    async with pacing(live.url, clock=lambda: now_s[0]) as pacer:
        lines = waiting(20, prompt_bytes=4 * 7000)
        await until(lambda: bool(pacer.headrooms))
        first = []
        for one in pacer.starts(MODEL, lines):
            first.append(lines[one.position])
            first[-1].endpoint = one.endpoint
            pacer.started(first[-1])
        assert 0 < len(first) < 5
        left = [flight for flight in lines if flight not in first]
        assert not pacer.starts(MODEL, left)
        now_s[0] += 1.5
        assert not pacer.starts(MODEL, left)
        now_s[0] += 1.0
        version = pacer.headrooms[live.url].version
        await until(lambda: pacer.headrooms[live.url].version > version)  # said at the new time
        assert pacer.starts(MODEL, left)


async def test_while_the_scheduler_is_gone_nothing_starts_and_when_it_is_back_lines_do(live: Serving) -> None:
    async with pacing(live.url, stale_after_s=0.3) as pacer:
        await until(lambda: not pacer.held)
        await live.stop()
        await until(lambda: live.url in pacer.held)
        assert "nothing starts" in pacer.held[live.url]
        assert not pacer.starts(MODEL, waiting(5))
        await live.start()
        await fill(pacer, waiting(50), 10)
        assert not pacer.held


async def test_a_scheduler_without_a_board_is_named_with_its_own_words() -> None:
    async with serving("plugins: [{type: random-picker}]") as live, pacing(live.url) as pacer:
        await until(lambda: "status 404" in pacer.held[live.url])
        assert "batch-headroom-producer" in pacer.held[live.url]


async def test_lines_of_a_model_nobody_serves_start_for_the_sender_to_refuse_them() -> None:
    pacer = HeadroomPacer(lambda model: None)
    await pacer.open()
    lines = waiting(3)
    assert len(start(pacer, list(lines))) == 3
    for flight in lines:
        pacer.ended(flight, aborted=False)
    assert (pacer.aborts(MODEL), pacer.held) == ((), {})
    await pacer.close()


async def test_workers_share_the_headroom_and_who_is_alone_again_has_it_all(live: Serving) -> None:
    await until(lambda: bool(live.board.news.endpoints))
    n_star = sum(one.n_star for one in live.board.news.endpoints)
    async with pacing(live.url, worker="one") as first:
        mine = waiting(200)
        async with pacing(live.url, worker="two") as second:
            await until(lambda: live.feed.listeners == 2)
            await until(lambda: {len(one.headrooms) for one in (first, second)} == {1})
            version = live.board.news.version
            await until(lambda: all(one.headrooms[live.url].version > version + 1 for one in (first, second)))
            theirs = waiting(200)
            await until(lambda: not start(first, mine) and not start(second, theirs) and len(mine) < 200)
            assert len(mine) == len(theirs) == 200 - n_star // 2
        await until(lambda: not start(first, mine) and len(mine) == 200 - n_star)


async def test_lines_of_two_models_of_one_pool_share_its_headroom_and_each_is_aborted_by_its_own_name(
    live: Serving,
) -> None:
    async with pacing(live.url) as pacer:
        lines = waiting(60)
        for flight in lines[30:]:
            flight.call = msgspec.structs.replace(flight.call, model="other")
        await fill(pacer, lines[:30], 30)
        other = lines[30:]
        await until(lambda: bool(start(pacer, other) or len(other) < 20))
        live.burst()
        aborted: dict[str, set[str]] = {MODEL: set(), "other": set()}

        def some() -> bool:
            for model, keys in aborted.items():
                keys |= set(pacer.aborts(model))
            return all(aborted.values())

        await until(some)
        assert all(int(key.split("/")[1]) < 30 for key in aborted[MODEL])
        assert all(int(key.split("/")[1]) >= 30 for key in aborted["other"])
