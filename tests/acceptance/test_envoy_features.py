"""Features by a real Envoy, a whole scheduler and engines that tell what reached them, on both data paths.

Envoy's configuration is what ``llmd-sched envoy-config --config-file`` prints for the scheduler's.
"""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest
from aiohttp import web

from llmd_sched.__main__ import main
from llmd_sched.app import Scheduler, ServeSettings
from llmd_sched.stack import Stack, StackError, envoy_binary, free_ports, wait_http
from tests.acceptance.conftest import PATIENCE_S, until
from tests.builders import CONFIG_HEAD

paths = pytest.mark.parametrize("path", ["lean", "duplex"])

Labels = Mapping[str, str]
TIMES = 8


class Answer(NamedTuple):
    """What the client got, and what the engine saw (empty when it saw nothing)."""

    status: int
    headers: Mapping[str, str]
    text: str

    @property
    def engine(self) -> str:
        return self.headers["x-engine"]

    @property
    def seen(self) -> dict[str, Any]:
        """``headers`` by lower-case name, and ``body``, as the engine got them."""
        told: dict[str, Any] = json.loads(self.text)["seen"]
        return told


class Front:
    """Envoy's address, the scheduler behind it and the engines behind that."""

    def __init__(self, url: str, scheduler: Scheduler, engines: list[str], http: aiohttp.ClientSession) -> None:
        self.url, self.scheduler, self.engines, self.http = url, scheduler, engines, http

    async def ask(self, path: str = "/v1/completions", body: Any = None, **headers: str) -> Answer:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        fields = {"model": "m", "prompt": "p"} if body is None else body
        async with self.http.post(self.url + path, json=fields, headers=named) as reply:
            return Answer(reply.status, reply.headers, await reply.text())

    async def landed(self, **headers: str) -> set[str]:
        return {(await self.ask(**headers)).engine for _ in range(TIMES)}

    def sample(self, name: str, **labels: str) -> float:
        samples = [s for m in self.scheduler.telemetry.registry.collect() for s in m.samples]
        return sum(s.value for s in samples if s.name == f"llm_d_epp_{name}" and labels.items() <= s.labels.items())

    async def until(self, name: str, value: float, **labels: str) -> None:
        async def so() -> bool:
            return self.sample(name, **labels) == value

        await until(so, f"{name} is {self.sample(name, **labels)}, not {value}")

    async def idle(self) -> None:
        for name in ("open_requests", "inflight_requests", "inflight_tokens", "flow_control_queue_size"):
            await self.until(name, 0)
        for name in ("lost_requests_total", "producer_errors_total", "flow_control_errors_total"):
            assert self.sample(name) == 0, name


@asynccontextmanager
async def fronted(
    folder: Path,
    path: str,
    config: str,
    pods: int | Sequence[Labels] = 1,
    *,
    envoy: Sequence[str] = (),
    knows_config: bool = True,
    **fields: Any,
) -> AsyncIterator[Front]:
    """``envoy``: further arguments of envoy-config; ``knows_config``: whether it is given the configuration."""
    try:
        envoy_binary()
    except StackError as missing:
        pytest.skip(str(missing))
    labels: Sequence[Labels] = [{}] * pods if isinstance(pods, int) else pods
    file = folder / "config.yaml"
    file.write_text(CONFIG_HEAD + config)
    async with engines(len(labels)) as ports:
        grpc, health, metrics, listen, admin = free_ports(5)  # free of the engines too
        arguments = [f"--path={path}", f"--listen=127.0.0.1:{listen}", f"--scheduler=127.0.0.1:{grpc}", "--plain",
                     f"--admin-port={admin}", *envoy]  # fmt: skip
        document = envoy_config(*arguments, *([f"--config-file={file}"] if knows_config else []))
        listed = [
            {"name": f"pod-{i}", "address": "127.0.0.1", "port": port, "labels": dict(one)}
            for i, (port, one) in enumerate(zip(ports, labels, strict=True))
        ]
        endpoints = folder / "endpoints.json"
        endpoints.write_text(json.dumps({"endpoints": listed}))
        scheduler = Scheduler(
            ServeSettings(
                config_text=CONFIG_HEAD + config, host="127.0.0.1", grpc_port=grpc, health_port=health,
                metrics_port=metrics, secure_serving=False, endpoints_file=str(endpoints), drain_timeout_s=0.0,
                scrape_interval_s=1.0, allow_experimental_plugins=True, seed=1, **fields,
            )
        )  # fmt: skip
        await scheduler.start()
        try:
            timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
            async with Stack(folder) as stack, aiohttp.ClientSession(timeout=timeout) as http:
                started = await stack.start_envoy(document)
                await wait_http(f"http://127.0.0.1:{admin}/ready", started)
                front = Front(f"http://127.0.0.1:{listen}", scheduler, [str(port) for port in ports], http)
                await until(lambda: healthy(front), "Envoy never found the scheduler healthy")
                yield front
        finally:
            await asyncio.wait_for(scheduler.stop(), PATIENCE_S)


def envoy_config(*arguments: str) -> str:
    with redirect_stdout(io.StringIO()) as printed:
        assert main(["envoy-config", *arguments]) == 0
    return printed.getvalue()


async def healthy(front: Front) -> bool:
    async with front.http.get(f"{front.url}/v1/models") as reply:
        return reply.status == 200


# --- engines ----------------------------------------------------------------------------------------------------------

IDLE = "".join(f"vllm:{name} 0.0\n" for name in ("num_requests_waiting", "num_requests_running", "kv_cache_usage_perc"))
HOLD, STREAM, ENDLESS = "hold", "stream", "endless"


@asynccontextmanager
async def engines(count: int) -> AsyncIterator[list[int]]:
    app = web.Application()
    app.router.add_get("/metrics", page)
    app.router.add_route("*", "/{rest:.*}", answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    try:
        for _ in range(count):
            await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield [int(address[1]) for address in runner.addresses]
    finally:
        await runner.cleanup()


async def page(request: web.Request) -> web.Response:
    return web.Response(text=IDLE)


async def answer(request: web.Request) -> web.StreamResponse:
    """As the prompt says: HOLD and ENDLESS never end, STREAM comes in pieces cut within the model's name."""
    text = await request.text()
    body = json.loads(text) if text else {}
    assert request.transport is not None
    engine = {"x-engine": str(request.transport.get_extra_info("sockname")[1])}
    if body.get("prompt") == HOLD:
        await asyncio.sleep(3600)
    if body.get("prompt") in (STREAM, ENDLESS):
        return await stream(request, body, engine)
    seen = {"headers": {k.lower(): v for k, v in request.headers.items()}, "body": text}
    usage = {"prompt_tokens": 4, "completion_tokens": 6}
    return web.json_response({"model": body.get("model"), "seen": seen, "usage": usage}, headers=engine)


async def stream(request: web.Request, body: dict[str, Any], headers: Mapping[str, str]) -> web.StreamResponse:
    response = web.StreamResponse(headers={**headers, "content-type": "text/event-stream"})
    await response.prepare(request)
    event = f'data: {{"model":"{body["model"]}","choices":[{{"text":"x"}}]}}\n\n'.encode()
    while body["prompt"] == ENDLESS:
        await response.write(event)
        await asyncio.sleep(0.01)
    cut = event.index(b'":"') + 5
    for piece in (event[:cut], event[cut:] + event[:cut], event[cut:], b"data: [DONE]\n\n"):
        await response.write(piece)
        await asyncio.sleep(0.01)  # so that the pieces travel apart
    await response.write_eof()
    return response


# --- sessions ---------------------------------------------------------------------------------------------------------

SESSIONS = """
plugins:
- {type: session-affinity-filter, name: by-token, parameters: {encodedEndpointHeaderConfig: {secretFile: %s}}}
- {type: session-id-producer, parameters: {cookieName: sid}}
- {type: agent-identity}
- type: session-affinity-filter
  name: by-id
  parameters:
    strategy: session_id
    sessionIdConfig: {sources: [{header: x-session-id}, {attribute: SessionID}, {attribute: agent-identity}]}
- {type: random-picker}
schedulingProfiles:
- name: default
  plugins: [{pluginRef: by-token}, {pluginRef: by-id}, {pluginRef: random-picker}]
"""


@paths
async def test_the_client_gets_a_token_and_is_brought_back_by_it(tmp_path: Path, path: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text("a secret that is long enough\n")
    async with fronted(tmp_path, path, SESSIONS % secret, pods=4) as front:
        first = await front.ask()
        token = first.headers["x-session-token"]
        assert await front.landed(x_session_token=token) == {first.engine}
        assert len(await front.landed()) > 1
        assert len(await front.landed(x_session_token=token[:-2] + "AA")) > 1, "a forged one"
        streamed = await front.ask(body={"model": "m", "prompt": STREAM, "stream": True}, x_session_token=token)
        assert (streamed.engine, streamed.headers["x-session-token"]) == (first.engine, token)
        for mine in ({"x-session-id": "a"}, {"cookie": "other=1; sid=b"}, {"session-id": "c"}):
            assert len(await front.landed(**mine)) == 1, mine
        await front.idle()


# --- disaggregation ---------------------------------------------------------------------------------------------------

DISAGGREGATED = """
plugins:
- {type: prefix-based-pd-decider, parameters: {nonCachedTokens: 64}}
- {type: always-disagg-multimodal-decider}
- type: disagg-profile-handler
  parameters: {deciders: {prefill: prefix-based-pd-decider, encode: always-disagg-multimodal-decider}}
- {type: prefill-filter}
- {type: decode-filter}
- {type: encode-filter}
- {type: random-picker}
schedulingProfiles:
- {name: prefill, plugins: [{pluginRef: prefill-filter}, {pluginRef: random-picker}]}
- {name: decode, plugins: [{pluginRef: decode-filter}, {pluginRef: random-picker}]}
- {name: encode, plugins: [{pluginRef: encode-filter}, {pluginRef: random-picker}]}
"""
ROLES = [{"llm-d.ai/role": role} for role in ("decode", "prefill", "encode")]
LONG = {"model": "m", "prompt": "word" * 200}
IMAGE = {"type": "image_url", "image_url": {"url": "https://example.com/cat.png"}}
SEEN = {"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "word" * 200}, IMAGE]}]}
OWN = {"x-prefiller-host-port": "10.9.9.9:1", "x-encoder-hosts-ports": "10.9.9.9:2"}


@paths
async def test_the_engine_is_told_who_prefills_and_encodes(tmp_path: Path, path: str) -> None:
    async with fronted(tmp_path, path, DISAGGREGATED, pods=ROLES) as front:
        decode, prefill, encode = front.engines
        kept = await front.ask(**OWN)
        assert (kept.status, kept.engine) == (200, decode)
        assert not set(OWN) & set(kept.seen["headers"])
        split = await front.ask(body=LONG, **OWN)
        assert split.engine == decode
        assert split.seen["headers"]["x-prefiller-host-port"] == f"127.0.0.1:{prefill}"
        assert "x-encoder-hosts-ports" not in split.seen["headers"]
        image = await front.ask("/v1/chat/completions", SEEN)
        assert image.seen["headers"]["x-encoder-hosts-ports"] == f"127.0.0.1:{encode}"
        await front.idle()


async def test_an_envoy_that_does_not_know_of_it_is_told_what_is_missing(tmp_path: Path) -> None:
    async with fronted(tmp_path, "lean", DISAGGREGATED, pods=ROLES, knows_config=False) as front:
        told = await front.ask(body=LONG)
        assert told.status == 500
        assert "configure request_header_mode SEND (envoy-config --config-file)" in told.text
        await front.idle()


# --- objectives, rewrites, costs --------------------------------------------------------------------------------------

OBJECTS = """
plugins:
- type: static-objectives
  parameters: {objectives: {vip: 7}, rewrites: [{model: food, targets: {food-v2-tuned: 1}}]}
- type: request-attribute-reporter
  parameters: {attributes: [{key: {name: cost}, expression: usage.prompt_tokens + usage.completion_tokens}]}
- {type: random-picker}
"""


@pytest.mark.parametrize("path", ["lean", "duplex"])
async def test_a_rule_rewrites_the_model_both_ways(tmp_path: Path, path: str) -> None:
    """On the lean path the reply does not come by, so it keeps the engine's name."""
    async with fronted(tmp_path, path, OBJECTS) as front:
        name = "food" if path == "duplex" else "food-v2-tuned"
        told = await front.ask(body={"model": "food", "prompt": "p"}, x_llm_d_inference_objective="vip")
        assert told.status == 200, told.text
        assert json.loads(told.seen["body"])["model"] == "food-v2-tuned"
        assert json.loads(told.text)["model"] == name
        streamed = await front.ask(body={"model": "food", "prompt": STREAM, "stream": True})
        events = [json.loads(line[6:]) for line in streamed.text.split("\n\n") if line and "[DONE]" not in line]
        assert [event["model"] for event in events] == [name, name]
        await front.idle()
        assert front.sample("request_total", priority="7", target_model_name="food-v2-tuned") == 1
        assert front.sample("model_rewrite_decisions_total", model_rewrite_name="food") == 2


async def test_a_request_that_only_counts_tokens_reaches_the_engine_whole(tmp_path: Path) -> None:
    """The reference ends its stream once such a request is routed; Envoy then sends it without its body at times."""
    async with fronted(tmp_path, "duplex", OBJECTS) as front:
        body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "pad": "x" * 200_000}
        told = await front.ask("/v1/messages/count_tokens", body)
        assert told.status == 200
        assert json.loads(told.seen["body"]) == body
        await front.idle()


# --- whose word counts ------------------------------------------------------------------------------------------------

STEERING = {
    "x-llm-d-inference-objective": "vip",
    "x-llm-d-slo-ttft-ms": "5",
    "x-gateway-inference-fairness-id": "mine",
    "x-prefiller-host-port": "10.9.9.9:1",
}


@paths
@pytest.mark.parametrize("trusted", [False, True], ids=["stranger", "trusted"])
async def test_steering_counts_from_trusted_peers_only(tmp_path: Path, path: str, trusted: bool) -> None:
    networks = ("127.0.0.0/8",) if trusted else ("10.0.0.0/8",)
    async with fronted(tmp_path, path, OBJECTS, envoy=["--tell-peer"], trusted_header_sources=networks) as front:
        told = await front.ask(**STEERING)
        assert told.status == 200
        assert set(STEERING) & set(told.seen["headers"]) == (set(STEERING) if trusted else set())
        expected = {"priority": "7", "fairness_id": "mine"} if trusted else {"priority": "0"}
        assert front.sample("request_total", **expected) == 1
        rewritten = await front.ask(**{"x-llm-d-model-name-rewrite": "other"})
        assert json.loads(rewritten.seen["body"])["model"] == ("other" if trusted else "m")
        await front.idle()


# --- flow control -----------------------------------------------------------------------------------------------------

FLOW = """
featureGates: [flowControl]
plugins:
- {type: concurrency-detector, parameters: {maxConcurrency: 1}}
- {type: static-objectives, parameters: {objectives: {high: 10, low: -1}}}
- {type: active-request-scorer}
- {type: max-score-picker}
schedulingProfiles: [{name: default, plugins: [{pluginRef: active-request-scorer}, {pluginRef: max-score-picker}]}]
flowControl: {saturationDetector: {pluginRef: concurrency-detector}, %s}
"""
HELD = {"model": "m", "prompt": HOLD}


async def leave(client: asyncio.Task[Answer]) -> None:
    client.cancel()
    await asyncio.gather(client, return_exceptions=True)


@paths
async def test_requests_wait_their_turn_and_those_who_leave_give_way(tmp_path: Path, path: str) -> None:
    async with fronted(tmp_path, path, FLOW % "maxRequests: 2") as front:
        held = asyncio.create_task(front.ask(body=HELD))
        await front.until("inflight_requests", 1)
        leaves = asyncio.create_task(front.ask())
        await front.until("flow_control_queue_size", 1)
        stays = asyncio.create_task(front.ask(x_llm_d_inference_objective="low"))
        await front.until("flow_control_queue_size", 2)
        refused = await front.ask()
        assert (refused.status, refused.headers["x-llm-d-request-dropped-reason"]) == (429, "rejected-saturated")
        await leave(leaves)
        await front.until("flow_control_queue_size", 1)
        assert not stays.done()
        await leave(held)
        assert (await stays).status == 200
        await front.idle()


@paths
async def test_who_waited_too_long_is_told(tmp_path: Path, path: str) -> None:
    async with fronted(tmp_path, path, FLOW % "defaultRequestTTL: 150ms") as front:
        held = asyncio.create_task(front.ask(body=HELD))
        await front.until("inflight_requests", 1)
        told = await front.ask()
        assert (told.status, told.headers["x-llm-d-request-dropped-reason"]) == (429, "rejected-ttl-expired")
        assert told.text.startswith("inference error: ResourceExhausted - request timed out in queue: ")
        await leave(held)
        await front.idle()


async def test_a_sheddable_request_that_gives_way_is_told(tmp_path: Path) -> None:
    async with fronted(tmp_path, "duplex", FLOW % "enableEviction: true") as front:
        held = asyncio.create_task(front.ask(body=HELD, x_llm_d_inference_objective="low"))
        await front.until("inflight_requests", 1)
        assert (await front.ask(x_llm_d_inference_objective="high")).status == 200
        told = await held
        assert (told.status, told.text) == (429, "request evicted by flow control")
        assert told.headers["x-llm-d-request-dropped-reason"] == "evicted"
        await front.idle()


async def test_a_sheddable_stream_that_gives_way_breaks_off(tmp_path: Path) -> None:
    """Its status is long told by then."""
    body, low = {"model": "m", "prompt": ENDLESS, "stream": True}, {"x-llm-d-inference-objective": "low"}
    async with fronted(tmp_path, "duplex", FLOW % "enableEviction: true") as front:
        async with front.http.post(f"{front.url}/v1/completions", json=body, headers=low) as reply:
            assert reply.status == 200
            await reply.content.readany()
            assert (await front.ask(x_llm_d_inference_objective="high")).status == 200
            with pytest.raises((aiohttp.ClientPayloadError, aiohttp.ClientConnectionError)):
                await reply.read()
        await front.idle()
        assert front.sample("request_error_total", error_code="evicted") == 1
        assert front.sample("request_error_total") == 1
