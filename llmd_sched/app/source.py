"""Where endpoints, objectives and model rewrites come from: a file, DNS, or Kubernetes."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable
from contextlib import AsyncExitStack
from random import Random
from typing import Protocol

from llmd_sched.app.settings import ServeSettings
from llmd_sched.catalog import Resolved
from llmd_sched.errors import ConfigError
from llmd_sched.extproc.service import NO_OBJECTS, Objects
from llmd_sched.kube import client, lease
from llmd_sched.kube.access import MetricsAccess
from llmd_sched.kube.client import ApiClient
from llmd_sched.kube.discovery import KubeDiscovery
from llmd_sched.kube.lease import Elector
from llmd_sched.kube.objects import PoolName, PoolSpec, standalone
from llmd_sched.plugin import Plugin
from llmd_sched.pool.discovery import FileDiscovery, FileWatcher
from llmd_sched.pool.dns import DnsDiscovery, DnsWatcher
from llmd_sched.pool.pool import Pool
from llmd_sched.sched.objects import StaticObjects

log = logging.getLogger(__name__)

DEFAULT_POOL_NAME = "default"


class Watcher(Protocol):
    async def start(self) -> None: ...
    async def stop(self) -> None: ...


class Source:
    """Keeps the pool filled. ``on_change`` is told when readiness or the objects may have changed."""

    def __init__(self, pool_name: str) -> None:
        self.pool_name = pool_name
        self.on_change: Callable[[], None] = lambda: None
        self.electing = False

    @property
    def synced(self) -> bool:
        """The first look is done."""
        return True

    @property
    def leading(self) -> bool:
        return True

    @property
    def objects(self) -> Objects:
        return NO_OBJECTS

    async def start(self) -> None:
        """Raises ConfigError or OSError."""

    async def step_down(self) -> None:
        """Let another lead: called before draining."""

    async def stop(self) -> None: ...

    async def may_read_metrics(self, token: str) -> bool:
        """Asked only where ``reviews_metrics``."""
        return True

    reviews_metrics = False
    lingers = False
    """Proxies send on until they have learned that we are not ready, so draining takes its full time."""


class WatchedSource(Source):
    """A file or DNS."""

    def __init__(self, watcher: Watcher, pool_name: str, objects: Objects) -> None:
        super().__init__(pool_name)
        self._watcher, self._objects = watcher, objects

    @property
    def objects(self) -> Objects:
        return self._objects

    async def start(self) -> None:
        await self._watcher.start()

    async def stop(self) -> None:
        await self._watcher.stop()


class KubeSource(Source):
    """An InferencePool, or pods by selector; with an elector only the leader is ready."""

    reviews_metrics = lingers = True

    def __init__(
        self, settings: ServeSettings, pool: Pool, api: ApiClient, name: PoolName, spec: PoolSpec | None
    ) -> None:
        super().__init__(name.name)
        rng = Random()
        self._api = api
        self._discovery = KubeDiscovery(api, pool, name, rng, spec)
        self._access = MetricsAccess(api)
        self._stack = AsyncExitStack()
        self._elector: Elector | None = None
        if settings.leader_election:
            self.electing = True
            identity = f"{os.environ.get('POD_NAME') or 'llmd-sched'}_{uuid.uuid4()}"
            lease_name = lease.lease_name(name.namespace, name.name)
            self._elector = Elector(api, name.namespace, lease_name, identity, self._led, rng)

    def _led(self, _: bool) -> None:
        self.on_change()

    @property
    def synced(self) -> bool:
        return self._discovery.synced

    @property
    def leading(self) -> bool:
        return self._elector is None or self._elector.leading

    @property
    def objects(self) -> Objects:
        return self._discovery.objects

    async def start(self) -> None:
        self._stack.push_async_callback(self._api.close)
        self._discovery.on_change.append(lambda: self.on_change())
        self._stack.push_async_callback(self._discovery.stop)
        await self._discovery.start()
        if self._elector is not None:
            self._elector.start()

    async def step_down(self) -> None:
        if self._elector is not None:
            await self._elector.stop()

    async def stop(self) -> None:
        await self._stack.aclose()

    async def may_read_metrics(self, token: str) -> bool:
        return await self._access.may_read_metrics(token)


def source(resolved: Resolved, settings: ServeSettings, pool: Pool) -> Source:
    """Raises ConfigError when nothing says where the endpoints are, or more than one thing does."""
    objects = next(iter(resolved.kind(StaticObjects).values()), NO_OBJECTS)
    label = settings.pool_name or DEFAULT_POOL_NAME
    if settings.pool_name and settings.endpoint_selector:
        raise ConfigError("give either --pool-name or --endpoint-selector, not both", "--pool-name")
    if settings.endpoints_file:
        params: Plugin = FileDiscovery(path=settings.endpoints_file, watch_file=True)
    elif resolved.discovery is not None:
        params = resolved.plugins[resolved.discovery].plugin
    else:
        return _kube_source(resolved, settings, pool)
    watcher = DnsWatcher(params, pool) if isinstance(params, DnsDiscovery) else FileWatcher(_file(params), pool)
    if settings.leader_election:
        raise ConfigError("needs Kubernetes, where the lease is", "--ha-enable-leader-election")
    return WatchedSource(watcher, label, objects)


def _file(params: Plugin) -> FileDiscovery:
    assert isinstance(params, FileDiscovery)
    return params


def _kube_source(resolved: Resolved, settings: ServeSettings, pool: Pool) -> KubeSource:
    named, selected = bool(settings.pool_name), bool(settings.endpoint_selector)
    if not named and not selected:
        raise ConfigError(
            "no endpoints: declare a file-discovery or dns-discovery plugin and refer to it here, or start with "
            "--endpoints-file, or in Kubernetes with --pool-name or --endpoint-selector",
            "$.dataLayer.discovery",
        )
    for unused in resolved.kind(StaticObjects):
        log.warning("%s is not used: in Kubernetes objectives and rewrites are objects of the API server", unused)
    api = client.in_cluster(os.environ)
    namespace = settings.pool_namespace or client.namespace_of(os.environ)
    if named:
        return KubeSource(settings, pool, api, PoolName(settings.pool_name, namespace, settings.pool_group), None)
    ports, pod = settings.endpoint_target_ports, os.environ.get("POD_NAME", "")
    name, spec = standalone(settings.endpoint_selector, ports, pod, namespace)
    return KubeSource(settings, pool, api, name, spec)
