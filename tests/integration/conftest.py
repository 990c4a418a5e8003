"""A whole ``Scheduler`` on loopback, over endpoints that have a metrics page and nothing else, and a channel to it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from llmd_sched.app import Scheduler, ServeSettings
from llmd_sched.config import DEFAULT_CONFIG
from llmd_sched.stack import free_ports
from llmd_sched.wire import accesslog_pb2
from tests.builders import CONFIG_HEAD
from tests.envoy_stream import CHANNEL_OPTIONS, PATIENCE_S, Stream, access_log, exchange, soon, until
from tests.messages import Message, Reply

Labels = Mapping[str, str]


class Running:
    """A started scheduler and ways to look at it. Endpoint i is ``default/pod-i`` at 127.0.0.1, port ``pods[i]``."""

    def __init__(self, scheduler: Scheduler, pods: list[int], file: Path) -> None:
        self.scheduler = scheduler
        self.pods = [f"127.0.0.1:{port}" for port in pods]
        self.endpoints_file = file
        self.grpc_port, self.health_port = scheduler.settings.grpc_port, scheduler.settings.health_port
        self.channel: aio.Channel

    def stream(self) -> Stream:
        return Stream(self.channel)

    async def exchange(self, *messages: Message) -> list[Reply]:
        return await exchange(self.channel, *messages)

    async def access_log(self, *entries: accesslog_pb2.HTTPAccessLogEntry) -> None:
        await access_log(self.channel, *entries)

    def sample(self, name: str, **labels: str) -> float:
        """Sum over the samples of this name that have these labels; 0 without any."""
        return sum(value for _, value in self.samples(name, **labels))

    def samples(self, name: str, **labels: str) -> list[tuple[Labels, float]]:
        samples = [s for m in self.scheduler.telemetry.registry.collect() for s in m.samples]
        return [
            (s.labels, s.value) for s in samples if s.name == f"llm_d_epp_{name}" and labels.items() <= s.labels.items()
        ]

    async def idle(self) -> None:
        """Until nothing is open any more, and then nothing is counted as in flight, queued or lost either."""
        await until(lambda: not self.scheduler.router.open and not self.scheduler.ext_proc.open_streams)
        for name in ("open_requests", "request_running", "inflight_requests", "inflight_tokens", "lost_requests_total",
                     "flow_control_queue_size", "flow_control_queue_bytes", "flow_control_errors_total",
                     "producer_errors_total"):  # fmt: skip
            assert self.sample(name) == 0, name


@asynccontextmanager
async def running(
    folder: Path, config: str = "", pods: int | Sequence[Labels] = 1, **fields: Any
) -> AsyncIterator[Running]:
    """``config`` without its head, empty = the default; ``pods``: how many, or the labels of each.

    Metrics are read once and stay fresh, so that reading them sets nothing in motion later.
    """
    labels: Sequence[Labels] = [{}] * pods if isinstance(pods, int) else pods
    async with idle_engines(len(labels)) as ports:
        grpc_port, health_port, metrics_port = free_ports(3)  # free of the engines too
        file = folder / "endpoints.json"
        write_endpoints(file, ports, labels)
        usual: dict[str, Any] = {
            "config_text": CONFIG_HEAD + config if config else DEFAULT_CONFIG,
            "endpoints_file": str(file),
            "drain_timeout_s": 0.0,
            "secure_serving": False,
            "scrape_interval_s": 3600.0,
            "metrics_stale_after_s": 3600.0,
            "seed": 1,
        }
        listen = {"grpc_port": grpc_port, "health_port": health_port, "metrics_port": metrics_port}
        started = Scheduler(ServeSettings(host="127.0.0.1", **listen, **{**usual, **fields}))
        await started.start()
        made = Running(started, ports, file)
        try:
            async with aio.insecure_channel(f"127.0.0.1:{grpc_port}", options=CHANNEL_OPTIONS) as made.channel:
                yield made
        finally:
            await soon(started.stop())


@asynccontextmanager
async def idle_engines(count: int) -> AsyncIterator[list[int]]:
    """The ports of engines that tell nothing but that they are idle."""

    async def page(request: web.Request) -> web.Response:
        gauges = ("num_requests_waiting", "num_requests_running", "kv_cache_usage_perc")
        return web.Response(text="".join(f"vllm:{name} 0.0\n" for name in gauges))

    app = web.Application()
    app.router.add_get("/metrics", page)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        for _ in range(count):
            await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield [int(address[1]) for address in runner.addresses]
    finally:
        await runner.cleanup()


def write_endpoints(file: Path, ports: Sequence[int], labels: Sequence[Labels]) -> None:
    listed = [
        {"name": f"pod-{i}", "address": "127.0.0.1", "port": port, "labels": dict(one)}
        for i, (port, one) in enumerate(zip(ports, labels, strict=True))
    ]
    file.write_text(json.dumps({"endpoints": listed}))


async def health(port: int, name: str = "readiness") -> str:
    async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        reply = await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=PATIENCE_S)
        return health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)


async def until_health(port: int, wanted: str, name: str = "readiness") -> None:
    async with asyncio.timeout(PATIENCE_S):
        while await health(port, name) != wanted:
            await asyncio.sleep(0.01)
