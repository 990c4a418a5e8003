"""One model server of the soak: cheap like the stub engine, but its metrics page tells what really runs there.

The first event comes after a time that grows with the prompt, so there is something to learn; ``delay_s`` spaces the
others. It is killed and frozen from outside, by signals, and dies as a process dies.
"""

from __future__ import annotations

import argparse
import asyncio

from benchmarks.stub_engine import StubEngine, metrics_page

PREFILL_S_PER_BYTE = 1e-6
"""4 us per token."""
BACKLOG = 1024
"""So many connections wait in the kernel while the process is frozen."""

_RUNNING = b'vllm:num_requests_running{engine="0",model_name="stub"} '
_BEFORE, _, _AFTER = metrics_page().partition(_RUNNING + b"3.0")


class Load:
    """What all connections of one engine share."""

    def __init__(self, delay_s: float) -> None:
        self.delay_s = delay_s
        self.running = 0

    def reply(self) -> bytes:
        """The metrics page as an HTTP/1.1 reply."""
        page = b"%s%s%.1f%s" % (_BEFORE, _RUNNING, self.running, _AFTER)
        return b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: %d\r\n\r\n%s" % (len(page), page)


class SoakEngine(StubEngine):
    """One keep-alive connection."""

    def __init__(self, load: Load) -> None:
        super().__init__(load.delay_s)
        self._load = load
        self._open = 0

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._count(-self._open)

    def _count(self, change: int) -> None:
        self._open += change
        self._load.running += change

    def _answer(self, request: bytes) -> None:
        if not request.startswith(b"GET"):
            self._count(1)
            asyncio.get_running_loop().call_later(len(request) * PREFILL_S_PER_BYTE, self._prefilled, request)
        elif self._transport is not None:
            self._transport.write(self._load.reply())

    def _prefilled(self, request: bytes) -> None:
        if self._transport is not None:
            super()._answer(request)

    def _emit(self, left: int, last: bytes) -> None:
        super()._emit(left, last)
        if self._transport is not None and not left:
            self._count(-1)


async def serve(host: str, port: int, delay_s: float) -> None:
    load = Load(delay_s)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: SoakEngine(load), host, port, backlog=BACKLOG)
    await server.serve_forever()


def main() -> None:
    import uvloop

    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("host")
    p.add_argument("port", type=int)
    p.add_argument("--delay-ms", type=float, default=5.0)
    args = p.parse_args()
    uvloop.run(serve(args.host, args.port, args.delay_ms / 1e3))


if __name__ == "__main__":
    main()
