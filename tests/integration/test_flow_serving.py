"""Flow control by a whole scheduler over gRPC: who waits, who goes next, who is refused, who is taken back.

One endpoint with room for one request, unless a test says otherwise; its metrics are never read again, so nothing goes
on but by what is asked and what ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest
from grpc import aio

from tests.envoy_stream import Stream, soon, until
from tests.integration.conftest import Running, running, write_endpoints
from tests.messages import (
    DUPLEX,
    LEAN,
    RAW,
    Reply,
    answered,
    asked,
    destination,
    entry,
    kinds,
    refused,
    response_body,
    stream_headers,
)

both = pytest.mark.parametrize("mode", [LEAN, DUPLEX])

PLUGINS = """
plugins:
- {type: concurrency-detector, parameters: {maxConcurrency: %d}}
- {type: static-objectives, parameters: {objectives: {high: 10, low: -1, lowest: -2}}}
- {type: active-request-scorer}
- {type: max-score-picker}
schedulingProfiles: [{name: default, plugins: [{pluginRef: active-request-scorer}, {pluginRef: max-score-picker}]}]
"""


def flow(limit: int = 1, **fields: Any) -> str:
    block = {"saturationDetector": "{pluginRef: concurrency-detector}", **fields}
    lines = [f"  {name}: {str(value).lower() if isinstance(value, bool) else value}" for name, value in block.items()]
    return "featureGates: [flowControl]" + PLUGINS % limit + "flowControl:\n" + "\n".join(lines) + "\n"


class Client:
    """One request and whoever waits for its answer."""

    def __init__(self, served: Running, priority: str = "", mode: str = DUPLEX, **headers: str) -> None:
        named = {"x_llm_d_inference_objective": priority} if priority else {}
        self.served = served
        self.stream: Stream = served.stream()
        self.mode = mode
        self.task = asyncio.create_task(self._ask(asked(mode, **named, **headers)))

    async def _ask(self, messages: Any) -> list[Reply]:
        """The replies that route it, or its refusal."""
        await self.stream.send(*messages)
        replies = []
        while (reply := await self.stream.call.read()) is not aio.EOF:
            replies.append(reply)
            if reply.HasField("immediate_response") or kinds([reply]) == ["request_body"]:
                break
        return replies

    @property
    def waits(self) -> bool:
        return not self.task.done()

    async def routed(self) -> str:
        return destination(await soon(self.task))

    async def refused(self) -> tuple[int, str, str]:
        """Status, text and reason; the stream has ended."""
        status, text, told = refused(await soon(self.task))
        assert await self.stream.to_the_end() == []
        return status, text, told["x-llm-d-request-dropped-reason"]

    async def finish(self) -> None:
        await self.routed()
        if self.mode == LEAN:
            (ticket,) = [
                r.dynamic_metadata["llmd"]["ticket"] for r in self.task.result() if r.HasField("dynamic_metadata")
            ]
            await self.served.access_log(entry(ticket))
        else:
            await self.stream.ask(*answered(), count=2)


async def queued(served: Running, count: int) -> None:
    await until(lambda: served.sample("flow_control_queue_size") == count)


async def lined_up(served: Running, *priorities: str, **headers: str) -> list[Client]:
    """Clients that wait, each come after the one before."""
    clients = []
    for priority in priorities:
        before = served.sample("flow_control_queue_size")
        clients.append(Client(served, priority, **headers))
        await queued(served, int(before) + 1)
    return clients


def outcomes(served: Running) -> dict[tuple[str, str], float]:
    """How many, by outcome and priority."""
    told = served.samples("flow_control_requests_total")
    return {(labels["outcome"], labels["priority"]): value for labels, value in told if value}


# --- who waits, and who goes ------------------------------------------------------------------------------------------


@both
async def test_requests_beyond_the_limit_wait_and_go_by_priority_as_room_comes(tmp_path: Path, mode: str) -> None:
    async with running(tmp_path, flow()) as served:
        first = Client(served, mode=mode)
        await first.routed()
        low, usual, later, high = await lined_up(served, "low", "", "", "high", mode=mode)
        for ended, going in ((first, high), (high, usual), (usual, later), (later, low)):
            assert going.waits
            await ended.finish()
            await going.routed()
            assert len(served.scheduler.router.open) == 1
        await low.finish()
        await served.idle()
        assert outcomes(served) == {("Dispatched", "0"): 3, ("Dispatched", "10"): 1, ("Dispatched", "-1"): 1}


async def test_what_is_told_of_a_queue(tmp_path: Path) -> None:
    async with running(tmp_path, flow(maxRequests=10, maxBytes="1k")) as served:
        first = Client(served)
        await first.routed()
        (waiting,) = await lined_up(served, "high", x_llm_d_inference_fairness_id="tenant")
        labels = {"fairness_id": "tenant", "priority": "10", "model_name": "m", "target_model_name": "m"}
        assert served.sample("flow_control_queue_size", **labels) == 1
        assert served.sample("flow_control_queue_bytes", **labels) == len(RAW)
        assert served.sample("flow_control_pool_saturation", stage="effective") == 1
        assert served.sample("flow_control_global_capacity_utilization_requests") == 0.1
        assert served.sample("flow_control_global_capacity_utilization_bytes") == len(RAW) / 1000
        assert served.sample("flow_control_capacity_utilization_requests", priority="10") == 1 / 5000
        assert served.sample("inflight_requests", fairness_id="default-flow", priority="0") == 1
        page = served.scheduler.telemetry.page().decode()
        assert "llm_d_epp_flow_control_queue_size{" in page
        assert "inference_extension_flow_control_queue_size{" in page
        await first.finish()
        await waiting.finish()
        await served.idle()
        told = {"outcome": "Dispatched", "priority": "10", "fairness_id": "tenant"}
        assert served.sample("flow_control_request_queue_duration_seconds_count", **told) == 1
        assert served.sample("flow_control_request_enqueue_duration_seconds_count", **told) == 1
        assert served.sample("flow_control_dispatch_cycle_duration_seconds_count") > 0
        assert served.sample("flow_control_pool_saturation", stage="effective") == 0


async def test_a_request_that_waits_takes_the_first_endpoint_that_appears(tmp_path: Path) -> None:
    async with running(tmp_path, flow(), pods=0) as served:
        (waiting,) = await lined_up(served, "")
        write_endpoints(served.endpoints_file, [9], [{}])
        assert await waiting.routed() == "127.0.0.1:9"
        await waiting.finish()
        await served.idle()


# --- who is refused ---------------------------------------------------------------------------------------------------


async def test_a_request_that_waited_for_as_long_as_it_may_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path, flow(defaultRequestTTL="150ms")) as served:
        first = Client(served)
        await first.routed()
        status, text, reason = await Client(served).refused()
        assert (status, reason) == (429, "rejected-ttl-expired")
        assert text.startswith("inference error: ResourceExhausted - request timed out in queue: ")
        await first.finish()
        await served.idle()
        assert outcomes(served) == {("Dispatched", "0"): 1, ("EvictedTTL", "0"): 1}


@pytest.mark.parametrize(
    "limits",
    [{"maxRequests": 1}, {"maxBytes": len(RAW) + 1}, {"priorityBands": "[{priority: 0, maxRequests: 1}]"}],
    ids=["requests", "bytes", "band"],
)
async def test_a_full_queue_refuses_at_once(tmp_path: Path, limits: dict[str, Any]) -> None:
    async with running(tmp_path, flow(**limits)) as served:
        first = Client(served)
        await first.routed()
        (waiting,) = await lined_up(served, "")
        status, text, reason = await Client(served).refused()
        assert (status, reason) == (429, "rejected-saturated")
        assert text.startswith("inference error: ResourceExhausted - ")
        await first.finish()
        await waiting.finish()
        await served.idle()
        assert outcomes(served) == {("Dispatched", "0"): 2, ("RejectedCapacity", "0"): 1}


async def test_without_an_endpoint_a_request_waits_for_its_own_budget(tmp_path: Path) -> None:
    async with running(tmp_path, flow(noEndpointRequestTTL="150ms", maxRequests=1), pods=0) as served:
        (waiting,) = await lined_up(served, "")
        status, text, reason = await Client(served).refused()
        assert (status, reason) == (503, "rejected-no-endpoints"), "a full queue, and nowhere to go"
        assert text.startswith("inference error: ServiceUnavailable - no endpoints available: ")
        status, text, reason = await waiting.refused()
        assert (status, reason) == (503, "rejected-no-endpoints")
        assert text.startswith("inference error: ServiceUnavailable - no endpoints available: ")
        await served.idle()
        assert outcomes(served) == {("RejectedNoEndpoints", "0"): 1, ("EvictedNoEndpoints", "0"): 1}


async def test_a_client_that_goes_while_it_waits_leaves_its_place(tmp_path: Path) -> None:
    async with running(tmp_path, flow(maxRequests=1)) as served:
        first = Client(served)
        await first.routed()
        (gone,) = await lined_up(served, "")
        gone.stream.call.cancel()
        await queued(served, 0)
        (waiting,) = await lined_up(served, "")
        await first.finish()
        await waiting.finish()
        await served.idle()
        assert outcomes(served) == {("Dispatched", "0"): 2, ("EvictedContextCancelled", "0"): 1}
        await asyncio.gather(gone.task, return_exceptions=True)


async def test_a_client_that_goes_while_it_is_served_makes_room(tmp_path: Path) -> None:
    async with running(tmp_path, flow()) as served:
        first = Client(served)
        await first.routed()
        (waiting,) = await lined_up(served, "")
        first.stream.call.cancel()
        await waiting.finish()
        await served.idle()


async def test_who_waits_when_it_stops_is_told_and_who_is_served_goes_on(tmp_path: Path) -> None:
    async with running(tmp_path, flow(), drain_timeout_s=10.0) as served:
        first = Client(served)
        await first.routed()
        (waiting,) = await lined_up(served, "")
        stopping = asyncio.create_task(served.scheduler.stop())
        status, text, reason = await waiting.refused()
        assert (status, reason) == (503, "rejected-shutting-down")
        assert text.startswith("inference error: ServiceUnavailable - ")
        assert (await Client(served).refused())[2] == "rejected-shutting-down"
        assert not stopping.done()
        await first.finish()
        await soon(stopping)
        assert outcomes(served) == {("Dispatched", "0"): 1, ("EvictedOther", "0"): 1, ("RejectedOther", "0"): 1}


# --- who is taken back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begun", [False, True], ids=["before the reply", "within the reply"])
async def test_a_sheddable_request_under_way_gives_way(tmp_path: Path, begun: bool) -> None:
    async with running(tmp_path, flow(enableEviction=True)) as served:
        victim = Client(served, "low")
        await victim.routed()
        if begun:
            await victim.stream.ask(stream_headers(), response_body(b"data: 1\n\n"), count=2)
        wanted = Client(served, "high")
        status, text, told = refused(await victim.stream.replies(1))
        assert (status, text) == (429, "request evicted by flow control")
        assert told["x-llm-d-request-dropped-reason"] == "evicted"
        victim.stream.call.cancel()  # what Envoy does then
        await wanted.finish()
        await served.idle()
        assert served.sample("request_error_total", error_code="evicted", priority="-1") == 1
        assert served.sample("request_error_total") == 1, "and it ended once"
        assert served.sample("flow_control_revocations_issued_total", priority="10") == 1
        assert served.sample("flow_control_revocations_total", outcome="confirmed") == 1
        assert served.sample("flow_control_revocation_confirmation_seconds_count") == 1


SMALL_WINDOW = [("grpc.http2.lookahead_bytes", 16_384), ("grpc.http2.bdp_probe", 0)]
"""A proxy with these takes no more than this at a time while it does not read."""


async def test_whoever_is_evicted_is_told_also_while_it_is_behind_with_reading(tmp_path: Path) -> None:
    """A chunk is on its way to the proxy then, and only one may write to a stream at a time."""
    async with (
        running(tmp_path, flow(enableEviction=True)) as served,
        aio.insecure_channel(f"127.0.0.1:{served.grpc_port}", options=SMALL_WINDOW) as channel,
    ):
        victim = Stream(channel)
        await victim.ask(*asked(x_llm_d_inference_objective="low"), count=2)
        await victim.ask(stream_headers(), count=1)
        await victim.send(response_body(b"x" * 60_000))
        await until(stuck(served))
        await Client(served, "high").finish()
        replies = await soon(victim.to_the_end())
        assert kinds(replies) == ["response_body", "immediate_response"]
        assert refused(replies)[:2] == (429, "request evicted by flow control")
        await served.idle()


def stuck(served: Running) -> Callable[[], bool]:
    """Whether the only stream has had a reply to write at each of the last looks."""
    looks = 0

    def look() -> bool:
        nonlocal looks
        (stream,) = served.scheduler.ext_proc._streams.values()
        looks = 0 if stream.delivered else looks + 1
        return looks == 20

    return look


async def test_nobody_is_taken_back_for_a_request_that_is_worth_no_more(tmp_path: Path) -> None:
    async with running(tmp_path, flow(enableEviction=True)) as served:
        for priority, other in (("low", "low"), ("", "high"), ("low", "lowest")):
            first = Client(served, priority)
            await first.routed()
            (waiting,) = await lined_up(served, other)
            await first.finish()
            await waiting.finish()
        await served.idle()
        assert served.sample("request_error_total") == 0


async def test_the_lowest_and_newest_goes_first(tmp_path: Path) -> None:
    async with running(tmp_path, flow(limit=3, enableEviction=True)) as served:
        under_way = []
        for priority in ("low", "lowest", "lowest"):
            under_way.append(Client(served, priority))
            await under_way[-1].routed()
        wanted = Client(served)
        assert refused(await under_way[2].stream.to_the_end())[1] == "request evicted by flow control"
        await wanted.finish()
        for one in under_way[:2]:
            await one.finish()
        await served.idle()
        assert served.sample("request_error_total") == 1


async def test_what_is_on_the_lean_path_cannot_be_taken_back(tmp_path: Path) -> None:
    async with running(tmp_path, flow(enableEviction=True)) as served:
        first = Client(served, "low", LEAN)
        await first.routed()
        (waiting,) = await lined_up(served, "high")
        assert served.sample("flow_control_revocations_total", outcome="failed") > 0
        await first.finish()
        await waiting.finish()
        await served.idle()


# --- many at once -----------------------------------------------------------------------------------------------------

LIMIT, PODS = 3, 2


async def test_two_hundred_streams_at_once_never_exceed_the_limit(tmp_path: Path) -> None:
    """Some clients go while they wait, some while they are served, some in between."""
    rng = Random(1)
    async with running(tmp_path, flow(LIMIT), pods=PODS) as served:
        open_ = at_each_dispatch(served)
        clients = [Client(served, rng.choice(("", "high", "low"))) for _ in range(200)]
        await until(lambda: served.sample("request_total") == 200)
        ends = await asyncio.gather(*(leave_or_finish(one, rng.random()) for one in clients))
        await served.idle()
        assert ends.count("finished") > 100
        assert max(open_) == LIMIT * PODS
        assert sum(outcomes(served).values()) == 200


def at_each_dispatch(served: Running) -> list[int]:
    """Grows by how many requests are open after each choice."""
    counted: list[int] = []
    gate = served.scheduler.gate
    assert gate is not None
    tell = gate.on_end

    def look(item: Any) -> None:
        tell(item)
        counted.append(len(served.scheduler.router.open))

    gate.on_end = look
    return counted


async def leave_or_finish(client: Client, fate: float) -> str:
    if fate < 0.15:
        await asyncio.sleep(fate / 3)
        client.stream.call.cancel()
        await asyncio.gather(client.task, return_exceptions=True)
        return "gone"
    await client.routed()
    if fate < 0.3:
        client.stream.call.cancel()
        return "aborted"
    await client.finish()
    return "finished"


async def test_requests_taken_back_while_their_clients_come_and_go_all_end_once(tmp_path: Path) -> None:
    rng = Random(2)
    async with running(tmp_path, flow(LIMIT, enableEviction=True), pods=PODS) as served:
        open_ = at_each_dispatch(served)
        clients = [Client(served, rng.choice(("low", "lowest", "high"))) for _ in range(120)]
        await until(lambda: served.sample("request_total") == 120)
        ends = await asyncio.gather(*(end_somehow(one, rng.random()) for one in clients))
        await served.idle()
        assert max(open_) <= LIMIT * PODS
        assert sum(outcomes(served).values()) == 120
        evicted = served.sample("request_error_total", error_code="evicted")
        assert evicted >= ends.count("evicted") > 0
        assert served.sample("flow_control_revocations_total", outcome="confirmed") >= evicted
        dispatched = sum(value for (outcome, _), value in outcomes(served).items() if outcome == "Dispatched")
        assert served.sample("request_duration_seconds_count") == dispatched


async def end_somehow(client: Client, fate: float) -> str:
    """Leave soon, or answer soon; whoever is evicted first is told so."""
    replies = asyncio.create_task(drained(client))
    await asyncio.sleep(fate / 3)
    if fate < 0.3:
        client.stream.call.cancel()
    else:
        await asyncio.gather(client.task, return_exceptions=True)
        with suppress(aio.AioRpcError, asyncio.InvalidStateError, asyncio.CancelledError):
            await client.stream.send(*answered())
    return await replies


async def drained(client: Client) -> str:
    with suppress(aio.AioRpcError, asyncio.CancelledError):
        routed = await client.task
        if "immediate_response" in kinds([*routed, *await client.stream.to_the_end()]):
            return "evicted"
        return "finished"
    return "gone"
