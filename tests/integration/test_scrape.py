"""Reading metrics over real sockets: every shape of reply, what the pool is told of each, and who is read how often."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import pytest_asyncio

from llmd_sched.pool import scrape
from llmd_sched.pool.engines import ENGINE_LABEL
from llmd_sched.pool.http import Getter, HttpError, unchunked
from llmd_sched.pool.pool import STALE_AFTER_S, Pool
from llmd_sched.pool.scrape import Scraper
from llmd_sched.types import Endpoint

PAGE = b'# HELP x\nvllm:num_requests_waiting{engine="0"} 3.0\nvllm:num_requests_running{engine="0"} 2.0\n' + b"#" * 9000
IDLE_PAGE = b"vllm:num_requests_waiting 0.0\nvllm:num_requests_running 0.0\n"


def sized(body: bytes, status: bytes = b"200 OK", extra: bytes = b"") -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n%s\r\n%s" % (status, len(body), extra, body)


def chunked(body: bytes, size: int = 1000) -> bytes:
    pieces = [body[i : i + size] for i in range(0, len(body), size)]
    framed = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in pieces)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + framed + b"0\r\n\r\n"


class Server:
    """Answers every request with ``reply``, cut into pieces; counts connections."""

    def __init__(self) -> None:
        self.reply, self.pieces, self.hang_up, self.silent = sized(PAGE), 1, False, False
        self.connections = self.requests = 0
        self.port = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self, port: int = 0) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        self.port = int(self._server.sockets[0].getsockname()[1])

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                self.requests += 1
                if self.silent:
                    continue
                size = -(-len(self.reply) // self.pieces)
                for at in range(0, len(self.reply), size):
                    writer.write(self.reply[at : at + size])
                    await writer.drain()
                    await asyncio.sleep(0)
                if self.hang_up:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.close()


@pytest_asyncio.fixture
async def server() -> AsyncIterator[Server]:
    made = Server()
    await made.start()
    yield made
    await made.stop()


@pytest_asyncio.fixture
async def getter(server: Server) -> AsyncIterator[Getter]:
    made = Getter("127.0.0.1", server.port, "/metrics", 20_000)
    yield made
    made.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("pieces", [1, 2, 37])
@pytest.mark.parametrize("reply", [sized(PAGE), chunked(PAGE), chunked(PAGE, 7), sized(b"")])
async def test_a_page_arrives_whole_however_it_is_sent(
    server: Server, getter: Getter, reply: bytes, pieces: int
) -> None:
    server.reply, server.pieces = reply, pieces
    for _ in range(3):
        assert await getter.get() in (PAGE, b"")
    assert (server.connections, server.requests) == (1, 3)


async def test_a_page_without_a_length_ends_with_its_connection(server: Server, getter: Getter) -> None:
    server.reply, server.hang_up = b"HTTP/1.0 200 OK\r\n\r\n" + PAGE, True
    assert await getter.get() == PAGE
    assert await getter.get() == PAGE
    assert server.connections == 2


async def test_a_connection_that_was_closed_meanwhile_is_made_anew(server: Server, getter: Getter) -> None:
    server.hang_up = True
    for _ in range(3):
        assert await getter.get() == PAGE
        await asyncio.sleep(0.02)
    assert server.connections == 3


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (sized(b"no", b"404 Not Found"), "status 404"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "not an HTTP reply"),
        (sized(b"x" * 20_001), "more than 20000 bytes"),
        (chunked(b"x" * 20_001), "more than 20000 bytes"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "chunk without a size"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000, "headers of more than"),
    ],
)
async def test_what_is_no_page_says_what_it_is(server: Server, getter: Getter, reply: bytes, says: str) -> None:
    server.reply = reply
    with pytest.raises(HttpError, match=says):
        await getter.get()
    assert getter.connected
    server.reply = sized(PAGE)
    assert await getter.get() == PAGE


async def test_a_reply_that_came_too_late_is_not_taken_for_the_next(server: Server, getter: Getter) -> None:
    server.silent = True
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await getter.get()
    server.silent = False
    assert await getter.get() == PAGE
    assert server.connections == 2


def test_an_incomplete_chunked_body_is_none_yet() -> None:
    body = chunked(b"abcdef", 4).partition(b"\r\n\r\n")[2]
    assert [unchunked(body[:n]) for n in range(len(body))] == [None] * len(body)
    assert unchunked(body) == b"abcdef"


async def test_the_pool_learns_what_its_servers_say_and_who_cannot_be_reached(server: Server) -> None:
    pool, one = Pool(), Endpoint("one", "127.0.0.1", server.port)
    gone = Server()
    await gone.start()
    two = Endpoint("two", "127.0.0.1", gone.port)
    pool.apply([one, two])
    scraper = Scraper(pool, 0.05)
    await scraper.start()
    try:
        await until(lambda: bool(pool.fresh(asyncio.get_running_loop().time()).all()))
        assert pool.columns(asyncio.get_running_loop().time())["waiting"].tolist() == [3.0, 3.0]
        await gone.stop()
        await until(lambda: len(pool.candidates(None, 0.0)) == 1)
        assert pool.candidates(None, 0.0).endpoints == [one]
        assert scraper.errors
        await gone.start(two.port)
        await until(lambda: len(pool.candidates(None, 0.0)) == 2)
        pool.apply([one])
        asked = gone.requests
        await asyncio.sleep(0.15)
        assert gone.requests <= asked + 1
    finally:
        await scraper.stop()
        await gone.stop()


@asynccontextmanager
async def scraping(scraper: Scraper, *endpoints: Endpoint) -> AsyncIterator[Scraper]:
    scraper.pool.apply(endpoints)
    await scraper.start()
    try:
        yield scraper
    finally:
        await scraper.stop()


@pytest_asyncio.fixture
async def idle_server() -> AsyncIterator[Server]:
    made = Server()
    made.reply = sized(IDLE_PAGE)
    await made.start()
    yield made
    await made.stop()


def at(server: Server, name: str = "one", engine: str = "vllm") -> Endpoint:
    return Endpoint(name, "127.0.0.1", server.port, labels={ENGINE_LABEL: engine})


@pytest.fixture
def hardly_ever(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Scraper]:
    """A scraper that, after its first read of an idle endpoint, waits for longer than any test runs."""
    monkeypatch.setattr(scrape, "IDLE_INTERVAL_S", 600.0)
    return lambda: Scraper(Pool(stale_after_s=5000.0), 300.0)


async def test_an_idle_endpoint_is_read_less_often_than_a_busy_one(server: Server, idle_server: Server) -> None:
    async with scraping(Scraper(Pool(), 0.02), at(server), at(idle_server, "idle")):
        await until(lambda: server.requests >= 40)
        assert 1 <= idle_server.requests < server.requests / 2


async def test_an_idle_endpoint_is_read_often_enough_for_a_short_limit(server: Server, idle_server: Server) -> None:
    assert scrape.IDLE_INTERVAL_S <= STALE_AFTER_S / 2
    async with scraping(Scraper(Pool(stale_after_s=0.08), 0.02), at(server), at(idle_server, "idle")):
        await until(lambda: server.requests >= 60)
        assert server.requests / 4 < idle_server.requests < server.requests


async def test_an_endpoint_that_gets_busy_is_read_more_often_again(server: Server, idle_server: Server) -> None:
    async with scraping(Scraper(Pool(), 0.02), at(server), at(idle_server, "idle")):
        await until(lambda: server.requests >= 20)
        idle_server.reply = sized(PAGE)
        noticed = idle_server.requests
        await until(lambda: idle_server.requests > noticed + 1)
        busy_reads, reads = server.requests, idle_server.requests
        await until(lambda: server.requests >= busy_reads + 30)
        assert idle_server.requests - reads > 15


async def test_a_chosen_endpoint_is_read_at_once_and_only_once(
    idle_server: Server, hardly_ever: Callable[[], Scraper]
) -> None:
    one = at(idle_server)
    async with scraping(hardly_ever(), one) as scraper:
        await until(lambda: bool(scraper.pool.fresh(scraper.clock()).all()))
        assert idle_server.requests == 1
        scraper.touched(one.server)
        await until(lambda: idle_server.requests == 2)
        for _ in range(20):
            scraper.touched(one.server)
            await asyncio.sleep(0.005)
        assert idle_server.requests == 2
        scraper.touched(("default/unknown", "127.0.0.1:1"))


async def test_a_refusing_endpoint_is_tried_less_often_and_not_because_it_was_chosen(
    server: Server, hardly_ever: Callable[[], Scraper]
) -> None:
    gone = Server()
    await gone.start()
    await gone.stop()
    async with scraping(Scraper(Pool(), 0.02), at(server), at(gone, "gone")) as scraper:
        await until(lambda: server.requests >= 40)
        assert 2 <= scraper.errors < server.requests / 2
        assert [e.name for e in scraper.pool.candidates(None, scraper.clock()).endpoints] == ["one"]
    async with scraping(hardly_ever(), at(gone)) as scraper:
        await until(lambda: scraper.errors == 1)
        for _ in range(10):
            scraper.touched(at(gone).server)
            await asyncio.sleep(0.005)
        assert scraper.errors == 1


async def test_a_counter_of_executions_is_traffic_only_while_it_grows(server: Server, idle_server: Server) -> None:
    idle_server.reply = sized(b"nv_inference_exec_count 70000\nnv_inference_pending_request_count 0\n")
    async with scraping(Scraper(Pool(), 0.02), at(server), at(idle_server, "idle", engine="triton")) as scraper:
        await until(lambda: server.requests >= 40)
        assert 1 <= idle_server.requests < server.requests / 2
        assert scraper.pool.columns(scraper.clock())["running"].tolist() == [2.0, 70000.0]


async def test_a_page_is_read_as_its_endpoints_engine_has_it_and_a_new_label_counts(server: Server) -> None:
    server.reply = sized(b"sglang:num_queue_reqs 4\ntrtllm_num_requests_waiting 5\n")

    def waiting(value: float) -> Callable[[], bool]:
        return lambda: scraper.pool.columns(scraper.clock())["waiting"].tolist() == [value]

    async with scraping(Scraper(Pool(), 0.02), at(server, engine="sglang")) as scraper:
        await until(waiting(4.0))
        scraper.pool.apply([at(server, engine="trtllm-serve")])
        await until(waiting(5.0))


async def test_an_unknown_engine_is_complained_of_once_and_read_as_vllm(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    members = [at(server, "one", engine="mystery"), at(server, "two", engine="mystery")]
    async with scraping(Scraper(Pool(), 0.02), *members) as scraper:
        await until(lambda: scraper.pool.columns(scraper.clock())["waiting"].tolist() == [3.0, 3.0])
        scraper.pool.apply(members)
    (said,) = [r.getMessage() for r in caplog.records if "mystery" in r.getMessage()]
    assert "read as vllm" in said
    assert "triton-tensorrt-llm" in said


async def test_a_stopped_scraper_follows_no_longer(server: Server) -> None:
    async with scraping(Scraper(Pool(), 0.02), at(server)) as scraper:
        await until(lambda: server.requests > 0)
    scraper.pool.apply([at(server, "another")])
    asked = server.requests
    await asyncio.sleep(0.1)
    assert server.requests == asked
