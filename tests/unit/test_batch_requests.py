"""One line to the engine side, over a stand-in on loopback: headers, retries, deadlines, aborts and resumption."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import pytest

from batchgw.client.gateway import Gateway, Gateways, wait_s
from batchgw.client.requests import Call, Flight, Sender, retry_after_s
from batchgw.client.result import EXPIRED, answered, request_id, usage_of
from batchgw.records import Result, Usage
from benchmarks.batch_engine import Engine, Fault, Trouble, running

PATIENCE_S = 10.0
CHAT_BODY = b'{"model": "m",  "messages": [{"role": "user", "content": "hi"}]}'


class Seen:
    """A watch that notes."""

    def __init__(self) -> None:
        self.count = 0
        self.attempts: list[tuple[int | None, str, float | None]] = []
        self.first = asyncio.Event()

    def tokens(self, flight: Flight, count: int) -> None:
        self.count += count
        self.first.set()

    def answered(self, flight: Flight, status: int | None, reason: str, retry_after_s: float | None) -> None:
        self.attempts.append((status, reason, retry_after_s))

    @property
    def statuses(self) -> list[int | None]:
        return [status for status, _, _ in self.attempts]


def call(left_s: float = 60.0, **fields: Any) -> Call:
    usual: dict[str, Any] = {"batch_id": "batch_1", "line": 3, "custom_id": "c", "url": "/v1/chat/completions",
                             "model": "m", "body": CHAT_BODY, "tenant": "acme"}  # fmt: skip
    return Call(**{**usual, "deadline_s": time.time() + left_s, **fields})


@asynccontextmanager
async def sender(engine: Engine, **fields: Any) -> AsyncIterator[Sender]:
    usual: dict[str, Any] = {"initial_backoff_s": 0.001, "max_backoff_s": 0.01, **fields}
    made = Sender(Gateways(Gateway(url=engine.url, **usual)), Random(1))
    await made.open()
    try:
        yield made
    finally:
        await made.close()


async def sent(one: Call, trouble: Trouble | None = None, **fields: Any) -> tuple[dict[str, Any], Result, Engine, Seen]:
    """The line that came out, the engine that was asked and what the watch saw."""
    async with (
        running(Engine(trouble=trouble)) as engine,
        sender(engine, **fields) as made,
        asyncio.timeout(PATIENCE_S),
    ):
        seen = Seen()
        result = await made.send(Flight(one), seen)
    return json.loads(result.output), result, engine, seen


def script(*faults: Fault | None) -> Trouble:
    """One after the other, then none."""
    left = list(faults)
    return lambda asked: left.pop(0) if left else None


async def test_a_streamed_line_is_answered_as_an_unstreamed_one() -> None:
    streamed, result, engine, seen = await sent(call())
    whole, other, plain, _ = await sent(call(), stream=False)
    assert (engine.asked[0].body["stream"], "stream" in plain.asked[0].body) == (True, False)
    assert streamed == whole
    assert streamed["response"]["body"]["choices"][0]["message"]["content"] == " w0 w1 w2 w3 w4"
    assert (result.ok, result.line, result.usage, seen.count) == (True, 3, Usage(1, 0, 5, 0), 5)
    assert other.usage == result.usage


async def test_what_cannot_be_streamed_is_sent_byte_for_byte() -> None:
    body = b'{"model": "m",  "input": "x"}'
    bodies = []
    async with running(Engine()) as engine:
        original = engine.answer

        async def spy(request: Any) -> Any:
            bodies.append(await request.read())
            return await original(request)

        engine.answer = spy  # type: ignore[method-assign]
        async with running(engine), sender(engine) as made:
            result = await made.send(Flight(call(url="/v1/embeddings", body=body)), Seen())
    assert result.ok
    assert bodies == [body]


async def test_each_line_says_who_asks_until_when_and_how_it_ranks() -> None:
    passed = {"Authorization": "Bearer user", "X-Request-Id": "forged", "x-extra": "1"}
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    one = call(headers=passed, trace=trace)
    _, _, engine, _ = await sent(one, api_key="key", priority=9)
    asked = engine.asked[0].headers
    assert asked["x-request-id"] == request_id("batch_1", "c")
    assert asked["x-gateway-inference-objective"] == asked["x-llm-d-inference-objective"] == "batch"
    assert asked["x-gateway-inference-fairness-id"] == "acme"
    assert asked["authorization"] == "Bearer key"
    assert (asked["x-extra"], asked["traceparent"]) == ("1", trace)
    assert 50_000 < int(asked["x-slo-ttft-ms"]) <= 60_000
    assert engine.asked[0].body["priority"] == 9
    assert "x-gateway-destination-endpoint-subset" not in asked


async def test_a_users_own_token_is_passed_where_the_gateway_has_none_and_an_endpoint_may_be_named() -> None:
    flight = Flight(call(headers={"authorization": "Bearer user"}))
    flight.endpoint = "10.0.0.1:8000"
    async with running(Engine()) as engine, sender(engine, send_fairness_id=False, objective="") as made:
        await made.send(flight, Seen())
    asked = engine.asked[0].headers
    assert asked["authorization"] == "Bearer user"
    assert asked["x-gateway-destination-endpoint-subset"] == "10.0.0.1:8000"
    assert not [name for name in asked if name.endswith(("fairness-id", "objective"))]


@pytest.mark.parametrize(
    "fault",
    [Fault("status", 429), Fault("status", 500), Fault("status", 503), Fault("reset"), Fault("reset", tokens=2)],
    ids=["429", "500", "503", "reset", "cut"],
)
async def test_what_may_pass_is_tried_again(fault: Fault) -> None:
    line, result, engine, seen = await sent(call(), script(fault, fault))
    assert result.ok
    assert len(engine.asked) == 3
    assert seen.statuses == [None if fault.kind == "reset" else fault.status] * 2 + [200]
    assert line["response"]["body"]["choices"][0]["message"]["content"] == " w0 w1 w2 w3 w4"


async def test_a_stream_that_broke_goes_on_where_it_was() -> None:
    line, _, engine, _ = await sent(call(), script(Fault("reset", tokens=2)))
    assert engine.asked[1].body["messages"][-1] == {"role": "assistant", "content": " w0 w1"}
    assert line["response"]["body"]["usage"] == {"prompt_tokens": 1, "completion_tokens": 5, "total_tokens": 6}


@pytest.mark.parametrize("status", [400, 401, 404, 422])
async def test_a_refusal_of_the_line_itself_is_final_and_its_answer_is_kept(status: int) -> None:
    line, result, engine, _ = await sent(call(), lambda asked: Fault("status", status, {"x-request-id": "e-1"}))
    assert len(engine.asked) == 1
    assert not result.ok
    assert (line["error"], line["response"]["status_code"], line["response"]["request_id"]) == (None, status, "e-1")
    assert line["response"]["body"]["error"]["message"] == "no"


async def test_when_retries_are_used_up_the_last_answer_is_kept() -> None:
    line, result, engine, _ = await sent(call(), lambda asked: Fault("status", 429), max_retries=2)
    assert len(engine.asked) == 3
    assert (result.ok, line["response"]["status_code"]) == (False, 429)


async def test_without_any_answer_the_line_says_so() -> None:
    line, result, engine, _ = await sent(call(), lambda asked: Fault("reset"), max_retries=1)
    assert len(engine.asked) == 2
    assert (result.ok, line["response"], line["error"]["code"]) == (False, None, "SERVER_ERROR")


async def test_retry_after_is_told_to_the_watch_and_waited() -> None:
    _, result, _, seen = await sent(call(), script(Fault("status", 503, {"retry-after": "0.05"})))
    assert result.ok
    assert seen.attempts[0] == (503, "", 0.05)


async def test_a_line_that_timed_out_in_the_routers_queue_is_expired_or_tried_again() -> None:
    fault = Fault("status", 503, {"x-llm-d-request-dropped-reason": "rejected-ttl-expired"})
    line, _, engine, seen = await sent(call(), script(fault))
    assert (len(engine.asked), line["error"]["code"], seen.attempts[0][1]) == (
        1,
        "batch_expired",
        "rejected-ttl-expired",
    )
    _, result, _, _ = await sent(call(), script(fault), retry_ttl_expired=True)
    assert result.ok


async def test_a_line_that_hangs_at_its_deadline_is_expired() -> None:
    line, result, _, _ = await sent(call(left_s=0.2), lambda asked: Fault("hang"))
    assert not result.ok
    assert line["error"] == {"code": EXPIRED[0], "message": EXPIRED[1]}


async def test_a_retry_after_beyond_the_deadline_is_tried_before_it_and_the_last_answer_kept() -> None:
    one = call(left_s=0.2)
    line, _, engine, _ = await sent(one, lambda asked: Fault("status", 429, {"retry-after": "3600"}), max_retries=50)
    assert line["response"]["status_code"] == 429 if line["response"] else line["error"]["code"] == EXPIRED[0]
    assert 2 <= len(engine.asked) < 50


async def test_a_line_past_its_deadline_is_not_sent() -> None:
    line, _, engine, _ = await sent(call(left_s=-1.0))
    assert not engine.asked
    assert line["error"]["code"] == "batch_expired"


async def test_an_engine_that_hangs_is_left_after_the_request_timeout() -> None:
    _, result, engine, seen = await sent(call(), script(Fault("hang")), request_timeout_s=0.1)
    assert result.ok
    assert (len(engine.asked), seen.statuses) == (2, [None, 200])


async def test_a_model_without_gateway_fails_its_line_only() -> None:
    made = Sender(Gateways(None, {"other": Gateway(url="http://x")}))
    result = await made.send(Flight(call()), Seen())
    assert json.loads(result.output)["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("url", ["/v1/chat/completions", "/v1/completions"])
async def test_a_cut_line_goes_on_with_the_tokens_it_had(url: str) -> None:
    body = CHAT_BODY if "chat" in url else b'{"model": "m", "prompt": "hi", "max_tokens": 50}'
    flight, seen = Flight(call(url=url, body=body)), Seen()
    async with running(Engine(tokens=20, token_s=0.01)) as engine, sender(engine) as made, asyncio.timeout(PATIENCE_S):
        first = asyncio.create_task(made.send(flight, seen))
        await seen.first.wait()
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        had = flight.tokens
        result = await made.send(flight, seen)
    line = json.loads(result.output)["response"]["body"]
    choice = line["choices"][0]
    text = choice["message"]["content"] if "chat" in url else choice["text"]
    assert had >= 1
    assert text == "".join(f" w{i}" for i in range(20))
    assert line["usage"] == {"prompt_tokens": 1, "completion_tokens": 20, "total_tokens": 21}
    assert engine.asked[1].body.get("max_tokens", 50 - had) == 50 - had
    assert seen.count == 20, "no token is counted twice"


async def test_an_answer_of_several_lines_becomes_one() -> None:
    result = answered("b", 0, "c", 200, b'{\n "a": 1\r\n}')
    assert result.output.count(b"\n") == 1
    assert json.loads(result.output)["response"]["body"] == {"a": 1}
    assert json.loads(answered("b", 0, "c", 502, b"<html>\n").output)["response"]["body"] == "<html>\n"


@pytest.mark.parametrize(
    ("body", "expected"),
    [({"usage": {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 3},
                 "completion_tokens_details": {"reasoning_tokens": 2}}}, Usage(9, 3, 4, 2)),
     ({"usage": {"input_tokens": 9, "output_tokens": 4, "input_tokens_details": {"cached_tokens": 3},
                 "output_tokens_details": {"reasoning_tokens": 2}}}, Usage(9, 3, 4, 2)),
     ({"usage": {"prompt_tokens": 7, "total_tokens": 7}}, Usage(7)), ({"usage": None}, Usage()), ({}, Usage()),
     ({"usage": {"prompt_tokens": "many"}}, Usage()), ([], Usage())],
    ids=["chat", "responses", "embeddings", "null", "none", "strange", "no object"],
)  # fmt: skip
def test_usage_is_read_in_all_shapes(body: object, expected: Usage) -> None:
    assert usage_of(json.dumps(body).encode()) == expected


@pytest.mark.parametrize(
    ("status", "attempt", "retry_after", "low", "high"),
    [(500, 0, None, 0.5, 1.5), (500, 2, None, 2.0, 6.0), (500, 30, None, 30.0, 90.0), (None, 1, None, 1.0, 3.0),
     (429, 0, None, 1.5, 4.5), (503, 30, None, 15.0, 45.0), (503, 0, 10.0, 10.0, 12.5), (429, 9, 0.0, 0.0, 0.0)],
)  # fmt: skip
def test_waits_double_with_jitter_and_a_named_time_is_kept(
    status: int | None, attempt: int, retry_after: float | None, low: float, high: float
) -> None:
    rng, gateway = Random(1), Gateway(url="http://x")
    waits = [wait_s(gateway, status, attempt, retry_after, rng) for _ in range(200)]
    assert low <= min(waits) <= max(waits) <= high
    assert high == low or max(waits) - min(waits) > 0.5 * (high - low)


@pytest.mark.parametrize(
    ("value", "expected"), [("3", 3.0), ("0.5", 0.5), ("-1", 0.0), ("soon", None), ("", None),
                            ("Thu, 01 Jan 1970 00:01:40 GMT", 40.0)],
)  # fmt: skip
def test_retry_after_is_seconds_or_a_date(value: str, expected: float | None) -> None:
    assert retry_after_s(value, 60.0) == expected


@pytest.mark.parametrize(
    ("fields", "says"),
    [({"url": "engine:8000"}, "http://"), ({"url": "http://x", "request_timeout_s": 0}, "requestTimeoutS"),
     ({"url": "http://x", "max_backoff_s": 0.5}, "initialBackoffS"),
     ({"url": "http://x", "max_retries": -1}, "0..100")],
)  # fmt: skip
def test_a_gateway_that_cannot_be_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Gateway(**fields).check()


def test_the_same_line_has_the_same_request_id_and_another_has_another() -> None:
    assert request_id("b", "c") == request_id("b", "c")
    assert len({request_id("b", "c"), request_id("b", "d"), request_id("a", "c"), request_id("bc", "")}) == 4
