"""``batchgw`` as processes: the official client against one, a batch that outlives its processes, what they refuse."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import fakeredis
import openai
import pytest
from prometheus_client import CollectorRegistry

from batchgw.__main__ import main
from batchgw.app.parts import Batching, storage
from batchgw.config import load
from benchmarks.batch_engine import Engine, Fault, running, text_of
from benchmarks.batch_site import CHAT, requests

PATIENCE_S = 40.0
SECONDS: dict[str, Any] = {
    "worker": {"pollS": 0.05, "flushS": 0.05, "stopS": 5.0},
    "upkeep": {"lookS": 0.05},
    "pace": {"gate": {"type": "constant"}, "perModel": 10},
}
"""Everything quick."""


def write(folder: Path, **settings: Any) -> Path:
    """A configuration over the folder's data; JSON is YAML."""
    file = folder / "config.yaml"
    usual = {"listen": "127.0.0.1:0", "ops": "127.0.0.1:0", "workerOps": "127.0.0.1:0", "data": str(folder / "data")}
    file.write_text(json.dumps({**usual, **SECONDS, **settings}))
    return file


class Running:
    """A process that has said where it listens. ``stop`` returns its exit status."""

    def __init__(self, process: asyncio.subprocess.Process, said: str, log: Path) -> None:
        self.process, self.said, self.log = process, said, log

    def url(self, of: str) -> str:
        found = re.search(rf"{of} (http://127\.0\.0\.1:[0-9]+)", self.said)
        assert found, self.said
        return found[1]

    def client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url('API')}/v1", api_key="any", max_retries=0)

    async def stop(self, by: signal.Signals = signal.SIGTERM) -> int:
        if self.process.returncode is None:
            self.process.send_signal(by)
        async with asyncio.timeout(PATIENCE_S):
            return await self.process.wait()


@asynccontextmanager
async def started(command: str, config: Path, *flags: str) -> AsyncIterator[Running]:
    """Killed at the end, if it still runs."""
    log = config.with_name(f"{command}.log")
    with log.open("ab") as errors:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "batchgw", command, "--config", str(config), *flags,
            stdout=asyncio.subprocess.PIPE, stderr=errors,
        )  # fmt: skip
    assert process.stdout is not None
    try:
        async with asyncio.timeout(PATIENCE_S):
            said = (await process.stdout.readline()).decode()
        assert said, log.read_text()
        yield Running(process, said, log)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def until(client: openai.AsyncOpenAI, batch_id: str, completed: int) -> None:
    """So many lines have their answer, and others do not."""
    async with asyncio.timeout(PATIENCE_S):
        while (counts := (await client.batches.retrieve(batch_id)).request_counts) and counts.completed < completed:
            await asyncio.sleep(0.02)
    assert counts is not None
    assert counts.completed < counts.total


async def ended(client: openai.AsyncOpenAI, batch_id: str) -> openai.types.Batch:
    async with asyncio.timeout(PATIENCE_S):
        while (batch := await client.batches.retrieve(batch_id)).status not in ("completed", "failed", "expired"):
            await asyncio.sleep(0.02)
    return batch


async def submitted(client: openai.AsyncOpenAI, data: bytes) -> openai.types.Batch:
    file = await client.files.create(file=("in.jsonl", data), purpose="batch")
    return await client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")  # type: ignore[arg-type]


async def custom_ids(client: openai.AsyncOpenAI, batch: openai.types.Batch) -> list[str]:
    assert batch.output_file_id is not None
    text = (await client.files.content(batch.output_file_id)).text
    return [json.loads(line)["custom_id"] for line in text.splitlines()]


async def status_of(url: str) -> tuple[int, str]:
    timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
    async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url) as response:
        return response.status, await response.text()


async def test_the_official_client_and_the_command_line_run_batches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOOK_SECRET", "whsec_" + 12 * "abcd")
    refuse = Fault("status", 400)
    async with running(Engine(trouble=lambda asked: refuse if text_of(asked.body) == "line 3" else None)) as engine:
        hook = {"url": f"{engine.url}/hook", "secret": "${HOOK_SECRET}"}
        config = write(tmp_path, webhooks={"ours": hook}, worker={**SECONDS["worker"], "stopS": PATIENCE_S})
        async with started("serve", config, "--gateway", engine.url) as gateway, gateway.client() as client:
            url = gateway.url("API")
            batch = await ended(client, (await submitted(client, requests(40))).id)
            assert batch.request_counts is not None
            assert batch.request_counts.model_dump() == {"total": 40, "completed": 39, "failed": 1}
            assert await custom_ids(client, batch) == [f"c{i}" for i in range(40) if i != 3]
            for path, text in (("health", "OK"), ("ready", "ok"), ("metrics", "batchgw_harvested_tokens_total")):
                status, body = await status_of(f"{gateway.url('metrics')}/{path}")
                assert (status, text in body) == (200, True), path
            assert (await status_of(f"{url}/docs"))[0] == 200
            await asyncio.to_thread(command_line, tmp_path, url, capsys)
            told = [asked.body for asked in engine.asked if asked.path == "/hook"]
            assert told[0]["type"] == "batch.completed"
            assert told[0]["data"] == {"id": batch.id}
            await stops_at_once(gateway, client, engine)
        assert "Traceback" not in gateway.log.read_text()


async def stops_at_once(gateway: Running, client: openai.AsyncOpenAI, engine: Engine) -> None:
    """A stop waits for lines that hang, while probes say so; a second one does not."""
    engine.trouble = lambda asked: Fault("hang")
    await submitted(client, requests(1))
    ops = gateway.url("metrics")
    async with asyncio.timeout(PATIENCE_S):
        await engine.hung.wait()
        gateway.process.send_signal(signal.SIGTERM)
        while (await status_of(f"{ops}/ready"))[0] != 503:
            await asyncio.sleep(0.02)
        while await answers(f"{gateway.url('API')}/health"):
            await asyncio.sleep(0.02)
        assert await status_of(f"{ops}/health") == (200, "OK")
    assert await gateway.stop() == 1


async def answers(url: str) -> bool:
    try:
        return bool(await status_of(url))
    except aiohttp.ClientConnectionError:
        return False


def command_line(folder: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """``submit`` and ``status`` against a running gateway."""
    good, bad, out = folder / "good.jsonl", folder / "bad.jsonl", folder / "out.jsonl"
    good.write_bytes(requests(5))
    assert main(["submit", str(good), "--wait", "--output", str(out), "--base-url", url]) == 0
    said = capsys.readouterr().out
    assert "completed: 4 of 5 lines answered, 1 failed; 4 prompt tokens" in said
    assert [json.loads(line)["custom_id"] for line in out.read_text().splitlines()] == ["c0", "c1", "c2", "c4"]
    assert json.loads((folder / "out.errors.jsonl").read_text())["custom_id"] == "c3"
    bad.write_bytes(requests(2) + b"nonsense\n")
    assert main(["submit", str(bad), "--base-url", f"{url}/v1"]) == 1
    assert capsys.readouterr().err.startswith("line 3: ")
    assert main(["status", "--base-url", url]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in listed[1:]] == ["5/5", "40/40"]
    assert main(["status", "batch_none", "--base-url", url]) == 1
    assert capsys.readouterr().err == "batchgw status: Batch with ID batch_none not found (404)\n"
    assert main(["submit", str(folder / "none.jsonl"), "--base-url", url]) == 1
    assert "No such file" in capsys.readouterr().err


async def test_a_batch_outlives_a_stop_and_a_kill_and_ends_under_an_api_and_a_worker_of_their_own(
    tmp_path: Path,
) -> None:
    async with running(Engine(tokens=3, token_s=0.02)) as engine:
        config = write(tmp_path, leases={"leaseS": 600.0, "heartbeatS": 1.0}, gateway=engine.url)
        async with started("serve", config) as first, first.client() as client:
            batch = await submitted(client, requests(300))
            await until(client, batch.id, 40)
            assert await first.stop() == 0
        sent = dict(engine.calls)
        assert set(sent.values()) == {1}, "lines that ran were answered, not cut"

        config = write(tmp_path, leases={"leaseS": 1.0, "heartbeatS": 0.25}, gateway=engine.url)
        async with started("serve", config) as second, second.client() as client:
            await until(client, batch.id, len(sent) + 40)
            assert await second.stop(signal.SIGKILL) == -signal.SIGKILL
        assert not [id for id in sent if engine.calls[id] > 1], "what had a result was not sent again"

        async with started("api", config) as api, started("worker", config) as worker, api.client() as client:
            assert (await status_of(f"{worker.url('metrics')}/ready"))[0] == 200
            batch = await ended(client, batch.id)
            assert batch.request_counts is not None
            assert batch.request_counts.model_dump() == {"total": 300, "completed": 300, "failed": 0}
            assert await custom_ids(client, batch) == [f"c{i}" for i in range(300)]
            assert [await one.stop() for one in (api, worker)] == [0, 0]


async def test_a_redis_queue_is_served_beside_batches_and_with_them_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    redis = fakeredis.FakeServer()
    monkeypatch.setattr("redis.asyncio.from_url", lambda url, **timeouts: fakeredis.FakeAsyncRedis(server=redis))
    message = {"id": "r1", "deadline": time.time() + 60, "payload": {"model": "m", "prompt": "hi"}}
    async with running(Engine()) as engine, fakeredis.FakeAsyncRedis(server=redis) as client:
        config = write(tmp_path, gateway=engine.url, redisSource={"url": "redis://x", "pollS": 0.02})
        settings = load(config.read_text(), {})
        async with storage(settings) as (store, blobs), asyncio.timeout(PATIENCE_S):
            batching = Batching(settings, store, blobs, CollectorRegistry())
            running_task = asyncio.create_task(batching.run())
            await client.zadd("request-sortedset", {json.dumps(message): message["deadline"]})
            while (answer := await client.rpop("result-list")) is None:
                await asyncio.sleep(0.01)
            batching.stop()
            await running_task
    assert (json.loads(answer)["id"], json.loads(answer)["status_code"]) == ("r1", 200)


@pytest.fixture
def quiet() -> Iterator[None]:
    """The root logger as it was: ``main`` sets it up."""
    import logging

    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    yield
    root.setLevel(before[0])
    root.handlers[:] = before[1]


def test_keys_are_made_and_revoked_and_what_is_old_is_collected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(write(tmp_path, api={"apiKeysRequired": True}))
    assert main(["add-key", "acme", "--config", config]) == 0
    key = capsys.readouterr().out.strip()
    assert re.fullmatch("sk-[A-Za-z0-9_-]{43}", key)
    assert key.encode() not in (tmp_path / "data" / "batch.db").read_bytes()
    assert main(["revoke-key", key, "--config", config]) == 0
    assert main(["revoke-key", key, "--config", config]) == 1
    assert main(["gc", "--config", config]) == 0
    assert capsys.readouterr().out == "0 batches expired, 0 files removed, 0 uploads removed, 0 batches removed\n"
    folder = tmp_path / "data" / "blobs" / f"t-{'0' * 61}"
    folder.mkdir(parents=True)
    orphan = folder / f"file-{'0' * 32}.jsonl"
    orphan.write_bytes(b"x")
    os.utime(orphan, (1.0, 1.0))
    assert main(["gc", "--orphans", "--config", config]) == 0
    assert capsys.readouterr().out.endswith(", 1 orphans removed\n")
    assert not orphan.exists()
    assert main(["add-key", "", "--config", config]) == 2


async def test_an_address_in_use_ends_the_start_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quiet: None
) -> None:
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    config = str(write(tmp_path, ops=f"127.0.0.1:{port}"))
    assert await asyncio.to_thread(main, ["api", "--config", config]) == 2
    server.close()
    said = f"batchgw api: {config}: $.ops: cannot listen on 127.0.0.1:{port}: {os.strerror(errno.EADDRINUSE)}\n"
    assert capsys.readouterr() == ("", said)
