"""What is made of a reply by a whole scheduler over gRPC: its cost, its tokens, its text; and prompts cached or not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from llmd_sched.parsers.grpc import SERVICE
from tests.envoy_stream import until
from tests.integration.conftest import Running, running
from tests.messages import (
    BODY,
    Message,
    answered,
    asked,
    destination,
    kinds,
    metadata_of,
    refused,
    response_body,
    response_headers,
    response_trailers,
    stream_headers,
    streamed,
)
from tests.unit.test_grpc_parser import chunk, complete, framed

EXPERIMENTAL = {"allow_experimental_plugins": True}


# --- what a reply cost ------------------------------------------------------------------------------------------------

COST = """
plugins:
- type: request-attribute-reporter
  parameters:
    attributes:
    - key: {name: x-gateway-inference-request-cost}
      expression: usage.prompt_tokens + usage.completion_tokens
- {type: random-picker}
"""
USAGE = b'"usage":{"prompt_tokens":4,"completion_tokens":6,"total_tokens":10}'
EVENTS = [b'data: {"choices":[{"text":"a"}]}\n\n', b'data: {"choices":[],' + USAGE + b"}\n\n", b"data: [DONE]\n\n"]


@pytest.mark.parametrize(
    ("head", "chunks"),
    [(response_headers(), [b'{"choices":[],' + USAGE + b"}"]), (stream_headers(), EVENTS)],
    ids=["whole", "streamed"],
)
async def test_the_last_message_of_a_reply_tells_its_cost(tmp_path: Path, head: Message, chunks: list[bytes]) -> None:
    async with running(tmp_path, COST, **EXPERIMENTAL) as served:
        stream = served.stream()
        await stream.ask(*asked(), count=2)
        bodies = [response_body(one, end=one is chunks[-1]) for one in chunks]
        replies = await stream.ask(head, *bodies, count=1 + len(chunks))
        assert [metadata_of(r) for r in replies[:-1]] == [{}] * len(chunks)
        assert metadata_of(replies[-1]) == {"envoy.lb": {"x-gateway-inference-request-cost": 10.0}}


async def test_a_reply_without_usage_has_no_cost(tmp_path: Path) -> None:
    async with running(tmp_path, COST, **EXPERIMENTAL) as served:
        stream = served.stream()
        await stream.ask(*asked(), count=2)
        assert [metadata_of(r) for r in await stream.ask(*answered(), count=2)] == [{}, {}]


# --- cached or not at all ---------------------------------------------------------------------------------------------

PRECISE = """
plugins:
- type: precise-prefix-cache-producer
  parameters: {kvEventsConfig: {discoverPods: false, zmqEndpoint: "%s"}}
- {type: prefix-cache-scorer, parameters: {prefixMatchInfoProducerName: precise-prefix-cache-producer}}
- {type: max-score-picker}
"""
TOKENS = list(range(1000, 1064))


async def test_a_client_that_prefers_a_cached_prompt_is_refused_until_an_engine_reports_it(
    tmp_path: Path, unused_tcp_port: int
) -> None:
    zmq = pytest.importorskip("zmq")
    address = f"tcp://127.0.0.1:{unused_tcp_port}"
    data = json.dumps({**BODY, "prompt": TOKENS}).encode()
    async with running(tmp_path, PRECISE % address, pods=4) as served:
        status, text, told = refused(await served.exchange(*asked(data=data, prefer="If-Available; wait=5")))
        assert (status, "x-llm-d-request-dropped-reason" in told) == (412, False)
        assert text == "inference error: PreconditionFailed - no decode worker has the requested KV cache"
        await served.exchange(*asked(data=data))  # that we sent it somewhere is no proof
        assert refused(await served.exchange(*asked(data=data, prefer="if-available")))[0] == 412
        with zmq.Context() as context, context.socket(zmq.PUB) as engine:
            engine.linger = 0
            engine.connect(address)
            await publish_until_known(served, engine, f"kv@{served.pods[2]}@m".encode())
            assert destination(await served.exchange(*asked(data=data, prefer="if-available"))) == served.pods[2]
        await served.idle()


async def publish_until_known(served: Running, engine: Any, topic: bytes) -> None:
    """What is published before the subscription has come through is lost."""
    stored = ["BlockStored", [1, 2, 3, 4], None, TOKENS, 16, None, "GPU"]
    number = iter(range(1_000_000))

    def known() -> bool:
        engine.send_multipart([topic, next(number).to_bytes(8, "big"), msgspec.msgpack.encode([0.0, [stored], 0])])
        return served.sample("kv_cache_index_admissions_total") > 0

    await until(known)


# --- replies nobody follows, and those of gRPC ------------------------------------------------------------------------

SKIPPING = """
plugins: [{type: openai-parser}, {type: anthropic-parser}, {type: vllmgrpc-parser}, {type: random-picker}]
requestHandler: {parsers: [{pluginRef: openai-parser}, {pluginRef: anthropic-parser}, {pluginRef: vllmgrpc-parser}]}
"""
GENERATE = framed("GenerateRequest", tokenized={"input_ids": TOKENS}, sampling_params={"max_tokens": 8})
STREAMED = framed("GenerateRequest", tokenized={"input_ids": TOKENS}, stream=True)
ANTHROPIC = b'{"model": "m", "messages": [{"role": "user", "content": "hi"}]}'


@pytest.mark.parametrize(
    ("path", "data"),
    [("/v1/messages/count_tokens", ANTHROPIC), (f"/{SERVICE}HealthCheck", b"\0\0\0\0\0"), (f"/{SERVICE}Abort", b"any")],
)
async def test_a_request_that_generates_nothing_is_routed_and_followed_to_its_end(
    tmp_path: Path, path: str, data: bytes
) -> None:
    async with running(tmp_path, SKIPPING) as served:
        stream = served.stream()
        routed = await stream.ask(*asked(data=data, path=path), count=2)
        assert kinds(routed) == ["request_headers", "request_body"]
        assert streamed(routed, "request_body") == (data, [True])
        await stream.ask(response_headers("200", "application/json"), response_body(b"{}", end=True), count=2)
        await served.idle()
        assert served.sample("request_error_total") == 0


@pytest.mark.parametrize(
    ("data", "messages", "output"),
    [(GENERATE, [complete(1, 2, 3)], 3), (STREAMED, [chunk(1), chunk(2, 3), complete(3)], 3)],
    ids=["unary", "streamed"],
)
async def test_a_grpc_reply_is_counted_and_ends_with_its_trailers(
    tmp_path: Path, data: bytes, messages: list[bytes], output: int
) -> None:
    async with running(tmp_path, SKIPPING) as served:
        stream = served.stream()
        routed = await stream.ask(*asked(data=data, path=f"/{SERVICE}Generate"), count=2)
        assert destination(routed) == served.pods[0]
        assert streamed(routed, "request_body") == (data, [True])
        sent = b"".join(messages)
        cuts = [sent[at : at + 7] for at in range(0, len(sent), 7)]
        reply = [response_headers("200", "application/grpc"), *map(response_body, cuts), response_trailers()]
        replies = await stream.ask(*reply, count=len(reply))
        assert streamed(replies, "response_body") == (sent, [False] * len(cuts))
        assert kinds(replies)[-1] == "response_trailers"
        await served.idle()
        assert served.sample("request_input_tokens_sum") == 9
        assert served.sample("request_cached_tokens_sum") == 4
        assert served.sample("request_output_tokens_sum") == output
        assert served.sample("request_ttft_seconds_count", streaming="true") == (data == STREAMED)


async def test_a_grpc_body_that_is_none_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path, SKIPPING) as served:
        replies = await served.exchange(*asked(data=b"\0\0\0\0\x09abc", path=f"/{SERVICE}Generate"))
        assert refused(replies)[0] == 400


# --- learning from replies --------------------------------------------------------------------------------------------

SAID = "The answer is long enough to fill some blocks of its own. " * 20
CHATS: Mapping[str, tuple[str, Message, list[bytes]]] = {
    "whole": (
        "/v1/chat/completions",
        response_headers(),
        [json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": SAID}}]}).encode()],
    ),
    "streamed": (
        "/v1/chat/completions",
        stream_headers(),
        [
            *(
                b"data: " + json.dumps({"choices": [{"index": 0, "delta": {"content": part}}]}).encode() + b"\n\n"
                for part in (SAID[:100], SAID[100:])
            ),
            b"data: [DONE]\n\n",
        ],
    ),
    "anthropic": (
        "/v1/messages",
        response_headers(),
        [json.dumps({"content": [{"type": "text", "text": SAID}]}).encode()],
    ),
}


@pytest.mark.parametrize("name", CHATS)
async def test_the_next_turn_of_a_chat_finds_prompt_and_reply_where_the_last_one_was_served(
    tmp_path: Path, name: str
) -> None:
    path, head, chunks = CHATS[name]
    asks = [{"role": "user", "content": "word" * 64 * 4}]
    then = [*asks, {"role": "assistant", "content": SAID}, {"role": "user", "content": "And?"}]
    config = SKIPPING.replace("random-picker", "prefix-cache-scorer}, {type: max-score-picker")
    async with running(tmp_path, config, pods=4) as served:
        stream = served.stream()
        routed = await stream.ask(*asked(data=turn(asks), path=path), count=2)
        bodies = [response_body(one, end=one is chunks[-1]) for one in chunks]
        await stream.ask(head, *bodies, count=1 + len(bodies))
        await served.idle()
        second = await served.exchange(*asked(data=turn(then), path=path))
        assert destination(second) == destination(routed)
        # All full blocks of 64 tokens but the last, which the new question ends in.
        full = len(SAID + "word" * 64 * 4) // 256
        assert served.sample("prefix_indexer_hit_bytes_sum") == full * 256
        assert served.sample("prefix_indexer_hit_ratio_sum") == pytest.approx(full / (full + 1))


def turn(messages: list[dict[str, str]]) -> bytes:
    return json.dumps({"model": "m", "messages": messages, "max_tokens": 5}).encode()
