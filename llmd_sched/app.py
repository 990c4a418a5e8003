"""The composition root of ``serve``: configuration -> objects -> run; the one place that knows every concrete class.

Start: load and check everything, then listen; nothing is half started. Stop (SIGTERM): health says NOT_SERVING,
streams go on for the drain time, then the servers, the scraper, the trainer, each within a bound.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import logging.handlers
import secrets
import signal
import time
from collections.abc import Iterable
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random

import msgspec
from grpc import aio, ssl_server_credentials
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from prometheus_client import CollectorRegistry, start_http_server

from llmd_sched import __version__
from llmd_sched import config as configs
from llmd_sched.catalog import Resolved, build_parsers, build_router, resolve
from llmd_sched.errors import ConfigError
from llmd_sched.extproc.server import EXT_PROC, ExtProcServer, ServerSettings
from llmd_sched.extproc.service import EndpointPicker
from llmd_sched.extproc.tls import certificate
from llmd_sched.plugin import Identity, Reporter
from llmd_sched.pool.discovery import FileDiscovery, FileWatcher
from llmd_sched.pool.pool import Pool
from llmd_sched.pool.scrape import Scraper
from llmd_sched.predict import state
from llmd_sched.predict.gauges import producer_gauges
from llmd_sched.predict.producer import PredictedLatency
from llmd_sched.predict.trainer import TrainerProcess
from llmd_sched.prefix.approx import MIN_BLOCK_TOKENS
from llmd_sched.prefix.hashing import block_hashes
from llmd_sched.router import Router
from llmd_sched.telemetry import Gauge, Telemetry

log = logging.getLogger(__name__)

HEALTH_NAMES = ("", "liveness", "readiness", EXT_PROC, "inference-extension")
MIN_SCRAPE_INTERVAL_S = 0.05
REAP_EVERY_S = 1.0
DRAIN_LOOK_S = 0.05
OUTCOME_LOG_BYTES = 256 << 20


class ServeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The command line of ``serve``."""

    config_text: str = configs.DEFAULT_CONFIG
    host: str = "0.0.0.0"
    grpc_port: int = 9002
    health_port: int = 9003
    metrics_port: int = 9090
    secure_serving: bool = True
    cert_path: str = ""
    drain_timeout_s: float = 30.0
    scrape_interval_s: float = MIN_SCRAPE_INTERVAL_S
    metrics_stale_after_s: float = 2.0
    allow_experimental_plugins: bool = False
    endpoints_file: str = ""
    """Used instead of ``dataLayer.discovery``."""
    outcome_log: str = ""
    pool_name: str = "default"
    predictor_state_dir: str = ""
    """Where the predictors' models and windows outlive the process; empty = nowhere."""
    seed: int | None = None
    server: ServerSettings = ServerSettings()


class Scheduler:
    """One running scheduler. ``start`` raises ConfigError or OSError (a port in use) before anything listens."""

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        config = configs.load(settings.config_text)
        self.resolved = resolve(config, allow_experimental=settings.allow_experimental_plugins)
        for warning in self.resolved.warnings:
            log.warning("%s", warning)
        self.pool = Pool(settings.metrics_stale_after_s)
        self.router: Router = build_router(
            self.resolved, self.pool, Random(settings.seed), ticket_prefix=secrets.token_hex(4) + "-"
        )
        self.telemetry = Telemetry(CollectorRegistry())
        self.health = HealthServicer()
        self.trainers: list[tuple[PredictedLatency, TrainerProcess]] = []
        self._stack = AsyncExitStack()

    async def start(self) -> None:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise

    async def _start(self) -> None:
        settings = self.settings
        picker = EndpointPicker(
            self.router,
            build_parsers(self.resolved),
            self.telemetry,
            outcome_log=self._outcome_log(),
            identities=self.resolved.kind(Identity),
            reporters=list(self.resolved.kind(Reporter).values()),
            plugin_headers={name for d in self.resolved.plugins.values() for name in d.plugin.headers()},
        )
        own_headers = self.router.scheduling.handler.own_headers
        self.ext_proc = ExtProcServer(picker, msgspec.structs.replace(settings.server, own_headers=own_headers))
        self._warm_up()
        await self._start_trainers()
        await self._start_pool()
        await self._start_grpc()
        self.telemetry.pull(self._gauges)
        try:
            metrics, thread = start_http_server(settings.metrics_port, settings.host, self.telemetry.registry)
        except OSError as e:
            raise OSError(f"cannot listen on {settings.host}:{settings.metrics_port}: {e.strerror}") from None
        self._stack.callback(thread.join, 2.0)
        self._stack.callback(metrics.server_close)
        self._stack.callback(metrics.shutdown)
        reaper = asyncio.create_task(self._reap(), name="reaper")
        self._stack.callback(reaper.cancel)
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    def _warm_up(self) -> None:
        """Compile the kernels now rather than during the first request."""
        block_hashes(b"warm up", "", MIN_BLOCK_TOKENS, 1)
        for producer in self.router.producers:
            if isinstance(producer, PredictedLatency):
                producer.warm_up()

    async def _start_trainers(self) -> None:
        for producer in self.router.producers:
            if isinstance(producer, PredictedLatency):
                producer.timer = time.perf_counter
                path = state.prepare(self.settings.predictor_state_dir, producer.name)
                found = state.restored(path, time.monotonic(), time.time()) if path else None
                if found is not None:
                    producer.restore(found.model)
                trainer = TrainerProcess(
                    producer.model,
                    on_model=producer.publish,
                    classes=lambda producer=producer: producer.classes.names,  # type: ignore[misc]
                    state_path=path,
                )
                producer.on_sample = trainer.add
                self._stack.push_async_callback(trainer.stop)
                await trainer.start()
                self.trainers.append((producer, trainer))

    async def _start_pool(self) -> None:
        watcher = FileWatcher(discovery(self.resolved, self.settings), self.pool)
        self._stack.push_async_callback(watcher.stop)
        await watcher.start()
        scraper = Scraper(self.pool, max(self.settings.scrape_interval_s, MIN_SCRAPE_INTERVAL_S))
        self._stack.push_async_callback(scraper.stop)
        await scraper.start()
        self.scraper = scraper
        self.router.on_chosen = lambda endpoint: scraper.touched(endpoint.server)

    async def _start_grpc(self) -> None:
        settings = self.settings
        server = aio.server(options=settings.server.grpc_options)
        self._stack.push_async_callback(server.stop, 1.0)
        self.ext_proc.add_to(server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
        address = f"{settings.host}:{settings.grpc_port}"
        if settings.secure_serving:
            credentials = ssl_server_credentials([certificate(settings.cert_path)])
            _bound(server.add_secure_port, address, credentials)
        else:
            _bound(server.add_insecure_port, address)
        health = aio.server(options=[("grpc.so_reuseport", 0)])
        self._stack.push_async_callback(health.stop, 0.5)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, health)
        _bound(health.add_insecure_port, f"{settings.host}:{settings.health_port}")
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        await server.start()
        await health.start()
        log.info("ext_proc and access log on %s (%s)", address, "TLS" if settings.secure_serving else "plain")

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in HEALTH_NAMES:
            await self.health.set(name, status)

    async def _reap(self) -> None:
        errors = 0
        while True:
            await asyncio.sleep(REAP_EVERY_S)
            now_s = time.monotonic()
            if sum(self.router.producer_errors.values()) > errors:
                errors = sum(self.router.producer_errors.values())
                log.error("a producer failed (%d times so far): %s", errors, self.router.last_producer_error)
            lost = self.router.reap(now_s)
            if lost:
                log.warning("gave up %d requests whose end was never reported", lost)
            for producer, _ in self.trainers:
                producer.ledger.expire(now_s)

    def _outcome_log(self) -> logging.Logger | None:
        if not self.settings.outcome_log:
            return None
        path = Path(self.settings.outcome_log)
        try:
            handler = logging.handlers.RotatingFileHandler(path, maxBytes=OUTCOME_LOG_BYTES, backupCount=1)
        except OSError as e:
            raise ConfigError(f"cannot write the outcome log: {e.strerror}", str(path)) from None
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger = logging.Logger("outcomes", logging.INFO)
        logger.addHandler(handler)
        self._stack.callback(handler.close)
        return logger

    async def stop(self) -> None:
        """Drain, then stop in the reverse order of starting."""
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        deadline_s = time.monotonic() + self.settings.drain_timeout_s
        while time.monotonic() < deadline_s and (self.router.open or self.ext_proc.open_streams):
            await asyncio.sleep(DRAIN_LOOK_S)
        await self._stack.aclose()

    def _gauges(self) -> Iterable[Gauge]:
        """Read from live objects; runs in the metrics server's thread, so it only reads."""
        now_s = time.monotonic()
        columns = self.pool.columns(now_s)
        fresh = self.pool.fresh(now_s)
        name = (self.settings.pool_name,)
        yield "llm_d_epp_info", "Build.", ("commit", "build_ref"), [(("", __version__), 1.0)]
        yield "llm_d_epp_ready_endpoints", "Endpoints read in time.", ("name",), [(name, float(fresh.sum()))]
        for metric, column in (
            ("average_kv_cache_utilization", "kv_usage"),
            ("average_queue_size", "waiting"),
            ("average_running_requests", "running"),
        ):
            values = columns[column][fresh]
            mean = float(values.mean()) if len(values) else 0.0
            yield f"llm_d_epp_{metric}", "Over fresh endpoints.", ("name",), [(name, mean)]
        queues = [((*name, e.key), float(q)) for e, q in zip(self.pool.endpoints, columns["waiting"], strict=True)]
        yield "llm_d_epp_per_endpoint_queue_size", "Waiting.", ("name", "model_server_endpoint"), queues
        yield "llm_d_epp_open_requests", "Routed and not finished.", (), [((), float(len(self.router.open)))]
        yield "llm_d_epp_lost_requests_total", "Ends never reported.", (), [((), float(self.router.lost))]
        yield "llm_d_epp_scrape_errors_total", "Metric pages not read.", (), [((), float(self.scraper.errors))]
        errors = [((n,), float(c)) for n, c in self.router.producer_errors.items()]
        yield "llm_d_epp_producer_errors_total", "Producers that failed.", ("producer_name",), errors
        for producer, trainer in self.trainers:
            yield from producer_gauges(producer, trainer, now_s)


def _bound(add: object, address: str, *credentials: object) -> None:
    try:
        port = add(address, *credentials)  # type: ignore[operator]
    except RuntimeError:
        port = 0
    if not port:
        raise OSError(f"cannot listen on {address}: the port is in use, or not ours to open")


def discovery(resolved: Resolved, settings: ServeSettings) -> FileDiscovery:
    """Where the endpoints come from. Raises ConfigError when nothing says."""
    if settings.endpoints_file:
        return FileDiscovery(path=settings.endpoints_file, watch_file=True)
    if resolved.discovery is not None:
        plugin = resolved.plugins[resolved.discovery].plugin
        assert isinstance(plugin, FileDiscovery)
        return plugin
    raise ConfigError(
        "no endpoints: declare a file-discovery plugin and refer to it here, or start with --endpoints-file",
        "$.dataLayer.discovery",
    )


async def serve(settings: ServeSettings) -> None:
    """Run until SIGTERM or SIGINT; a second one stops without draining."""
    scheduler = Scheduler(settings)
    stop = asyncio.Event()
    for sig in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(sig, stop.set)
    await scheduler.start()
    gc.collect()
    gc.freeze()  # what is here now stays; the collector need not walk it again in the middle of a request
    log.info("serving with %d endpoints", len(scheduler.pool))
    await stop.wait()
    log.info("draining for at most %g s", settings.drain_timeout_s)
    await scheduler.stop()
