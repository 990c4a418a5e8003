"""As many lines as the scheduler says: ``batchgw.pace`` fed by ``GET /v1/headroom``, which it keeps listening to.

While the scheduler cannot be reached, or has not said a word for ``stale_after_s``, nothing new starts; what runs goes
on. ``held`` says so in a sentence. Each line is sent to the endpoint that has room for it.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from random import Random

import aiohttp
import msgspec

from batchgw.client.requests import Flight
from batchgw.pace import LOOK_AHEAD, FixedCap, Pace, PoolHeadroom, Share, Waiting
from batchgw.worker.pacer import Standing, Start

log = logging.getLogger(__name__)

PATH = "/v1/headroom"
STALE_AFTER_S = 2.0
CONNECT_TIMEOUT_S = 5.0
SILENCE_S = 5.0
"""A connection without a word for so long is given up; ten come a second."""

MAX_BACKOFF_S = 5.0
MIN_BACKOFF_S = 0.1
MAX_EVENT_BYTES = 8 << 20
"""Half a kilobyte per endpoint."""

PREFILL_S, PREFILL_TOKEN_S = 1.0, 200e-6
"""A prompt of a line that is not streamed is taken to be computed after so long; engines are several times as fast."""

MAX_SCHEDULERS = 100
MAX_REASON_CHARACTERS = 300
BYTES_PER_TOKEN = 4


class HeadroomPacer:
    """A ``batchgw.worker.pacer.Pacer``. ``url_of`` a model is the admin address of the scheduler of its pool
    (``http://host:9090``); models of one pool share its headroom. None says that nobody serves the model: its lines
    start at once, for the sender to refuse them. ``token`` opens that port where it asks for one.

    ``worker`` tells this process from others that send batch to the same pool: each gets its part of the headroom.
    ``most`` lines per pool are in flight at once, whatever it says. The aborted lines come last in bursts.
    """

    def __init__(
        self, url_of: Callable[[str], str | None], *, worker: str = "", token: str = "", most: int = 5000,
        stale_after_s: float = STALE_AFTER_S, clock: Callable[[], float] = time.monotonic, rng: Random | None = None,
    ) -> None:  # fmt: skip
        if most < 1 or not stale_after_s > 0:
            raise ValueError(
                f"lines in flight ({most}) must be at least 1, and stale_after_s ({stale_after_s}) above 0"
            )
        self.changed = asyncio.Event()
        self._url_of, self._worker = url_of, worker or uuid.uuid4().hex
        self._headers = {"Accept": "text/event-stream"} | ({"Authorization": f"Bearer {token}"} if token else {})
        self._most, self._stale_after_s = most, stale_after_s
        self._clock, self._rng = clock, rng or Random()
        self._pools: dict[str, _Pool] = {}
        self._session: aiohttp.ClientSession | None = None

    @property
    def held(self) -> Mapping[str, str]:
        """Address of a scheduler -> why nothing starts there; empty while all have spoken."""
        now_s = self._clock()
        return {url: why for url, pool in self._pools.items() if (why := pool.held(now_s))}

    @property
    def headrooms(self) -> Mapping[str, PoolHeadroom]:
        """The latest word of each scheduler."""
        return {url: pool.news for url, pool in self._pools.items() if pool.news is not None}

    def standings(self) -> Sequence[Standing]:
        now_s = self._clock()
        return [pool.standing(url, now_s, self._most) for url, pool in self._pools.items()]

    async def open(self) -> None:
        """Schedulers are listened to once a line for them comes."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=SILENCE_S)
        self._session = aiohttp.ClientSession(timeout=timeout, headers=self._headers, read_bufsize=MAX_EVENT_BYTES)

    async def close(self) -> None:
        tasks = [pool.listening for pool in self._pools.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    def starts(self, model: str, waiting: Sequence[Flight]) -> Sequence[Start]:
        pool = self._pool(model)
        if pool is None:
            return [Start(position) for position in range(len(waiting))]
        room = self._most - len(pool.pace.lines)
        if room <= 0:
            return ()
        pool.assume_prefilled(self._clock())
        positions = _looked_at(waiting)
        offered = [_waiting(waiting[position]) for position in positions]
        chosen = pool.pace.starts(offered, self._clock())
        if len(chosen) >= LOOK_AHEAD:
            self.changed.set()  # there may be room for more than were looked at
        return [Start(positions[one.position], one.endpoint) for one in chosen[:room]]

    async def admit(self, flight: Flight) -> bool:
        return True

    def started(self, flight: Flight) -> None:
        if pool := self._pool(flight.call.model):
            pool.started(flight, self._clock())

    def tokens(self, flight: Flight, count: int) -> None:
        pool = self._pool(flight.call.model)
        if pool is not None and pool.produced(flight, count):
            self.changed.set()  # the next prompt may be sent

    def answered(self, flight: Flight, status: int | None, reason: str, retry_after_s: float | None) -> None: ...

    def ended(self, flight: Flight, aborted: bool) -> None:
        if pool := self._pool(flight.call.model):
            pool.ended(flight)

    def aborts(self, model: str) -> Collection[str]:
        pool = self._pool(model)
        return () if pool is None else pool.aborts(model, self._clock())

    def _pool(self, model: str) -> _Pool | None:
        url = self._url_of(model)
        if url is None:
            return None
        url = url.rstrip("/")
        pool = self._pools.get(url)
        if pool is None:
            if len(self._pools) >= MAX_SCHEDULERS:
                raise ValueError(f"{url} would be one more than the {MAX_SCHEDULERS} schedulers that are listened to")
            pool = self._pools[url] = _Pool(Pace(FixedCap(lines=0, prefill_tokens=0), self._stale_after_s))
            pool.listening = asyncio.create_task(self._listen(url, pool), name=f"headroom of {url}")
        return pool

    # Listening

    async def _listen(self, url: str, pool: _Pool) -> None:
        """For ever. What goes wrong is told once, and tried again after a while that grows."""
        failures = 0
        while True:
            heard = pool.news
            try:
                await self._hear(url, pool)
                why = "it ended the stream"
            except _Refused as e:
                why = str(e)
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as e:
                why = f"{type(e).__name__}: {e}".removesuffix(": ")
            failures = failures + 1 if pool.news is heard else 0
            if why != pool.why:
                log.warning("no headroom of %s: %s", url, why)
            pool.why = why
            pause_s = min(MIN_BACKOFF_S * 2 ** min(failures, 10), MAX_BACKOFF_S)
            await asyncio.sleep(pause_s * self._rng.uniform(0.5, 1.0))

    async def _hear(self, url: str, pool: _Pool) -> None:
        """Until the stream ends. Raises _Refused, or what the connection failed of."""
        assert self._session is not None, "open() comes first"
        async with self._session.get(url + PATH, params={"worker": self._worker}, allow_redirects=False) as response:
            if response.status != 200 or response.content_type != "text/event-stream":
                said = (await response.content.read(MAX_REASON_CHARACTERS)).decode(errors="replace").strip()
                raise _Refused(f"status {response.status}: {said}")
            kind = ""
            async for line in response.content:
                name, _, value = line.rstrip(b"\r\n").partition(b": ")
                if name == b"event":
                    kind = value.decode(errors="replace")
                elif name == b"data":
                    self._told(pool, kind, value)

    def _told(self, pool: _Pool, kind: str, data: bytes) -> None:
        """Raises ValueError for what cannot be understood."""
        if kind == "share":
            pool.pace.share = msgspec.json.decode(data, type=Share)
        elif kind == "headroom":
            pool.news = msgspec.json.decode(data, type=PoolHeadroom)
            pool.heard_s = self._clock()
            pool.pace.hear(pool.news, pool.heard_s)
            pool.why = ""
            self.changed.set()


class _Pool:
    """One scheduler, and the lines sent by way of it."""

    __slots__ = ("cut", "heard_s", "listening", "models", "news", "pace", "prefilling", "why")

    def __init__(self, pace: Pace) -> None:
        self.pace = pace
        self.news: PoolHeadroom | None = None
        self.heard_s: float | None = None
        self.why = ""
        """What went wrong last; empty once it has spoken again."""
        self.models: dict[str, str] = {}
        """Line in flight -> its model."""
        self.cut: set[str] = set()
        """Lines that were said to be aborted, and are still ending."""
        self.prefilling: dict[str, tuple[Flight, float]] = {}
        """Lines whose first token has not come, and by when it should have."""
        self.listening: asyncio.Task[None]

    def started(self, flight: Flight, now_s: float) -> None:
        prompt_tokens = _waiting(flight).prompt_tokens
        self.pace.started(flight.key, flight.endpoint, prompt_tokens)
        self.models[flight.key] = flight.call.model
        self.prefilling[flight.key] = flight, now_s + PREFILL_S + PREFILL_TOKEN_S * prompt_tokens

    def produced(self, flight: Flight, count: int) -> bool:
        """True when these are its first tokens."""
        self.pace.produced((flight.key,), count)
        return self.prefilling.pop(flight.key, None) is not None

    def ended(self, flight: Flight) -> None:
        self.pace.ended(flight.key)
        self.prefilling.pop(flight.key, None)
        del self.models[flight.key]
        self.cut.discard(flight.key)

    def aborts(self, model: str, now_s: float) -> set[str]:
        """Each line is named once."""
        keys = {key for key in self.pace.aborts(now_s) if self.models[key] == model} - self.cut
        self.cut |= keys
        return keys

    def assume_prefilled(self, now_s: float) -> None:
        """Of a line that is not streamed no token is seen before all are: it must not hold back others so long."""
        late = [key for key, (flight, due_s) in self.prefilling.items() if due_s <= now_s and not flight.assembly]
        self.pace.produced(late, 0)
        for key in late:
            del self.prefilling[key]

    def standing(self, url: str, now_s: float, most: int) -> Standing:
        in_flight, stale = len(self.pace.lines), self.pace.stale(now_s)
        lines = sum(one.n_star for one in self.news.endpoints) // self.pace.share.of if self.news and not stale else 0
        return Standing(
            url, "unheard" if stale else "", in_flight, most, max(0, min(lines, most) - in_flight),
            heard_s=None if self.heard_s is None else now_s - self.heard_s,
        )  # fmt: skip

    def held(self, now_s: float) -> str:
        if not self.pace.stale(now_s):
            return ""
        return f"no word on the headroom for {self.pace.stale_after_s:g} s ({self.why or 'none yet'}): nothing starts"


class _Refused(Exception):
    """Answered, but not with headroom."""


def _waiting(flight: Flight) -> Waiting:
    """One that has been on its way is an aborted one: its prompt was computed, or begun to be."""
    return Waiting(flight.call.prompt_bytes // BYTES_PER_TOKEN + flight.tokens, flight.sent_s > 0)


def _looked_at(waiting: Sequence[Flight]) -> list[int]:
    """Positions of as many as the pace looks at, of either kind."""
    left = [LOOK_AHEAD, LOOK_AHEAD]
    positions = []
    for position, flight in enumerate(waiting):
        aborted = flight.sent_s > 0
        if left[aborted]:
            left[aborted] -= 1
            positions.append(position)
    return positions
