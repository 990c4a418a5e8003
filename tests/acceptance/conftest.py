"""Real processes on loopback: simulated engines, ``llmd-sched serve`` and a real Envoy, once per data path.

The duplex path runs over TLS with a certificate the scheduler makes up, which is what ``serve`` does by default; the
lean path runs in plain text, as ``llmd-sched up`` does. So both are covered.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from llmd_sched.extproc.envoy import EnvoySettings, render
from llmd_sched.sim.steptime import PRESETS
from llmd_sched.stack import Child, Stack, StackError, envoy_binary, free_ports, stop, wait_http

PATIENCE_S = 20.0
"""How long anything may take before a test gives up. Nothing waits that long unless it is broken."""

PRESET = "llama-3-8b-h100"
MODEL = PRESETS[PRESET].model
SPEEDUP = 5.0
ENGINES = 2


async def until(what: Callable[[], Awaitable[bool]], message: str) -> None:
    """Poll until ``what`` holds; fails with ``message`` after PATIENCE_S."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not await what():
                await asyncio.sleep(0.05)
    except TimeoutError:
        pytest.fail(f"waited {PATIENCE_S:g} s in vain: {message}")


class World:
    """What runs for one data path, and how to look at it."""

    def __init__(self, path: str, stack: Stack) -> None:
        self.path = path
        self.stack = stack
        self.folder = stack.folder
        self.tls = path == "duplex"
        ports = free_ports(ENGINES + 5)
        self.engine_ports = ports[:ENGINES]
        self.grpc, self.health, self.metrics_port, self.listen, self.admin = ports[ENGINES:]
        self.engines: list[Child] = []
        self.scheduler: Child
        self.url = f"http://127.0.0.1:{self.listen}"
        self.outcomes_file = stack.folder / "outcomes.jsonl"
        self.http: aiohttp.ClientSession

    async def start(self) -> None:
        (self.folder / "config.yaml").write_text(resources.files("llmd_sched").joinpath("local.yaml").read_text())
        lines = [f"- {{name: engine-{i}, address: 127.0.0.1, port: {p}}}" for i, p in enumerate(self.engine_ports)]
        (self.folder / "endpoints.yaml").write_text("endpoints:\n" + "\n".join(lines) + "\n")
        self.engines = [await self.start_engine(i) for i in range(ENGINES)]
        for i in range(ENGINES):
            await self.wait_engine(i)
        await self.start_scheduler()
        await self.start_envoy("envoy", self.listen, self.admin)

    async def start_engine(self, number: int) -> Child:
        return await self.stack.start_llmd(
            f"engine-{number}", "sim-engine", "--preset", PRESET, "--port", str(self.engine_ports[number]),
            "--name", f"engine-{number}", "--speedup", str(SPEEDUP), "--noise", "0.05", "--seed", str(number),
            "--max-model-len", "32768",
        )  # fmt: skip

    async def wait_engine(self, number: int) -> None:
        await wait_http(f"http://127.0.0.1:{self.engine_ports[number]}/health", self.engines[number])

    async def start_scheduler(self) -> None:
        """Always on the same ports, so it can be killed and started again."""
        self.scheduler = await self.stack.start_llmd(
            "scheduler", "serve", "--config-file", str(self.folder / "config.yaml"), "--host", "127.0.0.1",
            "--endpoints-file", str(self.folder / "endpoints.yaml"), f"--secure-serving={str(self.tls).lower()}",
            "--grpc-port", str(self.grpc), "--grpc-health-port", str(self.health),
            "--metrics-port", str(self.metrics_port), "--outcome-log", str(self.outcomes_file),
            "--seed", "1", "--drain-timeout", "10s",
        )  # fmt: skip
        await wait_http(f"http://127.0.0.1:{self.metrics_port}/metrics", self.scheduler)

    async def start_envoy(self, name: str, listen: int, admin: int, **fields: Any) -> Child:
        settings = EnvoySettings(
            path=self.path, listen_host="127.0.0.1", listen_port=listen, admin_port=admin,
            scheduler_port=self.grpc, scheduler_tls=self.tls, **fields,
        )  # fmt: skip
        config = self.folder / f"{name}.json"
        config.write_text(render(settings))
        arguments = ["-c", str(config), "--concurrency", "1", "-l", "warning", "--disable-hot-restart"]
        child = await self.stack.start(name, [str(envoy_binary()), *arguments])
        await wait_http(f"http://127.0.0.1:{admin}/ready", child)
        return child

    def forget(self, child: Child) -> None:
        self.stack.children.remove(child)

    async def kill(self, child: Child) -> None:
        """SIGKILL to this one process; what it started is left to itself."""
        os.kill(child.pid, signal.SIGKILL)
        await child.process.wait()

    @asynccontextmanager
    async def without_scheduler(self) -> AsyncIterator[None]:
        """Killed for the while, then a new one on the ports of the old."""
        await self.kill(self.scheduler)
        try:
            yield
        finally:
            await self.replace_scheduler()

    async def replace_scheduler(self) -> None:
        """A new one in place of one that has ended; returns once a request succeeds again."""
        await stop(self.scheduler)
        self.forget(self.scheduler)
        await self.start_scheduler()
        await until(self.succeeds, "never again a success")

    async def replace_engine(self, number: int) -> None:
        await stop(self.engines[number])
        self.forget(self.engines[number])
        self.engines[number] = await self.start_engine(number)
        await self.wait_engine(number)

    def ask(self, *, url: str | None = None, headers: dict[str, str] | None = None, **body: Any) -> Any:
        """A completion; use as ``async with``. ``max_tokens`` is 5 unless given."""
        fields = {"model": MODEL, "prompt": "Tell me about the weather", "max_tokens": 5, **body}
        return self.http.post(f"{url or self.url}/v1/completions", json=fields, headers=headers)

    async def succeeds(self, url: str | None = None) -> bool:
        try:
            async with self.ask(url=url) as reply:
                await reply.read()
                return reply.status == 200
        except aiohttp.ClientError:
            return False

    async def metric(self, name: str, *labels: str) -> float:
        """Sum over the samples of this name that have these labels (as they are written)."""
        async with self.http.get(f"http://127.0.0.1:{self.metrics_port}/metrics") as reply:
            text = await reply.text()
        found = [line.rpartition(" ") for line in text.splitlines() if line.startswith(f"llm_d_epp_{name}")]
        return sum(
            float(value)
            for sample, _, value in found
            if sample.partition("{")[0] == f"llm_d_epp_{name}" and all(label in sample for label in labels)
        )

    async def idle(self) -> None:
        """Until the scheduler has no open request, which must not be because it gave them up."""

        async def none_open() -> bool:
            return await self.metric("open_requests") == 0

        await until(none_open, "requests are still open")
        assert await self.metric("lost_requests_total") == 0

    def outcomes(self) -> list[dict[str, Any]]:
        lines = self.outcomes_file.read_text().splitlines() if self.outcomes_file.exists() else []
        return [json.loads(line) for line in lines]

    async def outcome(self, request_id: str) -> dict[str, Any]:
        """The line of the outcome log for this request, once it is written."""
        found: list[dict[str, Any]] = []

        async def written() -> bool:
            found[:] = [o for o in self.outcomes() if o["request_id"] == request_id]
            return bool(found)

        await until(written, f"no outcome of {request_id}")
        (line,) = found
        return line

    async def still_serves(self) -> None:
        assert await self.succeeds()
        await self.idle()


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["lean", "duplex"])
async def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    try:
        envoy_binary()
    except StackError as missing:
        pytest.skip(str(missing))
    folder: Path = tmp_path_factory.mktemp(request.param)
    async with Stack(folder) as stack:
        made = World(request.param, stack)
        await made.start()
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=60)) as session:
            made.http = session
            await until(made.succeeds, "the first request never succeeded")
            yield made
