"""A live copy of one kind of Kubernetes objects: listed in pages, then watched, listed again when the watch is lost.

Of each object only what ``keep`` makes of it stays. A watch goes on from the last resource version it saw; after a 410
(that version is forgotten), a line beyond MAX_LINE_BYTES and every RELIST_EVERY_S everything is listed anew. Failures
are retried for ever, at most every MAX_BACKOFF_S; meanwhile the copy stays as it was.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from random import Random
from typing import Generic, TypeVar

import aiohttp
import msgspec

from llmd_sched.kube.client import ApiClient, ApiError, Status
from llmd_sched.kube.objects import Meta

log = logging.getLogger(__name__)

PAGE_OBJECTS = 100
"""Few, because a page is read in one go on the loop that also serves requests: 100 pods take about 10 ms."""
MAX_PAGES = 500
MAX_OBJECTS = 10_000
MAX_LINE_BYTES = 4 << 20
WATCH_S = 300
"""How long the server keeps one watch open; each asks for up to twice that, so that watches do not end together."""
RELIST_EVERY_S = 1800.0
RECONNECT_S = 0.05
SHORT_WATCH_S = 1.0
FIRST_BACKOFF_S = 0.5
MAX_BACKOFF_S = 30.0
ABSENT_EVERY_S = 10.0
ABSENT_AFTER = 3
"""So many 404s in a row and a kind we had is gone: an API server that starts may answer one too many."""

T = TypeVar("T")


class Source(msgspec.Struct, frozen=True):
    """Which objects. An ``optional`` kind may be unknown to the server, or forbidden to us: then there are none."""

    group_version: str
    """``v1``, or ``group/version``."""
    resource: str
    namespace: str
    label_selector: str = ""
    field_selector: str = ""
    optional: bool = False

    @property
    def path(self) -> str:
        root = "/apis/" if "/" in self.group_version else "/api/"
        return f"{root}{self.group_version}/namespaces/{self.namespace}/{self.resource}"

    @property
    def params(self) -> dict[str, str]:
        chosen = {"labelSelector": self.label_selector, "fieldSelector": self.field_selector}
        return {name: value for name, value in chosen.items() if value}

    def __str__(self) -> str:
        return f"{self.resource} of {self.group_version} in {self.namespace}"


class _Object(msgspec.Struct, frozen=True):
    metadata: Meta = Meta()


class _ListMeta(msgspec.Struct, frozen=True, rename="camel"):
    resource_version: str = ""
    next: str | None = msgspec.field(name="continue", default=None)


class _Page(msgspec.Struct, frozen=True):
    metadata: _ListMeta
    items: list[msgspec.Raw] | None = None


class _Event(msgspec.Struct, frozen=True):
    type: str
    object: msgspec.Raw


_object = msgspec.json.Decoder(_Object)
_page = msgspec.json.Decoder(_Page)
_event = msgspec.json.Decoder(_Event)


class Lost(Exception):
    """The watch cannot go on from where it was: list again."""


class BrokenWatch(Exception):
    """The watch ended as it should not, but may go on."""


class Lines:
    """Cuts a stream into lines, whatever pieces it comes in."""

    def __init__(self, most_bytes: int = MAX_LINE_BYTES) -> None:
        self._most_bytes = most_bytes
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that are complete now. Raises Lost when one is too long."""
        end = data.rfind(b"\n") + 1
        lines = bytes(self._rest + data[:end]).split(b"\n") if end else []
        if end:
            self._rest.clear()
        self._rest += data[end:]
        if len(self._rest) > self._most_bytes:
            raise Lost(f"a line of more than {self._most_bytes} bytes")
        return [line for line in lines if line.strip()]


class Reflector(Generic[T]):
    """``keep`` makes of an object's JSON what is kept; None = nothing. ``on_change`` is called after any change."""

    def __init__(
        self,
        api: ApiClient,
        source: Source,
        keep: Callable[[bytes], T | None],
        on_change: Callable[[], None],
        rng: Random,
        *,
        seed: dict[str, T] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``seed`` holds what is shown until the first list came."""
        self.source = source
        self.objects: dict[str, T] = dict(seed or {})
        """By ``namespace/name``."""
        self.synced = False
        """A list came, or it is known that there are none."""
        self.absent = False
        """An optional kind the server does not have, or does not show us."""
        self._api, self._keep, self._on_change, self._rng, self._clock = api, keep, on_change, rng, clock
        self._version: str | None = None
        self._listed_at_s = 0.0
        self._changed = False
        self._failures = self._not_found = 0
        self._said = ""
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"watch {self.source}")

    def cancel(self) -> None:
        """Ends soon, and shows nothing more."""
        if self._task is not None:
            self._task.cancel()

    @property
    def ended(self) -> bool:
        return self._task is None or self._task.done()

    async def stop(self) -> None:
        self.cancel()
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            try:
                wait_s = await self._turn()
                self._tell()
            except Exception:  # a follower that ended would freeze the pool without anybody noticing
                log.exception("%s: following failed", self.source)
                self._version = None
                wait_s = MAX_BACKOFF_S
            await asyncio.sleep(wait_s)

    async def _turn(self) -> float:
        """A list when one is due, then a watch. The seconds to wait before the next."""
        try:
            if self._version is None or self._clock() >= self._listed_at_s + RELIST_EVERY_S:
                await self._list()
            await self._watch(self._version or "")
        except ApiError as error:
            if error.status == 410:
                self._version = None
            return self._refused(error)
        except (Lost, msgspec.MsgspecError) as error:
            self._version = None
            return self._failed(str(error))
        except (aiohttp.ClientError, BrokenWatch, OSError, TimeoutError) as error:
            return self._failed(str(error) or type(error).__name__)
        return RECONNECT_S * self._rng.random()

    async def _list(self) -> None:
        params = {**self.source.params, "limit": str(PAGE_OBJECTS)}
        found: dict[str, T] = {}
        for _ in range(MAX_PAGES):
            page = _page.decode(await self._api.get(self.source.path, params))
            for raw in page.items or ():
                self._put(found, _object.decode(raw).metadata.key, bytes(raw))
            if not page.metadata.next:
                break
            params["continue"] = page.metadata.next
        else:
            raise BrokenWatch(f"more than {MAX_PAGES * PAGE_OBJECTS} objects")
        self._version, self._listed_at_s = page.metadata.resource_version, self._clock()
        self._show(found, absent=False)
        if self._said:
            log.info("%s: followed again", self.source)
        self._said, self._not_found = "", 0

    def _show(self, found: dict[str, T], *, absent: bool) -> None:
        self._changed |= found != self.objects or absent != self.absent or not self.synced
        self.objects, self.absent, self.synced = found, absent, True
        self._tell()

    async def _watch(self, version: str) -> None:
        began_s, came = self._clock(), False
        seconds = WATCH_S + self._rng.randrange(WATCH_S)
        params = {
            **self.source.params,
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(seconds),
        }
        lines = Lines()
        async with self._api.stream(self.source.path, params) as content:
            async for data in content.iter_any():
                for line in lines.feed(data):
                    self._apply(line)
                    self._failures, came = 0, True
                self._tell()
        if not came and self._clock() < began_s + SHORT_WATCH_S:
            raise BrokenWatch("the watch ended at once")

    def _apply(self, line: bytes) -> None:
        event = _event.decode(line)
        if event.type == "ERROR":
            status = msgspec.json.decode(event.object, type=Status)
            raise ApiError(status.code, status.message)
        raw = bytes(event.object)
        meta = _object.decode(raw).metadata
        if event.type == "DELETED":
            self._changed |= self.objects.pop(meta.key, None) is not None
        elif event.type in ("ADDED", "MODIFIED"):
            self._changed |= self._put(self.objects, meta.key, raw)
        self._version = meta.resource_version or self._version

    def _put(self, into: dict[str, T], key: str, raw: bytes) -> bool:
        """Whether this changed anything."""
        try:
            kept = self._keep(raw)
        except (msgspec.MsgspecError, ValueError) as error:
            log.warning("%s: %s cannot be used, so it stays as it was: %s", self.source, key, error)
            kept = self.objects.get(key)
        if kept is None:
            return into.pop(key, None) is not None
        if key not in into and len(into) >= MAX_OBJECTS:
            self._say(f"more than {MAX_OBJECTS}; the others are not used")
            return False
        changed = into.get(key) != kept
        into[key] = kept
        return changed

    def _tell(self) -> None:
        if self._changed:
            self._changed = False
            self._on_change()

    def _refused(self, error: ApiError) -> float:
        if error.status == 404 or (error.status == 403 and self.source.optional):
            self._not_found += 1
            if self._not_found >= ABSENT_AFTER or not self.synced or self.absent:
                return self._gone(error)
        if error.status == 403:
            return self._failed(f"{error} (the service account must be allowed to list and watch them)")
        return self._failed(str(error))

    def _gone(self, error: ApiError) -> float:
        self._version = None
        self._say(f"{error}; {'there are none for us' if self.source.optional else 'the kind must be installed'}")
        if self.source.optional:
            self._show({}, absent=True)
        elif self.objects:
            self._show({}, absent=False)
        return ABSENT_EVERY_S * self._rng.uniform(0.5, 1.0)

    def _failed(self, message: str) -> float:
        self._failures += 1
        self._say(message)
        return backoff_s(self._failures, self._rng)

    def _say(self, message: str) -> None:
        """Once, until it is another or all is well again."""
        if message != self._said:
            self._said = message
            log.log(logging.INFO if self.source.optional else logging.WARNING, "%s: %s", self.source, message)


def backoff_s(failures: int, rng: Random) -> float:
    """Half to all of 0.5 s, 1 s, 2 s, ... MAX_BACKOFF_S; ``failures`` >= 1."""
    return rng.uniform(0.5, 1.0) * min(FIRST_BACKOFF_S * 2.0 ** min(failures - 1, 16), MAX_BACKOFF_S)
