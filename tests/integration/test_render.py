"""The client of a vLLM server's render endpoints, against a double on loopback."""

from __future__ import annotations

import asyncio
import json
import struct
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer, unused_port

from llmd_sched.extproc import render
from llmd_sched.extproc.render import Renderer, prompts_in

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PATIENCE_S = 5.0

Handler = Callable[[web.Request], Awaitable[web.Response]]


def words(*ids: int) -> bytes:
    return struct.pack(f"<{len(ids)}I", *ids)


class Double:
    """Renders each character of a text as a token, as vLLM replies: with everything else it would generate from."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, object]] = []
        self.answer: Handler | None = None
        self.port = 0

    async def handle(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.bodies.append(body)
        if self.answer is not None:
            return await self.answer(request)
        if request.path == "/v1/completions/render":
            prompts = [body["prompt"]] if isinstance(body["prompt"], str) else body["prompt"]
            return web.json_response([self._request(body, prompt) for prompt in prompts])
        assert request.path == "/v1/chat/completions/render"
        return web.json_response(self._request(body, "".join(m["content"] for m in body["messages"])))

    def _request(self, body: dict[str, object], text: str) -> dict[str, object]:
        ids = [ord(c) for c in text]
        return {"request_id": "r", "token_ids": ids, "features": None, "sampling_params": {}, "model": body["model"]}

    def asked(self) -> list[dict[str, object]]:
        return [body for body in self.bodies if body.get("prompt") != "warm up"]


@asynccontextmanager
async def rendering(double: Double, **options: float) -> AsyncIterator[Renderer]:
    app = web.Application(client_max_size=8 << 20)
    app.router.add_post("/{path:.*}", double.handle)
    server = TestServer(app)
    await server.start_server()
    double.port = server.port or 0
    renderer = Renderer(str(server.make_url("/")), "served", **{"timeout_s": PATIENCE_S, **options})
    await renderer.start()
    try:
        yield renderer
    finally:
        await renderer.stop()
        await server.close()


def body_of(**fields: object) -> bytes:
    return json.dumps({"model": "asked", **fields}).encode()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    ("path", "fields", "prompts"),
    [
        (COMPLETIONS, {"prompt": "ab"}, (words(97, 98),)),
        (COMPLETIONS, {"prompt": ["a", "bc"]}, (words(97), words(98, 99))),
        ("/tenant/v1/completions?x=1", {"prompt": "a"}, (words(97),)),
        (CHAT, {"messages": [{"role": "user", "content": "hi"}], "tools": []}, (words(104, 105),)),
    ],
)
async def test_prompts_are_rendered_under_the_name_the_server_knows(
    path: str, fields: dict[str, object], prompts: tuple[bytes, ...]
) -> None:
    double = Double()
    async with rendering(double) as renderer:
        assert await renderer.tokens(path, body_of(**fields)) == prompts
        assert double.asked() == [{"model": "served", **fields}]
        assert (renderer.calls, renderer.failures) == (1, 0)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/messages", "/v1/completions/render", "", "/v1/models"])
async def test_other_paths_are_not_asked_about(path: str) -> None:
    double = Double()
    async with rendering(double) as renderer:
        assert await renderer.tokens(path, body_of(input="a")) is None
        assert (double.asked(), renderer.calls, renderer.failures) == ([], 0, 0)


@pytest.mark.parametrize(
    "reply",
    [
        b'{"error": {"message": "no such model"}}',
        b"",
        b"{",
        b"[]",
        b"[{}]",
        b'[{"token_ids":[]}]',
        b'[{"token_ids":null}]',
        b'[{"token_ids":[-1]}]',
        b'[{"token_ids":[1,"2"]}]',
        b'[{"token_ids":[[1],[2]]}]',
        b'[{"token_ids":[1],"features":3}]',
        b'{"token_ids":"\xff"}',
        b"<html>",
        b'{"token_ids":' * 100_000,
    ],
)
async def test_an_answer_that_is_none_is_counted_and_the_request_goes_on(reply: bytes) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=reply, content_type="application/json")

    double = Double()
    async with rendering(double) as renderer:
        await until(lambda: renderer.ready)
        double.answer = answer
        assert await renderer.tokens(COMPLETIONS, body_of(prompt="a")) is None
        assert (renderer.calls, renderer.failures) == (1, 1)
        double.answer = None
        assert await renderer.tokens(COMPLETIONS, body_of(prompt="a")) == (words(97),)


@pytest.mark.parametrize("status", [400, 404, 500, 503, 302])
async def test_an_error_of_the_server_is_a_failure(status: int) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.json_response([{"token_ids": [1]}], status=status)

    double = Double()
    double.answer = answer
    async with rendering(double) as renderer:
        assert await renderer.tokens(COMPLETIONS, body_of(prompt="a")) is None
        assert renderer.failures == 1


async def test_a_body_that_cannot_be_renamed_is_a_failure() -> None:
    async with rendering(Double()) as renderer:
        assert await renderer.tokens(COMPLETIONS, b"{") is None
        assert renderer.failures == 1


async def test_no_server_is_a_failure() -> None:
    renderer = Renderer(f"http://127.0.0.1:{unused_port()}", "served")
    await renderer.start()
    try:
        assert await renderer.tokens(COMPLETIONS, body_of(prompt="a")) is None
        assert (renderer.calls, renderer.failures, renderer.ready) == (1, 1, False)
    finally:
        await renderer.stop()


async def test_a_slow_server_is_waited_for_as_long_as_the_kind_of_prompt_may_take() -> None:
    release = asyncio.Event()

    async def answer(request: web.Request) -> web.Response:
        await release.wait()
        return web.json_response([{"token_ids": [1]}])

    double = Double()
    async with rendering(double, timeout_s=0.05, mm_timeout_s=PATIENCE_S) as renderer:
        double.answer = answer
        with_media = asyncio.create_task(renderer.tokens(COMPLETIONS, body_of(prompt="a"), media=True))
        assert await renderer.tokens(COMPLETIONS, body_of(prompt="a")) is None
        assert not with_media.done()
        release.set()
        assert await with_media == (words(1),)
        assert (renderer.calls, renderer.failures) == (2, 1)


async def test_a_reply_beyond_the_limit_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "MAX_REPLY_BYTES", 100)
    double = Double()
    async with rendering(double) as renderer:
        assert await renderer.tokens(COMPLETIONS, body_of(prompt="a" * 100)) is None
        assert renderer.failures == 1


async def test_calls_beyond_the_limit_fail_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "MAX_CALLS", 2)
    release = asyncio.Event()

    async def answer(request: web.Request) -> web.Response:
        await release.wait()
        return web.json_response([{"token_ids": [1]}])

    double = Double()
    async with rendering(double) as renderer:
        await until(lambda: renderer.ready)
        double.answer = answer
        waiting = [asyncio.create_task(renderer.tokens(COMPLETIONS, body_of(prompt="a"))) for _ in range(2)]
        await until(lambda: len(double.asked()) == 2)
        assert await renderer.tokens(COMPLETIONS, body_of(prompt="a")) is None
        release.set()
        assert await asyncio.gather(*waiting) == [(words(1),)] * 2


async def test_the_server_is_tried_until_it_answers_and_then_left_alone() -> None:
    async def not_yet(request: web.Request) -> web.Response:
        return web.Response(status=503)

    double = Double()
    double.answer = not_yet
    async with rendering(double, warm_up_every_s=0.01) as renderer:
        await until(lambda: len(double.bodies) >= 3)
        assert not renderer.ready
        double.answer = None
        await until(lambda: renderer.ready)
        tries = len(double.bodies)
        assert double.bodies[0] == {"model": "served", "prompt": "warm up"}
        await asyncio.sleep(0.05)
        assert len(double.bodies) == tries
        assert (renderer.calls, renderer.failures) == (0, 0)


async def test_a_server_that_never_answers_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def never(request: web.Request) -> web.Response:
        return web.Response(status=503)

    monkeypatch.setattr(render, "WARM_UP_TRIES", 3)
    double = Double()
    double.answer = never
    async with rendering(double, warm_up_every_s=0.001):
        await until(lambda: "has not rendered a prompt in 3 tries" in caplog.text)
        assert len(double.bodies) == 3


async def test_a_renderer_that_was_not_started_renders_nothing() -> None:
    renderer = Renderer("http://127.0.0.1:1", "served")
    assert await renderer.tokens(COMPLETIONS, body_of(prompt="a")) is None
    await renderer.stop()


def rendered(hashes: object, placeholders: object) -> bytes:
    features = {"mm_hashes": {"image": hashes}, "mm_placeholders": {"image": placeholders}, "kwargs_data": None}
    return json.dumps({"token_ids": [1, 9, 9, 2, 9, 3], "features": features}).encode()


def mark(hashed: str) -> int:
    return zlib.crc32(hashed.encode())


@pytest.mark.parametrize(
    ("hashes", "placeholders", "ids"),
    [
        (["a", "b"], [{"offset": 1, "length": 2}, {"offset": 4, "length": 1}], [1, "a", "a", 2, "b", 3]),
        (["a"], [{"offset": 1, "length": 2}, {"offset": 4, "length": 1}], [1, "a", "a", 2, 9, 3]),
        ([None], [{"offset": 4, "length": 1}], [1, 9, 9, 2, "", 3]),
        (["a"], [{"offset": 5, "length": 2}], [1, 9, 9, 2, 9, 3]),
        (["a"], [{"offset": -1, "length": 2}], [1, 9, 9, 2, 9, 3]),
        (["a"], [{"offset": 3, "length": -2}], [1, 9, 9, 2, 9, 3]),
        (["a"], [{"offset": 0, "length": 6}], ["a"] * 6),
        ([], [], [1, 9, 9, 2, 9, 3]),
    ],
)
def test_prompts_with_different_images_differ(hashes: object, placeholders: object, ids: list[int | str]) -> None:
    expected = [mark(one) if isinstance(one, str) else one for one in ids]
    assert prompts_in(rendered(hashes, placeholders)) == (words(*expected),)


@pytest.mark.parametrize("features", [{}, {"mm_hashes": None, "mm_placeholders": None}, None])
def test_without_media_tokens_are_as_they_came(features: object) -> None:
    assert prompts_in(json.dumps({"token_ids": [1, 2], "features": features}).encode()) == (words(1, 2),)
