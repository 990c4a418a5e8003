"""What a line costs the worker's process, in CPU, and how soon another worker takes over from one that is killed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from batchgw.blobs import Blobs
from batchgw.client import reply, result
from batchgw.client.requests import Call, Flight
from batchgw.records import Batch, Claim
from batchgw.store import open_store
from batchgw.worker.inputs import Inputs
from batchgw.worker.worker import WorkerSettings
from benchmarks.batch_engine import Engine, running
from benchmarks.batch_processes import Child, Replies, serve_engine, serve_worker
from benchmarks.batch_site import CHAT, Process, Site, requests

AT_ONCE = 50
"""Lines in flight."""
LIMIT_S = 300.0
LOOK_S = 0.05


async def dispatch(store_url: str, folder: Path, lines: int, tokens: int) -> dict[str, float]:
    """ms of CPU a line: of all from the claim to the written result, and of each part when it runs by itself.

    The engine and PostgreSQL are other processes and not in it; SQLite is in it.
    """
    engine = Child(serve_engine, tokens)
    engine_url = await engine.start()
    try:
        async with _site(store_url, folder, engine_url) as gateway:
            await _whole(gateway, 200, stream=True)  # imports, connections, prepared statements
            figures = {"streamed_cpu_ms_per_line": await _whole(gateway, lines, stream=True)}
            figures["whole_cpu_ms_per_line"] = await _whole(gateway, lines, stream=False)
            batch, _ = await _planned(gateway, lines)
            figures["store_cpu_ms_per_line"], claims = await _store(gateway, batch)
            figures["read_cpu_ms_per_line"], calls = await _read(gateway, claims)
            client = await _client(gateway, calls)
        figures["json_cpu_ms_per_line"] = _json(calls, tokens)
        figures["http_cpu_ms_per_line"] = client - figures["json_cpu_ms_per_line"]
        parts = sum(figures[f"{part}_cpu_ms_per_line"] for part in ("store", "read", "json", "http"))
        figures["loop_cpu_ms_per_line"] = figures["streamed_cpu_ms_per_line"] - parts
        return figures
    finally:
        await engine.kill()


@asynccontextmanager
async def _site(store_url: str, folder: Path, engine_url: str) -> AsyncIterator[Site]:
    (folder / "blobs").mkdir(exist_ok=True)
    async with open_store(store_url) as store:
        yield Site(store, Blobs.open(str(folder / "blobs")), engine_url)


async def _planned(gateway: Site, lines: int, stream: bool = True) -> tuple[Batch, Process]:
    """A batch in progress, and a worker that has not begun."""
    process = Process(gateway, f"w-{time.monotonic_ns()}", per_model=AT_ONCE, settings=WorkerSettings(), stream=stream)
    batch = await gateway.submit(requests(lines, max_tokens=64))
    await process.upkeep.plan()
    return batch, process


async def _whole(gateway: Site, lines: int, stream: bool) -> float:
    batch, process = await _planned(gateway, lines, stream=stream)
    await process.sender.open()
    began_s = time.process_time()
    work = asyncio.create_task(process.worker.run())
    async with asyncio.timeout(LIMIT_S):
        while (await gateway.batch(batch.id)).status == "in_progress":
            await asyncio.sleep(LOOK_S)
    took_s = time.process_time() - began_s
    process.worker.stop()
    await work
    await process.sender.close()
    return 1e3 * took_s / lines


async def _store(gateway: Site, batch: Batch) -> tuple[float, list[Claim]]:
    """Claims and results of all chunks, and nothing else."""
    output, claims = result.answered(batch.id, 0, "c0", 200, b'{"choices": "%s"}' % (b"word " * 60)), list[Claim]()
    began_s = time.process_time()
    while claim := await gateway.store.claim_chunk(batch.id, "m", "store", time.time(), 60.0):
        results = [msgspec.structs.replace(output, line=line) for line in range(claim.chunk.start, claim.chunk.stop)]
        await gateway.store.add_results(claim, results, time.time())
        claims.append(claim)
    took_s = time.process_time() - began_s
    return 1e3 * took_s / sum(claim.chunk.stop - claim.chunk.start for claim in claims), claims


async def _read(gateway: Site, claims: Sequence[Claim]) -> tuple[float, list[Call]]:
    inputs, calls = Inputs(gateway.store, gateway.blobs), list[Call]()
    began_s = time.process_time()
    for claim in claims:
        calls += await inputs.calls(claim)
    return 1e3 * (time.process_time() - began_s) / len(calls), calls


class _Nobody:
    def tokens(self, flight: Flight, count: int) -> None: ...

    def answered(self, flight: Flight, status: int | None, reason: str, retry_after_s: float | None) -> None: ...


async def _client(gateway: Site, calls: Sequence[Call]) -> float:
    """Sending and reading, with the JSON that is part of it."""
    sender, left, nobody = Process(gateway, "client").sender, iter(calls), _Nobody()

    async def some() -> None:
        for call in left:
            assert (await sender.send(Flight(call), nobody)).ok

    await sender.open()
    began_s = time.process_time()
    await asyncio.gather(*(some() for _ in range(AT_ONCE)))
    took_s = time.process_time() - began_s
    await sender.close()
    return 1e3 * took_s / len(calls)


def _json(calls: Sequence[Call], tokens: int) -> float:
    """The body taken apart and written for a stream, the events put together, and the line of the result."""
    events = Replies(tokens).events
    began_s = time.process_time()
    for call in calls:
        msgspec.json.encode(reply.streaming(CHAT, msgspec.json.decode(call.body)))
        assembly = reply.Assembly(CHAT)
        for event in events:
            assembly.feed(event)
        result.answered(call.batch_id, call.line, call.custom_id, 200, msgspec.json.encode(assembly.reply()))
    return 1e3 * (time.process_time() - began_s) / len(calls)


async def recovery(store_url: str, folder: Path, lease_s: float, heartbeat_s: float) -> dict[str, float]:
    """Seconds from the kill of the only worker until another has sent each line again that was in flight, and until
    the batch is over."""
    async with (
        running(Engine(tokens=10, token_s=0.05)) as engine,
        _site(store_url, folder, engine.url) as gateway,
    ):
        batch = await gateway.submit(requests(200))
        victim = Child(serve_worker, store_url, str(folder / "blobs"), engine.url, "victim", lease_s, heartbeat_s)
        await victim.start()
        async with asyncio.timeout(60.0):
            while (await gateway.batch(batch.id)).completed < 40:
                await asyncio.sleep(LOOK_S)
        await victim.kill()
        killed_s = time.monotonic()
        answered = {msgspec.json.decode(one.output)["id"] async for one in gateway.store.results(batch.id)}
        cut = set(engine.calls) - answered
        async with gateway.worker("rescuer", per_model=AT_ONCE, lease_s=lease_s, heartbeat_s=heartbeat_s):
            async with asyncio.timeout(LIMIT_S):
                while any(engine.calls[id] < 2 for id in cut):
                    await asyncio.sleep(LOOK_S)
            resent_s = time.monotonic() - killed_s
            await gateway.ended(batch.id, LIMIT_S)
        return {"lines": float(len(cut)), "resent_s": resent_s, "over_s": time.monotonic() - killed_s}
