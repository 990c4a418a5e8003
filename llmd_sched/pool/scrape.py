"""Reading model servers' metrics, often where there is traffic, and cheaply.

A vLLM page has 52 KB of which five lines matter. They are found by searching the bytes for the line starts, beginning
a little before where they stood last time, so most of a page is never looked at. Several series of one family (the
engines of a data-parallel server) are summed, KV usage averaged. What to look for is in ``engines.py``.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import ssl
import time
from collections.abc import Callable, Iterator

from llmd_sched.pool.engines import DEFAULT_ENGINE, ENGINES, Engine, InfoLabel, Series
from llmd_sched.pool.http import Getter, HttpError
from llmd_sched.pool.pool import Load, Pool
from llmd_sched.pool.sources import Reading
from llmd_sched.types import Endpoint

log = logging.getLogger(__name__)

MAX_PAGE_BYTES = 4 << 20
TIMEOUT_S = 1.0
LOOK_BACK_BYTES = 1024
FACTS_EVERY_S = 10.0
"""Block size and count only change with the engine; looked up this often."""

IDLE_INTERVAL_S = 1.0
"""An endpoint without traffic is read this often, and one that refuses connections tried."""

TOUCHED_FOR_S = 1.0
"""One that was chosen counts as having traffic this long, until the request shows on its page."""

MAX_UNKNOWN_ENGINES = 100
"""So many unknown names are remembered, to complain of each once."""

_RUNNING_ADAPTERS = re.compile(rb'[{,]running_lora_adapters="([^"]*)"')
_WAITING_ADAPTERS = re.compile(rb'[{,]waiting_lora_adapters="([^"]*)"')
_MAX_ADAPTERS = re.compile(rb'[{,]max_lora="(\d{1,9})"')


class PageReader:
    """Reads one endpoint's pages; remembers where the lines were."""

    def __init__(self, engine: Engine = ENGINES[DEFAULT_ENGINE]) -> None:
        self._engine = engine
        self._at: dict[bytes, int] = {}
        self._facts_read_s = float("-inf")
        self._serves_adapters = False

    def read(self, page: bytes, now_s: float) -> Load:
        """The values found; None for a family that is absent or not a number."""
        engine = self._engine
        block_tokens = cache_blocks = None
        if now_s - self._facts_read_s >= FACTS_EVERY_S:
            block_tokens, cache_blocks = self._fact(page, engine.block_tokens), self._fact(page, engine.cache_blocks)
            self._serves_adapters = engine.lora is not None and self._find(page, engine.lora) >= 0
            self._facts_read_s = now_s if block_tokens is not None else float("-inf")
        waiting, running = self._values(page, engine.waiting), self._values(page, engine.running)
        usages = self._values(page, engine.kv_usage)
        lora = self._newest(page, engine.lora) if self._serves_adapters and engine.lora is not None else None
        return Load(
            waiting=sum(waiting) if waiting else None,
            running=sum(running) if running else None,
            kv_usage=min(1.0, max(0.0, sum(usages) / len(usages))) if usages else None,
            block_tokens=block_tokens,
            cache_blocks=cache_blocks,
            adapters=None if lora is None else _names(_RUNNING_ADAPTERS, lora),
            waiting_adapters=None if lora is None else _names(_WAITING_ADAPTERS, lora),
            max_adapters=None if lora is None else _most_adapters(lora),
            custom=self._custom(page) if engine.custom else None,
        )

    def _find(self, page: bytes, series: Series) -> int:
        """Where a sample line of the family starts (after HELP and TYPE); -1 if there is none."""
        name = series.name
        hint = max(0, self._at.get(name, 0) - LOOK_BACK_BYTES)
        for start in (hint, 0):
            at = page.find(series.line, start)
            while at >= 0:
                after = page[at + 1 + len(name) : at + 2 + len(name)]
                if after in (b"{", b" "):
                    at = self._first_line(page, series, at)
                    self._at[name] = at
                    return at + 1
                at = page.find(series.line, at + 1)
            if not hint:
                break
        return 0 if page.startswith(series.starts) else -1

    @staticmethod
    def _first_line(page: bytes, series: Series, at: int) -> int:
        """The line break before a family's first sample, when ``at`` is the one before any: a hint may point inside."""
        while at > 0:
            before = page.rfind(b"\n", 0, at)
            if not page.startswith(series.starts, before + 1):
                break
            at = before
        return at

    def _values(self, page: bytes, series: Series | None) -> list[float]:
        return [value for value, _ in self._lines(page, series)] if series is not None else []

    def _custom(self, page: bytes) -> dict[str, float]:
        """The first of each, as the reference has it: whether several add up nobody can tell."""
        found = ((name, self._first(page, series)) for name, series in self._engine.custom)
        return {name: value for name, value in found if value is not None}

    def _first(self, page: bytes, series: Series) -> float | None:
        return next((value for value, _ in self._lines(page, series)), None)

    def _lines(self, page: bytes, series: Series) -> Iterator[tuple[float, bytes]]:
        """Value and labels of each wanted sample of the family that is a finite number."""
        at, size = self._find(page, series), len(series.name)
        while at >= 0 and page.startswith(series.starts, at):
            end = page.find(b"\n", at)
            end = len(page) if end < 0 else end
            # name{labels} value [timestamp]
            after = max(page.rfind(b"}", at, end) + 1, at + size)
            try:
                value = float(page[after:end].split(None, 1)[0])
            except (ValueError, IndexError):
                value = math.nan
            labels = page[at + size : after]
            if math.isfinite(value) and series.wants(labels):
                yield value, labels
            at = end + 1

    def _newest(self, page: bytes, lora: Series) -> list[bytes]:
        """Labels of the newest sample, or of several equally new ones: the engines of a data-parallel server.

        There is a series per set of adapters there ever was; its value is when that set was the one.
        """
        samples = list(self._lines(page, lora))
        newest = max((value for value, _ in samples), default=0.0)
        return [labels for value, labels in samples if value == newest]

    def _fact(self, page: bytes, fact: InfoLabel | Series | None) -> float | None:
        """Of the first series: the engines of a data-parallel server are alike."""
        if fact is None:
            return None
        if isinstance(fact, Series):
            return self._first(page, fact)
        at = self._find(page, fact.series)
        if at < 0:
            return None
        end = page.find(b"\n", at)
        found = fact.digits.search(page, at, len(page) if end < 0 else end)
        return float(found[1]) if found else None


def _names(label: re.Pattern[bytes], samples: list[bytes]) -> frozenset[str]:
    """The comma lists in one label of all samples together."""
    found = (label.search(labels) for labels in samples)
    names = b",".join(match[1] for match in found if match).decode(errors="replace").split(",")
    return frozenset(name.strip() for name in names if name.strip())


def _most_adapters(samples: list[bytes]) -> float | None:
    """Slots of one engine: an adapter may take one in each, so several engines together hold no more for certain."""
    found = (_MAX_ADAPTERS.search(labels) for labels in samples)
    return max((float(match[1]) for match in found if match), default=None)


class Pace:
    """How long an endpoint is left alone between reads: ``interval_s`` with traffic, doubling to ``idle_s`` without."""

    __slots__ = ("_idle_s", "_interval_s", "_touched", "_touched_at_s", "pause_s")

    def __init__(self, interval_s: float, idle_s: float) -> None:
        self._interval_s = interval_s
        self._idle_s = max(idle_s, interval_s)
        self._touched = False
        self._touched_at_s = -math.inf
        self.pause_s = interval_s

    @property
    def backed_off(self) -> bool:
        return self.pause_s > self._interval_s

    def touched(self) -> None:
        """The endpoint was chosen. Seen at the next read, so a decision costs no look at the clock."""
        self._touched = True

    def after_read(self, traffic: bool, now_s: float) -> None:
        """``traffic``: as the page tells."""
        if self._touched:
            self._touched, self._touched_at_s = False, now_s
        if traffic or now_s - self._touched_at_s < TOUCHED_FOR_S:
            self.pause_s = self._interval_s
        else:
            self.after_refusal()

    def after_refusal(self) -> None:
        """Nobody listens there, whoever chooses it."""
        self.pause_s = min(2.0 * self.pause_s, self._idle_s)


class _Poller:
    """Reads one endpoint's pages in a task of its own, until it is closed."""

    def __init__(self, scraper: Scraper, endpoint: Endpoint, engine: Engine, phase: float) -> None:
        self.engine = engine
        self._scraper, self._endpoint, self._phase = scraper, endpoint, phase
        self._reader = PageReader(engine)
        how = scraper.reading
        self._getter = Getter(endpoint.address, how.port or endpoint.port, how.path, MAX_PAGE_BYTES, how.tls)
        # Well below the pool's limit, so that an endpoint left alone because it is idle never counts as stale.
        self._pace = Pace(scraper.interval_s, min(IDLE_INTERVAL_S, scraper.pool.stale_after_s / 2))
        self._last_running: float | None = None
        self._page_traffic = False
        self._failing = self._refused = False
        self._nap: asyncio.Future[bool] | None = None
        self.task = asyncio.create_task(self._run(), name=f"scrape {endpoint.key}")

    def touched(self) -> None:
        self._pace.touched()
        if self._nap is not None and self._pace.backed_off and not self._refused:
            _wake(self._nap, True)

    async def _run(self) -> None:
        clock, pace = self._scraper.clock, self._pace
        # Endpoints found together are not read together. With 100 busy ones that costs 0.05 cores more (the loop wakes
        # for each), but a decision then waits 1.5 ms behind pages at the 99th percentile, and not 3 to 6.
        due_s = clock() - self._phase * pace.pause_s
        try:
            while True:
                self._refused = not await self._read_once()
                now_s = clock()
                if self._refused:
                    pace.after_refusal()
                else:
                    pace.after_read(self._page_traffic, now_s)
                due_s = max(due_s + pace.pause_s, now_s)
                if await self._sleep(due_s - now_s):
                    due_s = clock()
        finally:
            self._getter.close()

    async def _sleep(self, wait_s: float) -> bool:
        """True when it was cut short."""
        loop = asyncio.get_running_loop()
        nap: asyncio.Future[bool] = loop.create_future()
        self._nap = nap
        timer = loop.call_later(wait_s, _wake, nap, False)
        try:
            return await nap
        finally:
            self._nap = None
            timer.cancel()

    def _shows_traffic(self, load: Load) -> bool:
        before, self._last_running = self._last_running, load.running
        return bool(load.waiting) or (load.running != before if self.engine.running_only_grows else bool(load.running))

    async def _read_once(self) -> bool:
        """False when there was no connection to be had. What is wrong is said once, until pages can be read again."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                page = await self._getter.get()
        except (HttpError, OSError) as e:  # a timeout is an OSError too
            self._failed(e)
            return self._getter.connected
        now_s = self._scraper.clock()
        load = self._reader.read(page, now_s)
        self._scraper.pool.record(self._endpoint, load, now_s)
        self._page_traffic = self._shows_traffic(load)
        if self._failing:
            self._failing = False
            log.info("%s at %s: metrics are read again", self._endpoint.key, self._endpoint.hostport)
        return True

    def _failed(self, error: Exception) -> None:
        self._scraper.errors += 1
        self._page_traffic = False
        endpoint, how = self._endpoint, self._scraper.reading
        # Another port that is closed, or a certificate we do not trust, is no reason to send no requests there.
        if not self._getter.connected and how.port in (0, endpoint.port) and not isinstance(error, ssl.SSLError):
            self._scraper.pool.record_failure(endpoint)
        if not self._failing:
            self._failing = True
            url = how.url(endpoint.address, endpoint.port)
            log.warning("%s: cannot read %s: %s", endpoint.key, url, error or "timed out")


def _wake(nap: asyncio.Future[bool], early: bool) -> None:
    if not nap.done():
        nap.set_result(early)


class Scraper:
    """Reads every endpoint's metrics page; follows the pool's members.

    One with traffic is read every ``interval_s``: something waits or runs on its last page, or it was ``touched`` just
    now. Any other is left alone longer and longer, up to IDLE_INTERVAL_S, and read at once when it is touched.
    """

    def __init__(
        self,
        pool: Pool,
        interval_s: float,
        clock: Callable[[], float] = time.monotonic,
        reading: Reading | None = None,
    ) -> None:
        self.pool = pool
        self.interval_s = interval_s
        self.errors = 0
        self.clock = clock
        self.reading = reading or Reading()
        self._pollers: dict[tuple[str, str], _Poller] = {}
        self._unknown_engines: set[str] = set()
        self._started = 0

    async def start(self) -> None:
        self.pool.on_change.append(self._follow)
        self._follow(self.pool.endpoints)

    async def stop(self) -> None:
        if self._follow in self.pool.on_change:
            self.pool.on_change.remove(self._follow)
        tasks = [poller.task for poller in self._pollers.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._pollers.clear()

    def touched(self, server: tuple[str, str]) -> None:
        """The endpoint (its ``server``) was chosen for a request."""
        poller = self._pollers.get(server)
        if poller is not None:
            poller.touched()

    def _follow(self, endpoints: list[Endpoint]) -> None:
        wanted = {e.server: (e, self._engine(e)) for e in endpoints}
        for known, poller in list(self._pollers.items()):
            if known not in wanted or poller.engine is not wanted[known][1]:
                self._pollers.pop(known).task.cancel()
        for server, (endpoint, engine) in wanted.items():
            if server not in self._pollers:
                self._started += 1
                # Multiples of the golden ratio, modulo 1, are spread evenly however many there are.
                self._pollers[server] = _Poller(self, endpoint, engine, self._started * 0.618034 % 1.0)

    def _engine(self, endpoint: Endpoint) -> Engine:
        how, unknown = self.reading, self._unknown_engines
        name = how.engine_name(endpoint.labels)
        if name not in how.engines and name not in unknown and len(unknown) < MAX_UNKNOWN_ENGINES:
            unknown.add(name)
            what = "%s: %s is %r, read as %s; known are %s"
            log.warning(what, endpoint.key, how.engine_label, name, how.default_engine, ", ".join(how.engines))
        return how.engines.get(name) or how.engines[how.default_engine]
