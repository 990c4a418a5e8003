"""The trainer's own process: reads samples from its input, writes models and signs of life to its output.

It ends when its input does, so it never outlives its parent, and keeps what it knows in the state file on the way out.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import get_args

import msgspec

from llmd_sched.predict import state
from llmd_sched.predict.base import TargetName
from llmd_sched.predict.frames import HEARTBEAT_S, Batch, Forget, Frames, Held, Report, Start, frame
from llmd_sched.predict.inline import InlineTrainer
from llmd_sched.predict.model import Model

LOOK_S = 0.1
SAVE_EVERY_S = 30.0
REST_SHARE = 3.0
"""After a fit, rest this many times as long as it took: training takes a quarter of a core at most."""
MAX_MEMORY_BYTES = 4 << 30
"""Of address space beyond what the imports took; a fit that wants more fails alone, instead of the machine."""

_READ_BYTES = 1 << 16
_log = logging.getLogger(__name__)


def run(stdin_fd: int = 0, stdout_fd: int = 1) -> None:
    """Until the input ends. Logs go to stderr."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes our input
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s trainer %(levelname)s %(message)s")
    _be_modest()
    frames, child = Frames(), Child()
    while True:
        if select.select([stdin_fd], [], [], LOOK_S)[0]:
            data = os.read(stdin_fd, _READ_BYTES)
            if not data:
                break
            for body in frames.feed(data):
                child.hear(body)
        report = child.work(time.monotonic())
        if report is not None:
            try:
                _write_all(stdout_fd, frame(report))
            except BrokenPipeError:
                break
    child.save(time.monotonic())


def _be_modest() -> None:
    """Less important than the scheduler: to the CPU, to the kernel out of memory, and bounded in memory itself."""
    with contextlib.suppress(OSError, AttributeError):
        # Nice 10 still takes slices of 4 ms from a scheduler that has to share its core; idle priority starves.
        os.nice(19)
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MAX_MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


class Child:
    """An InlineTrainer behind frames, on which a fit that fails is a number and not the end."""

    def __init__(self) -> None:
        self._decoder = msgspec.msgpack.Decoder(Start | Batch | Forget)
        self._trainer: InlineTrainer | None = None
        self._path: Path | None = None
        self._saved_samples = 0
        self._failed = 0
        self._fit_cpu_ms = 0.0
        self._rest_until_s = self._save_at_s = self._report_at_s = float("-inf")

    def hear(self, body: bytes) -> None:
        """Take in one frame from the parent; the first must be a Start."""
        message = self._decoder.decode(body)
        if isinstance(message, Start):
            self._start(message)
        elif self._trainer is None:
            return
        elif isinstance(message, Forget):
            self._trainer.forget()
            self._saved_samples = -1  # what is on disk must go too
        else:
            self._trainer.classes = message.classes
            for sample in message.samples:
                self._trainer.add(sample)

    def _start(self, start: Start) -> None:
        self._path = Path(start.state_path) if start.state_path else None
        window = None
        if self._path is not None:
            with contextlib.suppress(state.BadState):  # the parent looked first and has said so
                found = state.load(self._path, time.monotonic(), time.time())
                window = found.window() if found else None
        self._trainer = InlineTrainer(
            Model.from_bytes(start.model),
            window,
            interval_s=start.interval_s,
            first_samples=start.first_samples,
            least_new=start.least_new,
        )

    def work(self, now_s: float) -> Report | None:
        """Refit and save if it is time; what is to be reported, if anything."""
        trainer = self._trainer
        if trainer is None:
            return None
        model = self._refit(trainer, now_s) if trainer.due(now_s) and now_s >= self._rest_until_s else None
        if now_s >= self._save_at_s:
            self._save_at_s = now_s + SAVE_EVERY_S
            self.save(now_s)
        if model is None and now_s < self._report_at_s:
            return None
        self._report_at_s = now_s + HEARTBEAT_S
        counts = msgspec.structs.replace(trainer.counts, refused=trainer.window.refused, failed=self._failed)
        held = {name: _held(trainer, name) for name in get_args(TargetName)}
        return Report(model.to_bytes() if model else None, counts, held, self._fit_cpu_ms)

    def _refit(self, trainer: InlineTrainer, now_s: float) -> Model | None:
        begin_s, model = time.process_time(), None
        try:
            model = trainer.tick(now_s)
        except Exception:  # one window that cannot be fitted must not end the trainer: the next may be sound
            self._failed += 1
            _log.exception("a fit failed; the model in use stays")
        spent_s = time.process_time() - begin_s
        self._fit_cpu_ms = 1e3 * spent_s
        self._rest_until_s = now_s + (1.0 + REST_SHARE) * spent_s
        self._report_at_s = now_s  # whatever came of it is news
        return model

    def save(self, now_s: float) -> None:
        """Keep the state if there is anything new in it. A disk that refuses costs a line in the log."""
        trainer = self._trainer
        if trainer is None or self._path is None or trainer.counts.samples == self._saved_samples:
            return
        self._saved_samples = trainer.counts.samples
        # Rows may be of a class that appeared after the last fit; a restart must give it the same number.
        model = msgspec.structs.replace(trainer.model, classes=trainer.classes)
        try:
            state.save(self._path, model, trainer.window, now_s, time.time())
        except OSError as e:
            _log.warning("cannot save the predictor's state: %s", e)


def _held(trainer: InlineTrainer, name: TargetName) -> Held:
    oldest_s, newest_s = trainer.window.span_s(name)
    return Held(trainer.window.rows_by_class(name), oldest_s, newest_s)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


if __name__ == "__main__":
    run()
