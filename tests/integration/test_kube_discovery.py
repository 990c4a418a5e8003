"""A pool kept equal to an API server's objects: pods and ports, the pool's changes, objectives, rewrites, readiness."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from random import Random

import pytest
import pytest_asyncio

from llmd_sched.kube import watch
from llmd_sched.kube.client import ApiClient
from llmd_sched.kube.discovery import KubeDiscovery
from llmd_sched.kube.objects import ACTIVE_PORTS, PoolName, PoolSpec, standalone
from llmd_sched.kube.rewrites import Rewritten
from llmd_sched.pool.pool import Load, Pool
from tests.integration.kube_api import (
    LEGACY_OBJECTIVES,
    LEGACY_REWRITES,
    NAMESPACE,
    OBJECTIVES,
    PODS,
    POOLS,
    REWRITES,
    KubeApi,
    objective_object,
    pod_object,
    pool_object,
    rewrite_object,
    running,
)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(watch, "MAX_BACKOFF_S", 0.05)
    monkeypatch.setattr(watch, "ABSENT_EVERY_S", 0.02)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


class Picker:
    """A discovery and its pool."""

    def __init__(self, api: KubeApi, client: ApiClient, name: PoolName, spec: PoolSpec | None = None) -> None:
        self.api, self.pool = api, Pool()
        self.discovery = KubeDiscovery(client, self.pool, name, Random(0), spec)

    @property
    def members(self) -> list[str]:
        return [f"{e.key.removeprefix(NAMESPACE + '/')}@{e.hostport}" for e in self.pool.endpoints]

    async def has(self, *members: str) -> None:
        try:
            await until(lambda: self.members == list(members))
        except TimeoutError:
            assert self.members == list(members)


@asynccontextmanager
async def picking(
    api: KubeApi, client: ApiClient, name: PoolName | None = None, spec: PoolSpec | None = None
) -> AsyncIterator[Picker]:
    made = Picker(api, client, name or PoolName("pool", NAMESPACE), spec)
    await made.discovery.start()
    try:
        yield made
    finally:
        await made.discovery.stop()


@pytest_asyncio.fixture
async def picker() -> AsyncIterator[Picker]:
    """A pool of two pods, synced."""
    async with running() as (api, client):
        await api.put(POOLS, pool_object())
        await api.put(POOLS, pool_object((1,), name="another", app="other"))
        await api.put(PODS, pod_object("a", "10.0.0.1"))
        await api.put(PODS, pod_object("b", "10.0.0.2"))
        async with picking(api, client) as made:
            assert await made.discovery.wait_synced(10)
            await until(lambda: bool(api.open(PODS)) and bool(api.open(POOLS)))
            yield made


async def test_ready_pods_of_the_pool_are_endpoints(picker: Picker) -> None:
    assert picker.members == ["a-rank-0@10.0.0.1:8000", "b-rank-0@10.0.0.2:8000"]
    assert picker.pool.endpoints[0].labels == {"app": "vllm"}
    await picker.api.put(PODS, pod_object("a", "10.0.0.1", ready=False))
    await picker.has("b-rank-0@10.0.0.2:8000")
    await picker.api.put(PODS, pod_object("a", "10.0.0.1"))
    terminating = pod_object("b", "10.0.0.2")
    terminating["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    await picker.api.put(PODS, terminating)
    await picker.has("a-rank-0@10.0.0.1:8000")
    await picker.api.delete(PODS, "a")
    await picker.has()
    assert picker.discovery.synced


async def test_what_is_known_of_an_endpoint_outlives_changes_elsewhere(picker: Picker) -> None:
    picker.pool.record(picker.pool.endpoints[0], Load(waiting=7.0), 0.0)
    await picker.api.put(PODS, pod_object("0", "10.0.0.3"))
    await until(lambda: len(picker.pool) == 3)
    assert picker.pool.columns(0.0)["waiting"].tolist()[1] == 7.0


async def test_changed_ports_of_the_pool_change_the_endpoints_without_a_new_watch_of_pods(picker: Picker) -> None:
    await picker.api.put(POOLS, pool_object((8000, 9000)))
    await picker.has(
        "a-rank-0@10.0.0.1:8000", "a-rank-1@10.0.0.1:9000", "b-rank-0@10.0.0.2:8000", "b-rank-1@10.0.0.2:9000"
    )
    await picker.api.put(POOLS, pool_object((9000,)))
    await picker.has("a-rank-0@10.0.0.1:9000", "b-rank-0@10.0.0.2:9000")
    assert picker.api.counted(PODS) == {"list": 1, "watch": 1}


async def test_a_changed_selector_brings_other_pods_and_keeps_those_that_still_match(picker: Picker) -> None:
    api = picker.api
    await api.put(PODS, pod_object("c", "10.0.0.3", app="sglang"))
    both = pod_object("a", "10.0.0.1", app="vllm", tier="x")
    await api.put(PODS, both)
    await until(lambda: picker.pool.endpoints[0].labels == {"app": "vllm", "tier": "x"})
    sizes: list[list[str]] = []
    picker.pool.on_change.append(lambda members: sizes.append([e.name for e in members]))
    await api.put(POOLS, pool_object(tier="x"))
    await picker.has("a-rank-0@10.0.0.1:8000")
    await api.put(POOLS, pool_object(app="sglang"))
    await picker.has("c-rank-0@10.0.0.3:8000")
    assert sizes[0] == ["a-rank-0"]
    await until(lambda: len(api.open(PODS)) == 1)
    assert await picker.discovery.wait_synced(10)


async def test_a_deleted_pool_has_no_endpoints_and_is_not_synced_until_it_is_back(picker: Picker) -> None:
    await picker.api.delete(POOLS, "pool")
    await picker.has()
    assert (picker.discovery.synced, picker.discovery.spec) == (False, None)
    await picker.api.put(POOLS, pool_object())
    await picker.has("a-rank-0@10.0.0.1:8000", "b-rank-0@10.0.0.2:8000")
    assert await picker.discovery.wait_synced(10)


async def test_a_pool_that_comes_later_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    async with running() as (api, client), picking(api, client) as picker:
        await api.put(PODS, pod_object("a", "10.0.0.1"))
        await until(lambda: bool(api.open(POOLS)))
        assert not await picker.discovery.wait_synced(0.02)
        assert "there is none" in caplog.text
        await api.put(POOLS, {**pool_object(), "spec": {**pool_object()["spec"], "appProtocol": "kubernetes.io/h2c"}})
        assert await picker.discovery.wait_synced(10)
        await picker.has("a-rank-0@10.0.0.1:8000")
        assert picker.discovery.spec is not None
        assert picker.discovery.spec.app_protocol == "kubernetes.io/h2c"


async def test_a_pool_that_becomes_impossible_stays_as_it_was(picker: Picker, caplog: pytest.LogCaptureFixture) -> None:
    await picker.api.put(POOLS, pool_object(()))
    await until(lambda: "stays as it was" in caplog.text)
    assert len(picker.members) == 2


async def test_active_ports_of_a_pod_restrict_it_and_bad_ones_are_said_once(
    picker: Picker, caplog: pytest.LogCaptureFixture
) -> None:
    await picker.api.put(POOLS, pool_object((8000, 9000)))
    for round_ in range(3):
        notes = {ACTIVE_PORTS: "9000,http", "round": str(round_)}
        await picker.api.put(PODS, pod_object("a", "10.0.0.1", annotations=notes))
    await picker.has("a-rank-1@10.0.0.1:9000", "b-rank-0@10.0.0.2:8000", "b-rank-1@10.0.0.2:9000")
    (said,) = [r.getMessage() for r in caplog.records if ACTIVE_PORTS in r.getMessage()]
    assert "'http' ignored" in said
    assert "serving/a" in said


async def test_without_a_pool_object_flags_say_which_pods() -> None:
    name, spec = standalone("app in (vllm,sglang),!old", [8000], "my-epp-7d4b9-x2z", NAMESPACE)
    async with running() as (api, client):
        api.kinds.discard(POOLS)
        await api.put(OBJECTIVES, objective_object("o", 5, pool="my-epp"))
        async with picking(api, client, name, PoolSpec(spec.selector, spec.ports)) as picker:
            assert await picker.discovery.wait_synced(10)
            assert picker.discovery.objects.priority("o") == 5
            (query,) = [q for _, kind, q in api.requests if kind == PODS and "limit" in q]
            assert query["labelSelector"] == "app in (vllm,sglang),!old"
            assert not api.counted(POOLS)


async def test_objectives_and_rewrites_of_this_pool_are_followed(picker: Picker) -> None:
    api, discovery = picker.api, picker.discovery
    await api.put(OBJECTIVES, objective_object("high", 10))
    await api.put(OBJECTIVES, objective_object("unset", None))
    await api.put(OBJECTIVES, objective_object("foreign", 99, pool="another"))
    await api.put(REWRITES, rewrite_object("r", "m", "m-v2"))
    await api.put(REWRITES, rewrite_object("foreign", "n", "x", pool="another"))
    await until(lambda: bool(discovery.objects.models) and "unset" in discovery.objects.priorities)
    assert discovery.objects.priorities == {"high": 10, "unset": 0}
    assert discovery.objects.rewrite("m", Random(0)) == Rewritten("m-v2", "r")
    assert discovery.objects.rewrite("n", Random(0)) is None
    before = discovery.objects
    await api.put(OBJECTIVES, objective_object("high", 10, pool="another"))
    await api.delete(REWRITES, "r")
    await until(lambda: discovery.objects.priorities == {"unset": 0} and not discovery.objects.models)
    assert before.priorities["high"] == 10


async def test_a_reference_to_the_pool_in_another_group_is_said(
    picker: Picker, caplog: pytest.LogCaptureFixture
) -> None:
    await picker.api.put(OBJECTIVES, objective_object("o", 10, group="llm-d.ai"))
    await until(lambda: "spec.poolRef.group" in caplog.text)
    assert picker.discovery.objects.priority("o") == 0


@pytest.mark.parametrize("new_too", [True, False])
async def test_the_legacy_group_counts_only_without_the_new_one(
    new_too: bool, caplog: pytest.LogCaptureFixture
) -> None:
    api = KubeApi()
    api.kinds |= {LEGACY_OBJECTIVES, LEGACY_REWRITES}
    if not new_too:
        api.kinds -= {OBJECTIVES, REWRITES}
    async with running(api) as (_, client):
        await api.put(POOLS, pool_object())
        await api.put(LEGACY_OBJECTIVES, objective_object("o", 1))
        await api.put(LEGACY_REWRITES, rewrite_object("r", "m", "old"))
        await api.put(OBJECTIVES, objective_object("o", 2))
        await api.put(REWRITES, rewrite_object("r", "m", "new"))
        async with picking(api, client) as picker:
            assert await picker.discovery.wait_synced(10)
            await until(lambda: len(api.open(LEGACY_OBJECTIVES)) == 1)
            objects = picker.discovery.objects
            assert objects.priority("o") == (2 if new_too else 1)
            assert objects.rewrite("m", Random(0)) == Rewritten("new" if new_too else "old", "r")
    assert ("are deprecated" in caplog.text) is not new_too


async def test_a_group_that_is_installed_later_takes_over() -> None:
    api = KubeApi()
    api.kinds = (api.kinds | {LEGACY_OBJECTIVES}) - {OBJECTIVES}
    async with running(api) as (_, client):
        await api.put(POOLS, pool_object())
        await api.put(LEGACY_OBJECTIVES, objective_object("o", 1))
        async with picking(api, client) as picker:
            await until(lambda: picker.discovery.objects.priority("o") == 1)
            await api.put(OBJECTIVES, objective_object("o", 2))
            api.kinds.add(OBJECTIVES)
            await until(lambda: picker.discovery.objects.priority("o") == 2)


async def test_without_any_of_the_optional_kinds_the_pool_is_served_all_the_same() -> None:
    api = KubeApi()
    api.kinds -= {OBJECTIVES, REWRITES}
    async with running(api) as (_, client):
        await api.put(POOLS, pool_object())
        await api.put(PODS, pod_object("a", "10.0.0.1"))
        async with picking(api, client) as picker:
            assert await picker.discovery.wait_synced(10)
            assert picker.members == ["a-rank-0@10.0.0.1:8000"]


@pytest.mark.parametrize("kind", [PODS, OBJECTIVES, REWRITES])
async def test_it_is_not_synced_before_every_first_list_is_done(kind: str) -> None:
    api = KubeApi()
    async with running(api) as (_, client):
        await api.put(POOLS, pool_object())
        lists = api._list_or_watch
        gate = asyncio.Event()

        async def slow(request: object) -> object:
            if kind.endswith(request.match_info["resource"]):  # type: ignore[attr-defined]
                await gate.wait()
            return await lists(request)  # type: ignore[arg-type]

        api._list_or_watch = slow  # type: ignore[method-assign, assignment]
        await api.stop()
        await api.start()
        client._base_url = f"http://127.0.0.1:{api.port}"
        async with picking(api, client) as picker:
            await until(lambda: picker.discovery.spec is not None)
            assert not await picker.discovery.wait_synced(0.05)
            gate.set()
            assert await picker.discovery.wait_synced(10)


async def test_whoever_asked_is_told_after_the_pool_shows_it(picker: Picker) -> None:
    seen: list[int] = []
    picker.discovery.on_change.append(lambda: seen.append(len(picker.pool)))
    await picker.api.put(PODS, pod_object("c", "10.0.0.3"))
    await until(lambda: bool(seen))
    assert seen[0] == 3


async def test_a_stopped_discovery_leaves_nothing_running(picker: Picker, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    await picker.api.put(POOLS, pool_object(app="sglang"))
    await picker.has()
    await picker.discovery.stop()
    names = [task.get_name() for task in asyncio.all_tasks()]
    assert not [name for name in names if name.startswith("watch ")]
