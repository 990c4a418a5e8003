import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from llmd_sched.predict import features as f
from llmd_sched.predict import state
from llmd_sched.predict.frames import MAX_FRAME_BYTES, Batch, Counts, Frames, Report, Start, frame
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
    await until(lambda: trainer.counts.published >= 1)
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
    await until(lambda: trainer.counts.published >= 1)
    version, victim = trainer.model.version, trainer.pid
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    await until(lambda: trainer.restarts == 1 and trainer.pid not in (None, victim))
    assert trainer.model.version == version
    for sample in samples(300, slowdown=2.0):
        trainer.add(sample)
    await until(lambda: trainer.counts.published >= 2)
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
        [sys.executable, "-m", "llmd_sched.predict.child"], input=b"", capture_output=True, timeout=PATIENCE_S
    )
    assert (child.returncode, child.stdout) == (0, b"")


def test_frames_survive_any_cutting() -> None:
    stream = frame(Batch(samples(3), ("",))) + frame(Batch([], ("",)))
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
    await until(lambda: warm.counts.published >= 1)
    await warm.stop()
    assert warm.model.preset == "llama-3-8b-h100"


async def test_a_child_that_hangs_is_noticed_killed_and_started_again() -> None:
    trainer = TrainerProcess(settings=QUICK._replace(hung_s=5.0))
    await trainer.start()
    for sample in samples(60):
        trainer.add(sample)
    await until(lambda: trainer.counts.published >= 1)
    version, hung = trainer.model.version, trainer.pid
    assert hung is not None
    os.kill(hung, signal.SIGSTOP)
    await until(lambda: trainer.restarts == 1 and trainer.pid not in (None, hung))
    assert gone(hung)
    assert trainer.model.version == version
    assert trainer.counts.published >= 1  # totals outlive the child
    await trainer.stop()


async def test_an_idle_child_gives_signs_of_life(trainer: TrainerProcess) -> None:
    await until(lambda: set(trainer.held) == {"ttft", "tpot"})
    assert trainer.held["ttft"].rows == 0


async def test_the_child_tells_what_its_window_holds_and_forgets_it_when_told(trainer: TrainerProcess) -> None:
    for sample in samples(70):
        trainer.add(sample)
    await until(lambda: trainer.counts.published >= 1)
    await until(lambda: trainer.held["ttft"].rows == 70)
    assert trainer.held["ttft"].rows_by_class == {0: 70}
    assert (trainer.held["ttft"].oldest_s, trainer.held["ttft"].newest_s) == (0.0, 69.0)
    trainer.forget()
    await until(lambda: trainer.held["ttft"].rows == 0)
    assert trainer.model.version >= 1


async def test_names_of_engine_classes_travel_with_the_samples() -> None:
    trainer = TrainerProcess(settings=QUICK, classes=lambda: ("", "H100"))
    await trainer.start()
    for sample in samples(50):
        trainer.add(sample)
    await until(lambda: trainer.counts.published >= 1)
    await trainer.stop()
    assert trainer.model.classes == ("", "H100")


async def test_window_and_model_outlive_the_process(tmp_path: Path) -> None:
    path = tmp_path / "p.predictor-state"
    first = TrainerProcess(settings=QUICK, state_path=path)
    await first.start()
    for sample in samples(80):
        first.add(sample)
    await until(lambda: first.counts.published >= 1 and first.held["ttft"].rows == 80)
    await first.stop()
    found = state.load(path, time.monotonic(), time.time())
    assert found is not None
    assert found.model.version == first.model.version
    second = TrainerProcess(found.model, settings=QUICK, state_path=path)
    await second.start()
    await until(lambda: bool(second.held) and second.held["ttft"].rows == 80)
    await second.stop()


async def test_an_engine_class_without_a_fit_yet_keeps_its_number_over_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "p.predictor-state"
    trainer = TrainerProcess(settings=QUICK, classes=lambda: ("", "H100", "L40S"), state_path=path)
    await trainer.start()
    for sample in samples(10):  # too few for a fit
        trainer.add(sample)
    await until(lambda: trainer.samples_sent == 10)
    await trainer.stop()
    found = state.load(path, time.monotonic(), time.time())
    assert found is not None
    assert (found.model.version, found.model.classes) == (0, ("", "H100", "L40S"))


async def test_what_was_forgotten_does_not_come_back_with_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "p.predictor-state"
    trainer = TrainerProcess(settings=QUICK, state_path=path)
    await trainer.start()
    for sample in samples(70):
        trainer.add(sample)
    await until(lambda: bool(trainer.held) and trainer.held["ttft"].rows == 70)
    trainer.forget()
    await until(lambda: trainer.held["ttft"].rows == 0)
    await trainer.stop()
    found = state.load(path, time.monotonic(), time.time())
    assert found is not None
    assert found.window().size("ttft") == 0


async def test_a_damaged_state_does_not_keep_the_child_from_starting(tmp_path: Path) -> None:
    path = tmp_path / "p.predictor-state"
    path.write_bytes(b"not a state")
    trainer = TrainerProcess(settings=QUICK, state_path=path)
    await trainer.start()
    for sample in samples(50):
        trainer.add(sample)
    await until(lambda: trainer.counts.published >= 1)
    assert trainer.restarts == 0
    await trainer.stop()
    assert state.load(path, time.monotonic(), time.time()) is not None  # replaced by a sound one


async def test_a_fit_that_runs_out_of_memory_is_counted_and_the_child_goes_on() -> None:
    code = (
        "from llmd_sched.predict import child, inline\n"
        "fit, calls = inline.next_model, []\n"
        "def starved(*args, **named):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 1:\n"
        "        bytearray(64 << 30)\n"
        "    return fit(*args, **named)\n"
        "inline.next_model = starved\n"
        "child.run()\n"
    )
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(frame(Start(Model.cold().to_bytes(), 0.0, 50, 20)))
    frames, counts, sent = Frames(), Counts(), samples(100)
    async with asyncio.timeout(PATIENCE_S):
        for begin in (0, 50):
            child.stdin.write(frame(Batch(sent[begin : begin + 50], ("",))))
            while counts.fits + counts.failed < 1 + begin // 50:
                for body in frames.feed(await child.stdout.read(1 << 16)):
                    counts = msgspec.msgpack.decode(body, type=Report).counts
        child.stdin.close()
        await child.wait()
    assert (counts.failed, counts.published, child.returncode) == (1, 1, 0)
