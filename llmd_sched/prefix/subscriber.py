"""KV events over ZMQ: one connection to every endpoint, or one address that all engines connect to.

A message is three frames: topic, number (8 bytes, big-endian), payload. Each endpoint's batches are applied in order,
by one task; what comes meanwhile waits in ZMQ's queue, which is bounded: what does not fit is lost and then noticed as
a gap in the numbers. With a replay port, what is missing is asked for: on a gap, and after each reconnect, when the
answer also tells whether it is still the same engine.

Which endpoints: those in ``podNamespace`` (empty: any) whose labels match ``podLabelSelector``. The default selector
applies only if some endpoint of the pool carries its label at all, so that pools from a file need no labels.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from llmd_sched.errors import ConfigError
from llmd_sched.prefix.events import decode
from llmd_sched.prefix.precise import PrecisePrefixCache, Publisher, Server, rank_of
from llmd_sched.prefix.precise_config import DEFAULT_SELECTOR
from llmd_sched.types import Endpoint

if TYPE_CHECKING:
    import zmq.asyncio

log = logging.getLogger(__name__)

RECONNECT_S = 5.0
RECEIVE_QUEUE = 10_000
"""Messages of one connection that wait in ZMQ."""

MAX_MESSAGE_BYTES = 64 << 20
MAX_SUBSCRIBERS = 2_000
MAX_PUBLISHERS = 4_000
"""Behind the one address that engines connect to."""

TURN_BLOCKS = 1_000
TURN_MESSAGES = 32
"""After so much one endpoint's task lets others run."""

REPLAY_IDLE_S = 2.0
REPLAY_TOTAL_S = 120.0
REPLAY_COOLDOWN_S = 30.0
MAX_REPLAYS = 8
END_OF_REPLAY = b"\xff" * 8


class Subscribers:
    """Feeds a precise prefix cache. The pool's endpoints are to be given to ``follow`` whenever they change."""

    def __init__(
        self,
        cache: PrecisePrefixCache,
        *,
        reconnect_s: float = RECONNECT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises ConfigError when pyzmq is not installed."""
        self.zmq = _pyzmq()
        self.cache, self.reconnect_s, self.clock = cache, reconnect_s, clock
        self.params = cache.params.kv_events_config
        self.messages: Counter[str] = Counter()
        self.reconnections: Counter[str] = Counter()
        self.errors: Counter[tuple[str, str]] = Counter()
        """(``ip:port``, operation), and by ``ip:port`` the two before; of those who are followed."""
        self.replays = asyncio.Semaphore(MAX_REPLAYS)
        self.context: zmq.asyncio.Context = self.zmq.asyncio.Context()
        self.context.set(self.zmq.MAX_SOCKETS, 4 * MAX_SUBSCRIBERS)  # one to listen, two to watch it, one for replays
        self._connected: dict[Server, _Subscriber] = {}
        self._central: _Central | None = None

    @property
    def active(self) -> int:
        return len(self._connected) + (self._central is not None)

    @property
    def capacity(self) -> int:
        """Messages that may wait, all connections together."""
        return RECEIVE_QUEUE * self.active

    def start(self) -> None:
        """Listen at ``zmqEndpoint``, if there is one; raises ConfigError when that cannot be done."""
        if self.params.zmq_endpoint:
            self._central = _Central(self, self.params.zmq_endpoint)

    async def stop(self) -> None:
        tasks = [one.task for one in self._connected.values()]
        if self._central is not None:
            tasks.append(self._central.task)
        self._connected, self._central = {}, None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.context.destroy(linger=0)

    def follow(self, endpoints: list[Endpoint]) -> None:
        """The pool's members now. Not before the cache was told of them."""
        if self._central is not None:
            self._central.forget_but({e.server for e in endpoints})
        members = self._wanted(endpoints)
        if len(members) > MAX_SUBSCRIBERS:
            log.warning("KV events: %d endpoints, of which the first %d are followed", len(members), MAX_SUBSCRIBERS)
        wanted = {e.server: e for e in members[:MAX_SUBSCRIBERS]}
        for server in [s for s in self._connected if s not in wanted]:
            gone = self._connected.pop(server)
            gone.task.cancel()
            self._forget(gone.endpoint.hostport)
        for server, endpoint in wanted.items():
            if server not in self._connected:
                self._connected[server] = _Subscriber(self, endpoint)

    def _wanted(self, endpoints: list[Endpoint]) -> list[Endpoint]:
        if not self.params.discover_pods:
            return []
        pods = self.params.pod_discovery_config
        labels = pods.labels
        if pods.pod_label_selector == DEFAULT_SELECTOR and not any(k in e.labels for e in endpoints for k in labels):
            labels = {}
        there = [e for e in endpoints if pods.pod_namespace in ("", e.namespace)]
        return [e for e in there if all(e.labels.get(key) == value for key, value in labels.items())]

    def _forget(self, hostport: str) -> None:
        self.messages.pop(hostport, None)
        self.reconnections.pop(hostport, None)
        for key in [k for k in self.errors if k[0] == hostport]:
            del self.errors[key]

    def subscribed(self, address: str) -> zmq.asyncio.Socket:
        """A socket for the topics we want, neither bound nor connected."""
        made = self.context.socket(self.zmq.SUB)
        made.set(self.zmq.LINGER, 0)
        made.set(self.zmq.RCVHWM, RECEIVE_QUEUE)
        made.set(self.zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        made.set(self.zmq.RECONNECT_IVL, int(1e3 * self.reconnect_s))
        made.set(self.zmq.TCP_KEEPALIVE, 1)
        made.set(self.zmq.TCP_KEEPALIVE_IDLE, 30)
        made.set(self.zmq.IPV6, int("[" in address))
        made.subscribe(self.params.topic_filter.encode())
        return made

    def malformed(self, who: str) -> None:
        self.cache.feed.counts.malformed_batches += 1
        self.errors[who, "frames"] += 1


class _Turn:
    """Lets other tasks run after a bounded amount of work."""

    def __init__(self) -> None:
        self._messages = self._blocks = 0

    async def spent(self, blocks: int) -> None:
        self._messages += 1
        self._blocks += blocks
        if self._messages >= TURN_MESSAGES or self._blocks >= TURN_BLOCKS:
            self._messages = self._blocks = 0
            await asyncio.sleep(0)


class _Subscriber:
    """Connected to one endpoint, until its task is cancelled."""

    def __init__(self, group: Subscribers, endpoint: Endpoint) -> None:
        self.group, self.endpoint = group, endpoint
        pods, rank = group.params.pod_discovery_config, rank_of(endpoint)
        host = endpoint.hostport.rpartition(":")[0]
        self.address = f"tcp://{host}:{pods.socket_port + rank}"
        self.replay_address = f"tcp://{host}:{pods.replay_socket_port + rank}" if pods.replay_socket_port else ""
        self.publisher = Publisher(endpoint.server)
        self._may_replay_s = 0.0
        self._turn = _Turn()
        self._one_at_a_time = asyncio.Lock()
        self.task = asyncio.create_task(self._run(), name=f"kv events {endpoint.key}")

    async def _run(self) -> None:
        while True:
            try:
                await self._listen()
            except Exception as e:  # one endpoint's trouble must not end the following of it
                self.group.errors[self.endpoint.hostport, "receive"] += 1
                log.warning("%s: KV events from %s: %s", self.endpoint.key, self.address, str(e) or type(e).__name__)
            await asyncio.sleep(self.group.reconnect_s)

    async def _listen(self) -> None:
        zmq = self.group.zmq
        with contextlib.closing(self.group.subscribed(self.address)) as socket:
            watch = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
            try:
                socket.connect(self.address)
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._watch(watch))
                    tasks.create_task(self._receive(socket))
            finally:
                socket.disable_monitor()
                watch.close(0)

    async def _receive(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            frames = await socket.recv_multipart()
            async with self._one_at_a_time:
                await self._take(frames)

    async def _watch(self, watch: zmq.asyncio.Socket) -> None:
        """Counts reconnections, and asks for what was missed meanwhile."""
        connected = 0
        while True:
            await watch.recv_multipart()
            connected += 1
            if connected > 1:
                self.group.reconnections[self.endpoint.hostport] += 1
                if self.publisher.heard:
                    async with self._one_at_a_time:
                        await self._replay(self._catch_up)

    async def _take(self, frames: list[bytes]) -> None:
        who, cache, publisher = self.endpoint.hostport, self.group.cache, self.publisher
        self.group.messages[who] += 1
        if len(frames) != 3 or len(frames[1]) != 8:
            self.group.malformed(who)
            return
        topic, number = frames[0], int.from_bytes(frames[1], "big")
        missing = cache.announce(publisher, topic, number)
        if missing is not None:
            await self._replay(lambda: self._refill(missing))
        await self._turn.spent(cache.receive(publisher, number, frames[2]))

    async def _replay(self, ask: Callable[[], Any]) -> None:
        """Do it if there is whom to ask, and not soon after that failed."""
        if not self.replay_address or self.group.clock() < self._may_replay_s:
            return
        try:
            async with self.group.replays, asyncio.timeout(REPLAY_TOTAL_S):
                await ask()
        except (TimeoutError, self.group.zmq.ZMQError) as e:
            self._may_replay_s = self.group.clock() + REPLAY_COOLDOWN_S
            self.group.errors[self.endpoint.hostport, "replay"] += 1
            log.warning(
                "%s: KV event replay from %s: %s", self.endpoint.key, self.replay_address, str(e) or "timed out"
            )

    async def _refill(self, first: int) -> None:
        async with aclosing(self._replayed(first)) as batches:
            async for number, payload in batches:
                await self._turn.spent(self.group.cache.receive(self.publisher, number, payload))

    async def _catch_up(self) -> None:
        """After a reconnect: an engine that no longer has the last batch we know, as we know it, is another one."""
        publisher, same = self.publisher, False
        async with aclosing(self._replayed(max(publisher.applied, 0))) as batches:
            async for number, payload in batches:
                same = number != publisher.applied or hash(payload) == publisher.fingerprint or same
                if not same:
                    break
                await self._turn.spent(self.group.cache.receive(publisher, number, payload))
        if not same:
            self.group.cache.restarted(publisher)
            await self._refill(0)

    async def _replayed(self, first: int) -> AsyncGenerator[tuple[int, bytes], None]:
        """Batches from number ``first`` on, as far as the engine still has them. Raises TimeoutError, ZMQError."""
        zmq = self.group.zmq
        with contextlib.closing(self.group.context.socket(zmq.DEALER)) as socket:
            socket.set(zmq.LINGER, 0)
            socket.set(zmq.RCVHWM, RECEIVE_QUEUE)
            socket.set(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
            socket.set(zmq.IPV6, int("[" in self.replay_address))
            socket.connect(self.replay_address)
            await asyncio.wait_for(socket.send_multipart([b"", first.to_bytes(8, "big")]), REPLAY_IDLE_S)
            while True:
                frames = await asyncio.wait_for(socket.recv_multipart(), REPLAY_IDLE_S)
                if len(frames) < 2 or len(frames[-2]) != 8:
                    self.group.malformed(self.endpoint.hostport)
                elif frames[-2] == END_OF_REPLAY:
                    return
                else:
                    yield int.from_bytes(frames[-2], "big"), frames[-1]


class _Central:
    """One address all engines connect to; the topic says whose a batch is, its payload of which rank."""

    def __init__(self, group: Subscribers, address: str) -> None:
        self.group, self.address = group, address
        self._publishers: dict[tuple[bytes, int], Publisher] = {}
        self._turn = _Turn()
        self._socket = group.subscribed(address)
        try:
            self._socket.bind(address)
        except group.zmq.ZMQError as e:
            self._socket.close(0)
            raise ConfigError(f"cannot listen at {address!r}: {e}", "kvEventsConfig.zmqEndpoint") from None
        self.task = asyncio.create_task(self._run(), name=f"kv events at {address}")

    async def _run(self) -> None:
        with contextlib.closing(self._socket):
            while True:
                try:
                    await self._turn.spent(self._take(await self._socket.recv_multipart()))
                except Exception as e:  # nothing that arrives may end the listening
                    self.group.errors[self.address, "receive"] += 1
                    log.warning("KV events at %s: %s", self.address, str(e) or type(e).__name__)
                    await asyncio.sleep(self.group.reconnect_s)

    def _take(self, frames: list[bytes]) -> int:
        self.group.messages[self.address] += 1
        batch = decode(frames[2]) if len(frames) == 3 and len(frames[1]) == 8 else None
        if batch is None:
            self.group.malformed(self.address)
            return 0
        publisher = self._publisher(frames[0], batch.rank)
        if publisher is None:
            self.group.cache.feed.counts.unknown_endpoints += 1
            return 0
        number = int.from_bytes(frames[1], "big")
        self.group.cache.announce(publisher, frames[0], number)
        return self.group.cache.receive(publisher, number, frames[2], batch)

    def _publisher(self, topic: bytes, rank: int) -> Publisher | None:
        key = topic, rank
        if key not in self._publishers:
            server = self.group.cache.server(topic, rank)
            if server is None or len(self._publishers) >= MAX_PUBLISHERS:
                return None
            self._publishers[key] = Publisher(server)
        return self._publishers[key]

    def forget_but(self, servers: set[Server]) -> None:
        self._publishers = {key: one for key, one in self._publishers.items() if one.server in servers}


def _pyzmq() -> Any:
    try:
        import zmq
        import zmq.asyncio
    except ImportError:
        message = "KV events need pyzmq: install the extra kv-events, pip install 'llmd-sched[kv-events]'"
        raise ConfigError(message, "precise-prefix-cache-producer") from None
    return zmq
