"""One running scheduler.

Start: load and check everything, then listen; nothing is half started. Stop (SIGTERM): health says NOT_SERVING,
streams go on for the drain time, then the servers, the scraper, the trainer, each within a bound.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from random import Random
from typing import Any

import msgspec
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from llmd_sched import config as configs
from llmd_sched.admin.auth import Authorize, TokenFile
from llmd_sched.admin.decisions import Decisions
from llmd_sched.admin.server import AdminServer
from llmd_sched.app import gauges
from llmd_sched.app.admission import FlowMetrics, flow_gate, shedding
from llmd_sched.app.headroom import PATH as HEADROOM
from llmd_sched.app.headroom import headroom_feed
from llmd_sched.app.health import Health
from llmd_sched.app.settings import MIN_SCRAPE_INTERVAL_S, ServeSettings
from llmd_sched.app.source import source
from llmd_sched.catalog import build_parsers, build_router, resolve
from llmd_sched.errors import ConfigError
from llmd_sched.extproc.observer import Observer, open_outcome_log
from llmd_sched.extproc.render import Renderer
from llmd_sched.extproc.server import EXT_PROC, ExtProcServer, ServerSettings
from llmd_sched.extproc.service import EndpointPicker
from llmd_sched.extproc.tls import grpc_credentials, server_context
from llmd_sched.extproc.trust import TrustedSources
from llmd_sched.parsers import tokens
from llmd_sched.parsers.producer import TokenProducer
from llmd_sched.plugin import Attribute, Identity, Plugin, Reporter
from llmd_sched.pool.pool import Pool
from llmd_sched.pool.scrape import Scraper
from llmd_sched.pool.sources import reading
from llmd_sched.predict import state
from llmd_sched.predict.gauges import producer_gauges
from llmd_sched.predict.producer import PredictedLatency
from llmd_sched.predict.trainer import TrainerProcess
from llmd_sched.prefix import approx
from llmd_sched.prefix.precise import PrecisePrefixCache
from llmd_sched.prefix.subscriber import Subscribers
from llmd_sched.router import Router
from llmd_sched.telemetry import Gauge, Telemetry
from llmd_sched.tracing import Tracer, tracer

log = logging.getLogger(__name__)

HEALTH_NAMES = ("", "liveness", "readiness", EXT_PROC, "inference-extension")
ELECTING_HEALTH_NAMES = HEALTH_NAMES[:-1]
"""With leader election the reference knows no other names."""

SWITCH_INTERVAL_S = 0.0005
"""How long a decision waits for the thread that makes a metrics page to let go of the interpreter."""

REAP_EVERY_S = 1.0
DRAIN_LOOK_S = 0.05


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
        self.source = source(self.resolved, settings, self.pool)
        self.health = Health(electing=self.source.electing)
        self.decisions = Decisions()
        self.headroom = headroom_feed(self.router, lambda: self.source.leading)
        self.reading = reading(self.resolved.kind(Plugin))
        self.subscribers: list[Subscribers] = []
        self.trainers: list[tuple[PredictedLatency, TrainerProcess]] = []
        self._ready = False
        self._stack = AsyncExitStack()

    async def start(self) -> None:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise

    async def _start(self) -> None:
        picker = self._picker()
        self.ext_proc = ExtProcServer(picker, self._server_settings())
        self._open_gate(picker)
        self._warm_up()
        await self._start_renderer(picker)
        await self._start_trainers()
        await self._start_pool()
        await self._start_grpc()
        await self._start_admin()
        reaper = asyncio.create_task(self._reap(), name="reaper")
        self._stack.callback(reaper.cancel)
        self._ready = True
        self._tell_health()

    def _open_gate(self, picker: EndpointPicker) -> None:
        self.gate = flow_gate(self.resolved, picker, self.ext_proc, self.settings.scrape_interval_s)
        picker.admit = self.gate.admit if self.gate else shedding(self.resolved, picker)
        if self.gate is not None:
            FlowMetrics(self.gate, self.telemetry, self.source.pool_name, self.resolved.detector)

    async def _start_renderer(self, picker: EndpointPicker) -> None:
        for params in self.resolved.kind(TokenProducer).values():
            if params.backend is not None:
                backend = params.backend
                renderer = Renderer(backend.url, params.model_name, backend.timeout_s, backend.mm_timeout_s)
                self._stack.push_async_callback(renderer.stop)
                await renderer.start()
                picker.tokenize = renderer.tokens
                return

    def _picker(self) -> EndpointPicker:
        resolved = self.resolved
        return EndpointPicker(
            self.router,
            build_parsers(resolved),
            self._observer(),
            identities=resolved.kind(Identity),
            reporters=list(resolved.kind(Reporter).values()),
            plugin_headers={name for plugin in resolved.kind(Plugin).values() for name in plugin.headers()},
            plugin_types={name: declared.type for name, declared in resolved.plugins.items()},
            objects=lambda: self.source.objects,
            trusted=TrustedSources(self.settings.trusted_header_sources),
        )

    def _observer(self) -> Observer:
        handler = self.resolved.handler
        splits = bool(self.router.scheduling.handler.asks() or len(self.resolved.profiles) > 1)
        return Observer(
            self.telemetry,
            tracer=self._tracer(),
            decisions=self.decisions,
            outcome_log=self._outcome_log(),
            indexes=[
                (name, declared.type)
                for name, declared in self.resolved.plugins.items()
                if getattr(declared.plugin, "provides", None) is Attribute.PREFIX_MATCH
            ],
            disagg=(handler, self.resolved.plugins[handler].type) if splits else None,
        )

    def _tracer(self) -> Tracer:
        try:
            made = tracer(os.environ, wanted=self.settings.tracing)
        except ValueError as error:
            raise ConfigError(str(error), "environment") from None
        self._stack.callback(made.close)
        return made

    def _server_settings(self) -> ServerSettings:
        own_headers = self.router.scheduling.handler.own_headers
        return msgspec.structs.replace(self.settings.server, own_headers=own_headers)

    def _warm_up(self) -> None:
        """Compile the kernels now rather than during the first request."""
        approx.warm_up()
        tokens.warm_up()
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
        self.source.on_change = self._source_changed
        self._stack.push_async_callback(self.source.stop)
        await self.source.start()
        self._source_changed()
        how = self.reading
        interval_s = max(how.interval_s or self.settings.scrape_interval_s, MIN_SCRAPE_INTERVAL_S)
        scraper = Scraper(self.pool, interval_s, reading=how)
        self._stack.push_async_callback(scraper.stop)
        await scraper.start()
        self.scraper = scraper
        self.router.on_chosen = lambda endpoint: scraper.touched(endpoint.server)
        await self._subscribe()

    async def _subscribe(self) -> None:
        """To the KV events of the engines, for the producers that go by them."""
        for producer in self.router.producers:
            if isinstance(producer, PrecisePrefixCache):
                lookup_s = self.telemetry.histogram("kv_cache_index_lookup_latency_seconds").labels()
                producer.timer, producer.on_lookup = time.perf_counter, lookup_s.observe
                subscribers = Subscribers(producer)
                self._stack.push_async_callback(subscribers.stop)
                subscribers.start()
                self.pool.on_change.append(subscribers.follow)
                subscribers.follow(self.pool.endpoints)
                self.subscribers.append(subscribers)

    async def _start_grpc(self) -> None:
        settings = self.settings
        server = aio.server(options=list(settings.grpc_options.items()))
        self._stack.push_async_callback(server.stop, 1.0)
        self.ext_proc.add_to(server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
        address = f"{settings.host}:{settings.grpc_port}"
        if settings.secure_serving:
            credentials = grpc_credentials(settings.cert_path, reload=settings.cert_reload)
            _bound(server.add_secure_port, address, "--grpc-port", credentials)
        else:
            _bound(server.add_insecure_port, address, "--grpc-port")
        health = aio.server(options=[("grpc.so_reuseport", 0)])
        self._stack.push_async_callback(health.stop, 0.5)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, health)
        _bound(health.add_insecure_port, f"{settings.host}:{settings.health_port}", "--grpc-health-port")
        await self._set_health()
        await server.start()
        await health.start()
        log.info("ext_proc and access log on %s (%s)", address, "TLS" if settings.secure_serving else "plain")

    async def _start_admin(self) -> None:
        settings = self.settings
        self.telemetry.pull(self._gauges)
        context = None
        if settings.metrics_cert_dir or settings.metrics_client_ca_file:
            context = server_context(settings.metrics_cert_dir, settings.tls, client_ca=settings.metrics_client_ca_file)
        admin = AdminServer(
            self.telemetry.page,
            decisions=self.decisions,
            states=self._plugin_states,
            authorize=self._authorize(),
            routes={HEADROOM: self.headroom.answer},
            patient=(HEADROOM,),
            ssl_context=context,
        )
        self._stack.push_async_callback(admin.stop)
        self.headroom.start()
        self._stack.push_async_callback(self.headroom.stop)
        try:
            await admin.start(settings.host, settings.metrics_port)
        except OSError as error:
            raise OSError(f"{error} (--metrics-port)") from None

    def _authorize(self) -> Authorize | None:
        if self.settings.metrics_token_file:
            try:
                return TokenFile(self.settings.metrics_token_file)
            except ConfigError as error:
                raise ConfigError(str(error), "--metrics-token-file") from None
        return (
            self.source.may_read_metrics
            if self.source.reviews_metrics and self.settings.metrics_endpoint_auth
            else None
        )

    def _plugin_states(self) -> dict[str, Any]:
        live = {producer.name: producer for producer in self.router.producers}
        return {
            name: {"type": declared.type, "state": live[name].state()}
            if name in live
            else {"type": declared.type, "message": "has no state"}
            for name, declared in self.resolved.plugins.items()
        }

    def _source_changed(self) -> None:
        """Other objectives, other models, or another readiness."""
        objects = self.source.objects
        self.telemetry.pin(objects.models)
        if self.gate is not None:
            self.gate.flow.provide(objects.priorities.values(), time.monotonic())
        self._tell_health()

    def _tell_health(self) -> None:
        """Again, as readiness or leadership may have changed."""
        self._health_told = asyncio.ensure_future(self._set_health())

    async def _set_health(self) -> None:
        """Ready: the first look at the pool is done, and we lead where that is at stake. Then only the leader is
        ready, but every replica is alive."""
        status = health_pb2.HealthCheckResponse
        ready = self._ready and self.source.synced and self.source.leading
        names = ELECTING_HEALTH_NAMES if self.source.electing else HEALTH_NAMES
        for name in names:
            alive = self.source.electing and name == "liveness"
            await self.health.set(name, status.SERVING if ready or alive else status.NOT_SERVING)

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
        logger = open_outcome_log(self.settings.outcome_log)
        self._stack.callback(logger.handlers[0].close)
        return logger

    async def stop(self, hurry: asyncio.Event | None = None) -> None:
        """Drain, until ``hurry`` is set, then stop in the reverse order of starting. Who waits to be let in is told at
        once that we stop, except where the source lingers and everything goes on."""
        self._ready = False
        await self._set_health()
        await self.source.step_down()
        if self.gate is not None and not self.source.lingers:
            self.gate.stop()
        deadline_s = time.monotonic() + self.settings.drain_timeout_s
        hurry = hurry or asyncio.Event()
        while time.monotonic() < deadline_s and not hurry.is_set() and self._needed:
            await asyncio.sleep(DRAIN_LOOK_S)
        if self.gate is not None:
            self.gate.stop()
        await self._stack.aclose()

    @property
    def _needed(self) -> bool:
        """While draining: something is open, or may still come."""
        return self.source.lingers or bool(self.router.open or self.ext_proc.open_streams)

    def _gauges(self) -> Iterator[Gauge]:
        """Runs in the metrics server's thread, so it only reads."""
        now_s = time.monotonic()
        yield from gauges.pool(self.source.pool_name, self.pool, now_s)
        yield from gauges.requests(self.router, self.telemetry)
        yield from gauges.scraping(self.scraper)
        for subscribers in self.subscribers:
            yield from gauges.kv_events(subscribers)
        for producer, trainer in self.trainers:
            yield from producer_gauges(producer, trainer, now_s)


def _bound(add: object, address: str, flag: str, *credentials: object) -> None:
    try:
        port = add(address, *credentials)  # type: ignore[operator]
    except RuntimeError:
        port = 0
    if not port:
        raise OSError(f"cannot listen on {address}: the port is in use, or not ours to open ({flag})")


async def serve(settings: ServeSettings) -> None:
    """Run until SIGTERM or SIGINT; a second one stops without draining."""
    scheduler = Scheduler(settings)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    stop = asyncio.Event()
    for sig in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(sig, stop.set)
    await scheduler.start()
    gc.collect()
    gc.freeze()  # what is here now stays; the collector need not walk it again in the middle of a request
    log.info("serving with %d endpoints", len(scheduler.pool))
    await stop.wait()
    stop.clear()
    log.info("draining for at most %g s; another signal ends it", settings.drain_timeout_s)
    await scheduler.stop(stop)
