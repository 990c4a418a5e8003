"""Reading metrics over real sockets: every shape of reply, and what the pool is told of each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio

from llmd_sched.pool.http import Getter, HttpError, unchunked
from llmd_sched.pool.pool import Pool
from llmd_sched.pool.scrape import Scraper
from llmd_sched.types import Endpoint

PAGE = b'# HELP x\nvllm:num_requests_waiting{engine="0"} 3.0\nvllm:num_requests_running{engine="0"} 2.0\n' + b"#" * 9000


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
