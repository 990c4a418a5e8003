"""The soak as a user runs it, for a few seconds: nothing is lost, and nothing is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from llmd_sched.stack import StackError, envoy_binary

PATIENCE_S = 120.0
MARK = "LLMD_TEST_SOAK"


def marked(mark: str) -> list[psutil.Process]:
    """Processes that inherited this mark in their environment."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == mark:
                found.append(process)
    return found


def test_a_soak_of_seconds_loses_nothing_and_leaves_no_process(tmp_path: Path) -> None:
    try:
        envoy_binary()
    except StackError as missing:
        pytest.skip(str(missing))
    figures, picture = tmp_path / "figures.json", tmp_path / "picture.png"
    command = [sys.executable, "-m", "benchmarks.soak", "--minutes", "0.4", "--rate", "40", "--every", "1"]
    mark = str(tmp_path)
    try:
        done = subprocess.run(
            [*command, "--json", str(figures), "--plot", str(picture)],
            capture_output=True, text=True, timeout=PATIENCE_S, env={**os.environ, MARK: mark, "TMPDIR": str(tmp_path)},
        )  # fmt: skip
        left = marked(mark)
    finally:
        for process in marked(mark):
            process.kill()
    assert done.returncode == 0, done.stdout + done.stderr
    assert not left
    found = json.loads(figures.read_text())["figures"]
    assert found["sent_requests"] == 960
    assert found["lost_requests"] == 0, done.stdout
    assert found["completed_requests"] + found["failed_on_killed_requests"] == 960
    assert sum(found[f"{kind}_steps"] for kind in ("join", "leave", "freeze", "kill")) >= 4
    assert found["sent_to_left_requests"] == found["untold_requests"] == found["told_twice_requests"] == 0
    in_flight = ("open_requests", "inflight_requests", "inflight_tokens", "request_running", "lost_requests_total")
    assert [found[name] for name in (*in_flight, "producer_errors_total")] == [0] * 6
    assert picture.stat().st_size > 10_000
    assert not list(tmp_path.glob("llmd-soak-*")), "temporary files are removed"
