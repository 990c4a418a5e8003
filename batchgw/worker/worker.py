"""The worker: claims chunks under leases, runs their lines as the pacer allows, writes results before they count.

Four loops share one event loop and no locks: *claiming* fills a short buffer for each model, *starting* sends lines and
cuts those the pacer wants back, *writing* appends finished lines, and the heartbeat keeps the leases. Whatever dies at
any instant loses no line: a line without a written result is sent again by whoever claims its chunk next.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import msgspec

from batchgw.blobs import BlobError, BlobMissing
from batchgw.client import result as results
from batchgw.client.requests import Call, Flight, Sender
from batchgw.planner import Planner
from batchgw.records import Claim, LineError, Result
from batchgw.store.base import LeaseLost, Store, StoreUnavailable
from batchgw.worker.buffer import Buffer, Held
from batchgw.worker.gauges import View
from batchgw.worker.inputs import Inputs
from batchgw.worker.leases import Leases
from batchgw.worker.metrics import Metrics
from batchgw.worker.pacer import Pacer

log = logging.getLogger(__name__)

CHUNK_LINES = 50
BLOBS_AGAIN_S = 5.0
ADMIT_AGAIN_S = 0.2
LOOK_S = 0.1
"""How often the pacer is asked when nothing happens."""

WIND_DOWN_LOOK_S = 0.02

MAX_ATTEMPTS = 20
"""Leases of one chunk that may run out; then it is taken to kill its workers, and its lines are answered unsent."""


class WorkerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """``buffer_lines`` of one model, ``buffer_bytes`` of all wait in memory; ``kept_lines`` finished ones wait for a
    database that is away, then nothing new starts. A graceful stop lets lines run for ``stop_s``."""

    poll_s: float = 0.5
    flush_s: float = 0.5
    flush_lines: int = 50
    buffer_lines: int = 400
    buffer_bytes: int = 256 << 20
    kept_lines: int = 5000
    stop_s: float = 25.0

    def check(self) -> None:
        if min(self.poll_s, self.flush_s) <= 0 or self.stop_s < 0:
            raise ValueError("pollS and flushS must be above 0, stopS not negative")
        if min(self.flush_lines, self.buffer_lines, self.buffer_bytes, self.kept_lines) < 1:
            raise ValueError("flushLines, bufferLines, bufferBytes and keptLines must be at least 1")


class Worker:
    """``run`` until ``stop``. Cancelling ``run`` is a kill: nothing is handed in or back."""

    def __init__(
        self, store: Store, inputs: Inputs, sender: Sender, pacer: Pacer, leases: Leases, *,
        metrics: Metrics | None = None, planner: Planner | None = None, settings: WorkerSettings | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self._store, self._inputs, self._sender, self._pacer, self._leases = store, inputs, sender, pacer, leases
        self.metrics = metrics or Metrics()
        self.planner = planner or Planner()
        self._settings, self._clock = settings or WorkerSettings(), clock
        self._held: set[Held] = set()
        self._buffer = Buffer()
        self._running: dict[str, dict[Flight, Held]] = defaultdict(dict)
        self._kept = 0
        """Finished lines that are not written."""
        self._looked_s = float("-inf")
        self._hungry, self._full, self._stop = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.metrics.watch(self._view)

    @property
    def in_flight(self) -> int:
        return sum(map(len, self._running.values()))

    def _view(self) -> View:
        """For metrics, when they are asked for."""
        rows, now_s = self.planner.rows(), self._clock()
        flights = Counter((model, flight.endpoint) for model, of in self._running.items() for flight in of)
        speeds = {row.model: self.planner.speeds.lines_s(row.model) for row in rows}
        return View(rows, self.planner.slacks(now_s), speeds, flights, self._kept, self._pacer.standings())

    async def run(self) -> None:
        await self._pacer.open()
        try:
            async with asyncio.TaskGroup() as group:
                loops = (self._leases.run(), self._claiming(), self._starting(), self._writing())
                tasks = [group.create_task(loop) for loop in loops]
                await self._stop.wait()
                await self._wind_down()
                for task in tasks:
                    task.cancel()
        finally:
            lines = [task for held in self._held for task in held.flights.values()]
            self._held.clear()
            for task in lines:
                task.cancel()
            await asyncio.gather(*lines, return_exceptions=True)
            await self._pacer.close()

    def stop(self) -> None:
        """Refuse new work, finish what runs, hand in results, hand back the rest; each within its bound."""
        self._stop.set()

    # Claiming

    async def _claiming(self) -> None:
        while not self._stop.is_set():
            try:
                await self._claim()
            except StoreUnavailable as e:
                log.warning("no claims: %s", e)
                await asyncio.sleep(self._settings.poll_s)
            await _either(self._hungry, self._settings.poll_s)
            self._hungry.clear()

    async def _claim(self) -> None:
        now_s = self._clock()
        if now_s - self._looked_s >= self._settings.poll_s:
            self.planner.see(await self._store.waiting(now_s), now_s)
            self._looked_s = now_s
        for model in self.planner.models():
            while self._wants(model) and (row := self.planner.choose(model, self._prefixes(model), self._clock())):
                leases = self._leases
                claim = await self._store.claim_chunk(row.batch_id, model, leases.worker, self._clock(), leases.lease_s)
                lines = claim.chunk.stop - claim.chunk.start - len(claim.done) if claim else 0
                self.planner.claimed(row, lines, self._clock())
                if claim is not None:
                    await self._take(claim)

    def _wants(self, model: str) -> bool:
        """As many lines wait as run, so that what ends is replaced at once, and a chunk at least to choose from."""
        if self._stop.is_set() or self._buffer.bytes >= self._settings.buffer_bytes or self._choked:
            return False
        most = max(CHUNK_LINES, len(self._running[model]))
        return self._buffer.count(model) < min(self._settings.buffer_lines, most)

    @property
    def _choked(self) -> bool:
        return self._kept >= self._settings.kept_lines

    def _prefixes(self, model: str) -> set[int]:
        return {flight.call.prefix for flight in self._running[model]}

    async def _take(self, claim: Claim) -> None:
        """A claimed chunk's lines into the buffer, or the chunk back. Raises StoreUnavailable."""
        for older in [one for one in self._held if one.claim.chunk.number == claim.chunk.number]:
            if older.claim.batch.id == claim.batch.id:
                self._drop(older)  # our own lease on it ran out unheard
        held = Held(claim)
        if claim.chunk.attempts:
            self.metrics.recoveries.labels("in_progress", "resumed").inc()
        self._held.add(held)
        self._leases.hold(claim, lost=lambda: self._drop(held), ended=lambda: self._end(held))
        try:
            calls = await self._inputs.calls(claim)
        except (BlobMissing, msgspec.DecodeError, ValueError) as e:
            self._forget(held)
            await self._fail(claim, e)
        except (BlobError, StoreUnavailable) as e:
            log.warning("batch %s waits for its input file: %s", claim.batch.id, e)
            self._forget(held)
            await self._store.release_chunk(claim, self._clock() + BLOBS_AGAIN_S)
        else:
            self._spread(held, calls)

    async def _fail(self, claim: Claim, why: Exception) -> None:
        log.error("batch %s cannot be read: %s", claim.batch.id, why)
        error = LineError("input_file_unreadable", f"The input file can no longer be read: {why}")
        await self._store.end_batch(claim.batch.id, "failed", self._clock(), [error])
        await self._store.release_chunk(claim)

    def _spread(self, held: Held, calls: Sequence[Call]) -> None:
        if held not in self._held:
            return
        if self._stop.is_set():
            self._end(held)
        elif held.claim.chunk.attempts >= MAX_ATTEMPTS:
            for call in calls:
                self._finish(held, results.unanswered(call.batch_id, call.line, call.custom_id, results.FAILED))
        elif not held.over:
            for call in calls:
                self._buffer.put(Flight(call, held.claim.epoch), held)
        self._pacer.changed.set()

    # Starting

    async def _starting(self) -> None:
        while True:
            self._pacer.changed.clear()
            for model, running in list(self._running.items()):
                self._abort(model, running)
            if not self._stop.is_set() and not self._choked:
                for model in self._buffer.models():
                    self._start(model)
            await _either(self._pacer.changed, LOOK_S)

    def _abort(self, model: str, running: dict[Flight, Held]) -> None:
        keys = set(self._pacer.aborts(model))
        for flight, held in list(running.items()) if keys else ():
            if flight.key in keys:
                self.metrics.aborted(flight)
                held.flights[flight].cancel()

    def _start(self, model: str) -> None:
        starts = self._pacer.starts(model, self._buffer.flights(model))
        taken = self._buffer.take(model, [start.position for start in starts])
        for start, (flight, held) in zip(starts, taken, strict=True):
            flight.endpoint = start.endpoint
            self._running[model][flight] = held
            self._pacer.started(flight)
            held.flights[flight] = asyncio.create_task(self._line(flight, held))
        if starts:
            self._hungry.set()

    async def _line(self, flight: Flight, held: Held) -> None:
        """One line in flight, from its start to its result or back into the buffer."""
        began_s, call, result, again_s = self._clock(), flight.call, None, 0.0
        try:
            if await self._pacer.admit(flight):
                result = await self._sender.send(flight, self)
            else:
                again_s = ADMIT_AGAIN_S
        except asyncio.CancelledError:
            log.debug("batch %s: line %d cut after %d tokens", call.batch_id, call.line, flight.tokens)
        except Exception:
            log.exception("batch %s: line %d", call.batch_id, call.line)
            error = ("UNKNOWN", "The batch gateway failed on this request.")
            result = results.unanswered(call.batch_id, call.line, call.custom_id, error)
        del self._running[call.model][flight], held.flights[flight]
        self._pacer.ended(flight, aborted=result is None)
        self._pacer.changed.set()
        if held not in self._held:
            return
        if result is not None:
            self._finish(held, result)
            self.metrics.answered(call.model, result.ok, result.usage, self._clock() - began_s)
        elif not held.over:
            asyncio.get_running_loop().call_later(again_s, self._put_back, flight, held)
        if held.over:
            self._full.set()

    def _put_back(self, flight: Flight, held: Held) -> None:
        if held in self._held and not held.over:
            self._buffer.put(flight, held)
            self._pacer.changed.set()

    def tokens(self, flight: Flight, count: int) -> None:
        self.metrics.came(flight.call.model, count)
        self._pacer.tokens(flight, count)

    def answered(self, flight: Flight, status: int | None, reason: str, retry_after_s: float | None) -> None:
        if status is None or status >= 400:
            self.metrics.refused(flight, status, reason)
        self._pacer.answered(flight, status, reason, retry_after_s)

    # Writing

    def _finish(self, held: Held, result: Result) -> None:
        held.finished.append(result)
        self._kept += 1
        if len(held.finished) >= min(self._settings.flush_lines, held.left):
            self._full.set()

    async def _writing(self) -> None:
        while True:
            await _either(self._full, self._settings.flush_s)
            self._full.clear()
            try:
                for held in list(self._held):
                    await self._hand_in(held)
            except StoreUnavailable as e:
                log.warning("%d finished lines wait to be written: %s", self._kept, e)
                await asyncio.sleep(self._settings.flush_s)

    async def _hand_in(self, held: Held) -> None:
        """Writes what is finished; a chunk with nothing left to do is let go. Raises StoreUnavailable."""
        if held.finished and not await self._write(held):
            return
        if not held.left:
            self._forget(held)
        elif held.over and not held.flights and not held.finished:
            await self._store.release_chunk(held.claim)
            self._forget(held)

    async def _write(self, held: Held) -> bool:
        """False when the lease is lost. Raises StoreUnavailable, and the lines are kept."""
        finished, held.finished = held.finished, []
        try:
            await self._store.add_results(held.claim, finished, self._clock())
        except LeaseLost:
            self._kept -= len(finished)
            self._drop(held)
            return False
        except StoreUnavailable:
            held.finished = finished + held.finished
            raise
        self._kept -= len(finished)
        held.left -= len(finished)
        return True

    # Letting go

    def _end(self, held: Held) -> None:
        """Its batch is ending: no line of it starts any more, those that run are cut, what is finished counts."""
        held.over = True
        self._buffer.drop(held)
        held.cut()
        self._full.set()

    def _drop(self, held: Held) -> None:
        """It is another's: nothing of it counts any more."""
        if held not in self._held:
            return
        log.warning("batch %s: chunk %d is another worker's now", held.claim.batch.id, held.claim.chunk.number)
        self.metrics.lost_leases.inc()
        self._kept -= len(held.finished)
        held.finished = []
        self._forget(held)
        self._buffer.drop(held)
        held.cut()

    def _forget(self, held: Held) -> None:
        self._held.discard(held)
        self._leases.let_go(held.claim)

    async def _wind_down(self) -> None:
        """Nothing new starts (the loops see the stop); heartbeats go on until the end."""
        deadline_s = self._clock() + self._settings.stop_s
        while self.in_flight and self._clock() < deadline_s:
            await asyncio.sleep(LOOK_S)
        for held in list(self._held):
            self._end(held)
        with contextlib.suppress(StoreUnavailable, TimeoutError):
            async with asyncio.timeout(max(5.0, self._settings.stop_s)):
                while self._held:
                    await asyncio.sleep(WIND_DOWN_LOOK_S)


async def _either(event: asyncio.Event, wait_s: float) -> None:
    """Until the event, or for so long."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(wait_s):
            await event.wait()
