"""Processes of a batch gateway that can be measured and killed: API servers, workers, claimers, and an engine that
costs nearly nothing. They are forked from one that has imported everything, so that a new one serves in a moment."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import re
import shutil
import socket
import tempfile
import warnings
from collections.abc import Callable, Coroutine, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar, cast

import psutil
import uvicorn
import uvloop

from batchgw.api.app import create_app
from batchgw.api.settings import ApiSettings
from batchgw.blobs import Blobs
from batchgw.store import open_store
from benchmarks.batch_site import Process, Site

START_S = 60.0

T = TypeVar("T")

_forks = multiprocessing.get_context("forkserver")


class Child:
    """``target(*given, connection)`` in a process of its own, which ``tell``s when it is ready."""

    def __init__(self, target: Callable[..., None], *given: Any) -> None:
        _forks.set_forkserver_preload([__name__, target.__module__])
        self._ours, theirs = _forks.Pipe()
        self._process = _forks.Process(target=target, args=(*given, theirs), daemon=True)

    async def start(self) -> Any:
        """What it tells first. Raises EOFError when it died before, TimeoutError."""
        await asyncio.to_thread(self._process.start)
        return await self.told(START_S)

    async def told(self, limit_s: float) -> Any:
        """The next thing it tells."""
        if not await asyncio.to_thread(self._ours.poll, limit_s):
            raise TimeoutError(f"process {self._process.pid} said nothing for {limit_s:g} s")
        return self._ours.recv()

    @property
    def cpu_s(self) -> float:
        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.user + times.system)

    @property
    def rss_bytes(self) -> int:
        return int(psutil.Process(self._process.pid).memory_info().rss)

    @property
    def peak_bytes(self) -> int:
        """The most it ever had in memory."""
        status = Path(f"/proc/{self._process.pid}/status").read_text(encoding="ascii")
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) * 1024

    async def kill(self) -> None:
        """As the kernel does it: nothing of it runs any more."""
        self._process.kill()
        await asyncio.to_thread(self._process.join, START_S)


def run(whole: Coroutine[Any, Any, T]) -> T:
    """On uvloop, as the gateway itself runs."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(whole)


def serve_api(store_url: str, folder: str, port: int, told: Connection) -> None:
    """Tells its port."""
    run(_api(store_url, folder, port, told))


async def _api(store_url: str, folder: str, port: int, told: Connection) -> None:
    async with open_store(store_url) as store:
        app = create_app(ApiSettings(), store, Blobs.open(folder))
        config = uvicorn.Config(app, log_level="critical", access_log=False, lifespan="off", timeout_keep_alive=60)
        listening = socket.create_server(("127.0.0.1", port), backlog=128)
        told.send(listening.getsockname()[1])
        await uvicorn.Server(config).serve(sockets=[listening])


def serve_worker(
    store_url: str, folder: str, engine_url: str, name: str, lease_s: float, heartbeat_s: float, told: Connection
) -> None:
    """Tells that it works."""
    run(_worker(store_url, folder, engine_url, name, lease_s, heartbeat_s, told))


async def _worker(
    store_url: str, folder: str, engine_url: str, name: str, lease_s: float, heartbeat_s: float, told: Connection
) -> None:
    async with open_store(store_url) as store:
        gateway = Site(store, Blobs.open(folder), engine_url)
        process = Process(gateway, name, lease_s=lease_s, heartbeat_s=heartbeat_s, request_timeout_s=5.0)
        told.send(name)
        await process.serve()


def serve_engine(tokens: int, told: Connection) -> None:
    """Tells its URL."""
    run(_engine(tokens, told))


async def _engine(tokens: int, told: Connection) -> None:
    replies = Replies(tokens)
    server = await asyncio.get_running_loop().create_server(lambda: _Engine(replies), "127.0.0.1", 0)
    told.send(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    await server.serve_forever()


class Replies:
    """Whole and streamed, the same for each request: ``tokens`` events, one write each."""

    def __init__(self, tokens: int) -> None:
        usage = b'"usage":{"prompt_tokens":500,"completion_tokens":%d,"total_tokens":%d}' % (tokens, 500 + tokens)
        top = b'{"id":"r","object":"chat.completion%s","created":1,"model":"m","choices":[{"index":0,%s}],%s}'
        whole = top % (b"", b'"message":{"role":"assistant","content":"%s"},"finish_reason":"stop"', usage)
        body = whole % (b" word" * tokens)
        head = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\n%s\r\n\r\n"
        self.whole = head % (b"application/json", b"Content-Length: %d" % len(body)) + body
        self.start = head % (b"text/event-stream", b"Transfer-Encoding: chunked")
        choice = b'"delta":{"content":" word"},"finish_reason":%s'
        reasons = [b"null"] * (tokens - 1) + [b'"stop"']
        events = [b"data: " + top % (b".chunk", choice % reason, usage) + b"\n\n" for reason in reasons]
        self.events = [*events, b"data: [DONE]\n\n"]
        self.pieces = [*map(_chunk, self.events), b"0\r\n\r\n"]


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class _Engine(asyncio.Protocol):
    """Reads no more of a request than it must."""

    _length = re.compile(rb"content-length: (\d+)", re.IGNORECASE)

    def __init__(self, replies: Replies) -> None:
        self._replies, self._data = replies, bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass of it

    def data_received(self, data: bytes) -> None:
        self._data += data
        while (head := self._data.find(b"\r\n\r\n")) >= 0:
            length = self._length.search(self._data, 0, head)
            end = head + 4 + int(length[1] if length else 0)
            if len(self._data) < end:
                return
            streamed = self._data.find(b'"stream":true', head, end) >= 0
            del self._data[:end]
            for piece in (self._replies.start, *self._replies.pieces) if streamed else (self._replies.whole,):
                self._transport.write(piece)


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """The URL of an empty database of a PostgreSQL of its own. ImportError without pgserver."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of platformdirs, where there is no XDG_RUNTIME_DIR
        from pgserver.postgres_server import get_server
    folder = Path(tempfile.mkdtemp(prefix="pg-"))  # short: the path of its socket has a limit
    server = get_server(folder, cleanup_mode="stop")
    try:
        yield str(server.get_uri())
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)
