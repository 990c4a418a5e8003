"""What a gate is: a share of the lines that may run, asked often, and a last word on each one.

A gate's parameters are one frozen struct (camelCase as in YAML, the reference's snake_case read too); ``open`` makes
the live gate. Where the share is *measured*, it counts our own load in already and is some seconds old, so lines that
started since the reading are taken off: a scraped signal alone overshoots.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

import aiohttp
import msgspec

from batchgw.cancellation import cancelled

log = logging.getLogger(__name__)

POLL_S = 5.0
READ_TIMEOUT_S = 4.0


class Tools(msgspec.Struct, frozen=True):
    """What gates that ask others are given. ``redis_url`` and ``prometheus_url`` are the defaults of all of them."""

    prometheus_url: str = ""
    redis_url: str = ""
    redis: Callable[[str], Any] | None = None
    """Opens an asyncio client of an URL; None: that of the package ``redis``."""
    poll_s: float = POLL_S


class Spec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """Base of all gates' parameters."""

    def check(self, tools: Tools) -> None:
        """Raises ValueError when a parameter is missing or cannot be; called at start."""

    def make(self, tools: Tools) -> Gate:
        raise NotImplementedError


class Gate(Protocol):
    async def open(self) -> None:
        """Whatever it needs first; a gate that cannot reach its source opens too, and says what it does then."""

    async def close(self) -> None: ...

    def budget(self) -> float:
        """Share of the concurrency, in [0, 1]."""

    def windows(self) -> Sequence[Any]:
        """Congestion windows in it, for metrics."""

    def room(self, max_concurrency: int, in_flight: int) -> int:
        """Lines that may start now."""

    async def admit(self, id: str, tenant: str) -> bool:
        """True takes whatever this gate hands out one by one, until ``release`` of the same id."""

    def release(self, id: str) -> None: ...

    def answered(self, id: str, status: int | None, reason: str, retry_after_s: float | None) -> None: ...


class Open:
    """Base of gates: always open, hands nothing out."""

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    def budget(self) -> float:
        return 1.0

    def windows(self) -> Sequence[Any]:
        return ()

    def room(self, max_concurrency: int, in_flight: int) -> int:
        """The share of the concurrency, less what runs."""
        return whole(self.budget() * max_concurrency) - in_flight

    async def admit(self, id: str, tenant: str) -> bool:
        return True

    def release(self, id: str) -> None: ...

    def answered(self, id: str, status: int | None, reason: str, retry_after_s: float | None) -> None: ...


class Polled(Open):
    """A share that is read every ``poll_s`` seconds. ``read`` returns it, with None where there is no data, and may
    raise; then it is ``fallback``. ``measured``: the share is what is left beside our own load."""

    def __init__(
        self, name: str, read: Callable[[], Awaitable[float | None]], fallback: float, poll_s: float, measured: bool
    ) -> None:
        self._name, self._read, self._fallback, self._poll_s = name, read, fallback, poll_s
        self._measured = measured
        self._budget = 0.0
        self._readings = 0
        self._seen = -1
        self._in_flight_then = 0
        self._task: asyncio.Task[None] | None = None
        self.source_available = False

    async def open(self) -> None:
        await self.poll()
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def budget(self) -> float:
        return self._budget

    def room(self, max_concurrency: int, in_flight: int) -> int:
        if not self._measured:
            return super().room(max_concurrency, in_flight)
        if self._seen != self._readings:
            self._seen, self._in_flight_then = self._readings, in_flight
        return whole(self._budget * max_concurrency) - (in_flight - self._in_flight_then)

    async def poll(self) -> None:
        value = None
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                value = await self._read()
        except Exception as e:  # whatever a server says must not stop the gate
            log.warning("gate %s: no reading: %s: %s", self._name, type(e).__name__, e)
        self.source_available = value is not None and math.isfinite(value)
        self._budget = clamped(value if value is not None and self.source_available else self._fallback)
        self._readings += 1

    async def _run(self) -> None:
        while not cancelled():
            await asyncio.sleep(self._poll_s)
            await self.poll()


async def page(url: str, query: dict[str, str] | None = None) -> bytes:
    """The body of a GET. Raises aiohttp.ClientError, also for a status that is not 200."""
    async with aiohttp.ClientSession() as session, session.get(url, params=query) as response:
        response.raise_for_status()
        return await response.read()


def clamped(share: float) -> float:
    return min(1.0, max(0.0, share))


def whole(lines: float) -> int:
    """Rounded down, but not by what binary fractions lose: 0.7 of 10 is 7."""
    return math.floor(lines + 1e-9)
