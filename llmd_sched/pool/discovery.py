"""Endpoints from a file, watched: ``endpoints: [{name, namespace, address, port, labels}]``, YAML or JSON.

``address`` is an IPv4 or IPv6 address, or a host name; names are resolved again every RESOLVE_EVERY_S, and one that
stops resolving keeps its last address. A file that turns bad while we run changes nothing and is logged once.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import socket
from pathlib import Path

import msgspec

from llmd_sched.config import convert, read_yaml
from llmd_sched.errors import ConfigError
from llmd_sched.plugin import Plugin
from llmd_sched.pool.pool import Pool
from llmd_sched.types import Endpoint

log = logging.getLogger(__name__)

WATCH_EVERY_S = 1.0
RESOLVE_EVERY_S = 30.0
MAX_FILE_BYTES = 1 << 20
MAX_ENDPOINTS = 10_000


class FileDiscovery(Plugin, frozen=True):
    """``path`` of the endpoints file; ``watchFile``: apply later changes of it."""

    path: str
    watch_file: bool = False


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One endpoint as written in the file."""

    name: str
    address: str
    port: str | int
    namespace: str = "default"
    labels: dict[str, str] = msgspec.field(default_factory=dict)


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    endpoints: tuple[Entry, ...] = ()


def read_entries(text: str, source: str) -> list[Entry]:
    """Raises ConfigError naming ``source`` and the entry."""
    if len(text) > MAX_FILE_BYTES:
        raise ConfigError(f"{len(text)} bytes; at most {MAX_FILE_BYTES} are accepted", source)
    entries = convert(read_yaml(text, source) if text.strip() else {}, _File, f"{source}: $").endpoints
    if len(entries) > MAX_ENDPOINTS:
        raise ConfigError(f"{len(entries)} endpoints; at most {MAX_ENDPOINTS} are accepted", source)
    seen: set[tuple[str, str]] = set()
    for i, entry in enumerate(entries):
        where = f"{source}: $.endpoints[{i}]"
        if not entry.name:
            raise ConfigError("name must not be empty", f"{where}.name")
        if (entry.namespace, entry.name) in seen:
            raise ConfigError(f"{entry.namespace}/{entry.name} is listed twice", f"{where}.name")
        seen.add((entry.namespace, entry.name))
        if not re.fullmatch("[0-9]{1,5}", str(entry.port)) or not 1 <= int(entry.port) <= 65535:
            raise ConfigError(f"port {entry.port!r} is not a number from 1 to 65535", f"{where}.port")
        if not entry.address or any(c in entry.address for c in "/[] ") or _looks_like_port(entry.address):
            raise ConfigError(
                f"address {entry.address!r} must be an IPv4 or IPv6 address or a host name, without a port",
                f"{where}.address",
            )
    return list(entries)


def _looks_like_port(address: str) -> bool:
    """``host:80``; more colons are IPv6."""
    return address.count(":") == 1


class FileWatcher:
    """Keeps a pool equal to a file."""

    def __init__(self, params: FileDiscovery, pool: Pool) -> None:
        self.path = Path(params.path)
        self.watch = params.watch_file
        self.pool = pool
        self._entries: list[Entry] = []
        self._addresses: dict[str, str] = {}
        self._stamp: tuple[int, int, int] | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Load once; raises ConfigError when the file is missing or bad, or no name in it resolves."""
        await self._load()
        self._task = asyncio.create_task(self._run(), name="file discovery")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _load(self) -> None:
        try:
            self._stamp = self._read_stamp()
            text = self.path.read_text()
        except OSError as e:
            raise ConfigError(f"cannot read the endpoints file: {e.strerror}", str(self.path)) from None
        except UnicodeDecodeError as e:
            raise ConfigError(f"not UTF-8 text: {e}", str(self.path)) from None
        self._entries = read_entries(text, str(self.path))
        await self._apply(self._entries)

    async def _apply(self, entries: list[Entry]) -> None:
        addresses = await asyncio.gather(*(self._resolve(e.address) for e in entries))
        endpoints = []
        for i, (entry, address) in enumerate(zip(entries, addresses, strict=True)):
            if address is None:
                where = f"{self.path}: $.endpoints[{i}].address"
                raise ConfigError(f"host name {entry.address!r} does not resolve", where)
            endpoints.append(Endpoint(entry.name, address, int(entry.port), entry.namespace, entry.labels))
        if endpoints != self.pool.endpoints:
            self.pool.apply(endpoints)
            log.info("%s: %d endpoints", self.path, len(endpoints))

    async def _resolve(self, address: str) -> str | None:
        try:
            return str(ipaddress.ip_address(address))
        except ValueError:
            pass
        try:
            found = await asyncio.get_running_loop().getaddrinfo(address, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):  # UnicodeError: not a name at all, a label too long or empty
            return self._addresses.get(address)
        # A name of several addresses stays with the one it had, so the endpoint keeps what we know of it.
        known = [str(info[4][0]) for info in found]
        if self._addresses.get(address) not in known:
            self._addresses[address] = known[0]
        return self._addresses[address]

    def _read_stamp(self) -> tuple[int, int, int]:
        """Changes when the file does, and when it is replaced by another (an updated ConfigMap swaps a link)."""
        stat = self.path.stat()
        return stat.st_mtime_ns, stat.st_ino, stat.st_size

    async def _run(self) -> None:
        seconds = 0.0
        while True:
            await asyncio.sleep(WATCH_EVERY_S)
            seconds += WATCH_EVERY_S
            try:
                if self.watch and self._read_stamp() != self._stamp:
                    await self._load()
                elif seconds >= RESOLVE_EVERY_S:
                    seconds = 0.0
                    await self._apply(self._entries)
            except ConfigError as e:
                log.error("endpoints unchanged: %s", e)
            except OSError as e:
                log.warning("endpoints unchanged: %s: %s", self.path, e.strerror)
                self._stamp = None
