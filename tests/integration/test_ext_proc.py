"""Real gRPC on loopback against a router over a static pool: the reference's hermetic cases, and what they leave out.

Where we differ on purpose: reply chunks of a whole reply are echoed at once rather than collected, so what is compared
is all bytes together, and that the stream ends on the last.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import grpc
import pytest
from grpc import aio
from prometheus_client import CollectorRegistry

from llmd_sched import config as configs
from llmd_sched.app import Scheduler, ServeSettings
from llmd_sched.catalog import build_parsers, build_router, resolve
from llmd_sched.extproc.observer import Observer
from llmd_sched.extproc.server import EXT_PROC, ExtProcServer, ServerSettings
from llmd_sched.extproc.service import EndpointPicker
from llmd_sched.pool.pool import Load, Pool
from llmd_sched.stack import free_ports
from llmd_sched.telemetry import Telemetry
from llmd_sched.types import Endpoint, Outcome
from llmd_sched.wire import accesslog_pb2
from tests.envoy_stream import CHANNEL_OPTIONS, PATIENCE_S, Stream, access_log, exchange, until
from tests.integration.conftest import health, running, until_health
from tests.messages import (
    BODY,
    DUPLEX,
    LEAN,
    RAW,
    Message,
    Reply,
    answered,
    asked,
    destination,
    entry,
    kinds,
    reference_headers,
    refused,
    request_body,
    response_body,
    response_headers,
    response_trailers,
    set_by,
    stream_headers,
    streamed,
)

HEAD = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\n"
PASSTHROUGH = (
    HEAD
    + """\
plugins: [{type: queue-scorer}, {type: kv-cache-utilization-scorer}, {type: passthrough-parser}]
requestHandler: {parsers: [{pluginRef: passthrough-parser}]}
"""
)
LEAST_REQUESTS = HEAD + "plugins: [{type: active-request-scorer}, {type: max-score-picker}]\n"


# --- a server, and a stream to it -------------------------------------------------------------------------------------


class Served:
    """The router behind a listening server, a channel to it, and ways to look inside."""

    def __init__(self, pods: Sequence[tuple[float, float]], text: str, settings: ServerSettings) -> None:
        resolved = resolve(configs.load(text))
        self.pool = Pool(stale_after_s=1e9)
        self.pool.apply(Endpoint(name=f"pod-{i}", address=f"192.168.1.{i + 1}", port=8000) for i in range(len(pods)))
        for pod, (waiting, kv_usage) in zip(self.pool.endpoints, pods, strict=True):
            self.pool.record(pod, Load(waiting=waiting, running=0.0, kv_usage=kv_usage), time.monotonic())
        self.router = build_router(resolved, self.pool, Random(1))
        self.registry = CollectorRegistry()
        picker = EndpointPicker(self.router, build_parsers(resolved), Observer(Telemetry(self.registry)))
        self.server = ExtProcServer(picker, settings)
        self.channel: aio.Channel

    def sample(self, name: str, **labels: str) -> float:
        samples = [s for m in self.registry.collect() for s in m.samples if s.name == f"llm_d_epp_{name}"]
        return sum(s.value for s in samples if labels.items() <= s.labels.items())

    def stream(self) -> Stream:
        return Stream(self.channel)

    async def idle(self) -> None:
        """Until nothing is open any more."""
        await until(lambda: not self.router.open and not self.server.open_streams)

    async def access_log(self, *entries: accesslog_pb2.HTTPAccessLogEntry) -> None:
        await access_log(self.channel, *entries)


@asynccontextmanager
async def serving(
    pods: Sequence[tuple[float, float]] = ((0, 0.0), (0, 0.0)),
    text: str = configs.DEFAULT_CONFIG,
    **settings: Any,
) -> AsyncIterator[Served]:
    """``pods`` are (waiting, KV usage) of 192.168.1.1:8000 and on."""
    chosen = ServerSettings(**settings)
    served = Served(pods, text, chosen)
    server = aio.server(options=chosen.grpc_options)
    served.server.add_to(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with aio.insecure_channel(f"127.0.0.1:{port}", options=CHANNEL_OPTIONS) as channel:
            served.channel = channel
            yield served
    finally:
        await server.stop(0.2)


both = pytest.mark.parametrize("mode", [LEAN, DUPLEX])

# --- the reference's cases --------------------------------------------------------------------------------------------


@both
async def test_the_pod_with_the_shorter_queue_and_the_emptier_cache_is_chosen(mode: str) -> None:
    async with serving([(3, 0.2), (0, 0.1), (10, 0.2)]) as served:
        replies = await exchange(served.channel, *asked(mode))
        assert destination(replies) == "192.168.1.2:8000"
        assert served.sample("request_total", model_name="m") == 1


async def test_the_duplex_replies_are_headers_then_the_body_as_it_came() -> None:
    async with serving() as served:
        stream = served.stream()
        await stream.send(*asked())
        replies = await stream.replies(2)
        assert kinds(replies) == ["request_headers", "request_body"]
        assert set(set_by(replies[0])) == {"x-gateway-destination-endpoint", "content-length"}
        assert set_by(replies[0])["content-length"] == str(len(RAW))
        assert replies[0].request_headers.response.clear_route_cache
        assert streamed(replies, "request_body") == (RAW, [True])


async def test_the_lean_replies_let_the_headers_pass_then_change_headers_and_end_the_stream() -> None:
    async with serving() as served:
        stream = served.stream()
        await stream.send(reference_headers(LEAN))
        (first,) = await stream.replies(1)
        assert kinds([first]) == ["request_headers"]
        assert set_by(first) == {}
        await stream.send(request_body(RAW, end=True))
        (second,) = await stream.replies(1)
        assert kinds([second]) == ["request_body"]
        assert set(set_by(second)) == {"x-gateway-destination-endpoint"}
        assert second.request_body.response.clear_route_cache
        assert second.dynamic_metadata["llmd"]["ticket"] in served.router.open
        assert await stream.call.read() is aio.EOF
        assert await stream.call.code() is grpc.StatusCode.OK
        await until(lambda: not served.server.open_streams)
        assert len(served.router.open) == 1, "it stays open until the access log reports its end"


@both
async def test_saturated_pods_still_get_requests(mode: str) -> None:
    async with serving([(10, 0.9), (10, 0.9)]) as served:
        assert destination(await exchange(served.channel, *asked(mode))).startswith("192.168.1.")


@both
async def test_the_passthrough_parser_routes_any_bytes_by_load_and_leaves_them_alone(mode: str) -> None:
    data = b"no JSON \x00\xff"
    async with serving([(6, 0.2), (0, 0.1), (6, 0.2)], PASSTHROUGH) as served:
        replies = await exchange(served.channel, *asked(mode, data))
        assert destination(replies) == "192.168.1.2:8000"
        assert streamed(replies, "request_body")[0] == (data if mode == DUPLEX else b"")
        assert served.sample("request_total", model_name="", target_model_name="") == 1


@both
async def test_a_body_that_is_no_json_is_refused(mode: str) -> None:
    async with serving() as served:
        status, text, told = refused(await exchange(served.channel, *asked(mode, b"no healthy JSON")))
        assert status == 400
        assert text.startswith("inference error: BadRequest - error unmarshaling request bodyMap: ")
        assert "x-llm-d-request-dropped-reason" not in told
        await served.idle()


@both
async def test_a_request_without_a_model_is_refused(mode: str) -> None:
    async with serving() as served:
        replies = await exchange(served.channel, *asked(mode, b'{"prompt": "hello"}'))
        assert refused(replies)[:2] == (400, "inference error: BadRequest - model not found in request body")


@pytest.mark.parametrize("name", ["x_llm_d_model_name_rewrite", "x_gateway_model_name_rewrite"])
async def test_a_body_split_over_chunks_is_put_together_and_its_model_rewritten(name: str) -> None:
    wanted = RAW.replace(b'"m"', b'"sql-lora-1fdg2"')
    async with serving([(4, 0.2), (4, 0.2)]) as served:
        stream = served.stream()
        await stream.send(
            reference_headers(**{name: "sql-lora-1fdg2"}), request_body(RAW[:11]), request_body(RAW[11:], end=True)
        )
        replies = await stream.replies(2)
        assert streamed(replies, "request_body") == (wanted, [True])
        assert set_by(replies[0])["content-length"] == str(len(wanted))
        assert served.sample("request_total", model_name="m", target_model_name="sql-lora-1fdg2") == 1


async def test_the_lean_path_sends_a_rewritten_body_with_its_length() -> None:
    wanted = RAW.replace(b'"m"', b'"longer-than-before"')
    async with serving() as served:
        replies = await exchange(served.channel, *asked(LEAN, x_llm_d_model_name_rewrite="longer-than-before"))
        assert replies[-1].request_body.response.body_mutation.body == wanted
        assert set_by(replies[-1])["content-length"] == str(len(wanted))


@both
async def test_a_request_without_a_body_and_without_pods_is_an_internal_error(mode: str) -> None:
    async with serving([]) as served:
        replies = await exchange(served.channel, reference_headers(mode, end=True))
        assert refused(replies)[:2] == (500, "inference error: Internal - no pods available in datastore")


@both
async def test_a_request_without_pods_is_refused_for_want_of_endpoints(mode: str) -> None:
    async with serving([]) as served:
        status, text, told = refused(await exchange(served.channel, *asked(mode)))
        assert (status, told["x-llm-d-request-dropped-reason"]) == (503, "rejected-no-endpoints")
        assert text == (
            "inference error: ServiceUnavailable - failed to find endpoint candidates for serving the request"
        )


@both
async def test_a_get_goes_to_any_pod_and_is_not_followed(mode: str) -> None:
    async with serving() as served:
        stream = served.stream()
        await stream.send(reference_headers(mode, end=True, path="/v1/models"))
        replies = await stream.replies(1)
        assert destination(replies) in ("192.168.1.1:8000", "192.168.1.2:8000")
        assert set(set_by(replies[0])) == {"x-gateway-destination-endpoint"}
        assert await stream.rest() == []
        await served.idle()


@both
@pytest.mark.parametrize(
    ("subset", "chosen"),
    [
        (["192.168.1.1:8000", "192.168.1.3:8000"], "192.168.1.3:8000"),
        (["192.168.1.1", "192.168.1.3"], "192.168.1.3:8000"),
        ("192.168.1.1:8000,192.168.1.3:8000", "192.168.1.3:8000"),
        (["192.168.1.9:8000", "192.168.1.1:8000"], "192.168.1.1:8000"),
        (["192.168.1.2:9999", "192.168.1.3:8000"], "192.168.1.3:8000"),
    ],
)
async def test_the_best_pod_of_the_subset_is_chosen(mode: str, subset: Any, chosen: str) -> None:
    async with serving([(8, 0.2), (0, 0.1), (5, 0.2)]) as served:
        assert destination(await exchange(served.channel, *asked(mode, subset=subset))) == chosen


@both
@pytest.mark.parametrize("subset", [["192.168.1.9:8000"], [], ""])
async def test_a_subset_without_a_pod_is_refused(mode: str, subset: Any) -> None:
    async with serving() as served:
        status, _, told = refused(await exchange(served.channel, *asked(mode, subset=subset)))
        assert (status, told["x-llm-d-request-dropped-reason"]) == (503, "rejected-no-endpoints")


async def test_the_subset_can_be_ignored() -> None:
    async with serving([(8, 0.2), (0, 0.1)], honour_subset=False) as served:
        assert destination(await exchange(served.channel, *asked(subset=["192.168.1.1:8000"]))) == "192.168.1.2:8000"


@both
async def test_an_unknown_objective_is_served_all_the_same(mode: str) -> None:
    async with serving([(3, 0.2), (0, 0.1)]) as served:
        replies = await exchange(served.channel, *asked(mode, x_gateway_inference_objective="never-heard-of"))
        assert destination(replies) == "192.168.1.2:8000"
        assert served.sample("request_total", priority="0") == 1


@both
@pytest.mark.parametrize("on", [False, True])
async def test_scores_of_all_candidates_are_told_when_asked_for(mode: str, on: bool) -> None:
    async with serving([(3, 0.2), (0, 0.1)], emit_scores=on) as served:
        (reply,) = [r for r in await exchange(served.channel, *asked(mode)) if r.HasField("dynamic_metadata")]
        told = reply.dynamic_metadata["envoy.lb"]
        assert ("x-gateway-destination-endpoint-scores" in told) is on
        if on:
            scores = dict(told["x-gateway-destination-endpoint-scores"])
            assert set(scores) == {"192.168.1.1:8000", "192.168.1.2:8000"}
            assert scores["192.168.1.2:8000"] > scores["192.168.1.1:8000"] >= 0


# --- the response phase -----------------------------------------------------------------------------------------------

WHOLE = b'{"model": "m", "choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5}}'


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize(
    "chunks",
    [[WHOLE], [WHOLE[:30], WHOLE[30:]], [WHOLE, b""], [b"no JSON at all"], [b""]],
    ids=["one chunk", "two chunks", "an empty end", "no JSON", "nothing"],
)
async def test_a_whole_reply_comes_back_as_it_was(routed: bool, chunks: list[bytes]) -> None:
    """With a request phase and without one. The reference returns it in one piece at the end."""
    async with serving() as served:
        stream = served.stream()
        if routed:
            await stream.send(*asked())
            await stream.replies(2)
        await stream.send(response_headers())
        (marked,) = await stream.replies(1)
        assert set_by(marked) == {"x-went-into-resp-headers": "true"}
        for i, chunk in enumerate(chunks):
            await stream.send(response_body(chunk, end=i == len(chunks) - 1))
        replies = await stream.replies(len(chunks))
        data, ends = streamed(replies, "response_body")
        assert data == b"".join(chunks)
        assert ends == [False] * (len(chunks) - 1) + [True]
        assert await stream.call.read() is aio.EOF
        await served.idle()


async def test_the_tokens_of_a_stream_are_counted() -> None:
    events = [
        b'data: {"choices":[{"text":"NEVER"}],"usage":null}\n\n',
        b'data: {"choices":[{"text":"GONNA"}],"usage":null}\n\n',
        b'data: {"choices":[],"usage":{"prompt_tokens":7,"total_tokens":17,"completion_tokens":10}}\n\n',
        b"data: [DONE]\n\n",
    ]
    async with serving() as served:
        stream = served.stream()
        await stream.send(*asked(data=json.dumps({**BODY, "stream": True}).encode()))
        await stream.replies(2)
        await stream.send(stream_headers())
        await stream.replies(1)
        for event in events:
            await stream.send(response_body(event, end=event is events[-1]))
            (reply,) = await stream.replies(1)
            assert streamed([reply], "response_body") == (event, [event is events[-1]])
        await served.idle()
        assert served.sample("request_input_tokens_sum") == 7
        assert served.sample("request_output_tokens_sum") == 10
        assert served.sample("request_ttft_seconds_count", streaming="true") == 1


async def test_the_engines_error_is_passed_on_and_counted() -> None:
    async with serving() as served:
        stream = served.stream()
        await stream.send(*asked())
        await stream.replies(2)
        await stream.send(response_headers(status="503"), response_body(b"{}", end=True))
        await stream.replies(2)
        await served.idle()
        assert served.sample("request_error_total", error_code="ModelServerError") == 1


async def test_a_reply_that_ends_with_trailers_is_answered_to_its_end() -> None:
    async with serving() as served:
        stream = served.stream()
        await stream.send(*asked(), response_headers(), response_body(b"abc"), response_trailers())
        replies = await stream.to_the_end()
        assert kinds(replies)[2:] == ["response_headers", "response_body", "response_trailers"]
        await served.idle()


# --- many at once, and clients that go --------------------------------------------------------------------------------


async def test_a_second_request_sees_that_the_first_is_open() -> None:
    async with serving(text=LEAST_REQUESTS) as served:
        first, second = served.stream(), served.stream()
        await first.send(*asked())
        there = destination(await first.replies(2))
        await second.send(*asked())
        assert destination(await second.replies(2)) != there
        await first.send(response_headers(), response_body(b"{}", end=True))
        await until(lambda: len(served.router.open) == 1)
        assert destination(await exchange(served.channel, *asked())) == there
        second.call.cancel()
        await served.idle()


async def test_the_lean_path_sees_open_requests_too_until_they_are_reported() -> None:
    async with serving(text=LEAST_REQUESTS) as served:
        there = destination(await exchange(served.channel, *asked(LEAN)))
        (ticket,) = served.router.open
        other = destination(await exchange(served.channel, *asked(LEAN)))
        assert other != there
        await served.access_log(entry(ticket))
        assert destination(await exchange(served.channel, *asked(LEAN))) == there


@pytest.mark.parametrize("done", ["headers", "half a body", "routed", "reply headers", "half a reply"])
async def test_a_client_that_goes_releases_everything(done: str) -> None:
    steps: dict[str, tuple[list[Message], int]] = {
        "headers": ([reference_headers()], 0),
        "half a body": ([reference_headers(), request_body(b"{")], 0),
        "routed": ([*asked()], 2),
        "reply headers": ([*asked(), stream_headers()], 3),
        "half a reply": ([*asked(), stream_headers(), response_body(b"data: 1\n\n")], 4),
    }
    messages, answers = steps[done]
    async with serving() as served:
        stream = served.stream()
        await stream.send(*messages)
        await stream.replies(answers)
        await until(lambda: served.server.open_streams == 1)
        assert len(served.router.open) == (answers > 0)
        stream.call.cancel()
        await served.idle()
        assert served.sample("request_error_total", error_code="aborted") == (answers > 0)
        assert destination(await exchange(served.channel, *asked())).startswith("192.168.1.")


async def test_a_proxy_that_stops_writing_in_mid_request_releases_everything() -> None:
    async with serving() as served:
        assert await exchange(served.channel, reference_headers(), request_body(b"{")) == []
        assert kinds(await exchange(served.channel, *asked())) == ["request_headers", "request_body"]
        await served.idle()


class Unreachable:
    """A gRPC context whose proxy sends a whole request and is gone when the answer is written."""

    def __init__(self, *messages: Message) -> None:
        self._messages = list(messages)

    async def read(self) -> Any:
        return self._messages.pop(0) if self._messages else aio.EOF

    async def write(self, reply: Reply) -> None:
        if reply.HasField("dynamic_metadata"):
            raise asyncio.CancelledError


@both
async def test_a_request_whose_answer_could_not_be_delivered_is_given_back(mode: str) -> None:
    """On the lean path too: Envoy never saw the ticket, so no access-log entry will bring it back."""
    async with serving() as served:
        context: Any = Unreachable(*asked(mode))
        with pytest.raises(asyncio.CancelledError):
            await served.server.process(context, context)
        assert not served.router.open
        assert not served.server.open_streams


async def test_many_requests_at_once_are_all_answered() -> None:
    async with serving() as served:
        modes = [LEAN if i % 2 else DUPLEX for i in range(100)]
        answers = await asyncio.gather(*(exchange(served.channel, *asked(mode)) for mode in modes))
        assert all(destination(replies) for replies in answers)
        await until(lambda: len(served.router.open) == modes.count(LEAN))
        await served.access_log(*(entry(ticket) for ticket in list(served.router.open)))
        await served.idle()


@both
async def test_a_body_as_long_as_the_limit_passes_and_a_longer_one_is_refused(mode: str) -> None:
    limit = 6 << 20
    room = limit - len(json.dumps({**BODY, "prompt": ""}))
    async with serving(max_body_bytes=limit) as served:
        fits = json.dumps({**BODY, "prompt": "x" * room}).encode()
        assert destination(await exchange(served.channel, *asked(mode, fits)))
        too_long = json.dumps({**BODY, "prompt": "x" * (room + 1)}).encode()
        assert refused(await exchange(served.channel, *asked(mode, too_long)))[0] == 413


@pytest.mark.parametrize("mode", ["NONE", "STREAMED", "BUFFERED_PARTIAL"])
async def test_a_mode_we_do_not_speak_is_refused(mode: str) -> None:
    async with serving() as served:
        status, text, _ = refused(await exchange(served.channel, reference_headers(mode)))
        assert status == 500
        assert f"request_body_mode {mode} is not supported" in text


# --- access logs ------------------------------------------------------------------------------------------------------


async def test_a_batch_of_the_access_log_finishes_its_requests_and_ignores_strangers() -> None:
    async with serving() as served:
        for _ in range(3):
            await exchange(served.channel, *asked(LEAN))
        first, second, third = served.router.open
        start_us = 1_760_000_000 * 1e6
        noted = {
            "streamed": True,
            "first_us": start_us + 200_000,
            "last_us": start_us + 600_000,
            "tail": '"usage":{"prompt_tokens":7,"completion_tokens":5}',
        }
        await served.access_log(
            entry(first, **noted), entry("never-heard-of"), accesslog_pb2.HTTPAccessLogEntry(), entry(third)
        )
        assert list(served.router.open) == [second]
        assert served.sample("request_duration_seconds_count") == 2
        assert served.sample("request_ttft_seconds_sum") == pytest.approx(0.2)
        assert served.sample("request_streaming_tpot_seconds_sum") == pytest.approx(0.1)
        await served.access_log(entry(second), entry(second), entry(first))
        assert served.sample("request_duration_seconds_count") == 3


async def test_an_entry_that_blows_up_leaves_the_rest_of_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as served:
        for _ in range(3):
            await exchange(served.channel, *asked(LEAN))
        first, second, third = served.router.open
        finish = served.server.picker.finish

        def blows_up(ticket: str, outcome: Outcome) -> None:
            if ticket == second:
                raise RuntimeError("out of order")
            finish(ticket, outcome)

        monkeypatch.setattr(served.server.picker, "finish", blows_up)
        await served.access_log(entry(first), entry(second), entry(third))
        assert list(served.router.open) == [second]
        assert served.server.failed_entries == 1


async def test_an_empty_batch_of_the_access_log_is_no_error() -> None:
    async with serving() as served:
        await served.access_log()
        await served.access_log(entry(""))


# --- the whole scheduler: TLS, health, draining -----------------------------------------------------------------------


async def ask_get(channel: aio.Channel) -> str:
    stream = Stream(channel)
    await stream.send(reference_headers(end=True, path="/v1/models"))
    replies = await stream.replies(1)
    assert await stream.rest() == []
    return destination(replies)


HEALTH_NAMES = ("", "liveness", "readiness", EXT_PROC)


async def test_health_answers_by_name_on_both_ports(tmp_path: Path) -> None:
    async with running(tmp_path) as served:
        for port in (served.grpc_port, served.health_port):
            assert {name: await health(port, name) for name in HEALTH_NAMES} == dict.fromkeys(HEALTH_NAMES, "SERVING")
        assert await health(served.health_port, "no-such-service") == "SERVING"


async def test_while_draining_it_is_not_serving_and_open_streams_go_on(tmp_path: Path) -> None:
    async with running(tmp_path, drain_timeout_s=PATIENCE_S) as served:
        stream = served.stream()
        await stream.ask(*asked(), count=2)
        stopping = asyncio.create_task(served.scheduler.stop())
        await until_health(served.health_port, "NOT_SERVING")
        names = ("", "readiness", EXT_PROC)
        assert {n: await health(served.health_port, n) for n in names} == dict.fromkeys(names, "NOT_SERVING")
        assert await ask_get(served.channel)
        assert not stopping.done()
        replies = await stream.ask(*answered(), count=2)
        assert kinds(replies) == ["response_headers", "response_body"]
        await asyncio.wait_for(stopping, PATIENCE_S)
        assert not served.scheduler.router.open


async def test_it_serves_with_a_certificate_of_its_own(tmp_path: Path) -> None:
    async with running(tmp_path, secure_serving=True) as served:
        pem = await asyncio.to_thread(served_certificate, served.grpc_port)
        credentials = grpc.ssl_channel_credentials(pem.encode())
        options = [("grpc.ssl_target_name_override", "localhost")]
        async with aio.secure_channel(f"127.0.0.1:{served.grpc_port}", credentials, options) as channel:
            assert (await ask_get(channel)).startswith("127.0.0.1:")
        assert await health(served.health_port) == "SERVING"


def served_certificate(port: int) -> str:
    """The certificate it shows, unchecked; gRPC servers insist on HTTP/2 by ALPN."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", port), PATIENCE_S) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secured,
    ):
        shown = secured.getpeercert(binary_form=True)
    assert shown
    return ssl.DER_cert_to_PEM_cert(shown)


@pytest.mark.parametrize("which", ["grpc_port", "health_port", "metrics_port"])
async def test_a_port_in_use_is_named_and_nothing_stays_behind(tmp_path: Path, which: str) -> None:
    file = tmp_path / "endpoints.yaml"
    file.write_text("endpoints: [{name: pod-0, address: 127.0.0.1, port: 9}]\n")
    ports = dict(zip(("grpc_port", "health_port", "metrics_port"), free_ports(3), strict=True))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports[which] = taken.getsockname()[1]
        running = Scheduler(ServeSettings(host="127.0.0.1", endpoints_file=str(file), **ports))
        with pytest.raises(OSError, match=str(ports[which])):
            await running.start()
    frames = [getattr(task.get_coro(), "cr_frame", None) for task in asyncio.all_tasks()]
    assert not [f for f in frames if f is not None and f.f_globals["__name__"].startswith("llmd_sched.")]


async def test_a_second_scheduler_cannot_share_a_port_with_the_first(tmp_path: Path) -> None:
    """gRPC shares ports by default (SO_REUSEPORT); half the probes would then reach the other process."""
    async with running(tmp_path) as first:
        taken = ({"grpc_port": first.grpc_port, "health_port": 0}, {"grpc_port": 0, "health_port": first.health_port})
        for ports in taken:
            settings = ServeSettings(
                host="127.0.0.1",
                endpoints_file=str(first.endpoints_file),
                drain_timeout_s=0.0,
                metrics_port=free_ports(1)[0],
                **ports,
            )
            second = Scheduler(settings)
            try:
                with pytest.raises(OSError, match="cannot listen"):
                    await second.start()
            finally:
                await second.stop()
