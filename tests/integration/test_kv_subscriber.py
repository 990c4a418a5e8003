"""KV events over real ZMQ sockets: both ways of delivery, restarts, gaps, replay, and who is followed."""

from __future__ import annotations

import asyncio
import builtins
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import pytest_asyncio

from llmd_sched.config import convert
from llmd_sched.errors import ConfigError
from llmd_sched.prefix import subscriber
from llmd_sched.prefix.precise import PrecisePrefixCache, PrecisePrefixCacheProducer
from llmd_sched.prefix.subscriber import END_OF_REPLAY, Subscribers
from llmd_sched.types import Candidates, Endpoint
from tests.builders import candidates, request

zmq = pytest.importorskip("zmq")
zmq_asyncio = pytest.importorskip("zmq.asyncio")

BLOCKS = 64
PROMPT = list(range(1000, 1000 + 16 * BLOCKS))
LABEL = {"llm-d.ai/inference-serving": "true"}


def batch(first: int, blocks: int = 1, rank: int = 0) -> bytes:
    """These blocks of PROMPT, named by their position."""
    hashes = [100 + i for i in range(first, first + blocks)]
    tokens = PROMPT[16 * first : 16 * (first + blocks)]
    return msgspec.msgpack.encode(
        [0.0, [["BlockStored", hashes, 99 + first if first else None, tokens, 16, None, "GPU"]], rank]
    )


class Engine:
    """Publishes numbered batches as vLLM does, and replays them when asked to."""

    def __init__(self, context: Any, host: str = "127.0.0.1", topic: bytes = b"kv@pod@m") -> None:
        self.context, self.host, self.topic = context, host, topic
        self.port = self.replay_port = 0
        self.asked: list[int] = []
        self.silent = False
        self.start()

    def start(self) -> None:
        """With an empty cache; on the ports it had before, if it had any."""
        self.number, self.kept = 0, dict[int, bytes]()
        self.pub, self.router = self.context.socket(zmq.PUB), self.context.socket(zmq.ROUTER)
        self.pub.set(zmq.SNDHWM, 0)
        self.port = self._bind(self.pub, self.port)
        self.replay_port = self._bind(self.router, self.replay_port)
        self.task = asyncio.create_task(self._serve())

    def _bind(self, socket: Any, port: int) -> int:
        socket.set(zmq.LINGER, 0)
        if port:
            socket.bind(f"tcp://{self.host}:{port}")
            return port
        return int(socket.bind_to_random_port(f"tcp://{self.host}"))

    async def publish(self, payload: bytes, lose: bool = False) -> None:
        if not lose:
            await self.pub.send_multipart([self.topic, self.number.to_bytes(8, "big"), payload])
        self.kept[self.number] = payload
        self.number += 1

    async def _serve(self) -> None:
        while True:
            who, _, first = await self.router.recv_multipart()
            self.asked.append(int.from_bytes(first, "big"))
            if self.silent:
                continue
            for number in [n for n in self.kept if n >= self.asked[-1]]:
                await self.router.send_multipart([who, b"", number.to_bytes(8, "big"), self.kept[number]])
            await self.router.send_multipart([who, b"", END_OF_REPLAY, b""])

    async def stop(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.pub.close(0)
        self.router.close(0)

    async def restart(self) -> None:
        await self.stop()
        async with asyncio.timeout(10):
            while not self._starts():  # ZMQ gives ports back a little later
                await asyncio.sleep(0.01)

    def _starts(self) -> bool:
        try:
            self.start()
        except zmq.ZMQError:
            self.pub.close(0)
            self.router.close(0)
            return False
        return True


class Bench:
    """A cache, its subscribers, and engines."""

    def __init__(self) -> None:
        self.context = zmq_asyncio.Context()
        self.engines: list[Engine] = []
        self.members: list[Endpoint] = []

    def engine(self, host: str = "127.0.0.1", topic: bytes = b"kv@pod@m") -> Engine:
        self.engines.append(Engine(self.context, host, topic))
        return self.engines[-1]

    def follow(self, members: list[Endpoint], events: dict[str, object]) -> None:
        plugin = convert({"kvEventsConfig": events}, PrecisePrefixCacheProducer)
        plugin.check()
        self.cache = PrecisePrefixCache("precise", plugin)
        self.subscribers = Subscribers(self.cache, reconnect_s=0.1)
        self.subscribers.start()
        self.change(members)

    def change(self, members: list[Endpoint]) -> None:
        self.members = members
        self.cache.endpoints_changed(members)
        self.subscribers.follow(members)

    def held(self) -> list[float]:
        """Leading blocks of PROMPT, by member."""
        asked = request(prompts=(np.array(PROMPT, dtype="<u4").tobytes(),))
        view = Candidates(self.members, candidates(len(self.members)).columns)
        return self.cache.produce(asked, view, 0.0)["prefix_cached_blocks/precise"].tolist()

    async def heard(self, engine: Engine) -> None:
        """Publish harmless events until one of them arrives: then the subscription stands."""
        counts = self.cache.feed.counts
        seen = counts.batches
        await until(lambda: counts.batches > seen, lambda: engine.publish(msgspec.msgpack.encode([0.0, [], 0])))

    async def stop(self) -> None:
        if hasattr(self, "subscribers"):
            await self.subscribers.stop()
        for engine in self.engines:
            await engine.stop()
        self.context.destroy(linger=0)


async def until(condition: Callable[[], bool], meanwhile: Callable[[], Any] | None = None) -> None:
    async with asyncio.timeout(10):
        while not condition():
            if meanwhile is not None:
                await meanwhile()
            await asyncio.sleep(0.02)


@pytest_asyncio.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench()
    yield made
    await made.stop()


def discovered(engine: Engine, replay: bool = False, **pods: object) -> dict[str, object]:
    ports = {"socketPort": engine.port} | ({"replaySocketPort": engine.replay_port} if replay else {})
    return {"podDiscoveryConfig": ports | pods}


def at(engine: Engine, name: str = "one", **fields: object) -> Endpoint:
    return Endpoint(**{"name": name, "address": engine.host, "port": 8000, **fields})


async def test_what_an_engine_publishes_is_known_of_its_endpoint(bench: Bench) -> None:
    engine = bench.engine()
    other = Endpoint("other", "127.0.0.2", 8000)
    bench.follow([other, at(engine)], discovered(engine))
    await bench.heard(engine)
    for first in range(0, 40, 2):
        await engine.publish(batch(first, 2))
    await until(lambda: bench.held() == [0.0, 40.0])
    counts = bench.cache.feed.counts
    assert (counts.gaps, counts.restarts, counts.malformed_batches) == (0, 0, 0)
    assert bench.subscribers.active == 2
    assert bench.subscribers.messages["127.0.0.1:8000"] >= 21


async def test_ranks_of_one_pod_publish_on_ports_side_by_side(bench: Bench) -> None:
    engine = bench.engine()
    ranks = [Endpoint(f"pod-rank-{i}", "127.0.0.1", 8000 + i) for i in range(3)]
    bench.follow(ranks, {"podDiscoveryConfig": {"socketPort": engine.port - 2}})
    await bench.heard(engine)
    await engine.publish(batch(0, 3))
    await until(lambda: bench.held() == [0.0, 0.0, 3.0])


async def test_members_that_leave_are_no_longer_followed(bench: Bench) -> None:
    engine = bench.engine()
    bench.follow([at(engine)], discovered(engine))
    await bench.heard(engine)
    await engine.publish(batch(0))
    await until(lambda: bench.held() == [1.0])
    bench.change([])
    assert (bench.subscribers.active, len(bench.cache.index), bench.subscribers.messages) == (0, 0, {})
    bench.change([at(engine)])
    assert bench.held() == [0.0]
    await bench.heard(engine)
    await engine.publish(batch(0, 2))
    await until(lambda: bench.held() == [2.0])


async def test_a_restarted_engine_loses_its_blocks_without_replay(bench: Bench) -> None:
    engine = bench.engine()
    bench.follow([at(engine)], discovered(engine))
    await bench.heard(engine)
    for first in range(5):
        await engine.publish(batch(first))
    await until(lambda: bench.held() == [5.0])
    await engine.restart()
    await until(lambda: bench.subscribers.reconnections["127.0.0.1:8000"] > 0)
    assert bench.held() == [5.0]  # nobody knows yet
    await bench.heard(engine)
    assert bench.held() == [0.0]
    assert bench.cache.feed.counts.restarts == 1
    await engine.publish(batch(0, 2))
    await until(lambda: bench.held() == [2.0])


async def test_a_gap_is_counted_without_replay(bench: Bench) -> None:
    engine = bench.engine()
    bench.follow([at(engine)], discovered(engine))
    await bench.heard(engine)
    await engine.publish(batch(0))
    await engine.publish(batch(1), lose=True)
    await engine.publish(batch(2), lose=True)
    await engine.publish(batch(3))
    counts = bench.cache.feed.counts
    await until(lambda: counts.gaps == 1)
    assert (counts.missed_batches, bench.held()) == (2, [1.0])
    assert sum(counts.stores_skipped.values()) == 1


async def test_a_gap_is_filled_by_replay(bench: Bench) -> None:
    engine = bench.engine()
    bench.follow([at(engine)], discovered(engine, replay=True))
    await bench.heard(engine)
    await engine.publish(batch(0))
    first = engine.number
    await engine.publish(batch(1), lose=True)
    await engine.publish(batch(2), lose=True)
    await engine.publish(batch(3))
    await until(lambda: bench.held() == [4.0])
    assert engine.asked[-1] == first
    assert bench.cache.feed.counts.gaps == 0
    await engine.publish(batch(4))
    await until(lambda: bench.held() == [5.0])


async def test_what_was_published_before_we_came_is_replayed(bench: Bench) -> None:
    engine = bench.engine()
    for first in range(4):
        await engine.publish(batch(first), lose=True)
    bench.follow([at(engine)], discovered(engine, replay=True))
    await bench.heard(engine)
    await until(lambda: bench.held() == [4.0])
    assert engine.asked == [0]


async def test_with_replay_a_restart_is_noticed_before_the_new_engine_says_anything(bench: Bench) -> None:
    engine = bench.engine()
    bench.follow([at(engine)], discovered(engine, replay=True))
    await bench.heard(engine)
    for first in range(3):
        await engine.publish(batch(first))
    await until(lambda: bench.held() == [3.0])
    await engine.restart()
    await until(lambda: bench.held() == [0.0])
    assert bench.cache.feed.counts.restarts == 1


async def test_an_engine_that_has_come_as_far_as_the_old_one_is_told_apart_by_its_last_batch(bench: Bench) -> None:
    engine = bench.engine()
    bench.follow([at(engine)], discovered(engine, replay=True))
    await bench.heard(engine)
    await engine.publish(batch(0, 8))
    await until(lambda: bench.held() == [8.0])
    reached = engine.number
    await engine.restart()
    for first in range(reached + 1):
        await engine.publish(batch(first), lose=True)
    await until(lambda: bench.held() == [reached + 1.0])
    assert bench.cache.feed.counts.restarts == 1


async def test_the_same_engine_is_not_forgotten_over_a_lost_connection(bench: Bench) -> None:
    engine = bench.engine()
    bench.follow([at(engine)], discovered(engine, replay=True))
    await bench.heard(engine)
    await engine.publish(batch(0, 3))
    await until(lambda: bench.held() == [3.0])
    number, kept = engine.number, engine.kept
    await engine.restart()
    engine.number, engine.kept = number, kept
    await engine.publish(batch(3), lose=True)
    await until(lambda: bench.held() == [4.0])
    assert bench.cache.feed.counts.restarts == 0


async def test_a_replay_that_fails_is_not_tried_again_soon(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(subscriber, "REPLAY_IDLE_S", 0.05)
    engine = bench.engine()
    engine.silent = True
    for first in range(2):
        await engine.publish(batch(first), lose=True)
    with caplog.at_level(logging.WARNING):
        bench.follow([at(engine)], discovered(engine, replay=True))
        await bench.heard(engine)
        await engine.publish(batch(0), lose=True)
        await engine.publish(batch(0, 2))
        await until(lambda: bench.held() == [2.0])
    assert len(engine.asked) == 1
    assert bench.subscribers.errors["127.0.0.1:8000", "replay"] == 1
    assert "timed out" in caplog.text


async def test_what_is_no_message_is_counted_and_the_rest_is_heard(bench: Bench) -> None:
    engine = bench.engine()
    bench.follow([at(engine)], discovered(engine))
    await bench.heard(engine)
    for frames in ([b"kv@"], [b"kv@a@m", b"short", b""], [b"kv@a@m", bytes(8), b"", b""]):
        await engine.pub.send_multipart(frames)
    await engine.publish(b"\xc1")
    await engine.pub.send_multipart([b"other", bytes(8), batch(0)])
    await engine.publish(batch(0))
    await until(lambda: bench.held() == [1.0])
    assert bench.cache.feed.counts.malformed_batches == 4


@pytest.mark.parametrize(
    ("pods", "members", "followed"),
    [
        ({}, [({}, "a"), ({}, "b")], 2),
        ({}, [({"other": "label"}, "a")], 1),
        ({}, [(LABEL, "a"), ({}, "b")], 1),
        ({"podLabelSelector": "x=y"}, [(LABEL, "a"), ({}, "b")], 0),
        ({"podLabelSelector": "x=y"}, [({"x": "y"}, "a"), ({"x": "z"}, "b")], 1),
        ({"podLabelSelector": ""}, [(LABEL, "a"), ({}, "b")], 2),
        ({"podNamespace": "b"}, [({}, "a"), ({}, "b")], 1),
    ],
)
async def test_labels_and_namespace_say_who_is_followed(
    bench: Bench, pods: dict[str, object], members: list[tuple[dict[str, str], str]], followed: int
) -> None:
    made = [Endpoint(f"e{i}", "127.0.0.1", 1, namespace, labels) for i, (labels, namespace) in enumerate(members)]
    bench.follow(made, {"podDiscoveryConfig": pods})
    assert bench.subscribers.active == followed


async def connected(bench: Bench, topic: bytes) -> Engine:
    """An engine that connects to us."""
    engine = bench.engine(topic=topic)
    engine.pub.connect(bench.listening)
    return engine


def central(bench: Bench, members: list[Endpoint]) -> None:
    with zmq.Context() as context, context.socket(zmq.PUB) as probe:
        port = probe.bind_to_random_port("tcp://127.0.0.1")
    bench.listening = f"tcp://127.0.0.1:{port}"
    bench.follow(members, {"zmqEndpoint": bench.listening, "discoverPods": False})


async def test_engines_that_connect_to_us_are_told_apart_by_topic(bench: Bench) -> None:
    members = [Endpoint("one", "10.0.0.1", 8000), Endpoint("two", "10.0.0.2", 8000)]
    central(bench, members)
    one = await connected(bench, b"kv@10.0.0.1:8000@m")
    two = await connected(bench, b"kv@two@m")
    for engine in (one, two):
        await bench.heard(engine)
    for first in range(6):
        await one.publish(batch(first))
        await two.publish(batch(2 * first, 2))
    await until(lambda: bench.held() == [6.0, 12.0])
    assert bench.cache.feed.counts.restarts == 0
    two.number = 0  # as one that was started anew
    await two.publish(batch(0))
    await until(lambda: bench.held() == [6.0, 1.0])
    assert bench.cache.feed.counts.restarts == 1


async def test_ranks_behind_one_address_have_numbers_of_their_own(bench: Bench) -> None:
    central(bench, [Endpoint(f"pod-rank-{i}", "10.0.0.1", 8000 + i) for i in (0, 1)])
    engine = await connected(bench, b"kv@pod@m")
    counts = bench.cache.feed.counts
    await until(lambda: counts.batches > 0, lambda: engine.publish(msgspec.msgpack.encode([0.0, [], 0])))
    for number in range(engine.number, engine.number + 5):
        for rank in (0, 1):
            blocks = batch(number - engine.number, 1, rank)
            await engine.pub.send_multipart([engine.topic, number.to_bytes(8, "big"), blocks])
    await until(lambda: bench.held() == [5.0, 5.0])
    assert (counts.restarts, counts.gaps) == (0, 0)


async def test_somebody_unknown_is_counted_until_it_is_in_the_pool(bench: Bench) -> None:
    central(bench, [])
    engine = await connected(bench, b"kv@10.0.0.9@m")
    counts = bench.cache.feed.counts
    await until(lambda: counts.unknown_endpoints > 0, lambda: engine.publish(batch(0)))
    bench.change([Endpoint("nine", "10.0.0.9", 8000)])
    await engine.publish(batch(0, 2))
    await until(lambda: bench.held() == [2.0])


async def test_an_address_that_cannot_be_listened_at_is_named(bench: Bench) -> None:
    taken = f"tcp://127.0.0.1:{bench.engine().port}"
    with pytest.raises(ConfigError, match=rf"zmqEndpoint: cannot listen at '{taken}': Address already in use"):
        bench.follow([], {"zmqEndpoint": taken})


async def test_a_flood_does_not_keep_other_tasks_from_running(bench: Bench) -> None:
    engine = bench.engine()
    bench.follow([at(engine)], discovered(engine))
    await bench.heard(engine)
    counts = bench.cache.feed.counts
    expected = counts.batches + 2000
    for _ in range(2000):
        await engine.publish(batch(0))
    turns = 0
    while counts.batches < expected:
        seen = counts.batches
        await asyncio.sleep(0)
        assert counts.batches - seen <= subscriber.TURN_MESSAGES
        turns += 1
        assert turns < 1_000_000
    assert turns


async def test_without_pyzmq_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("zmq"):
            raise ImportError(name)
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match="kv-events"):
        Subscribers(PrecisePrefixCacheProducer().open("precise"))
