import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable

import numpy as np
import pytest

from llmd_sched.predict import features as f
from llmd_sched.predict.frames import MAX_FRAME_BYTES, Batch, Frames, frame
from llmd_sched.predict.model import Model
from llmd_sched.predict.trainer import Settings, TrainerProcess
from llmd_sched.types import Sample

PATIENCE_S = 30.0
QUICK = Settings(interval_s=0.05, flush_s=0.01, backoff_s=0.05)


def samples(count: int, slowdown: float = 1.0) -> list[Sample]:
    rng = np.random.default_rng(count)
    made = []
    for number in range(count):
        row = np.zeros(len(f.FEATURES))
        row[f.INPUT] = row[f.UNCACHED] = rng.uniform(50, 4000)
        row[f.RUNNING] = rng.integers(0, 40)
        ttft_ms = slowdown * (30.0 + 0.05 * row[f.UNCACHED])
        made.append(Sample(tuple(row.tolist()), ttft_ms, 10.0 + 0.1 * row[f.RUNNING], 0.0, 0.0, 0, float(number)))
    return made


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.01)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.fixture
async def trainer() -> AsyncIterator[TrainerProcess]:
    process = TrainerProcess(settings=QUICK)
    await process.start()
    yield process
    await process.stop()


async def test_the_child_publishes_once_the_first_samples_arrived(trainer: TrainerProcess) -> None:
    for sample in samples(50):
        trainer.add(sample)
    await until(lambda: trainer.published >= 1)
    assert trainer.model.version == 1
    assert trainer.model.samples == 50
    assert trainer.samples_sent == 50
    row = np.zeros((1, len(f.FEATURES)))
    row[0, [f.INPUT, f.UNCACHED]] = 1000.0
    assert trainer.model.predict(row)[0][0] == pytest.approx(80.0, rel=0.15)


async def test_the_version_in_use_is_told_to_whoever_asked() -> None:
    seen: list[int] = []
    trainer = TrainerProcess(on_model=lambda model: seen.append(model.version), settings=QUICK)
    await trainer.start()
    for sample in samples(100):
        trainer.add(sample)
    await until(lambda: trainer.samples_sent == 100 and bool(seen))
    for sample in samples(100):
        trainer.add(sample)
    await until(lambda: len(seen) >= 2)
    await trainer.stop()
    assert seen == sorted(set(seen))


async def test_a_killed_child_is_started_again_and_goes_on_from_the_last_model(trainer: TrainerProcess) -> None:
    for sample in samples(60):
        trainer.add(sample)
    await until(lambda: trainer.published >= 1)
    version, victim = trainer.model.version, trainer.pid
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    await until(lambda: trainer.restarts == 1 and trainer.pid not in (None, victim))
    assert trainer.model.version == version
    for sample in samples(300, slowdown=2.0):
        trainer.add(sample)
    await until(lambda: trainer.published >= 2)
    assert trainer.model.version > version


async def test_stop_ends_the_child_and_may_be_called_twice() -> None:
    trainer = TrainerProcess(settings=QUICK)
    await trainer.start()
    pid = trainer.pid
    assert pid is not None
    await trainer.stop()
    await trainer.stop()
    assert gone(pid)
    assert trainer.pid is None
    assert trainer.restarts == 0


async def test_a_child_that_hangs_is_killed_when_stopped() -> None:
    trainer = TrainerProcess(settings=QUICK)
    await trainer.start()
    pid = trainer.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    await trainer.stop(timeout_s=0.1)
    assert gone(pid)


async def test_the_buffer_is_bounded_and_drops_are_counted() -> None:
    trainer = TrainerProcess(settings=Settings(buffer=10))
    for sample in samples(25):
        trainer.add(sample)
    assert trainer.samples_dropped == 15
    await trainer.stop()


def test_the_child_ends_when_its_input_ends() -> None:
    child = subprocess.run(
        [sys.executable, "-m", "llmd_sched.predict.trainer"], input=b"", capture_output=True, timeout=PATIENCE_S
    )
    assert (child.returncode, child.stdout) == (0, b"")


def test_frames_survive_any_cutting() -> None:
    stream = frame(Batch(samples(3))) + frame(Batch([]))
    for size in (1, 3, 7, len(stream)):
        cutter = Frames()
        bodies = [body for at in range(0, len(stream), size) for body in cutter.feed(stream[at : at + size])]
        assert b"".join(len(body).to_bytes(4, "big") + body for body in bodies) == stream


def test_an_absurd_length_is_refused_before_it_is_awaited() -> None:
    with pytest.raises(ValueError, match="allowed"):
        Frames().feed((MAX_FRAME_BYTES + 1).to_bytes(4, "big"))


async def test_nothing_is_lost_on_the_first_model_when_started_warm() -> None:
    warm = TrainerProcess(Model.cold("llama-3-8b-h100"), settings=QUICK)
    assert warm.model.preset == "llama-3-8b-h100"
    await warm.start()
    for sample in samples(50):
        warm.add(sample)
    await until(lambda: warm.published >= 1)
    await warm.stop()
    assert warm.model.preset == "llama-3-8b-h100"
