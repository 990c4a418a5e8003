"""A GET over one kept-alive HTTP/1.1 connection: all that reading metrics twenty times a second needs.

A general client spends more on such a read than the kernel does on its 52 KB: aiohttp took 0.14 ms of CPU for one,
this 0.06 (``benchmarks/bench_scrape.py`` measures both). Replies may have a content length, be chunked,
or end with the connection, over TLS too; redirects and compression are not spoken.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from typing import cast

MAX_HEAD_BYTES = 64 << 10

_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})")
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,12})[ \t]*\r\n", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:[^\r]*chunked", re.IGNORECASE)
_CLOSE = re.compile(rb"\r\nconnection:[ \t]*close", re.IGNORECASE)


class HttpError(Exception):
    """The server answered, but not with a page: a status other than 200, or something that is not HTTP."""


class Getter:
    """Reads ``path`` of one server; one read at a time. Connects when it has to."""

    def __init__(self, host: str, port: int, path: str, max_body_bytes: int, tls: ssl.SSLContext | None = None) -> None:
        self._host, self._port, self._max_body_bytes, self._tls = host, port, max_body_bytes, tls
        authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._request = f"GET {path} HTTP/1.1\r\nHost: {authority}\r\nAccept: text/plain\r\n\r\n".encode()
        self._connection: _Connection | None = None

    @property
    def connected(self) -> bool:
        """Whether the last read got as far as a connection."""
        return self._connection is not None

    async def get(self) -> bytes:
        """The page. HttpError for a reply that is none, OSError when the server cannot be reached or breaks off.

        A kept-alive connection may have been closed by the other side since the last read, so that gets a second try.
        """
        if self._connection is not None and not self._connection.closed:
            try:
                return await self._connection.get(self._request)
            except ConnectionError:
                pass
        self.close()
        loop = asyncio.get_running_loop()
        _, self._connection = await loop.create_connection(
            lambda: _Connection(self._max_body_bytes), self._host, self._port, ssl=self._tls
        )
        return await self._connection.get(self._request)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class _Connection(asyncio.Protocol):
    """Collects one reply at a time; what comes when none is asked for ends the connection."""

    def __init__(self, max_body_bytes: int) -> None:
        self.closed = False
        self._max_body_bytes = max_body_bytes
        self._transport: asyncio.Transport | None = None
        self._parts: list[bytes] = []
        self._received = 0
        self._waiting: asyncio.Future[bytes] | None = None
        self._head = b""
        self._expected: int | None = None

    async def get(self, request: bytes) -> bytes:
        self._parts, self._received, self._head, self._expected = [], 0, b"", None
        self._waiting = asyncio.get_running_loop().create_future()
        assert self._transport is not None
        self._transport.write(request)
        try:
            return await self._waiting
        except asyncio.CancelledError:
            self.close()  # a reply may still come, and must not be taken for the next one's
            raise
        finally:
            self._waiting = None

    def close(self) -> None:
        self.closed = True
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name

    def data_received(self, data: bytes) -> None:
        if self._waiting is None or self._waiting.done():
            self.close()
            return
        self._parts.append(data)
        self._received += len(data)
        try:
            if not self._head:
                self._read_head()
            if self._head:
                self._read_body()
        except HttpError as error:
            self._waiting.set_exception(error)
            self.close()

    def _read_head(self) -> None:
        text = b"".join(self._parts)
        end = text.find(b"\r\n\r\n") + 4
        if end < 4:
            if self._received > MAX_HEAD_BYTES:
                raise HttpError(f"headers of more than {MAX_HEAD_BYTES} bytes")
            return
        self._head, self._parts, self._received = text[:end], [text[end:]], len(text) - end
        status = _STATUS.match(self._head)
        if status is None:
            raise HttpError("not an HTTP reply")
        if status[1] != b"200":
            raise HttpError(f"status {int(status[1])}")
        length = _LENGTH.search(self._head)
        self._expected = int(length[1]) if length and not _CHUNKED.search(self._head) else None

    def _read_body(self) -> None:
        if max(self._received, self._expected or 0) > self._max_body_bytes:
            raise HttpError(f"a page of more than {self._max_body_bytes} bytes")
        if self._expected is not None:
            if self._received >= self._expected:
                self._done(b"".join(self._parts)[: self._expected])
        elif _CHUNKED.search(self._head):
            page = unchunked(b"".join(self._parts))
            if page is not None:
                self._done(page)

    def _done(self, page: bytes) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(page)
        if _CLOSE.search(self._head):
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if self._waiting is None or self._waiting.done():
            return
        if self._head and self._expected is None and not _CHUNKED.search(self._head) and exc is None:
            self._waiting.set_result(b"".join(self._parts))
        else:
            self._waiting.set_exception(exc or ConnectionResetError("the connection was closed before the page ended"))


def unchunked(text: bytes) -> bytes | None:
    """The body of a chunked reply; None while it is not complete. HttpError when it is malformed."""
    parts: list[bytes] = []
    at = 0
    while (end := text.find(b"\r\n", at)) >= 0:
        try:
            size = int(text[at:end].partition(b";")[0], 16)
        except ValueError:
            raise HttpError("a chunk without a size") from None
        if size == 0:
            return b"".join(parts) if text.find(b"\r\n\r\n", end - 2) >= 0 else None
        if len(text) < end + 2 + size + 2:
            return None
        parts.append(text[end + 2 : end + 2 + size])
        at = end + 2 + size + 2
    return None
