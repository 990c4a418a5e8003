"""Gates that read Redis: redis (a budget somebody writes there), redis-quota (limits of a tenant over all workers)."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from typing import Any, Literal

from batchgw.cancellation import cancelled
from batchgw.gates.base import READ_TIMEOUT_S, Gate, Open, Polled, Spec, Tools

log = logging.getLogger(__name__)

MAX_RELEASES = 10_000
"""Places given back whose answer from Redis is still out; the oldest ones run out by themselves."""


class Redis(Spec, frozen=True):
    """The number in [0, 1] under ``budget_key``. Key missing or no number: 1, open; Redis not reachable: 0, closed."""

    address: str = ""
    """URL; empty: the one of all gates."""
    budget_key: str = "dispatch-gate-budget"

    def check(self, tools: Tools) -> None:
        _check_address(self.address, tools)

    def make(self, tools: Tools) -> Gate:
        client = _client(self.address, tools)
        return Polled("redis", lambda: self.read(client), 0.0, tools.poll_s, measured=False)

    async def read(self, client: Any) -> float:
        value = await client.get(self.budget_key)
        try:
            return float(value) if value is not None else 1.0
        except ValueError:
            return 1.0


class RedisQuota(Spec, frozen=True):
    """At most ``limit`` lines of a tenant in flight (``concurrency``), or started within ``window_s`` (``rate-limit``).

    Counted in Redis under ``prefix`` + tenant, so over all workers. A line over the limit waits. Redis not reachable:
    nothing is admitted. ``attribute``: what is counted by; lines have a tenant only, known as ``userid`` too.
    """

    limit: int
    mode: Literal["rate-limit", "concurrency"] = "rate-limit"
    attribute: Literal["userid", "tenant"] = "userid"
    window_s: float = 60.0
    prefix: str = "quota:"
    address: str = ""

    def check(self, tools: Tools) -> None:
        _check_address(self.address, tools)
        if self.limit < 1 or self.window_s <= 0:
            raise ValueError("limit must be at least 1 and windowS above 0")

    def make(self, tools: Tools) -> Gate:
        return _Quota(self, _client(self.address, tools))


class _Quota(Open):
    """One sorted set a tenant: ids by the time they started. Entries older than the window do not count: in
    ``concurrency`` mode that frees the places of a worker that died, so a line longer than the window frees its own."""

    def __init__(self, spec: RedisQuota, client: Any, clock: Callable[[], float] = time.time) -> None:
        self._spec, self._client, self._clock = spec, client, clock
        self._held: dict[str, str] = {}
        self._releases: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        await asyncio.gather(*self._releases, return_exceptions=True)
        await self._client.aclose()

    async def admit(self, id: str, tenant: str) -> bool:
        key, admitted = self._spec.prefix + tenant, False
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                admitted = await self._take(key, id)
        except Exception as e:
            log.warning("gate redis-quota: nothing admitted: %s: %s", type(e).__name__, e)
        if admitted and self._spec.mode == "concurrency":
            self._held[id] = key
        if cancelled():
            raise asyncio.CancelledError  # or the line would be sent, and a stop would wait for it
        return admitted

    async def _take(self, key: str, id: str) -> bool:
        """Takes a place first and gives it back when it was one too many: two who race may both be refused, but the
        limit is never exceeded."""
        now_s = self._clock()
        async with self._client.pipeline(transaction=True) as steps:
            steps.zremrangebyscore(key, "-inf", now_s - self._spec.window_s)
            steps.zadd(key, {id: now_s}, nx=True)
            steps.zcard(key)
            steps.pexpire(key, math.ceil(1000 * self._spec.window_s))
            _, added, count, _ = await steps.execute()
        if count <= self._spec.limit:
            return True
        if added:
            await self._client.zrem(key, id)
        return False

    def release(self, id: str) -> None:
        key = self._held.pop(id, None)
        if key is not None and len(self._releases) < MAX_RELEASES:
            task = asyncio.get_running_loop().create_task(self._remove(key, id))
            self._releases.add(task)
            task.add_done_callback(self._releases.discard)

    async def _remove(self, key: str, id: str) -> None:
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                await self._client.zrem(key, id)
        except Exception as e:
            log.warning("gate redis-quota: a place is freed by its age only: %s", e)


def _check_address(address: str, tools: Tools) -> None:
    if not (address or tools.redis_url):
        raise ValueError("address of a Redis server must be given, here or as redisUrl of all gates")


def _client(address: str, tools: Tools) -> Any:
    url = address or tools.redis_url
    if tools.redis is not None:
        return tools.redis(url)
    from redis import asyncio as client  # an optional dependency

    return client.from_url(url, socket_timeout=READ_TIMEOUT_S, socket_connect_timeout=READ_TIMEOUT_S)
