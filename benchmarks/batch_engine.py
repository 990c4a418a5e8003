"""A stand-in for an inference gateway: answers in milliseconds, notes what it was asked, and fails on demand."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from random import Random
from typing import Any, NamedTuple

from aiohttp import web


class Fault(NamedTuple):
    """``kind``: status (an HTTP error with ``headers``), reset (the connection breaks after ``tokens``), hang."""

    kind: str
    status: int = 500
    headers: Mapping[str, str] = {}
    tokens: int = 0
    body: str = '{"error": {"message": "no", "code": 500}}'


class Asked(NamedTuple):
    path: str
    headers: Mapping[str, str]
    body: dict[str, Any]


Trouble = Callable[[Asked], Fault | None]


def text_of(body: Mapping[str, Any]) -> str:
    """The prompt as one string."""
    if "messages" in body:
        return "".join(message["content"] for message in body["messages"])
    return str(body.get("prompt") or body.get("input") or "")


class Engine:
    """Each reply is the words ``w0 w1 ...`` up to ``tokens`` (or the body's limit), going on where a continued prompt
    ends; ``token_s`` apart. ``asked`` keeps the last 10,000 requests, ``calls`` counts them by request id."""

    def __init__(self, tokens: int = 5, token_s: float = 0.0, trouble: Trouble | None = None) -> None:
        self.tokens, self.token_s, self.trouble = tokens, token_s, trouble
        self.asked: list[Asked] = []
        self.calls: Counter[str] = Counter()
        self.in_flight = self.most_in_flight = 0
        self.url = ""
        self.hung = asyncio.Event()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        asked = Asked(
            request.path,
            {name.lower(): value for name, value in request.headers.items()},
            json.loads(await request.read()),
        )
        self.asked = [*self.asked[-9_999:], asked] if len(self.asked) >= 10_000 else self.asked
        self.asked.append(asked)
        self.calls[asked.headers.get("x-request-id", "")] += 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self._answer(request, asked, self.trouble(asked) if self.trouble else None)
        finally:
            self.in_flight -= 1

    async def _answer(self, request: web.Request, asked: Asked, fault: Fault | None) -> web.StreamResponse:
        if fault is not None and fault.kind == "status":
            headers = {"content-type": "application/json", **fault.headers}
            return web.Response(status=fault.status, text=fault.body, headers=headers)
        if fault is not None and fault.kind == "hang":
            self.hung.set()
            await asyncio.sleep(3600)
        if fault is not None and fault.kind == "reset" and not fault.tokens:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if asked.body.get("stream"):
            return await self._stream(request, asked, fault.tokens if fault else None)
        return web.json_response(await self._whole(asked))

    def _words(self, body: Mapping[str, Any]) -> tuple[int, int, list[str]]:
        """Tokens of the prompt, those of them that an earlier call made, and the words to come."""
        prompt = text_of(body)
        said = prompt.count(" w") if "w0" in prompt else 0
        most = body.get("max_tokens")
        total = self.tokens if most is None else min(self.tokens, most + said)
        return 1 + said, said, [f" w{i}" for i in range(said, total)]

    async def _whole(self, asked: Asked) -> dict[str, Any]:
        prompt, _, words = self._words(asked.body)
        await asyncio.sleep(self.token_s * len(words))
        text, chat = "".join(words), "messages" in asked.body
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop", "logprobs": None}
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        usage = {"prompt_tokens": prompt, "completion_tokens": len(words), "total_tokens": prompt + len(words)}
        kind = "chat.completion" if chat else "text_completion"
        return {"id": "r", "object": kind, "created": 1, "model": asked.body.get("model"), "choices": [choice],
                "usage": usage}  # fmt: skip

    async def _stream(self, request: web.Request, asked: Asked, reset_after: int | None) -> web.StreamResponse:
        prompt, _, words = self._words(asked.body)
        chat = "messages" in asked.body
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        head = {"id": "r", "created": 1, "model": asked.body.get("model"),
                "object": "chat.completion.chunk" if chat else "text_completion"}  # fmt: skip
        for i, word in enumerate(words):
            if reset_after == i:
                assert request.transport is not None
                request.transport.abort()
                return response
            choice: dict[str, Any] = {"index": 0, "logprobs": None}
            choice |= {"delta": {"content": word}} if chat else {"text": word}
            choice["finish_reason"] = "stop" if i == len(words) - 1 else None
            usage = {"prompt_tokens": prompt, "completion_tokens": i + 1, "total_tokens": prompt + i + 1}
            await response.write(f"data: {json.dumps({**head, 'choices': [choice], 'usage': usage})}\n\n".encode())
            if self.token_s:
                await asyncio.sleep(self.token_s)
        await response.write(b"data: [DONE]\n\n")
        return response


@asynccontextmanager
async def running(engine: Engine) -> AsyncIterator[Engine]:
    """Serves it on loopback; what it still answers is cut at the end."""
    app = web.Application(client_max_size=64 << 20)
    app.router.add_post("/{path:.*}", engine.answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.05, handler_cancellation=True)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        engine.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield engine
    finally:
        await runner.cleanup()


def sometimes(share: float, rng: Random, kinds: tuple[str, ...] = ("status", "reset", "cut", "hang")) -> Trouble:
    """A fault of a random kind with this probability; ``cut`` breaks the connection within the stream."""

    def trouble(asked: Asked) -> Fault | None:
        if rng.random() >= share:
            return None
        kind = rng.choice(kinds)
        return Fault("reset", tokens=rng.randint(1, 3)) if kind == "cut" else Fault(kind, rng.choice((429, 500, 503)))

    return trouble
