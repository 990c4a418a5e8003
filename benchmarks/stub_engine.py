"""Model servers that cost next to nothing: one process, many ports, canned replies.

Against these a benchmark measures the scheduler and not the engine. Each port answers GET with a vLLM-sized metrics
page (52 KB) and POST with a stream of ``max_tokens`` events, usage and the end mark last. ``--delay-ms`` spaces the
events, one write each; 0 sends them all at once.
"""

from __future__ import annotations

import argparse
import asyncio
import re
from typing import cast

_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"transfer-encoding: *chunked", re.IGNORECASE)
_MAX_TOKENS = re.compile(rb'"max_tokens": *(\d+)')
_EVENT = b'data: {"id":"cmpl-1","object":"text_completion","model":"stub","choices":[{"index":0,"text":" token"}]}\n\n'
PAGE_BYTES = 52_000


def metrics_page() -> bytes:
    """The five lines that matter where vLLM has them: gauges near the start, the cache facts near the end."""
    label = b'{engine="0",model_name="stub"}'
    filler = b'vllm:request_time_seconds_bucket{engine="0",le="0.3",model_name="stub"} 10.0\n'
    head = filler * 45
    gauges = b"".join(
        b"# HELP %s A gauge.\n# TYPE %s gauge\n%s%s %s\n" % (name, name, name, label, value)
        for name, value in (
            (b"vllm:num_requests_running", b"3.0"),
            (b"vllm:num_requests_waiting", b"0.0"),
            (b"vllm:kv_cache_usage_perc", b"0.125"),
        )
    )
    facts = b'vllm:cache_config_info{block_size="16",cache_dtype="auto",engine="0",num_gpu_blocks="29205"} 1.0\n'
    middle = filler * ((PAGE_BYTES - len(head) - len(gauges) - 6000) // len(filler))
    return head + gauges + middle + facts + filler * 70


_PAGE = metrics_page()
_METRICS = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/plain; version=1.0.0\r\ncontent-length: %d\r\n\r\n" % len(_PAGE)
) + _PAGE
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


_EVENT_CHUNK = _chunk(_EVENT)


class StubEngine(asyncio.Protocol):
    """One keep-alive connection; requests are answered in turn."""

    def __init__(self, delay_s: float) -> None:
        self._delay_s = delay_s
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            size = self._request_bytes(end + 4)
            if not 0 < size <= len(self._buffer):
                return
            request = bytes(self._buffer[:size])
            del self._buffer[:size]
            self._answer(request)

    def _request_bytes(self, head: int) -> int:
        """Size of the first request, whose head has ``head`` bytes; 0 while that is not known."""
        if _CHUNKED.search(self._buffer, 0, head):
            end = self._buffer.find(b"0\r\n\r\n", head)
            return end + 5 if end >= 0 else 0
        length = _LENGTH.search(self._buffer, 0, head)
        return head + (int(length[1]) if length else 0)

    def _answer(self, request: bytes) -> None:
        assert self._transport is not None
        if request.startswith(b"GET"):
            self._transport.write(_METRICS)
            return
        asked = _MAX_TOKENS.search(request)
        tokens = int(asked[1]) if asked else 1
        self._transport.write(_HEAD)
        usage = b'data: {"choices":[],"usage":{"prompt_tokens":600,"completion_tokens":%d}}\n\n' % tokens
        self._emit(tokens, _chunk(usage + b"data: [DONE]\n\n") + b"0\r\n\r\n")

    def _emit(self, left: int, last: bytes) -> None:
        if self._transport is None:
            return
        if not self._delay_s:
            self._transport.write(_EVENT_CHUNK * left + last)
        elif left:
            self._transport.write(_EVENT_CHUNK)
            asyncio.get_running_loop().call_later(self._delay_s, self._emit, left - 1, last)
        else:
            self._transport.write(last)


async def serve(ports: list[int], delay_s: float) -> None:
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(lambda: StubEngine(delay_s), "127.0.0.1", port) for port in ports]
    await asyncio.gather(*(server.serve_forever() for server in servers))


def main() -> None:
    import uvloop

    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("ports", type=int, nargs="+")
    p.add_argument("--delay-ms", type=float, default=0.0)
    args = p.parse_args()
    uvloop.run(serve(args.ports, args.delay_ms / 1e3))


if __name__ == "__main__":
    main()
