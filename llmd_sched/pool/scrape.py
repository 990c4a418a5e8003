"""Reading model servers' metrics, often and cheaply.

A vLLM page has 52 KB of which five lines matter. They are found by searching the bytes for the line starts, beginning
a little before where they stood last time, so most of a page is never looked at. Several series of one family (the
engines of a data-parallel server) are summed, KV usage averaged.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from collections.abc import Callable, Iterator

from llmd_sched.pool.http import Getter, HttpError
from llmd_sched.pool.pool import Load, Pool
from llmd_sched.types import Endpoint

log = logging.getLogger(__name__)

WAITING, RUNNING, KV_USAGE = b"vllm:num_requests_waiting", b"vllm:num_requests_running", b"vllm:kv_cache_usage_perc"
CACHE_CONFIG = b"vllm:cache_config_info"
LORA_INFO = b"vllm:lora_requests_info"
"""One series per set of adapters there ever was; its value is when that set was the one."""

PATH = "/metrics"
MAX_PAGE_BYTES = 4 << 20
TIMEOUT_S = 1.0
LOOK_BACK_BYTES = 1024
FACTS_EVERY_S = 10.0
"""Block size and count only change with the engine; looked up this often."""

_BLOCK_SIZE = re.compile(rb'[{,]block_size="(\d+)"')
_NUM_BLOCKS = re.compile(rb'[{,]num_gpu_blocks="(\d+)"')
_RUNNING_ADAPTERS = re.compile(rb'[{,]running_lora_adapters="([^"]*)"')


class PageReader:
    """Reads one endpoint's pages; remembers where the lines were."""

    def __init__(self) -> None:
        self._at: dict[bytes, int] = {}
        self._facts_read_s = float("-inf")
        self._serves_adapters = False

    def read(self, page: bytes, now_s: float) -> Load:
        """The values found; None for a family that is absent or not a number."""
        block_tokens = cache_blocks = None
        if now_s - self._facts_read_s >= FACTS_EVERY_S:
            block_tokens, cache_blocks = self._facts(page)
            self._serves_adapters = self._find(page, LORA_INFO) >= 0
            self._facts_read_s = now_s if block_tokens is not None else float("-inf")
        waiting, running, usages = (self._series(page, name) for name in (WAITING, RUNNING, KV_USAGE))
        return Load(
            waiting=sum(waiting) if waiting else None,
            running=sum(running) if running else None,
            kv_usage=min(1.0, max(0.0, sum(usages) / len(usages))) if usages else None,
            block_tokens=block_tokens,
            cache_blocks=cache_blocks,
            adapters=self._adapters(page) if self._serves_adapters else None,
        )

    def _find(self, page: bytes, name: bytes) -> int:
        """Where a sample line of the family starts (after HELP and TYPE); -1 if there is none."""
        hint = max(0, self._at.get(name, 0) - LOOK_BACK_BYTES)
        for start in (hint, 0):
            at = page.find(b"\n" + name, start)
            while at >= 0:
                after = page[at + 1 + len(name) : at + 2 + len(name)]
                if after in (b"{", b" "):
                    at = self._first_line(page, name, at)
                    self._at[name] = at
                    return at + 1
                at = page.find(b"\n" + name, at + 1)
            if not hint:
                break
        return 0 if page.startswith((name + b"{", name + b" ")) else -1

    @staticmethod
    def _first_line(page: bytes, name: bytes, at: int) -> int:
        """The line break before a family's first sample, when ``at`` is the one before any: a hint may point inside."""
        while at > 0:
            before = page.rfind(b"\n", 0, at)
            if not page.startswith((name + b"{", name + b" "), before + 1):
                break
            at = before
        return at

    def _series(self, page: bytes, name: bytes) -> list[float]:
        return [value for value, _ in self._lines(page, name)]

    def _lines(self, page: bytes, name: bytes) -> Iterator[tuple[float, bytes]]:
        """Value and labels of each of the family's samples that is a finite number."""
        at = self._find(page, name)
        while at >= 0 and page.startswith((name + b"{", name + b" "), at):
            end = page.find(b"\n", at)
            end = len(page) if end < 0 else end
            # name{labels} value [timestamp]
            after = max(page.rfind(b"}", at, end) + 1, at + len(name))
            try:
                value = float(page[after:end].split(None, 1)[0])
            except (ValueError, IndexError):
                value = math.nan
            if math.isfinite(value):
                yield value, page[at + len(name) : after]
            at = end + 1

    def _adapters(self, page: bytes) -> frozenset[str]:
        """Of the newest series, or of several equally new ones (a data-parallel server) together."""
        series = list(self._lines(page, LORA_INFO))
        newest = max((value for value, _ in series), default=0.0)
        found = (_RUNNING_ADAPTERS.search(labels) for value, labels in series if value == newest)
        names = b",".join(match[1] for match in found if match).decode(errors="replace").split(",")
        return frozenset(name.strip() for name in names if name.strip())

    def _facts(self, page: bytes) -> tuple[float | None, float | None]:
        at = self._find(page, CACHE_CONFIG)
        if at < 0:
            return None, None
        line = page[at : page.find(b"\n", at)]
        size, blocks = _BLOCK_SIZE.search(line), _NUM_BLOCKS.search(line)
        return (float(size[1]) if size else None), (float(blocks[1]) if blocks else None)


class Scraper:
    """One task per endpoint reads its ``/metrics`` every ``interval_s``; follows the pool's members."""

    def __init__(self, pool: Pool, interval_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.pool = pool
        self.interval_s = interval_s
        self.errors = 0
        self._clock = clock
        self._tasks: dict[tuple[str, str], asyncio.Task[None]] = {}

    async def start(self) -> None:
        self.pool.on_change.append(self._follow)
        self._follow(self.pool.endpoints)

    async def stop(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks.clear()

    def _follow(self, endpoints: list[Endpoint]) -> None:
        wanted = {e.server: e for e in endpoints}
        for known in [k for k in self._tasks if k not in wanted]:
            self._tasks.pop(known).cancel()
        for key, endpoint in wanted.items():
            if key not in self._tasks:
                self._tasks[key] = asyncio.create_task(self._poll(endpoint), name=f"scrape {endpoint.key}")

    async def _poll(self, endpoint: Endpoint) -> None:
        getter = Getter(endpoint.address, endpoint.port, PATH, MAX_PAGE_BYTES)
        reader, failing = PageReader(), False
        due_s = self._clock()
        try:
            while True:
                failing = await self._read_once(endpoint, getter, reader, failing)
                due_s = max(due_s + self.interval_s, self._clock())
                await asyncio.sleep(due_s - self._clock())
        finally:
            getter.close()

    async def _read_once(self, endpoint: Endpoint, getter: Getter, reader: PageReader, failing: bool) -> bool:
        """True when the page could not be read; said once, until it can be again."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                page = await getter.get()
        except (HttpError, OSError) as e:  # a timeout is an OSError too
            self.errors += 1
            if not getter.connected:
                self.pool.record_failure(endpoint)
            if not failing:
                log.warning("%s: cannot read http://%s%s: %s", endpoint.key, endpoint.hostport, PATH, e or "timed out")
            return True
        now_s = self._clock()
        self.pool.record(endpoint, reader.read(page, now_s), now_s)
        if failing:
            log.info("%s at %s: metrics are read again", endpoint.key, endpoint.hostport)
        return False
