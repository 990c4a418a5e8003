"""Messages of a Redis queue: each is answered once, whatever it is."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import fakeredis
import pytest

from batchgw.client.gateway import Gateway, Gateways
from batchgw.client.requests import Sender
from batchgw.gates.base import Open
from batchgw.worker.pacer import GatePacer
from batchgw.worker.redis_source import LEASE_S, RedisSettings, RedisSource
from benchmarks.batch_engine import Engine, Fault, running

SETTINGS = RedisSettings(url="redis://x", poll_s=0.02)


def message(id: str, left_s: float = 3600.0, wrapped: bool = True, **fields: Any) -> bytes:
    """Some are made when the tests are collected, minutes before they are sent."""
    data = {"id": id, "created": int(time.time()), "deadline": int(time.time() + left_s),
            "payload": {"model": "m", "prompt": "hi"}, "endpoint": "/v1/completions",
            "metadata": {"userid": "acme"}, **fields}  # fmt: skip
    envelope = {"internal": {"retry_count": 0, "result_queue_name": "mine"}, "request_kind": "plain", "data": data}
    return json.dumps(envelope if wrapped else data).encode()


@asynccontextmanager
async def source(client: Any, engine: Engine) -> AsyncIterator[None]:
    """With a connection of its own to the same Redis: one that was cut in a command is of no more use."""
    own = fakeredis.FakeAsyncRedis(server=client.server)
    sender = Sender(Gateways(Gateway(url=engine.url, initial_backoff_s=0.001, max_retries=1)))
    await sender.open()
    task = asyncio.create_task(RedisSource(own, sender, GatePacer(lambda model: Open(), per_model=4), SETTINGS).run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await sender.close()
        await own.aclose()


async def answers(client: Any, queue: str, count: int) -> dict[str, dict[str, Any]]:
    made: dict[str, dict[str, Any]] = {}
    async with asyncio.timeout(10.0):
        while len(made) < count:
            raw = await client.rpop(queue)
            if raw is None:
                await asyncio.sleep(0.01)
                continue
            answer = json.loads(raw)
            assert answer["id"] not in made, "answered twice"
            made[answer["id"]] = answer
    return made


@pytest.fixture
async def client() -> AsyncIterator[Any]:
    server = fakeredis.FakeServer()
    made = fakeredis.FakeAsyncRedis(server=server)
    made.server = server
    yield made
    await made.aclose()


async def put(client: Any, *messages: bytes) -> None:
    await client.zadd("request-sortedset", {raw: i for i, raw in enumerate(messages)})


async def test_each_message_is_answered_on_its_queue_and_leaves_nothing_behind(client: Any) -> None:
    await put(client, *[message(f"r{i}") for i in range(30)])
    async with running(Engine()) as engine, source(client, engine):
        made = await answers(client, "mine", 30)
        assert {answer["status_code"] for answer in made.values()} == {200}
        assert json.loads(made["r7"]["payload"])["choices"][0]["text"] == " w0 w1 w2 w3 w4"
        assert engine.asked[0].headers["x-gateway-inference-fairness-id"] == "acme"
        assert not await client.exists("request-sortedset", "request-sortedset:taken")


@pytest.mark.parametrize(
    ("raw", "queue", "code"),
    [(message("a", left_s=-5), "mine", "DEADLINE_EXCEEDED"),
     (message("a", endpoint="http://evil"), "mine", "INVALID_REQUEST"),
     (message("a", deadline="soon"), "mine", "INVALID_REQUEST"),
     (message("a", wrapped=False).replace(b'"hi"}', b'"hi"'), "result-list", "INVALID_REQUEST"),
     (message("a", wrapped=False, payload={"model": "m", "prompt": "bad"}), "result-list", "INFERENCE_ERROR")],
    ids=["past its deadline", "no path", "no deadline", "no JSON", "refused by the engine"],
)  # fmt: skip
async def test_what_cannot_be_done_is_answered_too(client: Any, raw: bytes, queue: str, code: str) -> None:
    await put(client, raw)
    async with running(Engine(trouble=lambda asked: Fault("status", 400))) as engine, source(client, engine):
        made = await answers(client, queue, 1)
    [answer] = made.values()
    assert (answer["id"], answer["error_code"]) == ("" if b'"hi",' in raw else "a", code)
    assert answer["error_message"]


async def test_a_message_whose_worker_died_is_answered_by_another(client: Any) -> None:
    await put(client, message("a"))
    async with running(Engine(trouble=lambda asked: Fault("hang"))) as stuck, source(client, stuck):
        await asyncio.wait_for(stuck.hung.wait(), 10.0)
    [(raw, lease)] = await client.zrange("request-sortedset:taken", 0, -1, withscores=True)
    assert lease == pytest.approx(time.time() + LEASE_S, abs=30.0)
    await client.zadd("request-sortedset:taken", {raw: time.time() - 1.0})
    async with running(Engine()) as engine, source(client, engine):
        made = await answers(client, "mine", 1)
    assert made["a"]["status_code"] == 200
