"""One line to the engine side: its headers, its attempts, its answer as a line of a result file.

A call ends with a ``Result`` in any case but one: it is cancelled. What it had produced then is in its ``Flight``, and
the next call with that flight goes on from there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from random import Random
from typing import Any, Protocol

import aiohttp
import msgspec

from batchgw.client import reply, result
from batchgw.client.gateway import Gateway, Gateways, retryable, wait_s
from batchgw.records import Result
from llmd_sched import headers

MAX_REPLY_BYTES = 64 << 20
CONNECT_TIMEOUT_S = 10.0
TTL_EXPIRED = "rejected-ttl-expired"
"""Dropped reason of a request whose time in the router's queue was up."""

MODEL_NOT_FOUND = "model_not_found"


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """One line as stored. ``body`` is the JSON of its ``body`` field, ``headers`` those passed through from the user,
    ``trace`` a W3C traceparent; ``prefix`` and ``prompt_bytes`` are the plan's."""

    batch_id: str
    line: int
    custom_id: str
    url: str
    model: str
    body: bytes
    tenant: str
    deadline_s: float
    headers: Mapping[str, str] = {}
    trace: str | None = None
    prefix: int = 0
    prompt_bytes: int = 0


class Watch(Protocol):
    """Who is told how a call goes; must not block nor raise."""

    def tokens(self, flight: Flight, count: int) -> None:
        """``count`` tokens have come (streamed calls only)."""

    def answered(self, flight: Flight, status: int | None, reason: str, retry_after_s: float | None) -> None:
        """One attempt is over; ``status`` None: without an HTTP answer. ``reason`` is the router's for a refusal."""


class Flight:
    """A call under way, or cut short. ``key`` tells it from all others, also of an earlier ``epoch`` of its lease."""

    __slots__ = ("assembly", "attempt", "call", "endpoint", "key", "progress", "sent_s")

    def __init__(self, call: Call, epoch: int = 0) -> None:
        self.call = call
        self.key = f"{call.batch_id}/{call.line}/{epoch}"
        self.progress: reply.Progress | None = None
        self.assembly: reply.Assembly | None = None
        self.attempt = 0
        self.endpoint = ""
        """Where the router is to send it (host:port); empty leaves it the choice."""
        self.sent_s = 0.0
        """When it last went out (unix)."""

    @property
    def tokens(self) -> int:
        """Generated so far."""
        if self.assembly is not None:
            return self.assembly.tokens
        return self.progress.tokens if self.progress else 0

    def land(self, body: Mapping[str, Any]) -> None:
        """The attempt is over without a reply: keep what the next one may go on from."""
        assembly, self.assembly = self.assembly, None
        if assembly is not None and reply.resumable(self.call.url, body):
            self.progress = assembly.progress() or self.progress


class _Answer(msgspec.Struct, frozen=True):
    status: int
    body: bytes
    served_as: str = ""
    reason: str = ""
    retry_after_s: float | None = None


class _Lost(Exception):
    """No HTTP answer: ``code`` is the category of the reference."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


_TROUBLE = (aiohttp.ClientError, TimeoutError, OSError, reply.BrokenStreamError)


class Sender:
    """Sends lines; ``open`` before, ``close`` after. Concurrency is the caller's business."""

    def __init__(self, gateways: Gateways, rng: Random | None = None, clock: Callable[[], float] = time.time) -> None:
        self._gateways = gateways
        self._rng = rng or Random()
        self._clock = clock
        self._session: aiohttp.ClientSession | None = None
        self._tls: dict[Gateway, Any] = {}

    async def open(self) -> None:
        connector = aiohttp.TCPConnector(limit=0)  # permits bound it
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, cookie_jar=aiohttp.DummyCookieJar())

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def send(self, flight: Flight, watch: Watch) -> Result:
        """Returns by the call's deadline. Raises nothing but CancelledError."""
        call = flight.call
        gateway = self._gateways.of(call.model)
        if gateway is None:
            error = (MODEL_NOT_FOUND, f"The model '{call.model}' is served by no gateway.")
            return result.unanswered(call.batch_id, call.line, call.custom_id, error)
        try:
            async with asyncio.timeout(call.deadline_s - self._clock()):
                return await self._attempts(gateway, flight, watch)
        except TimeoutError:
            return result.unanswered(call.batch_id, call.line, call.custom_id, result.EXPIRED)

    async def _attempts(self, gateway: Gateway, flight: Flight, watch: Watch) -> Result:
        """Until an answer is final, retries are used up, or the next would come after the deadline."""
        call = flight.call
        while True:
            answer, lost = None, None
            try:
                answer = await self._attempt(gateway, flight, watch)
            except _Lost as e:
                lost = e
            status, reason = (answer.status, answer.reason) if answer else (None, "")
            retry_after_s = answer.retry_after_s if answer else None
            watch.answered(flight, status, reason, retry_after_s)
            if reason == TTL_EXPIRED and not gateway.retry_ttl_expired:
                return result.unanswered(call.batch_id, call.line, call.custom_id, result.EXPIRED)
            left_s = call.deadline_s - self._clock()
            if retry_after_s is not None:
                retry_after_s = min(retry_after_s, left_s / 2)
            pause_s = wait_s(gateway, status, flight.attempt, retry_after_s, self._rng)
            again = answer is None or retryable(answer.status)
            if not again or flight.attempt >= gateway.max_retries or pause_s >= left_s:
                return _result(call, answer, lost)
            flight.attempt += 1
            await asyncio.sleep(pause_s)

    async def _attempt(self, gateway: Gateway, flight: Flight, watch: Watch) -> _Answer:
        """Raises _Lost. However it ends, what was generated stays in the flight."""
        body = body_of(flight.call)
        streamed = gateway.stream and reply.streamable(flight.call.url, body)
        if streamed and flight.progress and flight.progress.text and reply.exhausted(body, flight.progress):
            whole = reply.finished(flight.call.url, flight.call.model, flight.progress)
            return _Answer(200, msgspec.json.encode(whole))
        flight.sent_s = self._clock()
        try:
            async with self._post(gateway, flight, body, streamed) as response:
                if streamed and response.status == 200 and response.content_type == "text/event-stream":
                    return await self._streamed(flight, response, watch)
                return await _read(response)
        except reply.EngineError as e:
            return _Answer(e.status, e.body)
        except _TROUBLE as e:
            code = "PARSE_ERROR" if isinstance(e, reply.BrokenStreamError) else "SERVER_ERROR"
            raise _Lost(code, f"{type(e).__name__}: {e}".removesuffix(": ")) from e
        finally:
            flight.land(body)

    @asynccontextmanager
    async def _post(
        self, gateway: Gateway, flight: Flight, body: Mapping[str, Any], streamed: bool
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        assert self._session is not None, "open() comes first"
        call, wait = flight.call, gateway.request_timeout_s
        sent = reply.streaming(call.url, body, flight.progress, gateway.running_usage) if streamed else body
        if gateway.priority is not None:
            sent = {**sent, "priority": gateway.priority}
        data = call.body if sent is body else msgspec.json.encode(sent)
        timeout = aiohttp.ClientTimeout(None if streamed else wait, sock_read=wait, sock_connect=CONNECT_TIMEOUT_S)
        url = gateway.url.rstrip("/") + call.url
        async with self._session.post(
            url, data=data, headers=self._headers(gateway, flight), timeout=timeout, ssl=self._ssl(gateway),
            allow_redirects=False,
        ) as response:  # fmt: skip
            yield response

    async def _streamed(self, flight: Flight, response: aiohttp.ClientResponse, watch: Watch) -> _Answer:
        before = flight.progress if flight.progress and flight.progress.text else None
        assembly = flight.assembly = reply.Assembly(flight.call.url, before)
        received = 0
        async for data in response.content.iter_any():
            received += len(data)
            if received > MAX_REPLY_BYTES:
                raise reply.BrokenStreamError(f"a reply of more than {MAX_REPLY_BYTES} bytes")
            if count := assembly.feed(data):
                watch.tokens(flight, count)
            if assembly.ended:
                break
        return _Answer(200, msgspec.json.encode(assembly.reply()), response.headers.get(headers.REQUEST_ID, ""))

    def _headers(self, gateway: Gateway, flight: Flight) -> dict[str, str]:
        """Ours win over those passed through. Each is sent under all its names: a router may know but one."""
        call = flight.call
        ours = {headers.REQUEST_ID: result.request_id(call.batch_id, call.custom_id)}
        ours[headers.CONTENT_TYPE] = "application/json"
        left_ms = max(1, int(1000 * (call.deadline_s - self._clock())))
        ours |= dict.fromkeys(headers.TTFT_SLO_MS, str(left_ms))
        if gateway.objective:
            ours |= dict.fromkeys(headers.OBJECTIVE, gateway.objective)
        if gateway.send_fairness_id:
            ours |= dict.fromkeys(headers.FAIRNESS_ID, call.tenant)
        if gateway.api_key:
            ours["authorization"] = f"Bearer {gateway.api_key}"
        if flight.endpoint:
            ours[headers.DESTINATION_SUBSET] = flight.endpoint
        if call.trace:
            ours["traceparent"] = call.trace
        return {**{name.lower(): value for name, value in call.headers.items()}, **ours}

    def _ssl(self, gateway: Gateway) -> Any:
        if gateway.url.startswith("http://"):
            return True
        if gateway not in self._tls:
            self._tls[gateway] = gateway.tls()
        return self._tls[gateway]


def _result(call: Call, answer: _Answer | None, lost: _Lost | None) -> Result:
    if answer is None:
        error = (lost.code, f"No answer from the inference gateway: {lost}") if lost else result.FAILED
        return result.unanswered(call.batch_id, call.line, call.custom_id, error)
    return result.answered(call.batch_id, call.line, call.custom_id, answer.status, answer.body, answer.served_as)


async def _read(response: aiohttp.ClientResponse) -> _Answer:
    """A whole reply, or a refusal."""
    body = bytearray()
    async for data in response.content.iter_chunked(1 << 16):
        body += data
        if len(body) > MAX_REPLY_BYTES:
            raise reply.BrokenStreamError(f"a reply of more than {MAX_REPLY_BYTES} bytes")
    said = response.headers
    return _Answer(
        response.status,
        bytes(body),
        said.get(headers.REQUEST_ID, ""),
        said.get(headers.DROPPED_REASON, ""),
        retry_after_s(said.get("retry-after", ""), time.time()),
    )


def retry_after_s(value: str, now_s: float) -> float | None:
    """Of the header ``Retry-After``: seconds or a date; None for neither."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - now_s)
    except (ValueError, TypeError):
        return None


def body_of(call: Call) -> dict[str, Any]:
    """Lines were validated at upload; one that is no object is sent as it is and answered by the engine."""
    try:
        value = msgspec.json.decode(call.body)
    except msgspec.DecodeError:
        return {}
    return value if isinstance(value, dict) else {}
