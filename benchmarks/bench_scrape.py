"""What reading metrics costs, and by whom.

    python -m benchmarks.bench_scrape [--endpoints 100] [--json OUT]

Canned engines with 52 KB pages in processes of their own. In turn, several rounds: the scraper as shipped with every
endpoint busy (read every 50 ms), with every endpoint idle (left alone up to 1 s, once it has settled to that), and
aiohttp with the same page reader at the busy pace. CPU is this process's own, which does nothing else.
``page_read_ms`` is the page reader alone, without any HTTP.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import cast

import aiohttp

from benchmarks.results import table, write_json
from benchmarks.stub_engine import metrics_page
from llmd_sched.pool.pool import Pool
from llmd_sched.pool.scrape import PageReader, Scraper
from llmd_sched.stack import Stack, free_ports, wait_http
from llmd_sched.types import Endpoint

INTERVAL_S = 0.05
SECONDS = 4.0
SETTLE_S = 3.0
"""Twice what the pauses of an idle endpoint take to double from the interval to 1 s."""

BUSY, IDLE = b'vllm:num_requests_running{engine="0",model_name="stub"} 3.0\n', b"vllm:num_requests_running 0.0\n"


class IdleEngine(asyncio.Protocol):
    """Answers every GET with the stub engine's page, on which nothing runs."""

    def __init__(self) -> None:
        page = metrics_page().replace(BUSY, IDLE)
        self._reply = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(page), page)
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name

    def data_received(self, data: bytes) -> None:
        if self._transport is not None and data.endswith(b"\r\n\r\n"):
            self._transport.write(self._reply)


async def serve_idle(ports: list[int]) -> None:
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(IdleEngine, "127.0.0.1", port) for port in ports]
    await asyncio.gather(*(server.serve_forever() for server in servers))


async def ours(endpoints: list[Endpoint], settle_s: float = 0.0) -> float:
    """Cores used, from ``settle_s`` after the start."""
    pool = Pool()
    pool.apply(endpoints)
    scraper = Scraper(pool, INTERVAL_S)
    await scraper.start()
    await asyncio.sleep(settle_s)
    used = await cores(asyncio.sleep(SECONDS))
    fresh = pool.fresh(time.monotonic())
    await scraper.stop()
    if scraper.errors or not fresh.all():
        raise RuntimeError(f"{scraper.errors} pages could not be read, {int((~fresh).sum())} endpoints are stale")
    return used


async def with_aiohttp(endpoints: list[Endpoint]) -> None:
    pool = Pool()
    pool.apply(endpoints)

    async def poll(session: aiohttp.ClientSession, endpoint: Endpoint) -> None:
        reader = PageReader()
        due_s = time.monotonic()
        while True:
            async with session.get(f"http://{endpoint.hostport}/metrics") as reply:
                page = await reply.read()
            pool.record(endpoint, reader.read(page, time.monotonic()), time.monotonic())
            due_s = max(due_s + INTERVAL_S, time.monotonic())
            await asyncio.sleep(due_s - time.monotonic())

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), auto_decompress=False) as session:
        tasks = [asyncio.create_task(poll(session, e)) for e in endpoints]
        await asyncio.sleep(SECONDS)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def cores(work: Awaitable[None]) -> float:
    began_cpu_s, began_s = time.process_time(), time.perf_counter()
    await work
    return (time.process_time() - began_cpu_s) / (time.perf_counter() - began_s)


def page_read_ms() -> float:
    page, reader, rounds = metrics_page(), PageReader(), 2000
    began_s = time.process_time()
    for i in range(rounds):
        reader.read(page, float(i) * INTERVAL_S)
    return (time.process_time() - began_s) / rounds * 1e3


async def run(count: int, rounds: int, folder: Path) -> dict[str, float]:
    ports = free_ports(2 * count)
    busy_ports, idle_ports = ports[:count], ports[count:]
    async with Stack(folder) as stack:
        stub = [sys.executable, "-m", "benchmarks.stub_engine", *map(str, busy_ports)]
        idle_stub = [sys.executable, "-m", "benchmarks.bench_scrape", "--serve-idle", *map(str, idle_ports)]
        for name, command, port in (("busy", stub, busy_ports[-1]), ("idle", idle_stub, idle_ports[-1])):
            await wait_http(f"http://127.0.0.1:{port}/metrics", await stack.start(name, command))
        busy, idle = ([Endpoint(f"e{p}", "127.0.0.1", p) for p in some] for some in (busy_ports, idle_ports))
        measured: list[tuple[float, float, float]] = []
        for i in range(rounds):
            measured.append((await ours(busy), await ours(idle, SETTLE_S), await cores(with_aiohttp(busy))))
            sys.stderr.write(f"\r{i + 1}/{rounds} rounds" + ("\n" if i + 1 == rounds else ""))
    return {
        f"scrape_{count}_endpoints_cores": statistics.median(a for a, _, _ in measured),
        f"scrape_{count}_idle_endpoints_cores": statistics.median(b for _, b, _ in measured),
        f"scrape_{count}_endpoints_aiohttp_cores": statistics.median(c for _, _, c in measured),
        "scrape_ours_over_aiohttp_cpu_ratio": statistics.median(a / c for a, _, c in measured),
        "page_read_ms": page_read_ms(),
    }


def main() -> None:
    import uvloop

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--endpoints", type=int, default=100)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--json", metavar="OUT")
    p.add_argument("--serve-idle", type=int, nargs="+", metavar="PORT", help="be the idle engines")
    args = p.parse_args()
    if args.serve_idle:
        uvloop.run(serve_idle(args.serve_idle))
    with tempfile.TemporaryDirectory(prefix="llmd-bench-") as folder:
        found = uvloop.run(run(args.endpoints, args.rounds, Path(folder)))
    table(found)
    if args.json:
        write_json(args.json, {"endpoints": args.endpoints, "interval_s": INTERVAL_S}, 0, found)


if __name__ == "__main__":
    main()
