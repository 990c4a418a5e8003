"""Batch beside interactive traffic, live: simulated engines in real time, the scheduler, Envoy and a batch worker.

    python -m benchmarks.batch_live [--laws protect,harvest] [--engines 1] [--slower 4] [--phase 20] [--json OUT]

Each law is a run of its own over the same arrivals, after one without batch: idle and burst phases in turn, twice, the
first for warming up. Everything runs ``slower`` times as slow as the engine it stands for, engines, arrivals and what
the scheduler is told alike, so that what this host adds is small beside it. Ratios are to the run without batch, over
requests that arrive in the second burst, and over all after the first cycle. ``generated`` are batch's output tokens
per second of an engine at full speed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import msgspec
import numpy as np

from batchgw.store import open_store
from batchgw.worker.headroom_pacer import HeadroomPacer
from benchmarks.asked import names, positive
from benchmarks.batch_site import Process, site
from benchmarks.batch_traffic import SCENARIOS, Scenario, batch_lines
from benchmarks.results import table, write_json
from llmd_sched import headers
from llmd_sched.extproc.envoy import EnvoySettings, render
from llmd_sched.sim.steptime import PRESETS
from llmd_sched.stack import Stack, envoy_binary, free_ports, wait_http

PRESET = "llama-3-8b-h100"
SEED = 42
LINES = 3000
BOUND_FACTOR = 1.15
LAWS = ("protect", "harvest")
QUANTILES = (50, 95)


class Asked(msgspec.Struct):
    """An interactive request and what became of it; seconds of the wall clock."""

    at_s: float
    first_s: float = np.nan
    end_s: float = np.nan
    tokens: int = 0


class World:
    """What runs: engines, the scheduler with ``itl_ms`` as its bound, and Envoy."""

    def __init__(self, stack: Stack, engines: int, slower: float) -> None:
        self.stack, self.slower = stack, slower
        self.ports = free_ports(engines + 5)
        self.engines = self.ports[5:]
        self.url, self.admin = f"http://127.0.0.1:{self.ports[3]}", f"http://127.0.0.1:{self.ports[2]}"

    async def start(self, mode: str, itl_ms: float | None) -> None:
        listed = [{"name": f"engine-{i}", "address": "127.0.0.1", "port": p} for i, p in enumerate(self.engines)]
        (self.stack.folder / "endpoints.json").write_text(json.dumps({"endpoints": listed}))
        config_file = self.stack.folder / "config.json"
        config_file.write_text(json.dumps(config(mode, itl_ms, self.slower)))
        grpc, health, metrics, listen, admin = self.ports[:5]
        for i, port in enumerate(self.engines):
            child = await self.stack.start_llmd(
                f"engine-{i}", "sim-engine", "--preset", PRESET, "--port", str(port), "--policy", "priority",
                "--speedup", str(1 / self.slower), "--noise", "0.05", "--seed", str(i),
            )  # fmt: skip
            await wait_http(f"http://127.0.0.1:{port}/health", child)
        child = await self.stack.start_llmd(
            "scheduler", "serve", "--config-file", str(config_file), "--host", "127.0.0.1", "--secure-serving=false",
            "--endpoints-file", str(self.stack.folder / "endpoints.json"), "--grpc-port", str(grpc),
            "--grpc-health-port", str(health), "--metrics-port", str(metrics),
        )  # fmt: skip
        await wait_http(f"{self.admin}/metrics", child)
        settings = EnvoySettings(
            listen_host="127.0.0.1", listen_port=listen, admin_port=admin, scheduler_port=grpc,
            read_headers=(headers.DESTINATION_SUBSET,),
        )  # fmt: skip
        child = await self.stack.start_envoy(render(settings))
        await wait_http(f"http://127.0.0.1:{admin}/ready", child)

    async def generated(self, session: aiohttp.ClientSession) -> float:
        """Output tokens of all engines so far."""
        total = 0.0
        for port in self.engines:
            async with session.get(f"http://127.0.0.1:{port}/metrics") as reply:
                lines = (await reply.text()).splitlines()
            total += sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:generation_tokens_total"))
        return total


def config(mode: str, itl_ms: float | None, slower: float) -> dict[str, object]:
    """The scheduler's: told of the engines as they are, and of nothing else."""
    preset = PRESETS[PRESET]
    told = {
        "mode": mode,
        "stepBaseMs": preset.step_base_s * 1e3 * slower,
        "prefillTokenUs": preset.prefill_token_s * 1e6 * slower,
        "sequenceUs": preset.sequence_s * 1e6 * slower,
        "contextTokenNs": preset.decode_context_token_s * 1e9 * slower,
    }
    return {
        "apiVersion": "llm-d.ai/v1alpha1",
        "kind": "EndpointPickerConfig",
        "plugins": [
            {"type": "static-objectives", "parameters": {"objectives": {"batch": -1}}},
            {"type": "batch-headroom-producer", "parameters": told | ({"itlMs": itl_ms} if itl_ms else {})},
            {"type": "batch-headroom-filter"},
            {"type": "active-request-scorer"},
            {"type": "max-score-picker"},
        ],
    }


@asynccontextmanager
async def batch(world: World, wanted: bool) -> AsyncIterator[None]:
    """A worker in a process of its own, and more lines than it can do."""
    if not wanted:
        yield
        return
    folder = world.stack.folder
    (folder / "blobs").mkdir()
    store = f"sqlite:///{folder}/batch.db"
    async with site(lambda: open_store(store), folder / "blobs", world.url) as gateway:
        await gateway.submit(b"".join(lines()))
        command = [sys.executable, "-m", "benchmarks.batch_live", "--work", store, str(folder / "blobs")]
        await world.stack.start("worker", [*command, world.url, world.admin])
        yield


def lines() -> Iterator[bytes]:
    """Of an input file."""
    for number, (prompt, output) in enumerate(batch_lines(SEED, LINES)):
        content = f"{number:08d}" + "word" * (prompt - 2)
        body = {
            "model": PRESETS[PRESET].model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": output,
        }
        line = {"custom_id": f"c{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        yield json.dumps(line).encode() + b"\n"


async def work(store: str, blobs: str, url: str, admin: str) -> None:
    """As ``batchgw worker`` does, for ever."""
    async with site(lambda: open_store(store), Path(blobs), url) as gateway:
        pacer = HeadroomPacer(lambda model: admin)
        await Process(gateway, "worker", pacer=pacer, request_timeout_s=300.0, priority=1).serve()


async def ask(session: aiohttp.ClientSession, asked: Asked, number: int, prompt: int, output: int) -> None:
    content = f"{number:08d}" + "word" * (prompt - 2)
    body = {"model": PRESETS[PRESET].model, "prompt": content, "max_tokens": output, "stream": True}
    async with session.post("/v1/completions", json=body) as reply:
        reply.raise_for_status()
        async for line in reply.content:
            if line.startswith(b"data: {"):
                asked.end_s = time.perf_counter()
                asked.tokens += 1
                if asked.tokens == 1:
                    asked.first_s = asked.end_s


async def traffic(world: World, scenario: Scenario) -> tuple[list[Asked], list[float]]:
    """All interactive requests, and the engines' output tokens at the end of each phase."""
    made: list[Asked] = []
    counts: list[float] = []
    began_s = time.perf_counter()

    async def count(session: aiohttp.ClientSession) -> None:
        for phase in range(2 * scenario.cycles + 1):
            await asyncio.sleep(began_s + phase * scenario.phase_s * world.slower - time.perf_counter())
            counts.append(await world.generated(session))

    timeout = aiohttp.ClientTimeout(total=600.0)
    connector = aiohttp.TCPConnector(limit=0)
    session = aiohttp.ClientSession(world.url, timeout=timeout, connector=connector)
    async with session, asyncio.TaskGroup() as group:
        group.create_task(count(session))
        for number, (at_s, prompt, output) in enumerate(scenario.arrivals(SEED)):
            await asyncio.sleep(began_s + at_s * world.slower - time.perf_counter())
            made.append(Asked(time.perf_counter()))
            group.create_task(ask(session, made[-1], number, prompt, output))
    for one in made:
        one.at_s, one.first_s, one.end_s = one.at_s - began_s, one.first_s - began_s, one.end_s - began_s
    return made, counts


async def run(
    mode: str | None, scenario: Scenario, engines: int, slower: float, itl_ms: float | None
) -> dict[str, float]:
    """Latencies in ms of the wall clock; ``mode`` None is without batch."""
    with tempfile.TemporaryDirectory() as folder:
        async with Stack(Path(folder)) as stack:
            world = World(stack, engines, slower)
            await world.start(mode or "protect", itl_ms)
            async with batch(world, mode is not None):
                made, counts = await traffic(world, scenario)
    return figures(made, counts, scenario, engines, slower)


def figures(
    made: list[Asked], counts: list[float], scenario: Scenario, engines: int, slower: float
) -> dict[str, float]:
    later = [one for one in made if one.at_s >= scenario.warm_up_s * slower]
    found: dict[str, float] = {}
    for name, group in (("burst", [o for o in later if scenario.bursting(o.at_s / slower)]), ("all", later)):
        ttft_ms = [(one.first_s - one.at_s) * 1e3 for one in group]
        itl_ms = [(one.end_s - one.first_s) * 1e3 / (one.tokens - 1) for one in group if one.tokens > 1]
        for q in QUANTILES:
            found[f"{name}_ttft_p{q}_ms"] = float(np.percentile(ttft_ms, q))
            found[f"{name}_itl_p{q}_ms"] = float(np.percentile(itl_ms, q))
    edges_s = [phase * scenario.phase_s * slower for phase in range(len(counts))]
    for name, phase in (("idle", 2), ("burst", 3)):
        own = sum(overlap(one, edges_s[phase], edges_s[phase + 1]) for one in made)
        per_s = (counts[phase + 1] - counts[phase] - own) / (scenario.phase_s * engines)
        found[f"{name}_generated_tokens_per_s"] = max(per_s, 0.0)
    return found


def overlap(one: Asked, from_s: float, to_s: float) -> float:
    """Tokens of a request in a span of time, as if they came evenly."""
    inside_s = max(0.0, min(one.end_s, to_s) - max(one.first_s, from_s))
    return one.tokens * inside_s / max(one.end_s - one.first_s, 1e-9)


async def measure(args: argparse.Namespace) -> dict[str, float]:
    """Told to end, it stops what it started."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    scenario = msgspec.structs.replace(SCENARIOS["L8A"], phase_s=args.phase, cycles=2, engines=args.engines)
    setting = scenario, args.engines, args.slower
    alone = await run(None, *setting, None)
    found = {f"alone_{name}": value for name, value in alone.items()}
    for law in args.laws or LAWS:
        made = await run(law, *setting, BOUND_FACTOR * alone["burst_itl_p95_ms"])
        for name, value in made.items():
            timed = name.endswith("_ms")
            found[f"{law}_{name.removesuffix('_ms')}_ratio" if timed else f"{law}_{name}"] = (
                value / alone[name] if timed else value
            )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--laws", type=names, metavar="X,Y")
    p.add_argument("--engines", type=positive, default=1, metavar="N", help="(%(default)s)")
    p.add_argument("--slower", type=float, default=4.0, metavar="X", help="(%(default)s)")
    p.add_argument("--phase", type=float, default=20.0, metavar="S", help="of the engine's time (%(default)s)")
    p.add_argument("--json", type=Path, metavar="OUT")
    p.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.work:
        asyncio.run(work(*args.work))
        return 0
    unknown = set(args.laws or ()) - set(LAWS)
    if unknown or not args.slower > 0 or not args.phase >= 1:
        p.error(f"laws are {', '.join(LAWS)}; --slower must be above 0 and --phase at least 1")
    envoy_binary()
    found = asyncio.run(measure(args))
    table(found)
    if args.json:
        config = {name: value for name, value in vars(args).items() if name not in ("json", "work")}
        write_json(args.json, config, SEED, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
