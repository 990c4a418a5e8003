"""The trainer in a process of its own, so that a fit never delays a decision: the child, and the client that owns it.

They speak in ``frames`` over the child's pipes. The child ends when its input does, so it never outlives its parent.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from llmd_sched.predict.frames import Batch, Frames, Report, Start, frame
from llmd_sched.predict.model import BadModel, Model
from llmd_sched.types import Sample

if TYPE_CHECKING:
    from llmd_sched.predict.inline import InlineTrainer

_READ_BYTES = 1 << 16
_log = logging.getLogger(__name__)


# ---------------------------------------------------------------------------------------------------- the child


def run_child(stdin_fd: int = 0, stdout_fd: int = 1) -> None:
    """Read samples and write models until the input ends. Logs go to stderr."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes our input
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s trainer %(levelname)s %(message)s")
    with contextlib.suppress(OSError):
        os.nice(10)
    frames, child = Frames(), _Child()
    while True:
        if select.select([stdin_fd], [], [], 0.1)[0]:
            data = os.read(stdin_fd, _READ_BYTES)
            if not data:
                return
            for body in frames.feed(data):
                child.hear(body)
        report = child.refit(time.monotonic())
        if report is not None:
            try:
                _write_all(stdout_fd, frame(report))
            except BrokenPipeError:
                return


class _Child:
    """An InlineTrainer behind frames, on which a fit that fails is a number and not the end."""

    def __init__(self) -> None:
        self._decoder = msgspec.msgpack.Decoder(Start | Batch)
        self._trainer: InlineTrainer | None = None
        self._failed = 0

    def hear(self, body: bytes) -> None:
        """Take in one frame from the parent; the first must be a Start."""
        from llmd_sched.predict.inline import InlineTrainer  # LightGBM takes a second to import: not in the parent

        message = self._decoder.decode(body)
        if isinstance(message, Start):
            self._trainer = InlineTrainer(
                Model.from_bytes(message.model),
                interval_s=message.interval_s,
                first_samples=message.first_samples,
                least_new=message.least_new,
            )
        elif self._trainer is not None:
            for sample in message.samples:
                self._trainer.add(sample)

    def refit(self, now_s: float) -> Report | None:
        """Refit if it is due, and say what came of it."""
        trainer = self._trainer
        if trainer is None or not trainer.due(now_s):
            return None
        begin_s, model = time.process_time(), None
        try:
            model = trainer.tick(now_s)
        except Exception:  # one window that cannot be fitted must not end the trainer: the next may be sound
            self._failed += 1
            _log.exception("a fit failed; the model in use stays")
        return Report(
            model=model.to_bytes() if model else None,
            samples=trainer.samples,
            refused=trainer.refused,
            rejected=trainer.rejected,
            failed=self._failed,
            fit_cpu_ms=1e3 * (time.process_time() - begin_s),
        )


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


# --------------------------------------------------------------------------------------------------- the client


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


class TrainerProcess:
    """Owns the child: feeds it, publishes what it returns as ``model``, starts it again when it dies.

    The counters are plain numbers for a collector to read.
    """

    def __init__(
        self,
        model: Model | None = None,
        on_model: Callable[[Model], None] | None = None,
        settings: Settings | None = None,
    ) -> None:
        self.model = model or Model.cold()
        self.restarts = 0
        self.published = 0
        self.rejected = 0
        self.refused = 0
        self.failed_fits = 0
        self.samples_sent = 0
        self.samples_dropped = 0
        self.fit_cpu_ms = 0.0
        """Of the last fit."""
        self._settings = settings or Settings()
        self._on_model = on_model
        self._buffer: deque[Sample] = deque()
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

    async def stop(self, timeout_s: float = 2.0) -> None:
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
            "llmd_sched.predict.trainer",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        settings = self._settings
        start = Start(self.model.to_bytes(), settings.interval_s, settings.first_samples, settings.least_new)
        if self._child.stdin:
            self._child.stdin.write(frame(start))

    async def _serve_child(self) -> None:
        """Send and receive until either side of the child's pipes breaks."""
        both = [asyncio.ensure_future(self._send()), asyncio.ensure_future(self._receive())]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in both:
                task.cancel()
            for result in await asyncio.gather(*both, return_exceptions=True):
                if isinstance(result, Exception) and not isinstance(result, OSError):
                    _log.error("lost touch with the trainer: %s", result)

    async def _send(self) -> None:
        assert self._child is not None
        assert self._child.stdin is not None
        while True:
            if self._buffer:
                batch = [self._buffer.popleft() for _ in range(min(len(self._buffer), 1000))]
                try:
                    self._child.stdin.write(frame(Batch(batch)))
                    await self._child.stdin.drain()
                except BaseException:
                    self.samples_dropped += len(batch)
                    raise
                self.samples_sent += len(batch)
            await asyncio.sleep(self._settings.flush_s if len(self._buffer) < 1000 else 0.0)

    async def _receive(self) -> None:
        assert self._child is not None
        assert self._child.stdout is not None
        frames, decoder = Frames(), msgspec.msgpack.Decoder(Report)
        base = self.refused, self.rejected, self.failed_fits
        while data := await self._child.stdout.read(_READ_BYTES):
            for report in map(decoder.decode, frames.feed(data)):
                self.refused, self.rejected, self.failed_fits = (
                    total + more
                    for total, more in zip(base, (report.refused, report.rejected, report.failed), strict=True)
                )
                self.fit_cpu_ms = report.fit_cpu_ms
                if report.model is not None:
                    self._publish(report.model)

    def _publish(self, blob: bytes) -> None:
        try:
            model = Model.from_bytes(blob)
        except BadModel:
            _log.exception("the trainer sent a model that cannot be read; the one in use stays")
            return
        self.model = model
        self.published += 1
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


if __name__ == "__main__":
    run_child()
