"""A pool kept equal to what Kubernetes says: the InferencePool, its pods, its objectives and its rewrites.

Pods are selected by the server, so those of others are never read. Nothing here depends on leading: a follower keeps
the same picture. When the API server is away, the last picture stays.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, TypeVar

from llmd_sched.kube import objects
from llmd_sched.kube.client import ApiClient
from llmd_sched.kube.objects import LEGACY_GROUP, NEW_GROUP, Objective, Pod, PoolName, PoolSpec, Rewrite
from llmd_sched.kube.rewrites import Objects, snapshot
from llmd_sched.kube.watch import Reflector, Source
from llmd_sched.pool.pool import Pool

log = logging.getLogger(__name__)

CRD_VERSION = "v1alpha2"
MAX_SAID = 1000

T = TypeVar("T")


class KubeDiscovery:
    """``spec`` is given for a pool without an InferencePool (standalone); otherwise it is followed."""

    def __init__(self, api: ApiClient, pool: Pool, name: PoolName, rng: Random, spec: PoolSpec | None = None) -> None:
        self.pool = pool
        self.name = name
        self.spec: PoolSpec | None = None
        """None while there is no such InferencePool."""
        self.objects = Objects()
        """Of this pool; replaced as a whole."""
        self.on_change: list[Callable[[], None]] = []
        """Called after ``spec``, ``objects``, ``synced`` or the pool's endpoints may have changed."""
        self._api, self._rng, self._standalone = api, rng, spec
        self._said: set[str] = set()
        self._changed = asyncio.Event()
        self._retired: list[Reflector[Pod]] = []
        self._pods: Reflector[Pod] | None = None
        self._pools = Reflector(api, self._pool_source(), objects.read_pool, self._pool_changed, rng)
        groups = (NEW_GROUP, LEGACY_GROUP)
        self._objectives = [self._follow("inferenceobjectives", group, self._keep_objective) for group in groups]
        self._rewrites = [self._follow("inferencemodelrewrites", group, self._keep_rewrite) for group in groups]

    def _pool_source(self) -> Source:
        only = f"metadata.name={self.name.name}"
        return Source(f"{self.name.group}/v1", "inferencepools", self.name.namespace, field_selector=only)

    def _follow(self, resource: str, group: str, keep: Callable[[bytes], T | None]) -> Reflector[T]:
        source = Source(f"{group}/{CRD_VERSION}", resource, self.name.namespace, optional=True)
        return Reflector(self._api, source, keep, self._objects_changed, self._rng)

    @property
    def synced(self) -> bool:
        """The pool exists, and the first lists of its pods, objectives and rewrites are done."""
        pods = self._pods is not None and self._pods.synced
        return pods and _served(self._objectives).synced and _served(self._rewrites).synced

    async def start(self) -> None:
        """Returns at once; ``wait_synced`` says when there is something to see."""
        for reflector in self._followed():
            reflector.start()
        if self._standalone is None:
            self._pools.start()
        else:
            self._show_pool(self._standalone)

    async def wait_synced(self, timeout_s: float) -> bool:
        """Whether it became synced in time."""
        try:
            async with asyncio.timeout(timeout_s):
                while not self.synced:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        for reflector in (self._pools, *self._followed(), *([self._pods] if self._pods else ()), *self._retired):
            await reflector.stop()

    def _followed(self) -> list[Reflector[Any]]:
        return [*self._objectives, *self._rewrites]

    def _pool_changed(self) -> None:
        self._show_pool(next(iter(self._pools.objects.values()), None))

    def _show_pool(self, spec: PoolSpec | None) -> None:
        if spec == self.spec and spec is not None:
            return
        before, self.spec = self.spec, spec
        if spec is None:
            log.warning("InferencePool %s/%s: there is none", self.name.namespace, self.name.name)
        else:
            log.info("InferencePool %s/%s: pods with %s", self.name.namespace, self.name.name, spec.selector)
        if spec is None or before is None or spec.selector != before.selector:
            self._replace_pods(spec)
        self._show_endpoints()

    def _replace_pods(self, spec: PoolSpec | None) -> None:
        """Follow other pods; those already known that still match are shown until the new list is here."""
        seed = {}
        if self._pods is not None:
            seed = dict(self._pods.objects)
            self._retire(self._pods)
        self._pods = None
        if spec is not None:
            source = Source("v1", "pods", self.name.namespace, label_selector=str(spec.selector))
            self._pods = Reflector(self._api, source, self._keep_pod, self._show_endpoints, self._rng, seed=seed)
            self._pods.start()

    def _retire(self, reflector: Reflector[Pod]) -> None:
        reflector.cancel()
        self._retired = [r for r in self._retired if not r.ended] + [reflector]

    def _show_endpoints(self) -> None:
        pods = self._pods.objects.values() if self._pods is not None else ()
        members = objects.endpoints(pods, self.spec) if self.spec is not None else []
        if members != self.pool.endpoints:
            self.pool.apply(members)
        self._tell()

    def _objects_changed(self) -> None:
        objectives, rewrites = _served(self._objectives), _served(self._rewrites)
        self.objects = snapshot(objectives.objects.values(), rewrites.objects.values())
        for reflector in (objectives, rewrites):
            if reflector.objects and LEGACY_GROUP in reflector.source.group_version:
                self._say(f"{reflector.source.resource} of {LEGACY_GROUP} are deprecated; install those of {NEW_GROUP}")
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        for tell in self.on_change:
            tell()

    def _keep_pod(self, raw: bytes) -> Pod | None:
        pod = objects.read_pod(raw)
        if pod is not None and pod.active_ports is not None:
            bad = objects.active_ports(pod.active_ports)[1]
            if bad:
                self._say(
                    f"{objects.ACTIVE_PORTS}: {', '.join(map(repr, bad))} ignored; accepted are numbers from 1 to "
                    f"65535, separated by commas (pod {pod.namespace}/{pod.name})"
                )
        return pod

    def _keep_objective(self, raw: bytes) -> Objective | None:
        objective = objects.read_objective(raw)
        return objective if self._is_ours("InferenceObjective", objective) else None

    def _keep_rewrite(self, raw: bytes) -> Rewrite | None:
        rewrite = objects.read_rewrite(raw)
        return rewrite if self._is_ours("InferenceModelRewrite", rewrite) else None

    def _is_ours(self, kind: str, made: Objective | Rewrite) -> bool:
        """Whether it is for this pool; says so when it is not only for want of the right group."""
        ref = made.ref
        if self.name.is_meant(ref):
            return True
        if ref is not None and ref.name == self.name.name:
            self._say(
                f"{kind} {made.name} is for {ref.kind} {ref.name} of group {ref.group!r}; this one is of "
                f"{self.name.group!r} (spec.poolRef.group)"
            )
        return False

    def _say(self, message: str) -> None:
        if message not in self._said and len(self._said) < MAX_SAID:
            self._said.add(message)
            log.warning("%s", message)


def _served(groups: Sequence[Reflector[T]]) -> Reflector[T]:
    """Of the new group and the legacy one, the first the server has."""
    return next((reflector for reflector in groups if not reflector.absent), groups[-1])
