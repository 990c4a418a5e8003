"""Gates: their arithmetic, and what they do without data. Servers are on loopback, Redis is a fake one."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import fakeredis
import pytest
from aiohttp import web

from batchgw.client.requests import Call, Flight
from batchgw.errors import ConfigError
from batchgw.gates import GATES, gate, parse
from batchgw.gates.aimd import Aimd, Window
from batchgw.gates.base import Gate, Open, Polled, Tools
from batchgw.gates.prometheus import POD_QUEUE, QUEUED, READY_PODS, RUNNING, SATURATION
from batchgw.gates.redis import RedisQuota, _Quota
from batchgw.worker.pacer import GatePacer

Answers = Callable[[str], float | str | None]


@asynccontextmanager
async def prometheus(answer: Answers) -> AsyncIterator[str]:
    """A server that answers each query with a number, no data (None) or nonsense (a string)."""

    async def query(request: web.Request) -> web.Response:
        value = answer(request.query["query"])
        if isinstance(value, str):
            return web.Response(text=value, status=500 if value == "down" else 200)
        result = [] if value is None else [{"metric": {}, "value": [1.0, str(value)]}]
        return web.json_response({"status": "success", "data": {"resultType": "vector", "result": result}})

    async def page(request: web.Request) -> web.Response:
        return web.Response(text=str(answer("page")))

    app = web.Application()
    app.add_routes([web.get("/api/v1/query", query), web.get("/metrics", page)])
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def opened(written: dict[str, Any], tools: Tools = Tools()) -> AsyncIterator[Gate]:  # noqa: B008
    made = gate(written, tools)
    await made.open()
    try:
        yield made
    finally:
        await made.close()


async def budget(written: dict[str, Any], answer: Answers) -> float:
    async with prometheus(answer) as url, opened(written, Tools(prometheus_url=url)) as made:
        return made.budget()


@pytest.mark.parametrize(
    ("saturation", "expected"),
    [(0.0, 0.8), (0.3, 0.5), (0.8, 0.0), (1.7, 0.0), (None, 0.8), ("nonsense", 0.8), ("down", 0.8)],
)
async def test_saturation_closes_at_its_threshold_and_opens_without_data(saturation: Any, expected: float) -> None:
    written = {"type": "prometheus-saturation", "inferencePool": "pool-a"}
    asked = []
    made = await budget(written, lambda query: asked.append(query) or saturation)
    assert made == pytest.approx(expected)
    assert asked == [f'{SATURATION}{{inference_pool="pool-a"}}']


@pytest.mark.parametrize(
    ("loads", "expected"),
    [((0.5, 0.1, 0.2), 0.45), ((None, 0.25, 0.9), 0.7), ((None, None, 0.95), 0.0), ((None, None, None), 0.0),
     ((float("inf"), None, 0.0), 0.95)],
    ids=["router queues first", "then pod queues", "then running: closed at 1 - baseline", "no data: closed",
         "no ready pods is no data"],
)  # fmt: skip
async def test_the_budget_is_of_the_first_source_that_has_data(loads: tuple[Any, ...], expected: float) -> None:
    def answer(query: str) -> float | None:
        return loads[0] if QUEUED in query else loads[1] if POD_QUEUE in query else loads[2]

    written = {"type": "prometheus-budget", "pool": "p", "maxConcurrency": 20}
    assert await budget(written, answer) == pytest.approx(expected)


def test_the_budgets_queries_divide_by_ready_pods_times_concurrency() -> None:
    tools = Tools(prometheus_url="http://p")
    spec: Any = parse({"type": "prometheus-budget", "pool": "p", "max_concurrency": "20"}, tools)
    most = f'(sum({READY_PODS}{{name="p"}}) * 20)'
    assert spec.queries() == (
        f'sum({QUEUED}{{inference_pool="p"}}) / {most}',
        f'avg({POD_QUEUE}{{name="p"}}) / 20',
        f"sum({RUNNING}) / {most}",
    )


@pytest.mark.parametrize(("value", "expected"), [(0.4, 0.4), (7, 1.0), (-1, 0.0), (None, 0.0), ("down", 0.0)])
async def test_a_query_is_taken_as_it_is_within_0_and_1(value: Any, expected: float) -> None:
    assert await budget({"type": "prometheus-query", "query": "up"}, lambda _: value) == pytest.approx(expected)


PAGE = 'running{pod="a",kind="x"} 30\nrunning{pod="b",kind="x"} 20\nrunning{pod="c",kind="y"} 99\nready 2\n'


@pytest.mark.parametrize(
    ("page", "extra", "expected"),
    [(PAGE, {}, 0.7), (PAGE, {"baseline": 0}, 0.75), (PAGE, {"podsMetric": ""}, 0.45), (PAGE, {"metric": "no"}, 0.0),
     ("ready 2\nrunning 1 2 3 4", {}, 0.0), (PAGE.replace("ready 2", "ready 0"), {}, 0.0),
     (PAGE, {"labels": {"kind": "z"}, "fallback": 0.3}, 0.3)],
    ids=["sum over pods", "no baseline", "one pod", "no metric", "no page", "no pods", "fallback"],
)  # fmt: skip
async def test_a_scraped_page_gives_what_is_left_of_all_pods(page: str, extra: dict[str, Any], expected: float) -> None:
    async with prometheus(lambda _: page) as url:
        usual = {"type": "endpoint-scrape", "url": f"{url}/metrics", "metric": "running", "labels": {"kind": "x"},
                 "maxCountPerPod": 100, "podsMetric": "ready"}  # fmt: skip
        async with opened({**usual, **extra}) as made:
            assert made.budget() == pytest.approx(expected)


class _Down:
    async def get(self, key: str) -> None:
        raise ConnectionError("refused")

    def pipeline(self, transaction: bool) -> None:
        raise ConnectionError("refused")

    async def aclose(self) -> None: ...


@pytest.mark.parametrize(("value", "expected"), [("0.25", 0.25), (None, 1.0), ("lots", 1.0), ("-3", 0.0)])
async def test_redis_holds_the_budget_and_a_missing_one_is_open(value: str | None, expected: float) -> None:
    client = fakeredis.FakeAsyncRedis()
    if value is not None:
        await client.set("dispatch-gate-budget", value)
    async with opened({"type": "redis", "address": "redis://x"}, Tools(redis=lambda url: client)) as made:
        assert made.budget() == expected
        assert made.room(8, 1) == int(8 * expected) - 1


async def test_redis_away_is_closed() -> None:
    tools = Tools(redis_url="redis://x", redis=lambda url: _Down())
    async with opened({"type": "redis"}, tools) as made:
        assert made.budget() == 0.0
    async with opened({"type": "redis-quota", "limit": 5}, tools) as made:
        assert not await made.admit("a", "tenant")


class _Deaf:
    """A Redis client that swallows the first cancellation, as ``asyncio.wait_for`` of Python 3.11 can."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.answers = asyncio.Event()
        self.deaf = True

    async def get(self, key: str) -> str:
        self.asked.set()
        try:
            await self.answers.wait()
        except asyncio.CancelledError:
            if not self.deaf:
                raise
            self.deaf = False
        return "0.5"

    def pipeline(self, transaction: bool) -> Any:
        return self

    async def __aenter__(self) -> Any:
        return self

    async def __aexit__(self, *_: object) -> None: ...

    def zadd(self, *_: object, **__: object) -> None: ...

    zremrangebyscore = zcard = pexpire = zadd

    async def execute(self) -> list[int]:
        await self.get("")
        return [0, 1, 1, 1]

    async def aclose(self) -> None: ...


async def test_a_poll_that_swallows_the_cancellation_does_not_hold_up_the_stop() -> None:
    client = _Deaf()
    client.answers.set()
    made = gate({"type": "redis", "address": "redis://x"}, Tools(redis=lambda url: client, poll_s=0.001))
    await made.open()
    client.asked.clear()
    client.answers.clear()
    async with asyncio.timeout(10.0):
        await client.asked.wait()
        await made.close()
    assert made.budget() == 0.5


async def test_a_line_cut_while_its_quota_is_asked_is_not_admitted_and_gives_its_place_back() -> None:
    client = _Deaf()
    quota = _Quota(RedisQuota(limit=2, mode="concurrency"), client, Clock())
    admitting = asyncio.create_task(quota.admit("1", "a"))
    await client.asked.wait()
    admitting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await admitting
    assert quota._held, "the place is there to be released"


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
async def client() -> AsyncIterator[Any]:
    made = fakeredis.FakeAsyncRedis()
    yield made
    await made.aclose()


async def test_a_quota_of_places_is_per_tenant_and_a_released_place_is_free(client: Any) -> None:
    quota = _Quota(RedisQuota(limit=2, mode="concurrency"), client, Clock())
    assert [await quota.admit(id, "a") for id in ("1", "2", "3")] == [True, True, False]
    assert await quota.admit("4", "b")
    quota.release("1")
    await quota.close()
    assert await quota.admit("3", "a")


async def test_a_quota_of_starts_frees_with_time_only(client: Any) -> None:
    clock = Clock()
    quota = _Quota(RedisQuota(limit=1, window_s=60.0), client, clock)
    assert await quota.admit("1", "a")
    quota.release("1")
    clock.now_s = 59.0
    assert not await quota.admit("2", "a")
    clock.now_s = 60.0
    assert await quota.admit("2", "a")


async def test_a_local_limit_hands_out_its_places_and_takes_them_back() -> None:
    async with opened({"type": "local-max-concurrency", "limit": 2}) as made:
        assert [await made.admit(id, "t") for id in "abc"] == [True, True, False]
        assert (made.budget(), made.room(100, 2)) == (0.0, 0)
        made.release("a")
        assert made.budget() == 0.5
        assert await made.admit("c", "t")


async def test_a_composite_is_as_open_as_its_narrowest_and_admits_all_or_nothing() -> None:
    limits = [{"type": "local-max-concurrency", "limit": n} for n in (3, 1)]
    async with opened({"type": "composite", "gates": [{"type": "constant"}, *limits]}) as made:
        assert await made.admit("a", "t")
        assert not await made.admit("b", "t")
        assert (made.budget(), made.room(10, 1)) == (0.0, 0)
        made.release("a")
        assert made.budget() == 1.0, "the refused line gave back what the wider gate had granted it"


async def test_a_measured_share_counts_lines_started_since_the_reading_against_it() -> None:
    shares = iter([0.5, 0.1])

    async def read() -> float:
        return next(shares)

    made = Polled("x", read, 0.0, 5.0, measured=True)
    await made.poll()
    assert [made.room(10, in_flight) for in_flight in (3, 6, 8, 2)] == [5, 2, 0, 6]
    await made.poll()
    assert [made.room(10, in_flight) for in_flight in (8, 9, 7)] == [1, 0, 2]


def window(**fields: Any) -> tuple[Window, Clock]:
    clock = Clock()
    return Window(Aimd(**fields), clock), clock


async def fly(made: Window, count: int, start: int = 0) -> list[str]:
    ids = [str(i) for i in range(start, start + count)]
    assert all([await made.admit(id, "t") for id in ids])
    return ids


def land(
    made: Window, ids: list[str], status: int | None = 200, reason: str = "", retry_s: float | None = None
) -> None:
    for id in ids:
        made.answered(id, status, reason, retry_s)
        made.release(id)


async def test_the_window_doubles_each_round_until_it_is_refused_then_grows_by_one_a_round() -> None:
    made, clock = window(max=64)
    for expected in (2, 4, 8, 16):
        land(made, await fly(made, int(made.window)))
        assert made.window == expected
    land(made, await fly(made, 16), 429)
    assert made.window == 8, "refusals of one flight cut once"
    land(made, await fly(made, 8, 100))
    assert made.window == 8, "it holds"
    clock.now_s = 1.0
    land(made, await fly(made, 8, 200))
    assert made.window == pytest.approx(9.0, abs=0.1)


@pytest.mark.parametrize(
    ("status", "reason", "expected"),
    [(429, "", 16), (503, "rejected-saturated", 16), (503, "rejected-ttl-expired", 28.8),
     (503, "evicted-by-priority", 32), (500, "", 32), (400, "", 32), (None, "", 32)],
)  # fmt: skip
async def test_only_capacity_shrinks_the_window(status: int | None, reason: str, expected: float) -> None:
    made, _ = window(min=1, max=32)
    made.window = 32.0
    land(made, (await fly(made, 1)), status, reason)
    assert made.window == pytest.approx(expected)


async def test_retry_after_closes_the_gate_and_slow_start_follows() -> None:
    made, clock = window(min=2, max=32)
    made.window = 32.0
    land(made, await fly(made, 1), 429, retry_s=10.0)
    assert (made.budget(), made.room(100, 0), await made.admit("x", "t")) == (0.0, 0, False)
    clock.now_s = 10.0
    assert made.room(100, 0) == 2


@pytest.mark.parametrize(
    ("written", "says"),
    [({"type": "constat"}, "known are aimd, composite, constant"), ({}, "unknown gate None"),
     ({"type": ["x"]}, "unknown gate"), ({"type": "constant", "limit": 3}, "`limit`; parameters are: none"),
     ({"type": "local-max-concurrency"}, "`limit`"), ({"type": "local-max-concurrency", "limit": 0}, "at least 1"),
     ({"type": "composite", "gates": []}, "at least one"), ({"type": "redis"}, "address of a Redis"),
     ({"type": "prometheus-query", "query": "x"}, "url of a Prometheus"),
     ({"type": "prometheus-saturation", "url": "http://p"}, "inferencePool or query"),
     ({"type": "prometheus-budget", "url": "http://p", "pool": "p", "baseline": 1}, "baseline"),
     ({"type": "aimd", "min": 9, "max": 3}, "min <= max"), ({"type": "aimd", "dec": 1}, "dec"),
     ({"type": "composite", "gates": [{"type": "constant"}, {"type": "nope"}]}, r"\$\.gate\.gates\[1\]\.type")],
)  # fmt: skip
def test_a_gate_that_cannot_be_is_refused_with_what_is_accepted(written: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        gate(written, Tools())


def test_composites_that_hold_themselves_too_deep_are_refused() -> None:
    written: dict[str, Any] = {"type": "constant"}
    for _ in range(10):
        written = {"type": "composite", "gates": [written]}
    with pytest.raises(ConfigError, match="deep"):
        gate(written, Tools())


def test_all_names_of_the_reference_are_known() -> None:
    assert {"constant", "redis", "redis-quota", "local-max-concurrency", "prometheus-saturation", "prometheus-budget",
            "prometheus-query", "endpoint-scrape", "composite", "aimd"} == set(GATES)  # fmt: skip


def flights(model: str, count: int) -> list[Flight]:
    return [
        Flight(Call(batch_id="b", line=i, custom_id=str(i), url="/", model=model, body=b"", tenant="t", deadline_s=1.0))
        for i in range(count)
    ]


async def ready(pacer: GatePacer, model: str) -> None:
    pacer.starts(model, flights(model, 1))
    await pacer.changed.wait()


async def test_a_pacer_keeps_each_model_under_its_cap_and_all_under_theirs() -> None:
    pacer = GatePacer(lambda model: Open(), per_model=3, total=5)
    started = []
    for model in ("m", "n"):
        pacer.changed.clear()
        assert not pacer.starts(model, flights(model, 9)), "closed until the gate is open"
        await ready(pacer, model)
        waiting = flights(model, 9)
        starts = pacer.starts(model, waiting)
        for start in starts:
            pacer.started(waiting[start.position])
        started.append([start.position for start in starts])
    assert started == [[0, 1, 2], [0, 1]]
    await pacer.close()


async def test_a_closed_gate_of_one_model_leaves_the_other_open() -> None:
    closed = parse({"type": "local-max-concurrency", "limit": 1}, Tools()).make(Tools())
    pacer = GatePacer(lambda model: closed if model == "m" else Open(), per_model=4)
    await ready(pacer, "m")
    pacer.changed.clear()
    await ready(pacer, "n")
    first = flights("m", 1)[0]
    pacer.started(first)
    assert await pacer.admit(first)
    assert (len(pacer.starts("m", flights("m", 9))), len(pacer.starts("n", flights("n", 9)))) == (0, 4)
    pacer.ended(first, aborted=False)
    assert len(pacer.starts("m", flights("m", 9))) == 1
    await pacer.close()
