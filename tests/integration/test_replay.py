"""The replayer against a small server on loopback that streams, fails and breaks off on request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from llmd_sched.load import client
from llmd_sched.load.client import replay
from llmd_sched.load.report import Result
from llmd_sched.load.workload import Item, Span

USAGE = {"prompt_tokens": 12, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 8}}


class Stub:
    """Behaves as the model name of a request says; remembers what it was asked and how many at a time."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, object], str]] = []
        self.arrivals: asyncio.Queue[None] = asyncio.Queue()
        self.now = self.most = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def arrived(self, count: int) -> None:
        """Returns when this many more requests are held at the gate."""
        for _ in range(count):
            await self.arrivals.get()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append((request.path, body, request.headers["x-request-id"]))
        self.arrivals.put_nowait(None)
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await self.gate.wait()
            return await self.answer(request, body["model"])
        finally:
            self.now -= 1

    async def answer(self, request: web.Request, model: str) -> web.StreamResponse:
        if model == "busy":
            return web.Response(status=503, text="no capacity")
        if model == "whole":
            return web.json_response({"choices": [{"text": "abcd" * 2000}], "usage": USAGE})
        if model == "empty":
            return web.Response(status=200)
        response = web.StreamResponse(headers={"content-type": "text/event-stream", "x-inference-pod": "pod-7"})
        await response.prepare(request)
        for piece in pieces(model):
            await response.write(piece)
            await asyncio.sleep(0.002)
        if model == "broken":
            assert request.transport is not None
            request.transport.close()
        elif model == "hangs":
            await asyncio.sleep(3600)
        return response


def pieces(model: str) -> Iterable[bytes]:
    event = b'data: {"choices": [{"text": "abcd"}], "usage": null}\n\n'
    usage = b"data: " + json.dumps({"choices": [], "usage": USAGE}).encode() + b"\n\n"
    streams: dict[str, list[bytes]] = {
        "ok": [event] * 3 + [usage, b"data: [DONE]\n\n"],
        "cut": [event[:3], event[3:] + event[:5], event[5:] + event + usage[:30], usage[30:], b"data: [DO", b"NE]\n\n"],
        "long": [event * 2000] * 3 + [usage, b"data: [DONE]\n\n"],
        "without usage": [event] * 3 + [b"data: [DONE]\n\n"],
        "error event": [event, b'data: {"error": {"message": "out of memory"}}\n\n', b"data: [DONE]\n\n"],
        "bad usage": [b'data: {"choices": [{}], "usage": {"prompt_to\n\n', b"data: [DONE]\n\n"],
    }
    return streams.get(model, [event] * 2)


@pytest.fixture
def stub() -> Stub:
    return Stub()


@pytest.fixture
async def url(stub: Stub) -> AsyncIterator[str]:
    app = web.Application(client_max_size=1 << 24)
    app.router.add_post("/{path:.*}", stub.handle)
    server = TestServer(app, shutdown_timeout=0.1)
    await server.start_server()
    yield f"http://{server.host}:{server.port}"
    stub.gate.set()
    await server.close()


def item(**changes: object) -> Item:
    fields: dict[str, object] = {"at_s": 0.0, "session": "s", "prompt": (Span("a", 3),), "output_tokens": 3}
    return Item(**{**fields, **changes})  # type: ignore[arg-type]


async def run(
    url: str,
    items: Iterable[Item],
    model: str = "ok",
    *,
    limit: int = 100,
    timeout_s: float = 30.0,
    stop: asyncio.Event | None = None,
    on_result: Callable[[Result], None] | None = None,
) -> list[Result]:
    results: list[Result] = []

    def keep(result: Result) -> None:
        results.append(result)
        if on_result:
            on_result(result)

    await replay(
        url,
        items,
        model=model,
        headers={"x-slo-ttft-ms": "500"},
        concurrency_limit=limit,
        timeout_s=timeout_s,
        on_result=keep,
        stop=stop or asyncio.Event(),
    )
    return results


async def test_a_stream_gives_its_times_its_chunks_and_the_usage_of_its_tail(url: str) -> None:
    (result,) = await run(url, [item()])
    assert result.error is None
    assert result.status == 200
    assert result.chunks == 3
    assert (result.prompt_tokens, result.cached_tokens, result.completion_tokens) == (12, 8, 3)
    assert result.endpoint == "pod-7"
    assert result.ttft_s is not None
    assert 0 < result.ttft_s < result.e2e_s
    assert result.tpot_s is not None
    assert result.schedule_delay_s == pytest.approx(result.sent_s - result.at_s)


async def test_events_cut_anywhere_by_the_network_are_counted_once(url: str) -> None:
    (result,) = await run(url, [item()], "cut")
    assert (result.error, result.chunks, result.cached_tokens) == (None, 3, 8)


async def test_a_stream_longer_than_the_tail_is_counted_in_full(url: str) -> None:
    (result,) = await run(url, [item()], "long")
    assert (result.error, result.chunks, result.completion_tokens) == (None, 6000, 3)


async def test_a_stream_that_outruns_the_read_buffer_is_still_read_to_its_end(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "READ_BUFFER_BYTES", 1 << 14)
    monkeypatch.setattr(client, "DRAIN_S", 0.01)
    (result,) = await run(url, [item()], "long")
    assert (result.error, result.chunks) == (None, 6000)


@pytest.mark.parametrize("model", ["without usage", "bad usage"])
async def test_a_stream_without_readable_usage_is_no_failure(url: str, model: str) -> None:
    (result,) = await run(url, [item()], model)
    assert result.error is None
    assert result.chunks == {"without usage": 3, "bad usage": 1}[model]
    assert result.completion_tokens is None


async def test_a_whole_reply_gives_usage_and_no_tpot(url: str) -> None:
    (result,) = await run(url, [item(streaming=False)], "whole")
    assert (result.error, result.chunks, result.prompt_tokens, result.tpot_s) == (None, 0, 12, None)


@pytest.mark.parametrize(
    ("model", "error"),
    [
        ("ends early", "truncated"),
        ("broken", "truncated"),
        ("empty", "truncated"),
        ("busy", "status 503"),
        ("error event", "error event"),
    ],
)
async def test_each_failure_is_a_result_with_its_kind(url: str, model: str, error: str) -> None:
    (result,) = await run(url, [item()], model)
    assert result.error == error
    assert result.tpot_s is None


async def test_a_reply_that_never_ends_is_given_up_after_the_timeout(url: str) -> None:
    (result,) = await run(url, [item()], "hangs", timeout_s=0.3)
    assert result.error == "timeout"
    assert result.status == 200
    assert result.ttft_s is not None


async def test_a_server_that_never_replies_is_given_up_without_a_status(url: str, stub: Stub) -> None:
    stub.gate.clear()
    (result,) = await run(url, [item()], timeout_s=0.2)
    assert (result.error, result.status, result.ttft_s) == ("timeout", None, None)


async def test_a_refused_connection_is_a_result(unused_tcp_port: int) -> None:
    (result,) = await run(f"http://127.0.0.1:{unused_tcp_port}", [item()])
    assert result.error is not None
    assert result.error.startswith("connection: ")


async def test_requests_carry_the_model_the_path_and_an_id_of_their_own(url: str, stub: Stub) -> None:
    chat = item(prompt=(Span("a", 3), Span("b", 2)), roles=("system", "user"))
    results = await run(url, [item(), chat])
    assert sorted(path for path, _, _ in stub.asked) == ["/v1/chat/completions", "/v1/completions"]
    assert {body["model"] for _, body, _ in stub.asked} == {"ok"}
    ids = {request_id for _, _, request_id in stub.asked}
    assert len(ids) == 2
    assert ids == {result.request_id for result in results}


async def test_a_body_of_more_than_a_mebibyte_arrives_whole(url: str, stub: Stub) -> None:
    await run(url, [item(prompt=(Span("a", 400_000),))])
    assert len(str(stub.asked[0][1]["prompt"])) == 1_600_000


async def test_requests_do_not_wait_for_replies(url: str, stub: Stub) -> None:
    stub.gate.clear()
    replaying = asyncio.create_task(run(url, [item(at_s=n / 1000) for n in range(20)]))
    await stub.arrived(20)
    stub.gate.set()
    assert [result.error for result in await replaying] == [None] * 20


async def test_outstanding_requests_keep_to_the_limit_and_the_rest_is_late_not_lost(url: str, stub: Stub) -> None:
    results = await run(url, [item() for _ in range(12)], limit=3)
    assert stub.most == 3
    assert len(results) == 12
    assert max(result.schedule_delay_s for result in results) > min(result.e2e_s for result in results)


async def test_stop_ends_the_sending_and_waits_for_what_is_outstanding(url: str, stub: Stub) -> None:
    stop = asyncio.Event()
    stub.gate.clear()
    replaying = asyncio.create_task(run(url, [item(), item(), item(at_s=3600.0)], stop=stop))
    await stub.arrived(2)
    stop.set()
    stub.gate.set()
    assert [result.error for result in await replaying] == [None, None]


async def test_cancelling_the_replay_drops_what_is_outstanding(url: str, stub: Stub) -> None:
    stub.gate.clear()
    replaying = asyncio.create_task(run(url, [item()]))
    await stub.arrived(1)
    replaying.cancel()
    with pytest.raises(asyncio.CancelledError):
        await replaying
