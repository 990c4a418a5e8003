"""The simulated model server over real HTTP on loopback, fifty times as fast as the hardware it stands for."""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec
import pytest

from llmd_sched.sim import server as sim_server
from llmd_sched.sim.engine import EngineConfig
from llmd_sched.sim.server import ServerConfig, SimServer
from llmd_sched.sim.steptime import PRESETS

PRESET = PRESETS["llama-3-8b-h100"]
ENGINE = EngineConfig(preset=PRESET, max_model_len=4096)


class Served:
    """A running server and a client session bound to it."""

    def __init__(self, server: SimServer, session: aiohttp.ClientSession) -> None:
        self.server = server
        self.session = session

    async def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any, Any]:
        """Status, headers and the JSON reply."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.session.post(path, data=data, headers=headers) as reply:
            return reply.status, reply.headers, json.loads(await reply.read())

    async def events(self, path: str, body: dict) -> list[Any]:
        """The events of a stream, decoded; the end mark stays a string."""
        async with self.session.post(path, json={**body, "stream": True}) as reply:
            assert reply.status == 200
            assert reply.content_type == "text/event-stream"
            assert reply.headers["x-inference-pod"] == "pod-a"
            texts = [line[6:].decode().strip() async for line in reply.content if line.startswith(b"data: ")]
        return [text if text == "[DONE]" else json.loads(text) for text in texts]

    async def metrics(self) -> dict[str, float]:
        """Sample name with labels -> value."""
        async with self.session.get("/metrics") as reply:
            lines = (await reply.text()).splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


@asynccontextmanager
async def serving(config: ServerConfig) -> AsyncIterator[Served]:
    server = SimServer(config)
    port = await server.start()
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            yield Served(server, session)
    finally:
        await server.close()


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving(ServerConfig(engine=ENGINE, port=0, model="m", name="pod-a", speedup=50.0)) as running:
        yield running


async def test_a_whole_completion_says_what_was_used(served: Served) -> None:
    status, headers, reply = await served.post("/v1/completions", {"model": "m", "prompt": "x" * 101, "max_tokens": 7})
    assert status == 200
    assert headers["x-inference-pod"] == "pod-a"
    assert (reply["object"], reply["model"]) == ("text_completion", "m")
    choice = reply["choices"][0]
    assert (len(choice["text"]), choice["finish_reason"]) == (7 * 4, "length")
    assert reply["usage"] == {
        "prompt_tokens": 26,
        "completion_tokens": 7,
        "total_tokens": 33,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_a_completion_without_a_limit_is_16_tokens_and_without_a_model_is_served(served: Served) -> None:
    _, _, reply = await served.post("/v1/completions", {"prompt": "hello"})
    assert reply["usage"]["completion_tokens"] == 16


async def test_a_repeated_prompt_is_found_in_the_cache(served: Served) -> None:
    body = {"prompt": "y" * 64 * 5, "max_tokens": 2}
    await served.post("/v1/completions", body)
    _, _, reply = await served.post("/v1/completions", body)
    assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == 64
    _, _, salted = await served.post("/v1/completions", {**body, "cache_salt": "mine"})
    assert salted["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


async def test_token_ids_are_four_bytes_each(served: Served) -> None:
    body = {"prompt": list(range(40)), "max_tokens": 2}
    await served.post("/v1/completions", body)
    _, _, reply = await served.post("/v1/completions", {**body, "prompt": [list(range(40))]})
    assert reply["usage"]["prompt_tokens"] == 40
    assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == 32


async def test_a_stream_is_one_event_per_token_and_the_end_mark(served: Served) -> None:
    body = {"prompt": "hello", "max_tokens": 5}
    *tokens, end = await served.events("/v1/completions", body)
    assert end == "[DONE]"
    assert [len(event["choices"][0]["text"]) for event in tokens] == [4] * 5
    assert [event["choices"][0]["finish_reason"] for event in tokens] == [None] * 4 + ["length"]
    _, _, whole = await served.post("/v1/completions", body)
    assert whole["choices"][0]["text"] == "".join(event["choices"][0]["text"] for event in tokens)


async def test_a_chat_stream_says_its_role_first_and_its_usage_last(served: Served) -> None:
    body = {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "z" * 96}]}],
        "max_completion_tokens": 3,
        "stream_options": {"include_usage": True},
    }
    *tokens, usage, end = await served.events("/v1/chat/completions", body)
    assert end == "[DONE]"
    assert [event["object"] for event in tokens] == ["chat.completion.chunk"] * 3
    assert tokens[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "role" not in tokens[1]["choices"][0]["delta"]
    assert usage["choices"] == []
    assert (usage["usage"]["prompt_tokens"], usage["usage"]["completion_tokens"]) == (25, 3)


async def test_a_stream_of_one_token_is_first_and_last_at_once(served: Served) -> None:
    event, _ = await served.events(
        "/v1/chat/completions", {"messages": [{"role": "u", "content": "a"}], "max_tokens": 1}
    )
    assert event["choices"][0]["delta"]["role"] == "assistant"
    assert event["choices"][0]["finish_reason"] == "length"


async def test_a_chat_reply_without_a_limit_has_a_length_of_its_prompt(served: Served) -> None:
    body = {"messages": [{"role": "user", "content": "how long?"}]}
    _, _, first = await served.post("/v1/chat/completions", body)
    _, _, second = await served.post("/v1/chat/completions", body)
    assert first["usage"]["completion_tokens"] == second["usage"]["completion_tokens"]
    assert first["choices"][0]["finish_reason"] == "stop"
    assert first["choices"][0]["message"]["role"] == "assistant"


async def test_ignoring_the_end_without_a_limit_fills_the_context(served: Served) -> None:
    body = {"messages": [{"role": "user", "content": "x" * 16_000}], "ignore_eos": True}
    _, _, reply = await served.post("/v1/chat/completions", body)
    assert reply["usage"]["total_tokens"] == 4096


async def test_headers_leave_before_the_first_token() -> None:
    async with (
        serving(ServerConfig(engine=ENGINE, port=0, speedup=0.001)) as slow,
        slow.session.post("/v1/completions", json={"prompt": "x", "stream": True}) as reply,
    ):
        assert reply.status == 200
        assert slow.server.engine.counters.generation_tokens == 0


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"{", 400, "not a valid request"),
        ({"prompt": 7}, 400, "not a valid request"),
        ({"prompt": ""}, 400, "prompt must not be empty"),
        ({"prompt": ["a", "b"]}, 400, "not several prompts"),
        ({"prompt": [-1]}, 400, "token ids"),
        ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens must be at least 1"),
        ({"prompt": "a", "n": 2}, 400, "n must be 1"),
        ({"prompt": "a", "max_tokens": 4096}, 400, "maximum context length of 4096 tokens"),
        ({"prompt": "a", "model": "other"}, 404, "'other' does not exist"),
    ],
)
async def test_a_bad_request_is_refused_with_what_is_wrong(served: Served, body: Any, status: int, says: str) -> None:
    got, headers, reply = await served.post("/v1/completions", body)
    assert got == status
    assert says in reply["error"]["message"]
    assert reply["error"]["code"] == status
    assert headers["x-inference-pod"] == "pod-a"


async def test_a_full_queue_is_service_unavailable() -> None:
    engine = msgspec.structs.replace(ENGINE, max_waiting=0)
    async with serving(ServerConfig(engine=engine, port=0)) as full:
        status, _, reply = await full.post("/v1/completions", {"prompt": "a"})
        assert (status, reply["error"]["type"]) == (503, "ServiceUnavailableError")


@pytest.mark.parametrize(("asked", "status"), [("503", 503), ("429", 429), ("200", 400), ("nonsense", 400)])
async def test_an_error_can_be_forced_by_a_header(served: Served, asked: str, status: int) -> None:
    got, _, reply = await served.post("/v1/completions", {"prompt": "a"}, **{"X-Return-Error": asked})
    assert got == status
    assert "X-Return-Error" in reply["error"]["message"]


async def test_models_health_and_unknown_paths_answer_in_the_pods_name(served: Served) -> None:
    for path, status in (("/v1/models", 200), ("/health", 200), ("/nowhere", 404)):
        async with served.session.get(path) as reply:
            assert reply.status == status
            assert reply.headers["x-inference-pod"] == "pod-a"
    async with served.session.get("/v1/models") as reply:
        card = (await reply.json())["data"][0]
    assert (card["id"], card["max_model_len"]) == ("m", 4096)


async def test_metrics_have_vllms_names_labels_and_buckets(served: Served) -> None:
    await served.events("/v1/completions", {"prompt": "q" * 256, "max_tokens": 10})
    metrics = await served.metrics()
    labels = 'engine="0",model_name="m"'
    for name, value in {
        "vllm:num_requests_running": 0,
        "vllm:num_requests_waiting": 0,
        "vllm:kv_cache_usage_perc": 0,
        "vllm:prefix_cache_queries_total": 64,
        "vllm:prefix_cache_hits_total": 0,
        "vllm:prompt_tokens_total": 64,
        "vllm:generation_tokens_total": 10,
        "vllm:num_preemptions_total": 0,
        "vllm:time_to_first_token_seconds_count": 1,
        "vllm:inter_token_latency_seconds_count": 9,
        "vllm:e2e_request_latency_seconds_count": 1,
        "vllm:request_queue_time_seconds_count": 1,
        "vllm:request_inference_time_seconds_count": 1,
        "vllm:request_prefill_time_seconds_count": 1,
        "vllm:request_decode_time_seconds_count": 1,
        "vllm:request_prompt_tokens_sum": 64,
        "vllm:request_generation_tokens_sum": 10,
        "vllm:iteration_tokens_total_count": 10,
        "vllm:iteration_tokens_total_sum": 73,
    }.items():
        assert metrics[f"{name}{{{labels}}}"] == value, name
    assert metrics[f'vllm:request_success_total{{{labels},finished_reason="length"}}'] == 1
    assert metrics[f'vllm:time_to_first_token_seconds_bucket{{{labels},le="+Inf"}}'] == 1
    assert f'vllm:request_prompt_tokens_bucket{{{labels},le="2000.0"}}' in metrics
    assert f'vllm:iteration_tokens_total_bucket{{{labels},le="16384.0"}}' in metrics
    config = next(name for name in metrics if name.startswith("vllm:cache_config_info{"))
    assert 'block_size="16"' in config
    assert f'num_gpu_blocks="{PRESET.kv_blocks}"' in config
    assert "model_name" not in config


async def test_modelled_times_are_exact_however_late_the_timers_fire(served: Served) -> None:
    await served.events("/v1/completions", {"prompt": "q" * 256, "max_tokens": 2})
    metrics = await served.metrics()
    ttft_s = PRESET.request_overhead_s + PRESET.step_s(64, 64 * 32, 1, 0)
    labels = '{engine="0",model_name="m"}'
    assert metrics[f"vllm:time_to_first_token_seconds_sum{labels}"] * 50 == pytest.approx(ttft_s)
    assert metrics[f"vllm:inter_token_latency_seconds_sum{labels}"] * 50 == pytest.approx(PRESET.step_s(0, 0, 1, 64))


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_frees_what_its_request_held(stream: bool) -> None:
    async with serving(ServerConfig(engine=ENGINE, port=0)) as slow:
        body = json.dumps({"prompt": "x" * 400, "max_tokens": 3000, "stream": stream}).encode()
        port = slow.session._base_url.port  # type: ignore[union-attr]
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        engine = slow.server.engine
        await eventually(lambda: engine.running == 1 and engine.counters.generation_tokens > 2)
        writer.close()
        await writer.wait_closed()
        await eventually(lambda: engine.running == 0)
        assert (engine.waiting, engine.arriving, engine.kv_usage) == (0, 0, 0.0)
        metrics = await slow.metrics()
        assert sum(value for name, value in metrics.items() if 'finished_reason="abort"' in name) == 1


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait for it; the bound is only there so that a failure ends."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


async def test_many_streams_at_once_all_end_complete(served: Served) -> None:
    bodies = [{"prompt": f"{n}" * 300, "max_tokens": 20 + n} for n in range(40)]
    replies = await asyncio.gather(*(served.events("/v1/completions", body) for body in bodies))
    assert [len(events) for events in replies] == [20 + n + 1 for n in range(40)]
    assert served.server.engine.held_blocks == 0


def parsed(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    sim_server.add_arguments(parser)
    return parser.parse_args(["--preset", "llama-3-8b-h100", *options])


def test_options_become_the_configuration() -> None:
    config = sim_server.config_of(
        parsed("--port", "1", "--max-num-seqs", "9", "--kv-blocks", "50", "--policy", "priority", "--noise", "0.1")
    )
    assert (config.engine.preset.max_num_seqs, config.engine.preset.kv_blocks) == (9, 50)
    assert (config.engine.policy.value, config.engine.noise_sigma) == ("priority", 0.1)
    assert config.served_model == PRESET.model


def test_a_port_in_use_is_one_line_that_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert sim_server.run(parsed("--port", str(port))) == 1
    line = capsys.readouterr().err
    assert f"127.0.0.1:{port}" in line
    assert line.count("\n") == 1


@pytest.mark.parametrize(("options", "says"), [(["--speedup", "0"], "--speedup"), (["--noise", "2"], "noise_sigma")])
def test_a_bad_option_is_one_line(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sim_server.run(parsed("--port", "0", *options)) == 1
    line = capsys.readouterr().err
    assert says in line
    assert line.count("\n") == 1
