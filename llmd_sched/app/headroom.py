"""``GET /v1/headroom``: how much batch the engines can take now, to whoever asks, waits or listens.

    GET /v1/headroom                          the latest word, JSON of ``headroom.wire.PoolHeadroom``
    GET /v1/headroom?wait_s=20&version=17     not before something that matters has changed since version 17
    GET /v1/headroom, Accept: text/event-stream   every word, ten a second: events ``headroom``, and ``share``

A burst reaches listeners from within the arrival that begins it. Several workers of batch share one headroom: who
gives a name (``?worker=NAME``) is told by ``share`` events which of how many it is, whenever one comes or goes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
from aiohttp import web

from llmd_sched.headroom.producer import LOOK_S, BatchHeadroom
from llmd_sched.headroom.wire import PoolHeadroom
from llmd_sched.pool.pool import Pool
from llmd_sched.router import Router

log = logging.getLogger(__name__)

PATH = "/v1/headroom"
EVENTS = "text/event-stream"
QUERY = ("version", "wait_s", "worker")

MAX_LISTENERS = 32
"""Half of what the port takes: metrics are to be read besides."""

MAX_WAIT_S = 60.0
MAX_NAME_CHARACTERS = 128
WRITE_S = 5.0
"""A listener that has not taken its words for so long is let go."""

BUSY_SHARE = 0.05
"""Of the event loop's time, at most, for looking at very many endpoints."""

NOT_LEADING = "this replica does not lead, so it does not know the load; ask the one that does"
NO_BOARD = "nobody says here how much batch there may be; add {type: batch-headroom-producer} to plugins"


class _Asked(msgspec.Struct, frozen=True):
    version: int | None
    wait_s: float
    worker: str


class _Listener:
    __slots__ = ("news", "worker")

    def __init__(self, worker: str) -> None:
        self.news = asyncio.Event()
        self.worker = worker


class HeadroomFeed:
    """Looks at the board and answers. ``producer`` None: there is no board, and every answer is 404 saying so. A
    replica that does not lead sees no traffic, so it says nothing either (503)."""

    def __init__(
        self,
        producer: BatchHeadroom | None,
        pool: Pool,
        leads: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.producer = producer
        self._pool, self._leads, self._clock = pool, leads, clock
        self._listeners: set[_Listener] = set()
        self._matters: object = None
        self._changed_version = 0
        """Of the last word that differed in what matters."""
        self._told = b"", b""
        """The latest word as JSON and as event."""
        self._told_version = -1
        self._closing = False
        self._looking: asyncio.Task[None] | None = None

    @property
    def listeners(self) -> int:
        return len(self._listeners)

    def start(self) -> None:
        if self.producer is not None:
            self.producer.on_news.append(self._hear)
            self._looking = asyncio.create_task(self._look(self.producer), name="headroom")

    async def stop(self) -> None:
        """Whoever listens is told that there is no more."""
        self._closing = True
        self._wake()
        if self.producer is not None and self._looking is not None:
            self.producer.on_news.remove(self._hear)
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if self.producer is None:
            return web.Response(status=404, text=NO_BOARD + "\n")
        if not self._leads():
            return web.Response(status=503, text=NOT_LEADING + "\n", headers={"Retry-After": "1"})
        asked = _asked(request)
        listens = EVENTS in request.headers.get("Accept", "")
        if (listens or asked.wait_s) and len(self._listeners) >= MAX_LISTENERS:
            text = f"{MAX_LISTENERS} are listening already, more are not accepted\n"
            return web.Response(status=503, text=text, headers={"Retry-After": "5"})
        if listens:
            return await self._stream(request, self.producer, asked.worker)
        if asked.wait_s:
            await self._wait(self.producer, asked)
        return web.Response(body=self._words(self.producer)[0], content_type="application/json")

    # Looking

    async def _look(self, producer: BatchHeadroom) -> None:
        while True:
            began_s = time.perf_counter()
            try:
                producer.look(self._pool.candidates(None, self._clock()), self._clock())
            except Exception:
                log.exception("the headroom of batch could not be told")
            await asyncio.sleep(max(LOOK_S, (time.perf_counter() - began_s) / BUSY_SHARE))

    def _hear(self, news: PoolHeadroom) -> None:
        matters = news.mode, news.carriers, [(one.endpoint, one.n_star) for one in news.endpoints]
        if matters != self._matters:
            self._matters, self._changed_version = matters, news.version
        self._wake()

    def _wake(self) -> None:
        for listener in self._listeners:
            listener.news.set()

    def _words(self, producer: BatchHeadroom) -> tuple[bytes, bytes]:
        news = producer.news
        if news.version != self._told_version:
            text = msgspec.json.encode(news)
            self._told = text, b"id: %d\nevent: headroom\ndata: %b\n\n" % (news.version, text)
            self._told_version = news.version
        return self._told

    # Listening

    @contextmanager
    def _listening(self, worker: str = "") -> Iterator[_Listener]:
        listener = _Listener(worker)
        self._listeners.add(listener)
        self._wake()
        try:
            yield listener
        finally:
            self._listeners.discard(listener)
            self._wake()

    async def _wait(self, producer: BatchHeadroom, asked: _Asked) -> None:
        version = producer.news.version if asked.version is None else asked.version
        if version > producer.news.version:  # of a process that is gone
            return
        with self._listening() as listener:
            try:
                async with asyncio.timeout(asked.wait_s):
                    while self._changed_version <= version and not self._closing:
                        await listener.news.wait()
                        listener.news.clear()
            except TimeoutError:
                pass

    async def _stream(self, request: web.Request, producer: BatchHeadroom, worker: str) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": EVENTS, "Cache-Control": "no-store"})
        with self._listening(worker) as listener:
            try:
                await response.prepare(request)
                await self._tell(response, producer, listener)
            except TimeoutError:
                log.warning("a listener of %s takes nothing; let go", PATH)
                if request.transport is not None:
                    request.transport.abort()
            except ConnectionError:
                pass  # it went away
        return response

    async def _tell(self, response: web.StreamResponse, producer: BatchHeadroom, listener: _Listener) -> None:
        shared = b""
        while not self._closing and self._leads():
            listener.news.clear()
            share = self._share(listener.worker)
            _, words = self._words(producer)
            async with asyncio.timeout(WRITE_S):
                await response.write(words if share == shared else share + words)
            shared = share
            await listener.news.wait()

    def _share(self, worker: str) -> bytes:
        """Which of how many workers this is, as event; nothing for one without a name."""
        if not worker:
            return b""
        workers = sorted({one.worker for one in self._listeners} - {""})
        return b'event: share\ndata: {"number":%d,"of":%d}\n\n' % (workers.index(worker), len(workers))


def headroom_feed(router: Router, leads: Callable[[], bool] = lambda: True) -> HeadroomFeed:
    """Of the first board there is."""
    producer = next((one for one in router.producers if isinstance(one, BatchHeadroom)), None)
    return HeadroomFeed(producer, router.pool, leads)


def _asked(request: web.Request) -> _Asked:
    """Raises HTTPBadRequest with what is accepted."""
    query = request.query
    unknown = query.keys() - set(QUERY)
    if unknown:
        raise web.HTTPBadRequest(text=f"{min(unknown)[:40]!r} is none of {', '.join(QUERY)}")
    version = query.get("version")
    if version is not None and not (version.isascii() and version.isdecimal() and len(version) < 19):
        raise web.HTTPBadRequest(text=f"version={version[:40]!r} is not a whole number")
    try:
        wait_s = float(query.get("wait_s", "0"))
    except ValueError:
        wait_s = -1.0
    if not 0 <= wait_s <= MAX_WAIT_S:
        raise web.HTTPBadRequest(text=f"wait_s={query['wait_s'][:40]!r} is not a number from 0 to {MAX_WAIT_S:g}")
    worker = query.get("worker", "")
    if not (worker.isascii() and worker.isprintable() and len(worker) <= MAX_NAME_CHARACTERS):
        raise web.HTTPBadRequest(text=f"worker must be at most {MAX_NAME_CHARACTERS} printable ASCII characters")
    return _Asked(int(version) if version is not None else None, wait_s, worker)
