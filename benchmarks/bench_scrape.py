"""What reading metrics costs, and by whom.

    python -m benchmarks.bench_scrape [--endpoints 100] [--json OUT]

Canned engines with 52 KB pages in a process of their own. In turn, several rounds: the scraper as shipped (every
endpoint every 50 ms), and aiohttp with the same page reader at the same pace. CPU is this process's own, which does
nothing else. ``page_read_ms`` is the page reader alone, without any HTTP.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp

from benchmarks.results import table, write_json
from benchmarks.stub_engine import metrics_page
from llmd_sched.pool.pool import Pool
from llmd_sched.pool.scrape import PageReader, Scraper
from llmd_sched.stack import Stack, free_ports, wait_http
from llmd_sched.types import Endpoint

INTERVAL_S = 0.05
SECONDS = 4.0


async def ours(endpoints: list[Endpoint]) -> None:
    pool = Pool()
    pool.apply(endpoints)
    scraper = Scraper(pool, INTERVAL_S)
    await scraper.start()
    await asyncio.sleep(SECONDS)
    await scraper.stop()
    if scraper.errors or not pool.fresh(time.monotonic()).all():
        raise RuntimeError(f"{scraper.errors} pages could not be read")


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


async def cores(reads: Callable[[list[Endpoint]], Awaitable[None]], endpoints: list[Endpoint]) -> float:
    began_cpu_s, began_s = time.process_time(), time.perf_counter()
    await reads(endpoints)
    return (time.process_time() - began_cpu_s) / (time.perf_counter() - began_s)


def page_read_ms() -> float:
    page, reader, rounds = metrics_page(), PageReader(), 2000
    began_s = time.process_time()
    for i in range(rounds):
        reader.read(page, float(i) * INTERVAL_S)
    return (time.process_time() - began_s) / rounds * 1e3


async def run(count: int, rounds: int, folder: Path) -> dict[str, float]:
    ports = free_ports(count)
    async with Stack(folder) as stack:
        stub = await stack.start("stub", [sys.executable, "-m", "benchmarks.stub_engine", *map(str, ports)])
        await wait_http(f"http://127.0.0.1:{ports[-1]}/metrics", stub)
        endpoints = [Endpoint(f"e{i}", "127.0.0.1", port) for i, port in enumerate(ports)]
        measured: list[tuple[float, float]] = []
        for i in range(rounds):
            measured.append((await cores(ours, endpoints), await cores(with_aiohttp, endpoints)))
            sys.stderr.write(f"\r{i + 1}/{rounds} rounds" + ("\n" if i + 1 == rounds else ""))
    return {
        f"scrape_{count}_endpoints_cores": statistics.median(a for a, _ in measured),
        f"scrape_{count}_endpoints_aiohttp_cores": statistics.median(b for _, b in measured),
        "scrape_ours_over_aiohttp_cpu_ratio": statistics.median(a / b for a, b in measured),
        "page_read_ms": page_read_ms(),
    }


def main() -> None:
    import uvloop

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--endpoints", type=int, default=100)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--json", metavar="OUT")
    args = p.parse_args()
    with tempfile.TemporaryDirectory(prefix="llmd-bench-") as folder:
        found = uvloop.run(run(args.endpoints, args.rounds, Path(folder)))
    table(found)
    if args.json:
        write_json(args.json, {"endpoints": args.endpoints, "interval_s": INTERVAL_S}, 0, found)


if __name__ == "__main__":
    main()
