"""Real tokens of prompts, from a vLLM server's render endpoints.

``POST /v1/completions/render`` answers a list of requests, one for each prompt, ``POST /v1/chat/completions/render``
one; each has its ``token_ids`` and, where there are media, ``features``: whose hash stands at which tokens (vLLM,
entrypoints/serve/render/api_router.py and entrypoints/serve/disagg/protocol.py). ``vllm launch render`` has them, and
``vllm serve`` where it is told to.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import zlib

import aiohttp
import msgspec

from llmd_sched.errors import RequestError
from llmd_sched.parsers.rewrite import with_model
from llmd_sched.parsers.tokens import lists_in

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 64
MAX_CALLS = 512
"""At once, most of them waiting for a connection; what would go beyond fails at once."""
MAX_REPLY_BYTES = 64 << 20
"""With media a reply also has what the model's vision tower will be given."""
WARM_UP_TRIES = 24
WARM_UP_EVERY_S = 5.0

_PATHS = {
    "chat/completions": "/v1/chat/completions/render",
    "completions": "/v1/completions/render",
}
"""By the end of a request's path, longest first."""

_BYTES_PER_TOKEN = 4


class _Range(msgspec.Struct):
    offset: int
    length: int


class _Features(msgspec.Struct):
    mm_hashes: dict[str, list[str | None]] | None = None
    mm_placeholders: dict[str, list[_Range]] | None = None


class _Rendered(msgspec.Struct):
    token_ids: msgspec.Raw
    features: _Features | None = None


_RENDERED: msgspec.json.Decoder[list[_Rendered] | _Rendered] = msgspec.json.Decoder(list[_Rendered] | _Rendered)


class Renderer:
    """A client of one server; ``model`` is the name it has there. Timeouts in seconds, the second for media."""

    def __init__(
        self,
        url: str,
        model: str,
        timeout_s: float = 5.0,
        mm_timeout_s: float = 30.0,
        *,
        warm_up_every_s: float = WARM_UP_EVERY_S,
    ) -> None:
        self.calls = 0
        self.failures = 0
        self.ready = False
        """It has answered once."""
        self._url, self._model = url.rstrip("/"), model
        self._timeout_s, self._mm_timeout_s = timeout_s, mm_timeout_s
        self._warm_up_every_s = warm_up_every_s
        self._open = 0
        self._session: aiohttp.ClientSession | None = None
        self._warm_up_task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Returns at once. A server that has just started is slow on its first prompt, so it gets one from us."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=MAX_CONNECTIONS), cookie_jar=aiohttp.DummyCookieJar()
        )
        self._warm_up_task = asyncio.create_task(self._warm_up())

    async def stop(self) -> None:
        if self._warm_up_task is not None:
            self._warm_up_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._warm_up_task
        if self._session is not None:
            await self._session.close()

    async def tokens(self, path: str, body: bytes, *, media: bool = False) -> tuple[bytes, ...] | None:
        """The prompts of a request as little-endian uint32, four bytes a token; None goes on with the estimate.

        None without a call for a path that cannot be rendered; after one, counted as a failure, when it took too long
        or the answer is none. Tokens that stand for an image are replaced by ones that differ from image to image.
        """
        where = next((to for end, to in _PATHS.items() if path.partition("?")[0].endswith(end)), None)
        if where is None:
            return None
        self.calls += 1
        prompts = await self._try(where, body, self._mm_timeout_s if media else self._timeout_s)
        self.failures += prompts is None
        return prompts

    async def _try(self, where: str, body: bytes, timeout_s: float) -> tuple[bytes, ...] | None:
        if self._session is None or self._open >= MAX_CALLS:
            return None
        self._open += 1
        try:
            async with asyncio.timeout(timeout_s):
                prompts = prompts_in(await self._post(self._session, where, with_model(body, self._model)))
        except (aiohttp.ClientError, OSError, ValueError, msgspec.MsgspecError, RecursionError, RequestError) as error:
            log.debug("%s%s: %s", self._url, where, error or type(error).__name__)
            return None
        finally:
            self._open -= 1
        self.ready = True
        return prompts

    async def _post(self, session: aiohttp.ClientSession, where: str, body: bytes) -> bytes:
        """ValueError for an answer that is none."""
        headers = {"content-type": "application/json"}
        async with session.post(self._url + where, data=body, headers=headers, allow_redirects=False) as reply:
            if reply.status != 200:
                raise ValueError(f"status {reply.status}")
            text = bytearray()
            async for chunk in reply.content.iter_any():
                text += chunk
                if len(text) > MAX_REPLY_BYTES:
                    raise ValueError(f"a reply of more than {MAX_REPLY_BYTES} bytes")
            return bytes(text)

    async def _warm_up(self) -> None:
        body = msgspec.json.encode({"model": self._model, "prompt": "warm up"})
        for _ in range(WARM_UP_TRIES):
            if self.ready or await self._try(_PATHS["completions"], body, self._timeout_s) is not None:
                return
            await asyncio.sleep(self._warm_up_every_s)
        log.warning("%s has not rendered a prompt in %d tries; tokens are estimated", self._url, WARM_UP_TRIES)


def prompts_in(reply: bytes) -> tuple[bytes, ...]:
    """The prompts of a rendered request. ValueError or msgspec's DecodeError when it is none."""
    found = _RENDERED.decode(reply)
    rendered = found if isinstance(found, list) else [found]
    if not rendered:
        raise ValueError("no prompt in the reply")
    return tuple(_prompt(one) for one in rendered)


def _prompt(rendered: _Rendered) -> bytes:
    lists = lists_in(bytes(rendered.token_ids))
    if len(lists) != 1:
        raise ValueError("token_ids is not a list of token ids")
    return _marked(lists[0], rendered.features) if rendered.features else lists[0]


def _marked(prompt: bytes, features: _Features) -> bytes:
    """All images have the same tokens; so that prompts with different ones differ, these become their hashes."""
    marked = bytearray(prompt)
    for kind, ranges in (features.mm_placeholders or {}).items():
        for one, hashed in zip(ranges, (features.mm_hashes or {}).get(kind, []), strict=False):
            begin, end = one.offset * _BYTES_PER_TOKEN, (one.offset + one.length) * _BYTES_PER_TOKEN
            if 0 <= begin <= end <= len(marked):
                marked[begin:end] = zlib.crc32((hashed or "").encode()).to_bytes(4, "little") * one.length
    return bytes(marked)
