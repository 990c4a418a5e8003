"""What the scheduler costs per request and per streamed chunk, and how long a pick takes, behind a real Envoy.

    python -m benchmarks.bench_extproc --path lean|duplex [--json OUT]

Ten canned engines (``stub_engine``), the scheduler as shipped with the latency-predicting configuration, one Envoy of
one thread. Cases run in turn, several rounds, so that noise hits all alike; a figure is the median over rounds.

CPU is the scheduler process's own (user + system), as the kernel counts it; the trainer's process is told apart. It
includes reading ten engines' metrics every 50 ms, also shown alone (``idle_scrape_cores``); ``net`` figures have that
taken out. Pick latency is from sending a request to the first byte of an instant engine's reply, through
Envoy: an upper bound of what the scheduler adds. ``direct`` is the same without Envoy and scheduler.

``bare`` (lean only) is the small case against a server with one answer for every request (``bare_extproc``): what gRPC
costs on this machine at this moment. The ratio to it is steadier than the milliseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import yaml

from benchmarks.results import table, write_json
from llmd_sched.extproc.envoy import EnvoySettings, render
from llmd_sched.load.client import replay
from llmd_sched.load.report import Result
from llmd_sched.load.workload import Item, Span
from llmd_sched.stack import CpuMeter, Stack, free_ports, wait_http

ENDPOINTS = 10
SMALL_TOKENS, LARGE_TOKENS = 600, 50_000
"""2.4 KB and 200 KB of prompt."""
CHUNK_GAP_MS = 2.0
SETTLE_S = 0.5


class Case(NamedTuple):
    """``tokens`` of prompt, ``output`` events of reply, ``rate_per_s`` requests for ``seconds``."""

    name: str
    tokens: int
    output: int
    rate_per_s: float
    seconds: float


CASES = (
    Case("small", SMALL_TOKENS, 1, 200, 6),
    Case("small_10_tokens", SMALL_TOKENS, 10, 15, 8),
    Case("small_1000_tokens", SMALL_TOKENS, 1000, 15, 8),
    Case("large", LARGE_TOKENS, 1, 100, 5),
)


class Measured(NamedTuple):
    cpu_ms: float
    """Per request, gross."""
    net_cpu_ms: float
    """Per request, without the scraping."""
    trainer_cpu_ms: float
    first_byte_ms: list[float]
    chunks: int
    requests: int
    failed: int


def items(case: Case, serial: Iterator[int]) -> Iterator[Item]:
    """Evenly spaced; half of each prompt is shared by all, half is its own."""
    for i in range(int(case.rate_per_s * case.seconds)):
        own = Span(f"bench-{next(serial)}", case.tokens // 2)
        prompt = (Span("bench-shared", case.tokens - case.tokens // 2), own)
        yield Item(at_s=i / case.rate_per_s, session="bench", prompt=prompt, output_tokens=case.output)


async def drive(url: str, workload: Iterator[Item]) -> list[Result]:
    results: list[Result] = []
    await replay(
        url, workload, model="stub", headers={}, concurrency_limit=500, timeout_s=60,
        on_result=results.append, stop=asyncio.Event(),
    )  # fmt: skip
    return results


class Bench:
    def __init__(self, url: str, direct: str, scheduler_pid: int) -> None:
        self.url, self.direct, self.pid = url, direct, scheduler_pid
        self.bare: tuple[str, int] | None = None
        """URL and process id of the bare server."""
        self.bare_cpu_ms: list[float] = []
        self.serial = itertools.count()
        self.idle_cores: list[float] = []
        self.measured: dict[str, list[Measured]] = defaultdict(list)
        self.direct_ms: list[float] = []

    async def idle(self, seconds: float = 5.0) -> None:
        meter = CpuMeter(self.pid)
        await asyncio.sleep(seconds)
        self.idle_cores.append(meter.read()[0] / seconds)

    async def case(self, case: Case) -> None:
        meter = CpuMeter(self.pid)
        began_s = asyncio.get_running_loop().time()
        results = await drive(self.url, items(case, self.serial))
        await asyncio.sleep(SETTLE_S)
        own_s, trainer_s = meter.read()
        wall_s = asyncio.get_running_loop().time() - began_s
        n = len(results)
        self.measured[case.name].append(
            Measured(
                cpu_ms=own_s * 1e3 / n,
                net_cpu_ms=(own_s - self.idle_cores[-1] * wall_s) * 1e3 / n,
                trainer_cpu_ms=trainer_s * 1e3 / n,
                first_byte_ms=[r.ttft_s * 1e3 for r in results if r.ttft_s is not None],
                chunks=sum(r.chunks for r in results),
                requests=n,
                failed=sum(r.error is not None for r in results),
            )
        )

    async def bare_case(self, case: Case) -> None:
        if self.bare is not None:
            url, pid = self.bare
            meter = CpuMeter(pid)
            results = await drive(url, items(case, self.serial))
            await asyncio.sleep(SETTLE_S)
            self.bare_cpu_ms.append(meter.read()[0] * 1e3 / len(results))

    async def direct_case(self, case: Case) -> None:
        results = await drive(self.direct, items(case, self.serial))
        self.direct_ms += [r.ttft_s * 1e3 for r in results if r.ttft_s is not None]


async def run(path: str, rounds: int, folder: Path) -> Bench:
    async with Stack(folder) as stack:
        bench = await start(stack, path)
        await drive(bench.url, items(CASES[0], bench.serial))
        total = rounds * (len(CASES) + 2)
        done = itertools.count(1)
        for _ in range(rounds):
            await bench.idle()
            progress(next(done), total)
            for case in CASES:
                await bench.case(case)
                progress(next(done), total)
            await bench.bare_case(CASES[0])
            await bench.direct_case(CASES[0])
            progress(next(done), total)
        return bench


async def start(stack: Stack, path: str) -> Bench:
    ports = free_ports(ENDPOINTS + 9)
    engines, (gapped, grpc, health, metrics, listen, admin, *bare_ports) = ports[:ENDPOINTS], ports[ENDPOINTS:]
    await stack.start(
        "stub", [sys.executable, "-m", "benchmarks.stub_engine", *map(str, engines), "--delay-ms", str(CHUNK_GAP_MS)]
    )
    instant = await stack.start("instant", [sys.executable, "-m", "benchmarks.stub_engine", str(gapped)])
    await wait_http(f"http://127.0.0.1:{gapped}/metrics", instant)
    endpoints = [{"name": f"e{i}", "address": "127.0.0.1", "port": p} for i, p in enumerate(engines)]
    (stack.folder / "endpoints.yaml").write_text(yaml.safe_dump({"endpoints": endpoints}))
    (stack.folder / "config.yaml").write_text(resources.files("llmd_sched").joinpath("local.yaml").read_text())
    scheduler = await stack.start_llmd(
        "scheduler", "serve", "--config-file", str(stack.folder / "config.yaml"), "--host", "127.0.0.1",
        "--endpoints-file", str(stack.folder / "endpoints.yaml"), "--secure-serving=false", "--grpc-port", str(grpc),
        "--grpc-health-port", str(health), "--metrics-port", str(metrics), "--drain-timeout", "1s",
    )  # fmt: skip
    await wait_http(f"http://127.0.0.1:{metrics}/metrics", scheduler)
    settings = EnvoySettings(
        path=path, listen_host="127.0.0.1", listen_port=listen, admin_port=admin, scheduler_port=grpc
    )
    envoy = await stack.start_envoy(render(settings))
    await wait_http(f"http://127.0.0.1:{admin}/ready", envoy)
    bench = Bench(f"http://127.0.0.1:{listen}", f"http://127.0.0.1:{gapped}", scheduler.pid)
    if path == "lean":
        bench.bare = await start_bare(stack, f"127.0.0.1:{engines[0]}", *bare_ports)
    return bench


async def start_bare(stack: Stack, destination: str, grpc: int, listen: int, admin: int) -> tuple[str, int]:
    bare = await stack.start("bare", [sys.executable, "-m", "benchmarks.bare_extproc", str(grpc), destination])
    settings = EnvoySettings(listen_host="127.0.0.1", listen_port=listen, admin_port=admin, scheduler_port=grpc)
    envoy = await stack.start_envoy(render(settings), name="envoy-bare")
    await wait_http(f"http://127.0.0.1:{admin}/ready", envoy)
    return f"http://127.0.0.1:{listen}", bare.pid


def figures(bench: Bench, path: str) -> dict[str, float]:
    out: dict[str, float] = {f"{path}_idle_scrape_cores": statistics.median(bench.idle_cores)}
    for name, rounds in bench.measured.items():
        out[f"{path}_{name}_cpu_ms_per_request"] = statistics.median(m.cpu_ms for m in rounds)
        out[f"{path}_{name}_net_cpu_ms_per_request"] = statistics.median(m.net_cpu_ms for m in rounds)
        out[f"{path}_{name}_failed_requests"] = float(sum(m.failed for m in rounds))
    few, many = bench.measured["small_10_tokens"], bench.measured["small_1000_tokens"]
    pairs = list(zip(few, many, strict=True))
    out[f"{path}_1000_to_10_tokens_net_cpu_ratio"] = statistics.median(b.net_cpu_ms / a.net_cpu_ms for a, b in pairs)
    out[f"{path}_cpu_ms_per_chunk"] = statistics.median(
        (b.net_cpu_ms - a.net_cpu_ms) / (b.chunks / b.requests - a.chunks / a.requests) for a, b in pairs
    )
    first = [ms for m in bench.measured["small"] for ms in m.first_byte_ms]
    for q in (50, 95, 99):
        out[f"{path}_pick_ms_p{q}"] = float(np.percentile(first, q))
    out[f"{path}_direct_first_byte_ms_p50"] = float(np.percentile(bench.direct_ms, 50))
    if bench.bare_cpu_ms:
        ours = [m.net_cpu_ms for m in bench.measured["small"]]
        out[f"{path}_bare_cpu_ms_per_request"] = statistics.median(bench.bare_cpu_ms)
        ratios = [a / b for a, b in zip(ours, bench.bare_cpu_ms, strict=True)]
        out[f"{path}_small_net_over_bare_cpu_ratio"] = statistics.median(ratios)
    out[f"{path}_trainer_cpu_ms_per_request"] = statistics.median(m.trainer_cpu_ms for m in bench.measured["small"])
    return out


def progress(done: int, total: int) -> None:
    sys.stderr.write(f"\r{done}/{total} measurements" + ("\n" if done == total else ""))
    sys.stderr.flush()


def main() -> None:
    import uvloop

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--path", choices=("lean", "duplex"), default="lean")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--json", metavar="OUT")
    args = p.parse_args()
    with tempfile.TemporaryDirectory(prefix="llmd-bench-") as folder:
        bench = uvloop.run(run(args.path, args.rounds, Path(folder)))
    found = figures(bench, args.path)
    table(found)
    if args.json:
        cases = msgspec.to_builtins(CASES)
        write_json(args.json, {"path": args.path, "endpoints": ENDPOINTS, "cases": cases}, 0, found)


if __name__ == "__main__":
    main()
