"""Endpoints from DNS: every address of a host name is one, as a compose service or a headless Service has them.

The name is resolved every ``refreshInterval``. While it does not resolve the pool keeps what it has, which at start is
nobody: the servers may come later.
"""

from __future__ import annotations

import asyncio
import logging
import socket

import msgspec

from llmd_sched.config import duration_s
from llmd_sched.plugin import Plugin
from llmd_sched.pool.pool import Pool
from llmd_sched.types import Endpoint

log = logging.getLogger(__name__)

MIN_REFRESH_S = 0.1
MAX_REFRESH_S = 3600.0
MAX_ADDRESSES = 1000


class DnsDiscovery(Plugin, frozen=True):
    """``host``: a name all of whose addresses serve at ``port``; ``refreshInterval``: how often it is resolved.

    ``labels`` and ``namespace`` are given to every endpoint.
    """

    host: str
    port: int
    refresh_interval: str = "5s"
    labels: dict[str, str] = msgspec.field(default_factory=dict)
    namespace: str = "default"

    def check(self) -> None:
        if not self.host or any(c in self.host for c in "/[] :"):
            raise ValueError(f"host {self.host!r} must be a host name, without a port")
        if not 1 <= self.port <= 65535:
            raise ValueError(f"port {self.port} is not a number from 1 to 65535")
        if not self.namespace:
            raise ValueError("namespace must not be empty")
        if not MIN_REFRESH_S <= duration_s(self.refresh_interval) <= MAX_REFRESH_S:
            raise ValueError(f"refreshInterval {self.refresh_interval!r} must be from 100ms to 1h")


class DnsWatcher:
    """Keeps a pool equal to the addresses of a name."""

    def __init__(self, params: DnsDiscovery, pool: Pool) -> None:
        self.params = params
        self.pool = pool
        self._said = ""
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Resolves once, then goes on by itself."""
        await self._refresh()
        self._task = asyncio.create_task(self._run(), name="DNS discovery")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(duration_s(self.params.refresh_interval))
            await self._refresh()

    async def _refresh(self) -> None:
        host = self.params.host
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:  # UnicodeError: not a name at all, a label too long or empty
            self._say(f"does not resolve: {error}; asked again every {self.params.refresh_interval}")
            return
        addresses = sorted({str(info[4][0]) for info in found})
        if len(addresses) > MAX_ADDRESSES:
            self._say(f"{len(addresses)} addresses; the first {MAX_ADDRESSES} are used")
            addresses = addresses[:MAX_ADDRESSES]
        else:
            self._said = ""
        self._show(addresses)

    def _show(self, addresses: list[str]) -> None:
        """An endpoint is named after its address, so it stays itself whoever else comes or goes."""
        params = self.params
        members = [
            Endpoint(f"{params.host}-{address}", address, params.port, params.namespace, params.labels)
            for address in addresses
        ]
        if members != self.pool.endpoints:
            self.pool.apply(members)
            log.info("%s: %d endpoints", params.host, len(members))

    def _say(self, message: str) -> None:
        """Once, until it is another or the name resolves."""
        if message != self._said:
            self._said = message
            log.warning("%s: %s", self.params.host, message)
