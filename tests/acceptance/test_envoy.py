"""Real Envoy, real scheduler, simulated engines: what a client meets on either data path, in good times and bad."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import subprocess
import uuid
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import psutil
import pytest
import pytest_asyncio
from aiohttp import web
from multidict import CIMultiDict

from llmd_sched.app import Scheduler, ServeSettings
from llmd_sched.extproc.envoy import EnvoySettings, render
from llmd_sched.stack import Stack, StackError, envoy_binary, free_ports, stop, wait_http
from tests.acceptance.conftest import MODEL, PATIENCE_S, World, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

BROKEN = (aiohttp.ClientPayloadError, aiohttp.ClientConnectionError)
"""What a client sees when a stream breaks off."""


def new_id() -> str:
    return f"test-{uuid.uuid4()}"


def events_of(text: bytes) -> list[Any]:
    """The events of a stream, decoded; the end mark stays a string."""
    texts = [part.removeprefix(b"data: ").decode() for part in text.split(b"\n\n") if part]
    return [t if t == "[DONE]" else json.loads(t) for t in texts]


# --- good times -------------------------------------------------------------------------------------------------------


async def test_a_whole_reply_is_measured(world: World) -> None:
    request_id = new_id()
    async with world.ask(max_tokens=7, headers={"x-request-id": request_id}) as reply:
        assert reply.status == 200
        assert reply.headers["x-inference-pod"].startswith("engine-")
        told = await reply.json()
    assert told["usage"]["completion_tokens"] == 7
    seen = await world.outcome(request_id)
    assert (seen["end"], seen["status"], seen["model"]) == ("finished", 200, MODEL)
    assert (seen["prompt_tokens"], seen["output_tokens"]) == (told["usage"]["prompt_tokens"], 7)
    assert seen["ttft_ms"] is None, "a whole reply does not say when its first token came"
    assert seen["e2e_ms"] > 0
    await world.idle()


@pytest.mark.parametrize("include_usage", [False, True])
async def test_a_stream_is_measured(world: World, include_usage: bool) -> None:
    request_id = new_id()
    options = {"stream_options": {"include_usage": True}} if include_usage else {}
    async with world.ask(max_tokens=40, stream=True, headers={"x-request-id": request_id}, **options) as reply:
        assert reply.status == 200
        assert reply.content_type == "text/event-stream"
        events = events_of(await reply.read())
    assert events[-1] == "[DONE]"
    assert len(events) == 40 + include_usage + 1
    seen = await world.outcome(request_id)
    assert (seen["end"], seen["status"], seen["output_tokens"]) == ("finished", 200, 40)
    assert (seen["prompt_tokens"] is not None) is include_usage
    assert 0 < seen["ttft_ms"] < seen["e2e_ms"]
    assert 0 < seen["tpot_ms"] < seen["e2e_ms"]
    await world.idle()


async def test_the_models_are_listed_without_a_body_to_route_by(world: World) -> None:
    async with world.http.get(f"{world.url}/v1/models") as reply:
        assert reply.status == 200
        assert [m["id"] for m in (await reply.json())["data"]] == [MODEL]
    await world.idle()


async def test_a_chunked_request_arrives_whole(world: World) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        raw = json.dumps({"model": MODEL, "prompt": "p" * 4000, "max_tokens": 3}).encode()
        for i in range(0, len(raw), 500):
            yield raw[i : i + 500]

    async with world.http.post(f"{world.url}/v1/completions", data=pieces()) as reply:
        assert reply.status == 200
        assert (await reply.json())["usage"]["prompt_tokens"] == 1000
    await world.idle()


async def test_a_prompt_of_a_megabyte_arrives_whole(world: World) -> None:
    """The engine counts its tokens, and refuses them only because its context is shorter."""
    raw = io.BytesIO(json.dumps({"model": MODEL, "prompt": "word" * 262_144}).encode())
    async with world.http.post(f"{world.url}/v1/completions", data=raw) as reply:
        assert reply.status == 400
        assert "262144 prompt tokens" in (await reply.json())["error"]["message"]
    await world.still_serves()


async def test_the_model_is_rewritten_by_header(world: World) -> None:
    """The engine knows only its own name; where the reply crosses the scheduler, the client gets its own back."""
    alias = "an-alias-of-another-length"
    async with world.ask(model=alias, headers={"x-llm-d-model-name-rewrite": MODEL}) as reply:
        assert reply.status == 200, await reply.text()
        assert (await reply.json())["model"] == (alias if world.path == "duplex" else MODEL)
    await world.idle()


async def test_fifty_streams_at_once_all_complete(world: World) -> None:
    async def one(number: int) -> tuple[int, Any]:
        async with world.ask(prompt=f"{number} " * 100, max_tokens=30, stream=True) as reply:
            return reply.status, events_of(await reply.read())[-1]

    assert await asyncio.gather(*(one(i) for i in range(50))) == [(200, "[DONE]")] * 50
    await world.idle()


async def test_the_model_learns_from_the_traffic(world: World) -> None:
    async def one(number: int) -> None:
        async with world.ask(prompt=f"{number} " * (1 + number % 40) * 20, max_tokens=12, stream=True) as reply:
            await reply.read()

    for start in range(0, 150, 10):
        await asyncio.gather(*(one(i) for i in range(start, start + 10)))

    async def learned() -> bool:
        return await world.metric("predictor_model_version") > 0

    await until(learned, "no model was ever published")
    request_id = new_id()
    async with world.ask(max_tokens=12, stream=True, headers={"x-request-id": request_id}) as reply:
        await reply.read()
    seen = await world.outcome(request_id)
    assert seen["model_version"] > 0
    assert seen["predicted_ttft_ms"] > 0
    assert seen["predicted_tpot_ms"] > 0
    await world.idle()


# --- bad input --------------------------------------------------------------------------------------------------------

BAD = {
    "no JSON": (b"no JSON", 400, "inference error: BadRequest - error unmarshaling request bodyMap: "),
    "no object": (b"[1, 2]", 400, "inference error: BadRequest - error unmarshaling request bodyMap: "),
    "no model": (b'{"prompt": "p"}', 400, "inference error: BadRequest - model not found in request body"),
    "no prompt": (
        b'{"model": "m"}',
        400,
        "inference error: BadRequest - invalid completions request: must have prompt",
    ),
    "a model nobody serves": (b'{"model": "other", "prompt": "p"}', 404, '"the model '),
}


@pytest.mark.parametrize("name", BAD)
async def test_bad_input_is_answered_with_what_is_wrong(world: World, name: str) -> None:
    raw, status, text = BAD[name]
    async with world.http.post(f"{world.url}/v1/completions", data=raw) as reply:
        told = await reply.text()
        assert reply.status == status
        assert text in told
    await world.still_serves()


async def test_an_empty_chunked_body_is_no_request(world: World) -> None:
    async def nothing() -> AsyncIterator[bytes]:
        return
        yield b""

    async with world.http.post(f"{world.url}/v1/completions", data=nothing()) as reply:
        assert reply.status == 400
    await world.still_serves()


async def test_a_post_without_a_body_is_the_engines_to_refuse(world: World) -> None:
    async with world.http.post(f"{world.url}/v1/completions") as reply:
        assert reply.status == 400
        assert reply.headers["x-inference-pod"]
    await world.still_serves()


async def read_all(reader: asyncio.StreamReader) -> bytes:
    """Until the end, or until the peer resets the connection."""
    got = b""
    try:
        while piece := await asyncio.wait_for(reader.read(65536), PATIENCE_S):
            got += piece
    except ConnectionError:
        pass
    return got


async def send_much(port: int, head: str, pieces: list[bytes]) -> bytes:
    """Send until the server has had enough, while reading its answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = asyncio.create_task(read_all(reader))
    try:
        writer.write(f"POST /v1/completions HTTP/1.1\r\nhost: test\r\nconnection: close\r\n{head}\r\n\r\n".encode())
        for piece in pieces:
            if answer.done():
                break
            writer.write(piece)
            await writer.drain()
    except ConnectionError:
        pass
    got = await answer
    writer.close()
    return got


MEGABYTE = b"x" * (1 << 20)


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_of_ten_megabytes_is_too_large(world: World, chunked: bool) -> None:
    if chunked:
        head, pieces = "transfer-encoding: chunked", [b"100000\r\n" + MEGABYTE + b"\r\n"] * 10 + [b"0\r\n\r\n"]
    else:
        head, pieces = f"content-length: {10 << 20}", [MEGABYTE] * 10
    answer = await send_much(world.listen, head, pieces)
    assert answer.startswith(b"HTTP/1.1 413 ")
    await world.still_serves()


@pytest.mark.parametrize("sent", [b"", b'{"model": "m", "pro', b"\x00" * 900])
async def test_a_client_that_closes_in_mid_request_leaves_nothing_behind(world: World, sent: bytes) -> None:
    before = await world.metric("request_total")
    for _ in range(3):
        _, writer = await asyncio.open_connection("127.0.0.1", world.listen)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: test\r\ncontent-length: 1000\r\n\r\n" + sent)
        await writer.drain()
        writer.close()
        await writer.wait_closed()
    await world.still_serves()
    assert await world.metric("request_total") == before + 1, "half a request is no request"


async def test_a_client_that_goes_in_mid_stream_is_noticed(world: World) -> None:
    aborted = await world.metric("request_error_total", 'error_code="aborted"')
    request_id = new_id()
    async with world.ask(max_tokens=20_000, stream=True, headers={"x-request-id": request_id}) as reply:
        assert reply.status == 200
        await reply.content.readany()
        assert await world.metric("open_requests") == 1
        reply.close()
    seen = await world.outcome(request_id)
    assert seen["end"] == "aborted"
    assert seen["ttft_ms"] > 0, "when the first token came is known all the same"
    await world.still_serves()
    assert await world.metric("request_error_total", 'error_code="aborted"') == aborted + 1


async def test_a_client_that_goes_before_the_reply_is_noticed(world: World) -> None:
    request_id = new_id()
    asking = asyncio.create_task(send_and_wait(world, request_id))

    async def open_one() -> bool:
        return await world.metric("open_requests") == 1

    await until(open_one, "the request was never routed")
    asking.cancel()
    assert (await world.outcome(request_id))["end"] == "aborted"
    await world.still_serves()


async def send_and_wait(world: World, request_id: str) -> None:
    async with world.ask(max_tokens=20_000, headers={"x-request-id": request_id}) as reply:
        await reply.read()


# --- headers ----------------------------------------------------------------------------------------------------------


class Echo:
    """A model server that tells what reached it, behind a scheduler and an Envoy of its own."""

    def __init__(self) -> None:
        self.url = self.path = ""
        self.runner: web.AppRunner
        self.http: aiohttp.ClientSession
        self.scheduler: Scheduler

    async def post(self, headers: Sequence[tuple[str, str]] = ()) -> tuple[int, Seen, Any]:
        """Status, what the engine saw, and the response's headers."""
        lines = CIMultiDict(headers)
        async with self.http.post(f"{self.url}/v1/completions", data=ECHO_BODY, headers=lines) as reply:
            seen = await reply.json()
            return reply.status, Seen([(k.lower(), v) for k, v in seen["headers"]], seen["body"]), reply.headers

    def sample(self, name: str, **labels: str) -> float:
        samples = [s for m in self.scheduler.telemetry.registry.collect() for s in m.samples]
        return sum(s.value for s in samples if s.name == f"llm_d_epp_{name}" and labels.items() <= s.labels.items())

    async def idle(self) -> None:
        async def none_open() -> bool:
            return not self.scheduler.router.open

        await until(none_open, "requests are still open")
        assert self.scheduler.router.lost == 0


class Seen(NamedTuple):
    """One request as the engine got it; header names in lower case, one entry per line."""

    headers: list[tuple[str, str]]
    body: str

    def all(self, *names: str) -> list[str]:
        return [value for name, value in self.headers if name in names]


ECHO_BODY = b'{"model": "m", "prompt": "p"}'
STREAM_EVENTS = 10


async def echoed(request: web.Request) -> web.StreamResponse:
    if "x-cut" in request.headers:
        return await stream_in_pieces(request)
    response = web.json_response({"headers": list(request.headers.items()), "body": await request.text()})
    for cookie in ("a=1; Path=/", "b=2; Secure", "c=3"):
        response.headers.add("set-cookie", cookie)
    return response


async def stream_in_pieces(request: web.Request) -> web.StreamResponse:
    """A stream without usage whose texts look like events, and cut in the middle of every event's mark."""
    events = [b'data: {"choices": [{"text": "data: x"}]}\n\n'] * STREAM_EVENTS + [b"data: [DONE]\n\n"]
    text = b"".join(events)
    cut_at = int(request.headers["x-cut"])
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    starts = [0, *(i * len(events[0]) + cut_at for i in range(len(events))), len(text)]
    for start, end in itertools.pairwise(starts):
        await response.write(text[start:end])
        await asyncio.sleep(0.003)  # so that the pieces travel apart
    await response.write_eof()
    return response


async def echo_server(port: int) -> web.AppRunner:
    app = web.Application()
    app.add_routes([web.route("*", "/{rest:.*}", echoed)])
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    return runner


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["lean", "duplex"])
async def echo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Echo]:
    try:
        envoy_binary()
    except StackError as missing:
        pytest.skip(str(missing))
    folder: Path = tmp_path_factory.mktemp("echo")
    engine, grpc, health, metrics, listen, admin = free_ports(6)
    endpoints = folder / "endpoints.yaml"
    endpoints.write_text(f"endpoints: [{{name: echo, address: 127.0.0.1, port: {engine}}}]\n")
    made = Echo()
    made.path = request.param
    made.runner = await echo_server(engine)
    made.url = f"http://127.0.0.1:{listen}"
    made.scheduler = Scheduler(
        ServeSettings(
            host="127.0.0.1", grpc_port=grpc, health_port=health, metrics_port=metrics, secure_serving=False,
            endpoints_file=str(endpoints), drain_timeout_s=0.0, scrape_interval_s=1.0,
        )
    )  # fmt: skip
    await made.scheduler.start()
    try:
        async with Stack(folder) as stack, aiohttp.ClientSession() as session:
            made.http = session
            settings = EnvoySettings(
                path=request.param, listen_host="127.0.0.1", listen_port=listen, admin_port=admin, scheduler_port=grpc
            )
            envoy = await stack.start_envoy(render(settings))
            await wait_http(f"http://127.0.0.1:{admin}/ready", envoy)

            async def healthy() -> bool:
                async with session.get(f"{made.url}/v1/models") as reply:
                    return reply.status == 200

            await until(healthy, "Envoy never found the scheduler healthy")
            yield made
    finally:
        await made.scheduler.stop()
        await made.runner.cleanup()


async def test_header_lines_of_one_name_all_survive(echo: Echo) -> None:
    sent = [("x-tag", "one"), ("x-tag", "two"), ("x-tag", "three"), ("x-other", "1")]
    status, seen, answered = await echo.post(sent)
    assert status == 200
    assert ",".join(seen.all("x-tag")).replace(" ", "") == "one,two,three"
    assert seen.all("x-other") == ["1"]
    assert answered.getall("set-cookie") == ["a=1; Path=/", "b=2; Secure", "c=3"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-request-id", "From-The Client/1"),
        ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        ("authorization", "Bearer secret"),
    ],
)
async def test_the_clients_header_reaches_the_engine_unchanged(echo: Echo, name: str, value: str) -> None:
    _, seen, _ = await echo.post([(name, value)])
    assert seen.all(name) == [value]


@pytest.mark.parametrize("sent", [[], [("x-request-id", "")]])
async def test_a_request_without_an_id_gets_one(echo: Echo, sent: list[tuple[str, str]]) -> None:
    _, seen, _ = await echo.post(sent)
    (made,) = seen.all("x-request-id")
    assert uuid.UUID(made)


async def test_a_client_cannot_choose_its_destination(echo: Echo) -> None:
    elsewhere = "127.0.0.1:1"
    status, seen, _ = await echo.post([("x-gateway-destination-endpoint", elsewhere)] * 2)
    assert status == 200
    assert len(seen.all("x-gateway-destination-endpoint")) == (1 if echo.path == "duplex" else 0)
    assert elsewhere not in seen.all("x-gateway-destination-endpoint")
    async with echo.http.get(f"{echo.url}/v1/models", headers={"x-gateway-destination-endpoint": elsewhere}) as reply:
        assert reply.status == 200


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ([], ECHO_BODY.decode()),
        ([("x-llm-d-model-name-rewrite", "another")], ECHO_BODY.decode().replace('"m"', '"another"')),
    ],
)
async def test_the_engine_gets_one_length_that_fits(echo: Echo, headers: list[tuple[str, str]], body: str) -> None:
    """In full duplex Envoy takes ``content-length`` away, whoever set it, and sends chunks."""
    status, seen, _ = await echo.post(headers)
    assert (status, seen.body) == (200, body)
    assert seen.all("content-length", "transfer-encoding") in ([str(len(body))], ["chunked"])


@pytest.mark.parametrize("cut_at", [0, 3])
async def test_tokens_are_counted_however_the_stream_is_cut_and_whatever_it_says(echo: Echo, cut_at: int) -> None:
    """Also in the middle of ``data: ``, and when the text itself has that in it."""
    before = echo.sample("request_output_tokens_sum")
    headers = {"x-cut": str(cut_at)}
    async with echo.http.post(f"{echo.url}/v1/completions", data=ECHO_BODY, headers=headers) as reply:
        assert (await reply.read()).endswith(b"data: [DONE]\n\n")
    await echo.idle()
    assert echo.sample("request_output_tokens_sum") - before == STREAM_EVENTS


async def test_an_engine_that_cannot_be_reached_is_a_failure_told_at_once(echo: Echo) -> None:
    """The last test of its kind: the only engine goes away."""
    errors = echo.sample("request_error_total")
    await echo.runner.cleanup()
    async with echo.http.post(f"{echo.url}/v1/completions", data=ECHO_BODY) as reply:
        assert reply.status == 503
    await echo.idle()
    assert echo.sample("request_error_total") == errors + 1


# --- bad times --------------------------------------------------------------------------------------------------------


async def test_an_engine_killed_in_mid_stream_breaks_its_stream_and_nothing_else(world: World) -> None:
    errors = await world.metric("scrape_errors_total")
    request_id = new_id()
    async with world.ask(max_tokens=20_000, stream=True, headers={"x-request-id": request_id}) as reply:
        pod = reply.headers["x-inference-pod"]
        await reply.content.readany()
        number = int(pod.removeprefix("engine-"))
        await world.kill(world.engines[number])
        with pytest.raises(BROKEN):
            await reply.read()
    seen = await world.outcome(request_id)
    assert seen["end"] in ("upstream-failed", "aborted")
    assert seen["status"] == 200

    async def known_dead() -> bool:
        return await world.metric("scrape_errors_total") >= errors + 2

    try:
        await until(known_dead, "the dead engine was never noticed")
        for _ in range(10):
            async with world.ask() as after:
                await after.read()
                assert after.status == 200
                assert after.headers["x-inference-pod"] != pod
        await world.idle()
    finally:
        await world.replace_engine(number)

    async def back() -> bool:
        async with world.ask() as reply:
            await reply.read()
            return reply.headers.get("x-inference-pod") == pod

    await until(back, "the engine that came back never got a request")
    await world.idle()


async def test_without_a_scheduler_requests_fail_until_it_is_back(world: World) -> None:
    """Fail closed, the default. Once the new one answers, requests succeed without Envoy being touched."""
    trainers = psutil.Process(world.scheduler.pid).children(recursive=True)
    async with world.without_scheduler():
        for _ in range(5):
            async with world.ask() as reply:
                assert (reply.status, await reply.text()) == (500, "")
        async with world.http.get(f"{world.url}/v1/models") as reply:
            assert reply.status == 500
        _, alive = await asyncio.to_thread(psutil.wait_procs, trainers, PATIENCE_S)
        assert not alive, "the trainer outlives its scheduler"
    await world.still_serves()


async def test_a_stream_outlives_the_scheduler_on_the_lean_path_only(world: World) -> None:
    async with world.ask(max_tokens=1000, stream=True) as reply:
        await reply.content.readany()
        async with world.without_scheduler():
            if world.path == "lean":
                assert (await reply.read()).endswith(b"data: [DONE]\n\n")
            else:
                with pytest.raises(BROKEN):
                    await reply.read()
    await world.still_serves()


@pytest_asyncio.fixture(loop_scope="module")
async def open_url(world: World) -> AsyncIterator[str]:
    """A second Envoy that lets requests pass when the scheduler is away."""
    listen, admin = free_ports(2)
    envoy = await world.start_envoy("envoy-open", listen, admin, fail_open=True)
    url = f"http://127.0.0.1:{listen}"
    await until(lambda: world.succeeds(url), "the second Envoy never worked")
    yield url
    await stop(envoy)
    world.forget(envoy)


async def test_failing_open_envoy_has_nowhere_to_send_a_request(world: World, open_url: str) -> None:
    """Headers pass, and the routing cluster has no endpoint of its own. A body in full duplex cannot pass at all."""
    async with world.without_scheduler():
        async with world.http.get(f"{open_url}/v1/models") as reply:
            assert (reply.status, await reply.text()) == (503, "no healthy upstream")
        async with world.ask(url=open_url) as reply:
            told = reply.status, await reply.text()
    assert told == ((503, "no healthy upstream") if world.path == "lean" else (500, ""))
    await until(lambda: world.succeeds(open_url), "the first Envoy never worked again")
    await world.idle()


async def test_failing_open_with_a_fallback_requests_are_served_without_the_scheduler(world: World) -> None:
    """Only a body in full duplex cannot: Envoy has to answer 500."""
    listen, admin = free_ports(2)
    fallback = tuple(("127.0.0.1", port) for port in world.engine_ports)
    envoy = await world.start_envoy("envoy-fallback", listen, admin, fail_open=True, fallback=fallback)
    url = f"http://127.0.0.1:{listen}"
    try:
        await until(lambda: world.succeeds(url), "the second Envoy never worked")
        async with world.without_scheduler():
            async with world.http.get(f"{url}/v1/models") as reply:
                assert reply.status == 200
            async with world.ask(url=url) as reply:
                assert reply.status == (200 if world.path == "lean" else 500)
        assert await world.succeeds(url)
        await world.idle()
    finally:
        await stop(envoy)
        world.forget(envoy)


async def test_failing_open_no_client_chooses_its_destination(world: World, open_url: str) -> None:
    """Else anyone could have Envoy connect to any address it can reach."""
    headers = {"x-gateway-destination-endpoint": f"127.0.0.1:{world.engine_ports[0]}"}
    async with world.without_scheduler():
        async with world.ask(url=open_url, headers=headers) as reply:
            assert reply.status in (500, 503)
        async with world.http.get(f"{open_url}/v1/models", headers=headers) as reply:
            assert reply.status in (500, 503)


async def test_a_scheduler_told_to_stop_finishes_what_is_open(world: World) -> None:
    async with world.ask(max_tokens=200, stream=True) as reply:
        await reply.content.readany()
        world.scheduler.process.terminate()
        assert (await reply.read()).endswith(b"data: [DONE]\n\n")
    assert await asyncio.wait_for(world.scheduler.process.wait(), PATIENCE_S) == 0
    await world.replace_scheduler()
    await world.still_serves()


# --- configuration ----------------------------------------------------------------------------------------------------

SETTINGS = {
    "lean": EnvoySettings(path="lean"),
    "duplex": EnvoySettings(path="duplex"),
    "TLS, fail open": EnvoySettings(path="duplex", scheduler_tls=True, fail_open=True, admin_port=0),
    "IPv6": EnvoySettings(path="lean", listen_host="::1", scheduler_host="::1", max_body_bytes=100 << 20),
    "a scheduler by name": EnvoySettings(path="lean", scheduler_host="scheduler.local", scheduler_tls=True),
}


@pytest.mark.parametrize("name", SETTINGS)
async def test_envoy_accepts_the_configuration(tmp_path: Path, name: str) -> None:
    try:
        binary = envoy_binary()
    except StackError as missing:
        pytest.skip(str(missing))
    file = tmp_path / "envoy.json"
    file.write_text(render(SETTINGS[name]))
    command = [str(binary), "--mode", "validate", "-c", str(file), "-l", "warning"]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "deprecated" not in (done.stdout + done.stderr).lower()
