"""The queue of llm-d-async as a source of lines: a Redis sorted set in, a Redis list out, an answer for every message.

Messages are requests of their own, without file or batch. They pass the same gate, sender and headers as lines do. The
set is scored by deadline, so the earliest comes first; one that is past its deadline when it is taken is answered too
(DEADLINE_EXCEEDED), which the reference leaves out. A taken message lies in a second set, scored by its lease, until
its answer is pushed; one whose worker died is put back by any other.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from batchgw.cancellation import cancelled
from batchgw.client.requests import Call, Flight, Sender
from batchgw.client.result import EXPIRED
from batchgw.records import Result
from batchgw.worker.pacer import Pacer

log = logging.getLogger(__name__)

LEASE_S = 300.0
RENEW_S = LEASE_S / 3
RECLAIM_S = 15.0
ADMIT_AGAIN_S = 0.2
AGAIN_S = 1.0
TAKEN_SUFFIX = ":taken"


class RedisSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """``batch_size`` messages are taken at most at once, ``waiting`` wait in memory; ``results`` is where answers go
    whose message names no queue of its own."""

    url: str
    requests: str = "request-sortedset"
    results: str = "result-list"
    poll_s: float = 1.0
    batch_size: int = 10
    waiting: int = 50

    def check(self) -> None:
        if not self.url or self.poll_s <= 0 or min(self.batch_size, self.waiting) < 1:
            raise ValueError("url must be given, pollS above 0, batchSize and waiting at least 1")


class _Request(msgspec.Struct):
    id: str
    deadline: float
    payload: msgspec.Raw
    created: float = 0.0
    metadata: dict[str, str] = {}
    headers: dict[str, str] = {}
    endpoint: str = "/v1/completions"


class _Internal(msgspec.Struct):
    result_queue_name: str = ""


class _Envelope(msgspec.Struct):
    data: _Request
    internal: _Internal = msgspec.field(default_factory=_Internal)


class _Model(msgspec.Struct):
    model: str = ""


class Answer(msgspec.Struct, omit_defaults=True):
    """``payload`` is the body as text; ``error_code`` one of the reference's."""

    id: str
    status_code: int = 0
    payload: str = ""
    error_code: str = ""
    error_message: str = ""


class _Response(msgspec.Struct):
    status_code: int
    body: msgspec.Raw


class _Error(msgspec.Struct):
    code: str
    message: str


class _Outcome(msgspec.Struct):
    response: _Response | None
    error: _Error | None


class BadMessage(Exception):
    """A message that is none; ``answer`` says so on ``queue`` to whoever sent it."""

    def __init__(self, raw: bytes, message: str) -> None:
        super().__init__(message)
        id, self.queue = _told(raw)
        self.answer = Answer(id, 400, error_code="INVALID_REQUEST", error_message=message)


def read(raw: bytes) -> tuple[_Request, str, Call]:
    """The request, the queue its answer goes to (empty: the usual one) and what to send. Raises BadMessage."""
    try:
        wrapped = msgspec.json.decode(raw)
        bare = not (isinstance(wrapped, dict) and "data" in wrapped)
        envelope = (
            _Envelope(msgspec.json.decode(raw, type=_Request)) if bare else msgspec.json.decode(raw, type=_Envelope)
        )
        request = envelope.data
        model = msgspec.json.decode(request.payload, type=_Model).model
    except msgspec.DecodeError as e:
        raise BadMessage(raw, str(e)) from None
    if not request.endpoint.startswith("/") or request.endpoint.startswith("//") or "://" in request.endpoint:
        raise BadMessage(raw, f"endpoint must be a path that begins with one /, not {request.endpoint[:80]!r}")
    tenant = request.metadata.get("userid", "default")
    call = Call(batch_id="redis", line=0, custom_id=request.id, url=request.endpoint, model=model, tenant=tenant,
                body=bytes(request.payload), deadline_s=request.deadline, headers=request.headers,
                prompt_bytes=len(bytes(request.payload)))  # fmt: skip
    return request, envelope.internal.result_queue_name, call


def answer(id: str, result: Result) -> Answer:
    """The reference's answer for one line's result."""
    outcome = msgspec.json.decode(result.output, type=_Outcome)
    if outcome.response is not None:
        status, body = outcome.response.status_code, bytes(outcome.response.body).decode()
        code = "" if result.ok else "INFERENCE_ERROR"
        return Answer(id, status, body, code, "" if result.ok else f"the inference gateway answered {status}")
    error = outcome.error or _Error("UNKNOWN", "no answer")
    code = "DEADLINE_EXCEEDED" if error.code == EXPIRED[0] else "INFERENCE_ERROR"
    return Answer(id, error_code=code, error_message=error.message)


class RedisSource:
    """``run`` until cancelled; what is in flight then is put back by its lease."""

    def __init__(
        self, client: Any, sender: Sender, pacer: Pacer, settings: RedisSettings, clock: Callable[[], float] = time.time
    ) -> None:
        self._client, self._sender, self._pacer, self._settings, self._clock = client, sender, pacer, settings, clock
        self._taken = settings.requests + TAKEN_SUFFIX
        self._waiting: list[tuple[Flight, bytes, str]] = []
        self._running: set[asyncio.Task[None]] = set()
        self._mine: set[bytes] = set()
        self._numbers = itertools.count()

    async def run(self) -> None:
        loops = (
            self._again(self._take, self._settings.poll_s), self._again(self._renew, RENEW_S),
            self._again(self._reclaim, RECLAIM_S), self._starting(),
        )  # fmt: skip
        try:
            async with asyncio.TaskGroup() as group:
                for loop in loops:
                    group.create_task(loop)
        finally:
            for task in list(self._running):
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)

    async def _again(self, step: Callable[[], Any], every_s: float) -> None:
        while not cancelled():
            try:
                await step()
            except Exception as e:  # whatever Redis is out of, the next round may find it well
                log.warning("redis source: %s: %s", type(e).__name__, e)
            await asyncio.sleep(every_s)

    async def _take(self) -> None:
        """The earliest messages move from the queue to the taken ones; who moves one owns it."""
        room = min(self._settings.batch_size, self._settings.waiting - len(self._waiting))
        if room <= 0:
            return
        for raw in await self._client.zrange(self._settings.requests, 0, room - 1):
            async with self._client.pipeline(transaction=True) as steps:
                steps.zadd(self._taken, {raw: self._clock() + LEASE_S})
                steps.zrem(self._settings.requests, raw)
                _, moved = await steps.execute()
            if moved:
                await self._accept(raw)

    async def _accept(self, raw: bytes) -> None:
        try:
            _, queue, call = read(raw)
        except BadMessage as e:
            await self._push(raw, e.answer, e.queue)
            return
        self._mine.add(raw)
        self._waiting.append((Flight(call, next(self._numbers)), raw, queue))
        self._pacer.changed.set()

    async def _starting(self) -> None:
        while True:
            for model in {flight.call.model for flight, _, _ in self._waiting}:
                of_model = [one for one in self._waiting if one[0].call.model == model]
                for start in self._pacer.starts(model, [flight for flight, _, _ in of_model]):
                    chosen = of_model[start.position]
                    self._waiting.remove(chosen)
                    chosen[0].endpoint = start.endpoint
                    self._pacer.started(chosen[0])
                    task = asyncio.create_task(self._message(*chosen))
                    self._running.add(task)
                    task.add_done_callback(self._running.discard)
            await asyncio.sleep(ADMIT_AGAIN_S / 4)

    async def _message(self, flight: Flight, raw: bytes, queue: str) -> None:
        result = None
        try:
            if await self._pacer.admit(flight):
                result = await self._sender.send(flight, self._pacer)
        finally:
            self._pacer.ended(flight, aborted=result is None)
        if result is None:
            await asyncio.sleep(ADMIT_AGAIN_S)
            self._waiting.append((flight, raw, queue))
            return
        made = answer(flight.call.custom_id, result)
        while not cancelled():
            try:
                await self._push(raw, made, queue)
                return
            except Exception as e:  # the answer must not be lost to a moment without Redis
                log.warning("redis source: answer %s waits: %s", made.id, e)
                await asyncio.sleep(AGAIN_S)

    async def _push(self, raw: bytes, made: Answer, queue: str) -> None:
        """The answer out and the message gone, together."""
        async with self._client.pipeline(transaction=True) as steps:
            steps.lpush(queue or self._settings.results, msgspec.json.encode(made))
            steps.zrem(self._taken, raw)
            await steps.execute()
        self._mine.discard(raw)

    async def _renew(self) -> None:
        if self._mine:
            until_s = self._clock() + LEASE_S
            renewed: Mapping[bytes, float] = dict.fromkeys(self._mine, until_s)
            await self._client.zadd(self._taken, renewed, xx=True)

    async def _reclaim(self) -> None:
        """Messages whose worker is gone go back to the queue, by their deadline."""
        for raw in await self._client.zrangebyscore(self._taken, "-inf", self._clock(), start=0, num=100):
            async with self._client.pipeline(transaction=True) as steps:
                steps.zadd(self._settings.requests, {raw: _deadline(raw)})
                steps.zrem(self._taken, raw)
                await steps.execute()


def _deadline(raw: bytes) -> float:
    try:
        return read(raw)[0].deadline
    except BadMessage:
        return 0.0


def _told(raw: bytes) -> tuple[str, str]:
    """Id and result queue of a message that cannot be read, as far as they can be told."""
    try:
        message = msgspec.json.decode(raw)
        internal = message.get("internal") or {}
        return str(message.get("data", message).get("id", "")), str(internal.get("result_queue_name", ""))
    except (msgspec.DecodeError, AttributeError):
        return "", ""
