"""The trainer in a process of its own, so that a fit never delays a decision: the client that owns it.

They speak in ``frames`` over the child's pipes; ``child`` is the other end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec

from llmd_sched.predict.frames import Batch, Counts, Forget, Frames, Held, Report, Start, frame
from llmd_sched.predict.model import BadModel, Model
from llmd_sched.types import Sample

_READ_BYTES = 1 << 16
_log = logging.getLogger(__name__)


class Settings(NamedTuple):
    """How the trainer runs; every time in seconds."""

    interval_s: float = 1.0
    first_samples: int = 50
    least_new: int = 20
    flush_s: float = 0.1
    buffer: int = 20_000
    """Samples waiting to be sent; the oldest are dropped beyond it."""
    backoff_s: float = 0.5
    backoff_max_s: float = 30.0
    healthy_s: float = 10.0
    """A child that lived this long starts the back-off anew."""
    hung_s: float = 60.0
    """A child that says nothing for this long is killed and started again."""


class TrainerProcess:
    """Owns the child: feeds it, publishes what it returns as ``model``, starts it again when it dies or hangs.

    The counters are plain numbers for a collector to read.
    """

    def __init__(
        self,
        model: Model | None = None,
        on_model: Callable[[Model], None] | None = None,
        settings: Settings | None = None,
        *,
        classes: Callable[[], tuple[str, ...]] | None = None,
        state_path: Path | None = None,
    ) -> None:
        """``classes`` tells the names of the engine classes in the rows, by number (default: the model's)."""
        self.model = model or Model.cold()
        self.restarts = 0
        self.counts = Counts()
        """Of this child and those before it."""
        self.held: dict[str, Held] = {}
        """What its window holds, by target."""
        self.samples_sent = 0
        self.samples_dropped = 0
        self.fit_cpu_ms = 0.0
        """Of the last fit."""
        self._settings = settings or Settings()
        self._on_model = on_model
        self._classes = classes or (lambda: self.model.classes)
        self._state_path = state_path
        self._buffer: deque[Sample] = deque()
        self._forget = False
        self._child: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The child's process id; None while none runs."""
        return self._child.pid if self._child and self._child.returncode is None else None

    async def start(self) -> None:
        """Start the child; returns once it runs (its first model comes with its first samples)."""
        if self._supervisor is None:
            await self._spawn()
            self._supervisor = asyncio.create_task(self._supervise(), name="trainer")

    def add(self, sample: Sample) -> None:
        """Queue a sample for the child. Never blocks; beyond the buffer's bound the oldest is dropped."""
        if len(self._buffer) >= self._settings.buffer:
            self._buffer.popleft()
            self.samples_dropped += 1
        self._buffer.append(sample)

    def forget(self) -> None:
        """Drop what waits to be sent, and have the child empty its window. The model stays."""
        self._buffer.clear()
        self._forget = True

    async def stop(self, timeout_s: float = 5.0) -> None:
        """End the child: first by closing its input, after ``timeout_s`` by killing it. May be called twice."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
            self._supervisor = None
        await self._end_child(timeout_s)

    async def _supervise(self) -> None:
        backoff_s = self._settings.backoff_s
        while True:
            began_s = time.monotonic()
            await self._serve_child()
            await self._end_child(0.0)
            if time.monotonic() - began_s >= self._settings.healthy_s:
                backoff_s = self._settings.backoff_s
            _log.warning("the trainer died; starting it again in %.1f s", backoff_s)
            while True:
                await asyncio.sleep(backoff_s)
                backoff_s = min(2.0 * backoff_s, self._settings.backoff_max_s)
                self.restarts += 1
                try:
                    await self._spawn()
                    break
                except OSError:  # out of processes or memory: not for ever
                    _log.exception("the trainer cannot be started; next try in %.1f s", backoff_s)

    async def _spawn(self) -> None:
        self._child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "llmd_sched.predict.child",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        settings = self._settings
        start = Start(
            self.model.to_bytes(),
            settings.interval_s,
            settings.first_samples,
            settings.least_new,
            str(self._state_path or ""),
        )
        if self._child.stdin:
            self._child.stdin.write(frame(start))

    async def _serve_child(self) -> None:
        """Send and receive until either side of the child's pipes breaks, or the child falls silent."""
        both = [asyncio.ensure_future(self._send()), asyncio.ensure_future(self._receive())]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in both:
                task.cancel()
            for result in await asyncio.gather(*both, return_exceptions=True):
                if isinstance(result, TimeoutError):
                    _log.warning("the trainer has been silent for %g s; killing it", self._settings.hung_s)
                elif isinstance(result, Exception) and not isinstance(result, OSError):
                    _log.error("lost touch with the trainer: %s", result)

    async def _send(self) -> None:
        assert self._child is not None
        assert self._child.stdin is not None
        while True:
            if self._forget:
                self._forget = False
                self._child.stdin.write(frame(Forget()))
            if self._buffer:
                batch = [self._buffer.popleft() for _ in range(min(len(self._buffer), 1000))]
                try:
                    self._child.stdin.write(frame(Batch(batch, self._classes())))
                    await self._child.stdin.drain()
                except BaseException:
                    self.samples_dropped += len(batch)
                    raise
                self.samples_sent += len(batch)
            await asyncio.sleep(self._settings.flush_s if len(self._buffer) < 1000 else 0.0)

    async def _receive(self) -> None:
        """Ends when the child's output does; TimeoutError when nothing comes for ``hung_s``."""
        assert self._child is not None
        assert self._child.stdout is not None
        frames, decoder = Frames(), msgspec.msgpack.Decoder(Report)
        before = self.counts
        while True:
            data = await asyncio.wait_for(self._child.stdout.read(_READ_BYTES), self._settings.hung_s)
            if not data:
                return
            for report in map(decoder.decode, frames.feed(data)):
                self.counts, self.held = before + report.counts, report.held
                self.fit_cpu_ms = report.fit_cpu_ms or self.fit_cpu_ms
                if report.model is not None:
                    self._publish(report.model)

    def _publish(self, blob: bytes) -> None:
        try:
            model = Model.from_bytes(blob)
        except BadModel:
            _log.exception("the trainer sent a model that cannot be read; the one in use stays")
            return
        self.model = model
        if self._on_model is not None:
            self._on_model(model)

    async def _end_child(self, grace_s: float) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        if child.stdin is not None:
            child.stdin.close()
        try:
            await asyncio.wait_for(child.wait(), max(grace_s, 0.05))
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()
