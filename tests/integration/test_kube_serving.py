"""Whole schedulers over an API server: health, routing by its objects as they change, leadership, who reads metrics."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
import pytest_asyncio
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from llmd_sched.app import Scheduler, ServeSettings
from llmd_sched.config import DEFAULT_CONFIG
from llmd_sched.errors import ConfigError
from llmd_sched.extproc.server import EXT_PROC
from llmd_sched.kube import lease, watch
from llmd_sched.kube.lease import Timings
from llmd_sched.stack import free_ports
from tests.builders import CONFIG_HEAD
from tests.envoy_stream import CHANNEL_OPTIONS, PATIENCE_S, exchange, soon, until
from tests.integration.conftest import health, until_health
from tests.integration.kube_api import (
    LEASES,
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
)
from tests.messages import Reply, asked, destination, refused, request_headers, streamed

TOKEN_REVIEWS = "apis/authentication.k8s.io/v1/tokenreviews"
LEASE = "epp-serving-pool.llm-d.ai"
NAMES = ("", "liveness", "readiness", EXT_PROC, "inference-extension")
FLOW_CONTROL = (
    CONFIG_HEAD
    + """\
featureGates: [flowControl]
plugins: [{type: queue-scorer}, {type: concurrency-detector}]
flowControl: {saturationDetector: {pluginRef: concurrency-detector}}
"""
)
QUICK = Timings(lease_s=3.0, renew_s=2.0, retry_s=0.05)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(watch, "MAX_BACKOFF_S", 0.05)
    monkeypatch.setattr(watch, "ABSENT_EVERY_S", 0.02)
    monkeypatch.setattr(lease, "Timings", lambda: QUICK)


class Replica:
    """A started scheduler of one pod, and ways to look at it."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.health_port, self.metrics_port = scheduler.settings.health_port, scheduler.settings.metrics_port
        self.channel: aio.Channel

    async def ask(self, **headers: str) -> list[Reply]:
        return await exchange(self.channel, *asked(**headers))

    async def destination(self, **headers: str) -> str:
        return destination(await self.ask(**headers))

    async def health(self, name: str = "readiness") -> str:
        return await health(self.health_port, name)

    async def until(self, wanted: str, name: str = "readiness") -> None:
        await until_health(self.health_port, wanted, name)

    async def has(self, *addresses: str) -> None:
        await until(lambda: [e.address for e in self.scheduler.pool.endpoints] == list(addresses))

    async def get(self, path: str = "/metrics", token: str | None = None) -> int:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        url = f"http://127.0.0.1:{self.metrics_port}{path}"
        async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as reply:
            return reply.status

    def priorities(self, count: int) -> list[int]:
        """Of the last requests, newest first."""
        return [record.priority for record in self.scheduler.decisions.newest(count, None, None)]

    def page(self) -> str:
        return self.scheduler.telemetry.page().decode()


class Cluster:
    """An API server, and replicas that are stopped when the test ends."""

    def __init__(self, api: KubeApi, environ: pytest.MonkeyPatch, stack: AsyncExitStack) -> None:
        self.api, self._environ, self._stack = api, environ, stack

    async def replica(self, pod: str = "epp-5d8f7c9b4-x2x9z", **settings: Any) -> Replica:
        """Its endpoints are looked for once a second, where nobody listens."""
        self._environ.setenv("POD_NAME", pod)
        return await self._stack.enter_async_context(replica(**{"pool_name": "pool", **settings}))

    async def pods(self, *names: str) -> None:
        """``a`` is Ready at 127.0.0.2, ``b`` at 127.0.0.3, and so on."""
        for name in names:
            await self.api.put(PODS, pod_object(name, f"127.0.0.{ord(name) - ord('a') + 2}"))

    @property
    def holder(self) -> str:
        return str(self.api.objects[LEASES][LEASE]["spec"]["holderIdentity"]).partition("_")[0]


@asynccontextmanager
async def replica(**settings: Any) -> AsyncIterator[Replica]:
    grpc_port, health_port, metrics_port = free_ports(3)
    plain = ServeSettings(
        host="127.0.0.1",
        grpc_port=grpc_port,
        health_port=health_port,
        metrics_port=metrics_port,
        secure_serving=False,
        drain_timeout_s=0.0,
        scrape_interval_s=1.0,
    )
    scheduler = Scheduler(msgspec.structs.replace(plain, **settings))
    await scheduler.start()
    made = Replica(scheduler)
    try:
        async with aio.insecure_channel(f"127.0.0.1:{grpc_port}", options=CHANNEL_OPTIONS) as made.channel:
            yield made
    finally:
        at_once = asyncio.Event()
        at_once.set()
        await soon(scheduler.stop(at_once))


@pytest_asyncio.fixture
async def cluster(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cluster]:
    api = KubeApi()
    await api.start()
    monkeypatch.setenv("LLMD_KUBE_API", f"http://127.0.0.1:{api.port}")
    monkeypatch.setenv("NAMESPACE", NAMESPACE)
    async with AsyncExitStack() as stack:
        yield Cluster(api, monkeypatch, stack)
    await api.stop()


# --- health -----------------------------------------------------------------------------------------------------------


async def test_it_is_ready_under_every_name_once_the_pool_is_there_and_no_longer_when_it_is_gone(
    cluster: Cluster,
) -> None:
    await cluster.pods("a")
    one = await cluster.replica()
    assert {name: await one.health(name) for name in NAMES} == dict.fromkeys(NAMES, "NOT_SERVING")
    await cluster.api.put(POOLS, pool_object())
    await one.until("SERVING")
    assert {name: await one.health(name) for name in NAMES} == dict.fromkeys(NAMES, "SERVING")
    await cluster.api.delete(POOLS, "pool")
    await one.until("NOT_SERVING")
    assert {name: await one.health(name) for name in NAMES} == dict.fromkeys(NAMES, "NOT_SERVING")


async def test_a_pool_without_pods_is_ready(cluster: Cluster) -> None:
    await cluster.api.put(POOLS, pool_object())
    one = await cluster.replica()
    await one.until("SERVING")
    assert refused(await one.ask())[0] == 503


async def listed(port: int) -> dict[str, str]:
    async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        reply = await health_pb2_grpc.HealthStub(channel).List(health_pb2.HealthListRequest(), timeout=PATIENCE_S)
        names = health_pb2.HealthCheckResponse.ServingStatus
        return {name: names.Name(one.status) for name, one in reply.statuses.items()}


async def test_health_lists_what_it_answers_on_both_ports(cluster: Cluster) -> None:
    await cluster.api.put(POOLS, pool_object())
    one = await cluster.replica()
    await one.until("SERVING")
    for port in (one.health_port, one.scheduler.settings.grpc_port):
        assert await listed(port) == dict.fromkeys(NAMES, "SERVING")


async def test_with_leader_election_only_liveness_is_for_everybody(cluster: Cluster) -> None:
    await cluster.api.put(POOLS, pool_object())
    one = await cluster.replica("one-a-a", leader_election=True)
    await one.until("SERVING")
    two = await cluster.replica("two-b-b", leader_election=True)
    await until(lambda: two.scheduler.source.synced)
    for made, ready in ((one, "SERVING"), (two, "NOT_SERVING")):
        told = {name: await made.health(name) for name in (*NAMES, "no-such-name")}
        assert told == {
            "": ready,
            "liveness": "SERVING",
            "readiness": ready,
            EXT_PROC: ready,
            "inference-extension": "SERVICE_UNKNOWN",
            "no-such-name": "SERVICE_UNKNOWN",
        }
        assert set(await listed(made.health_port)) == set(NAMES[:-1])


async def test_without_leader_election_every_name_is_answered(cluster: Cluster) -> None:
    await cluster.api.put(POOLS, pool_object())
    one = await cluster.replica()
    await one.until("SERVING", "no-such-name")


# --- requests ---------------------------------------------------------------------------------------------------------


async def test_a_request_goes_to_a_ready_pod_and_to_none_that_is_not(cluster: Cluster) -> None:
    await cluster.api.put(POOLS, pool_object((8000,)))
    await cluster.pods("a")
    await cluster.api.put(PODS, pod_object("b", "127.0.0.3", ready=False))
    await cluster.api.put(PODS, pod_object("c", "127.0.0.4", app="other"))
    one = await cluster.replica()
    await one.until("SERVING")
    assert {await one.destination() for _ in range(10)} == {"127.0.0.2:8000"}


async def test_pods_that_come_and_go_are_followed(cluster: Cluster) -> None:
    await cluster.api.put(POOLS, pool_object())
    await cluster.pods("a")
    one = await cluster.replica()
    await one.has("127.0.0.2")
    await cluster.pods("b")
    await one.has("127.0.0.2", "127.0.0.3")
    await cluster.api.delete(PODS, "a")
    await one.has("127.0.0.3")
    assert await one.destination() == "127.0.0.3:8000"
    await cluster.api.put(PODS, pod_object("b", "127.0.0.3", ready=False))
    await one.has()
    status, _, told = refused(await one.ask())
    assert (status, told["x-llm-d-request-dropped-reason"]) == (503, "rejected-no-endpoints")


async def test_without_the_pool_requests_are_refused_until_it_is_back(cluster: Cluster) -> None:
    await cluster.api.put(POOLS, pool_object())
    await cluster.pods("a")
    one = await cluster.replica()
    await one.has("127.0.0.2")
    await cluster.api.delete(POOLS, "pool")
    await one.has()
    assert refused(await one.ask())[0] == 503
    assert refused(await exchange(one.channel, request_headers(end=True, path="/v1/models")))[0] == 500
    await cluster.api.put(POOLS, pool_object((9000,)))
    await one.has("127.0.0.2")
    await one.until("SERVING")
    assert await one.destination() == "127.0.0.2:9000"


async def test_an_objective_gives_the_priority_as_it_changes(cluster: Cluster) -> None:
    await cluster.api.put(POOLS, pool_object())
    await cluster.pods("a")
    await cluster.api.put(OBJECTIVES, objective_object("chat", 5))
    await cluster.api.put(OBJECTIVES, objective_object("urgent", 99, pool="another"))
    one = await cluster.replica()
    await one.until("SERVING")
    for name in ("chat", "urgent", "unknown"):
        await one.ask(x_llm_d_inference_objective=name)
    assert one.priorities(3) == [0, 0, 5]
    await cluster.api.put(OBJECTIVES, objective_object("chat", 7))
    await until(lambda: one.scheduler.source.objects.priority("chat") == 7)
    await one.ask(x_gateway_inference_objective="chat")
    assert one.priorities(1) == [7]


async def test_a_sheddable_objective_is_refused_while_nothing_is_known_of_the_pods(cluster: Cluster) -> None:
    await cluster.api.put(POOLS, pool_object())
    await cluster.pods("a")
    await cluster.api.put(OBJECTIVES, objective_object("batch", -5))
    one = await cluster.replica()
    await one.until("SERVING")
    status, _, told = refused(await one.ask(x_llm_d_inference_objective="batch"))
    assert (status, told["x-llm-d-request-dropped-reason"]) == (429, "rejected-saturated")


async def test_a_rewrite_changes_the_model_as_it_comes_and_goes(cluster: Cluster) -> None:
    await cluster.api.put(POOLS, pool_object())
    await cluster.pods("a")
    await cluster.api.put(REWRITES, rewrite_object("r", "m", "m-v2"))
    one = await cluster.replica()
    await one.until("SERVING")
    sent = streamed(await one.ask(x_llm_d_model_name_rewrite="by-header"), "request_body")[0]
    assert msgspec.json.decode(sent)["model"] == "m-v2"
    assert 'target_model_name="m-v2"' in one.page()
    await cluster.api.delete(REWRITES, "r")
    await until(lambda: not one.scheduler.source.objects.models)
    sent = streamed(await one.ask(x_llm_d_model_name_rewrite="by-header"), "request_body")[0]
    assert msgspec.json.decode(sent)["model"] == "by-header"


async def test_while_the_api_server_is_away_the_last_picture_is_served_and_then_followed_on(cluster: Cluster) -> None:
    await cluster.api.put(POOLS, pool_object())
    await cluster.pods("a")
    one = await cluster.replica()
    await one.has("127.0.0.2")
    await one.until("SERVING")
    port = cluster.api.port
    await cluster.api.stop()
    assert await one.destination() == "127.0.0.2:8000"
    assert await one.health() == "SERVING"
    await cluster.api.start(port)
    await cluster.pods("b")
    await one.has("127.0.0.2", "127.0.0.3")


async def test_a_replica_starts_before_the_api_server_does(cluster: Cluster) -> None:
    port = cluster.api.port
    await cluster.api.stop()
    one = await cluster.replica()
    assert await one.health() == "NOT_SERVING"
    assert refused(await one.ask())[0] == 503
    await cluster.api.start(port)
    await cluster.api.put(POOLS, pool_object())
    await one.until("SERVING")


async def test_pods_by_selector_need_no_pool_and_name_it_after_the_deployment(cluster: Cluster) -> None:
    await cluster.pods("a")
    await cluster.api.put(PODS, pod_object("c", "127.0.0.4", app="other"))
    settings = {"pool_name": "", "endpoint_selector": "app=vllm", "endpoint_target_ports": (8000, 8001)}
    one = await cluster.replica("my-epp-5d8f7c9b4-x2x9z", **settings)
    await one.until("SERVING")
    assert {await one.destination() for _ in range(20)} <= {"127.0.0.2:8000", "127.0.0.2:8001"}
    assert len(one.scheduler.pool) == 2
    assert 'name="my-epp"' in one.page()
    assert not cluster.api.counted(POOLS)


@pytest.mark.parametrize(
    ("pool", "selector", "ports", "pod", "where"),
    [
        ("pool", "a=b", (1,), "a-b-c", "--pool-name"),
        ("", "", (1,), "a-b-c", "$.dataLayer.discovery"),
        ("", "a==b=c", (1,), "a-b-c", "--endpoint-selector"),
        ("", " ", (1,), "a-b-c", "--endpoint-selector"),
        ("", "a=b", (), "a-b-c", "--endpoint-target-ports"),
        ("", "a=b", (70000,), "a-b-c", "--endpoint-target-ports"),
        ("", "a=b", tuple(range(1, 10)), "a-b-c", "--endpoint-target-ports"),
        ("", "a=b", (1,), "alone", "POD_NAME"),
    ],
)
async def test_what_selects_the_pods_is_checked_at_start(
    cluster: Cluster, pool: str, selector: str, ports: tuple[int, ...], pod: str, where: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        await cluster.replica(pod, pool_name=pool, endpoint_selector=selector, endpoint_target_ports=ports)
    assert refusal.value.path == where
    assert not cluster.api.requests


# --- two replicas -----------------------------------------------------------------------------------------------------


@pytest_asyncio.fixture
async def pair(cluster: Cluster) -> tuple[Replica, Replica]:
    """A leader and a follower."""
    await cluster.api.put(POOLS, pool_object())
    await cluster.pods("a")
    first = await cluster.replica("one-a-a", leader_election=True)
    await first.until("SERVING")
    second = await cluster.replica("two-b-b", leader_election=True)
    await second.has("127.0.0.2")
    return first, second


async def test_a_follower_is_warm_so_that_a_stray_request_is_routed(
    cluster: Cluster, pair: tuple[Replica, Replica]
) -> None:
    leader, follower = pair
    assert (await leader.health(), await follower.health()) == ("SERVING", "NOT_SERVING")
    assert await follower.destination() == "127.0.0.2:8000"
    await cluster.pods("b")
    await follower.has("127.0.0.2", "127.0.0.3")
    assert cluster.holder == "one-a-a"


async def test_when_the_leader_stops_it_gives_the_lease_away_and_the_follower_serves(
    cluster: Cluster, pair: tuple[Replica, Replica]
) -> None:
    leader, follower = pair
    puts = cluster.api.counted(LEASES)
    await leader.scheduler.stop()
    await follower.until("SERVING")
    assert cluster.holder == "two-b-b"
    assert await follower.destination() == "127.0.0.2:8000"
    assert cluster.api.counted(LEASES)["put"] > puts["put"]
    assert cluster.api.objects[LEASES][LEASE]["spec"]["leaseDurationSeconds"] == QUICK.lease_s


async def test_while_it_drains_the_leader_is_alive_without_the_lease(
    cluster: Cluster, pair: tuple[Replica, Replica]
) -> None:
    leader, follower = pair
    await leader.scheduler.source.step_down()
    await leader.until("NOT_SERVING")
    assert await leader.health("liveness") == "SERVING"
    await follower.until("SERVING")
    assert await leader.destination() == "127.0.0.2:8000"


@pytest.mark.parametrize("config", [DEFAULT_CONFIG, FLOW_CONTROL])
async def test_an_idle_leader_that_drains_still_takes_what_proxies_send_it(cluster: Cluster, config: str) -> None:
    """They learn of the new leader only some time after; the reference takes the whole drain time too."""
    await cluster.api.put(POOLS, pool_object())
    await cluster.pods("a")
    one = await cluster.replica("one-a-a", leader_election=True, drain_timeout_s=600.0, config_text=config)
    await one.until("SERVING")
    hurry = asyncio.Event()
    stopping = asyncio.create_task(one.scheduler.stop(hurry))
    await one.until("NOT_SERVING")
    await until(lambda: cluster.holder == "")
    for _ in range(5):
        assert await one.destination() == "127.0.0.2:8000"
        await asyncio.sleep(0.02)
    assert not stopping.done()
    hurry.set()
    await soon(stopping)


async def test_a_leader_that_cannot_renew_stops_leading_but_routes_and_leads_again(cluster: Cluster) -> None:
    await cluster.api.put(POOLS, pool_object())
    await cluster.pods("a")
    one = await cluster.replica("one-a-a", leader_election=True)
    await one.until("SERVING")
    port = cluster.api.port
    await cluster.api.stop()
    await one.until("NOT_SERVING")
    assert await one.health("liveness") == "SERVING"
    assert await one.destination() == "127.0.0.2:8000"
    await cluster.api.start(port)
    await one.until("SERVING")


async def test_without_kubernetes_there_is_no_lease_to_elect_with(tmp_path: Path) -> None:
    file = tmp_path / "endpoints.yaml"
    file.write_text("endpoints: [{name: e, address: 127.0.0.1, port: 9}]\n")
    with pytest.raises(ConfigError, match="--ha-enable-leader-election: needs Kubernetes"):
        async with replica(endpoints_file=str(file), leader_election=True):
            pass


# --- who reads the metrics --------------------------------------------------------------------------------------------


def people(api: KubeApi) -> None:
    api.tokens = {"prometheus-token": {"username": "prometheus"}, "other-token": {"username": "somebody"}}
    api.readers = {"prometheus"}


async def test_the_api_server_says_who_may_read_the_metrics(cluster: Cluster) -> None:
    people(cluster.api)
    one = await cluster.replica()
    for path in ("/metrics", "/debug/plugins/state", "/debug/decisions"):
        assert [await one.get(path, token) for token in (None, "nobodys", "other-token", "prometheus-token")] == [
            401, 403, 403, 200,
        ]  # fmt: skip
    assert await one.get("/healthz") == 200
    await cluster.api.stop()
    assert [await one.get("/metrics", token) for token in ("prometheus-token", "another")] == [200, 403]
    await cluster.api.start()


async def test_a_token_file_wins_over_the_api_server(cluster: Cluster, tmp_path: Path) -> None:
    people(cluster.api)
    file = tmp_path / "tokens"
    file.write_text("a-token-of-the-file\n")
    file.chmod(0o600)
    one = await cluster.replica(metrics_token_file=str(file))
    assert [await one.get(token=t) for t in (None, "prometheus-token", "a-token-of-the-file")] == [401, 403, 200]
    assert not cluster.api.counted(TOKEN_REVIEWS)


async def test_everybody_may_read_them_when_no_one_is_to_be_asked(cluster: Cluster) -> None:
    one = await cluster.replica(metrics_endpoint_auth=False)
    assert await one.get() == 200


async def test_no_token_reaches_the_log(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    people(cluster.api)
    with caplog.at_level(logging.DEBUG):
        one = await cluster.replica()
        for token in ("prometheus-token", "nobodys-token"):
            await one.get(token=token)
        cluster.api.forbidden = {TOKEN_REVIEWS}
        await one.get(token="unlucky-token")
    assert "access cannot be reviewed" in caplog.text
    assert not [t for t in ("prometheus-token", "nobodys-token", "unlucky-token") if t in caplog.text]
