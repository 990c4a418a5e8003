"""``llmd-sched up`` as a user runs it: it reports, and it leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from llmd_sched.local import demo_failed
from llmd_sched.stack import Stack, StackError, envoy_binary

PATIENCE_S = 60.0
"""How long anything may take before a test gives up. Nothing waits that long unless it is broken."""


class Up:
    """A running ``llmd-sched up`` whose temporary files lie in ``folder``."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
        self.output = folder / "output.txt"
        temporary = folder / "tmp"
        temporary.mkdir()
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "llmd_sched", "up", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "TMPDIR": str(temporary)},
                start_new_session=True,
            )
        self.children: dict[int, psutil.Process] = {}

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def look(self) -> list[str]:
        """Names of the log files so far, one per process; remembers which processes there are."""
        try:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                self.children[child.pid] = child
        except psutil.NoSuchProcess:
            pass
        return [log.stem for log in self.folder.glob("tmp/*/*.log")]

    def until(self, what: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while not what():
            assert time.monotonic() < deadline_s, f"waited in vain\n{self.text}"
            assert self.process.poll() is None, self.text
            time.sleep(0.02)

    def outcomes(self) -> int:
        """Finished requests so far."""
        self.look()
        return sum(file.read_bytes().count(b"\n") for file in self.folder.glob("tmp/*/outcomes.jsonl"))

    def interrupt(self) -> None:
        """Ctrl-C in a terminal reaches the whole foreground group; its children have sessions of their own."""
        os.killpg(self.process.pid, signal.SIGINT)

    def interrupt_pending(self) -> bool:
        """Sent and not yet delivered; another one would be lost in it."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        masks = re.findall(r"^(?:Shd|Sig)Pnd:\s*([0-9a-f]+)$", status, re.MULTILINE)
        return any(int(mask, 16) >> (signal.SIGINT - 1) & 1 for mask in masks)

    def wait(self) -> int:
        return self.process.wait(PATIENCE_S)

    def left(self) -> list[psutil.Process]:
        return psutil.wait_procs(list(self.children.values()), timeout=PATIENCE_S / 6)[1]


@contextmanager
def up(folder: Path, *arguments: str) -> Iterator[Up]:
    try:
        envoy_binary()
    except StackError as missing:
        pytest.skip(str(missing))
    running = Up(folder, *arguments)
    try:
        yield running
    finally:
        running.look()
        for process in [*running.children.values(), running.process]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        running.process.wait(PATIENCE_S)


def test_a_short_run_reports_and_exits_0(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    arguments = ("--duration", "6", "--engines", "2", "--rate", "20", "--json", str(figures))
    with up(tmp_path, *arguments) as running:
        running.until(lambda: running.outcomes() > 0)
        names = running.look()
        status = running.wait()
        text = running.text
    assert status == 0, text
    assert {"engine-0", "engine-1", "scheduler", "envoy"} <= set(names)
    assert "replay" in text
    assert "TTFT: predicted against measured, per 10 s" in text
    assert "TPOT: predicted against measured, per 10 s" in text
    found = re.search(r"model version at the end: (\d+); (\d+) of (\d+) requests", text)
    assert found, text
    assert int(found[3]) > 60
    assert "scheduler CPU per request: " in text
    assert "Traceback" not in text
    assert figures.stat().st_size
    assert not running.left()
    assert not list((tmp_path / "tmp").iterdir()), "temporary files are removed after success"


def test_a_batch_runs_beside_the_load_and_its_gateway_ends_with_the_rest(tmp_path: Path) -> None:
    arguments = ("--batch-lines", "20", "--duration", "4", "--engines", "2", "--rate", "5", "--keep")
    with up(tmp_path, *arguments) as running:
        running.until(lambda: "still up" in running.text)
        api = re.search(r"batch API: (http://127\.0\.0\.1:\d+/v1), held back by the scheduler's headroom", running.text)
        assert api, running.text
        with urllib.request.urlopen(f"{api[1]}/batches", timeout=PATIENCE_S) as answer:
            [batch] = json.load(answer)["data"]
        assert {"batchgw", "batch-demo"} <= set(running.look())
        running.interrupt()
        status = running.wait()
        text = running.text
    assert status == 0, text
    assert batch["request_counts"] == {"total": 20, "completed": 20, "failed": 0}
    assert "batch submitted beside the load, by OpenAI's own client:\n" in text
    assert re.search(rf"  {batch['id']}: completed \S+ s after the upload began; 20 lines, each answered once", text), (
        text
    )
    assert not running.left()
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.parametrize(("ends", "failed"), [("0", False), ("'demo batch: 1 of 20 lines not answered: c7'", True)])
async def test_a_demo_batch_that_fails_is_told_and_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ends: str, failed: bool
) -> None:
    async with Stack(tmp_path) as stack:
        demo = await stack.start("batch-demo", [sys.executable, "-c", f"raise SystemExit({ends})"])
        async with asyncio.timeout(PATIENCE_S):
            assert await demo_failed(demo, asyncio.Event()) is failed
    assert ("  demo batch: 1 of 20 lines not answered: c7" in capsys.readouterr().out) is failed


def test_an_interrupt_in_mid_run_still_reports_and_leaves_no_process(tmp_path: Path) -> None:
    with up(tmp_path, "--duration", "600", "--engines", "2", "--rate", "20") as running:
        running.until(lambda: running.outcomes() >= 10)
        assert len(running.children) >= 4
        running.interrupt()
        status = running.wait()
        text = running.text
    assert status == 0, text
    assert "model version at the end: " in text
    assert "Traceback" not in text
    assert not running.left()
    assert not list((tmp_path / "tmp").iterdir())


def test_two_interrupts_while_it_starts_end_it_at_once_and_leave_no_process(tmp_path: Path) -> None:
    with up(tmp_path, "--duration", "600", "--engines", "2", "--rate", "20") as running:
        running.until(lambda: "engine-1" in running.look() and len(running.children) >= 2)
        running.interrupt()
        running.until(lambda: not running.interrupt_pending())
        running.look()
        running.interrupt()
        status = running.wait()
        text = running.text
    assert status in (1, 130), text
    assert "Traceback" not in text
    assert not running.left()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--engines", "0"], "--engines: must be positive, not 0"),
        (["--rate", "nan"], "--rate: must be positive, not nan"),
        (["--duration", "-1"], "--duration: must be positive, not -1"),
        (["--batch-lines", "50001"], "--batch-lines: must be from 0 to 50000, not 50001"),
        (["--config-file", "no/such/file.yaml"], "no/such/file.yaml: no such file"),
        (["--trace", "no/such/trace.csv"], "no/such/trace.csv"),
    ],
)
def test_a_mistake_is_told_before_anything_is_started(tmp_path: Path, arguments: list[str], said: str) -> None:
    with up(tmp_path, *arguments) as running:
        status = running.wait()
        text = running.text
    assert status == 1
    assert said in text
    assert len(text.splitlines()) == 1, text
    assert not list((tmp_path / "tmp").iterdir())
