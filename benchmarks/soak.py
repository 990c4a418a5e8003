"""Minutes of traffic through a real Envoy while endpoints come, go, freeze and die: is anything lost, or growing?

    python -m benchmarks.soak [--minutes 10] [--rate 200] [--config FILE] [--json OUT] [--plot PNG]

Engines are processes with an address of their own on loopback, as pods have; Envoy takes the lean path with one thread;
the scheduler reads its endpoints from a file that is replaced whole. What happens to them is drawn from the seed:

    join    an engine under a new name and address is started, then listed
    leave   taken from the file, ended once its streams are
    freeze  SIGSTOP, some seconds later SIGCONT: requests must only be late
    kill    SIGKILL, some seconds later started again at the same address: requests that were there may fail

Every other failed request counts as lost, and so does one that failed on a killed engine but was sent there after the
scheduler had had time to know. Resident memory is looked at every second. In the end, once all streams have ended,
everything the scheduler counts as in flight has to be zero. It exits with 0 whenever it measured.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path

import aiohttp
import msgspec
import psutil
import yaml

from benchmarks.results import table, write_json
from benchmarks.soak_plan import DRAIN_S, Life, Step, Told, account, items, plan
from benchmarks.soak_report import Run, Sample, figures, plot
from llmd_sched.extproc.envoy import EnvoySettings, render
from llmd_sched.load.client import replay
from llmd_sched.load.report import Result
from llmd_sched.load.workload import Item
from llmd_sched.stack import Child, CpuMeter, Stack, free_ports, stop, wait_http

MEMBERS = 8
CONCURRENCY_LIMIT = 4000
TIMEOUT_S = 30.0
"""Of the client; five times as long as anything is frozen."""
SAMPLE_S = 1.0
QUIET_WAIT_S = 20.0
"""How long open requests may take to be gone in the end."""
MIB = 1 << 20

ZERO_IN_THE_END = (
    "open_requests",
    "inflight_requests",
    "inflight_tokens",
    "request_running",
    "predictor_open_predictions",
)
COUNTED = (
    *("lost_requests_total", "producer_errors_total", "scrape_errors_total"),
    *("predictor_model_version", "predictor_fits_failed_total", "predictor_drift_events_total"),
    *("predictor_trainer_restarts_total", "predictor_samples_dropped_total", "predictor_labels_refused_total"),
)

ENVOY_COUNTS = {
    "refused_by_breaker_total": "cluster.scheduler.upstream_rq_active_overflow",
    "scheduler_health_failures_total": "cluster.scheduler.health_check.failure",
    "log_entries_dropped_total": "access_logs.grpc_access_log.logs_dropped",
    "log_entries_unsent_total": "access_logs.grpc_access_log.grpc_entries_flush_failed",
    "log_entries_sent_total": "access_logs.grpc_access_log.grpc_entries_flushed",
}
COMPLAINTS = 40
_INFORMATION = re.compile(r"[0-9-]+ [0-9:,]+ (INFO|WARNING llmd_sched.pool.scrape)\b")
"""Lines of the log that are expected: engines that are killed or frozen cannot be read."""


class Fleet:
    """The engines, and the file that lists them."""

    def __init__(self, stack: Stack, port: int) -> None:
        self.stack, self.port = stack, port
        self.lives: list[Life] = []
        self._children: dict[int, Child] = {}
        self._members: list[int] = []
        self.file = stack.folder / "endpoints.yaml"

    async def start(self, members: int) -> None:
        await asyncio.gather(*(self._started(n) for n in range(members)))
        self._members = list(range(members))
        self._write()

    @staticmethod
    def _host(n: int) -> str:
        return f"127.0.{1 + n // 250}.{1 + n % 250}"

    def _life(self, n: int) -> Life:
        while len(self.lives) <= n:
            name = len(self.lives)
            self.lives.append(Life(f"e{name}", f"{self._host(name)}:{self.port}"))
        return self.lives[n]

    async def _started(self, n: int) -> None:
        life = self._life(n)
        command = [sys.executable, "-m", "benchmarks.soak_engines", self._host(n), str(self.port)]
        child = await self.stack.start(life.name, [*command, "--delay-ms", str(5 + n % 6)])
        self._children[n] = child
        await wait_http(f"http://{life.hostport}/metrics", child)

    def _write(self) -> None:
        listed = [{"name": f"e{n}", "address": self._host(n), "port": self.port} for n in self._members]
        new = self.file.with_suffix(".new")
        new.write_text(yaml.safe_dump({"endpoints": listed}))
        new.replace(self.file)

    async def _ended(self, n: int) -> None:
        child = self._children.pop(n)
        self.stack.children.remove(child)
        await stop(child)

    async def follow(self, steps: Sequence[Step]) -> None:
        async with asyncio.TaskGroup() as tasks:
            began_s = time.monotonic()
            for step in steps:
                await asyncio.sleep(began_s + step.at_s - time.monotonic())
                tasks.create_task(getattr(self, step.kind)(step.endpoint, step.for_s))

    async def join(self, n: int, for_s: float) -> None:
        await self._started(n)
        self._members.append(n)
        self._write()

    async def leave(self, n: int, for_s: float) -> None:
        self._members.remove(n)
        self._write()
        self._life(n).left_s = time.time()
        await asyncio.sleep(DRAIN_S)
        await self._ended(n)

    async def freeze(self, n: int, for_s: float) -> None:
        pid, began_s = self._children[n].pid, time.time()
        os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(for_s)
        finally:
            os.kill(pid, signal.SIGCONT)
            self._life(n).frozen.append((began_s, time.time()))

    async def kill(self, n: int, for_s: float) -> None:
        began_s = time.time()
        os.kill(self._children[n].pid, signal.SIGKILL)
        await self._ended(n)
        await asyncio.sleep(for_s)
        await self._started(n)
        self._life(n).down.append((began_s, time.time()))


class Soak:
    """One run in a started stack."""

    def __init__(self, stack: Stack, args: argparse.Namespace) -> None:
        self.stack, self.args = stack, args
        self.seconds = args.minutes * 60.0
        self.samples: list[Sample] = []
        self.results: list[Result] = []

    async def start(self) -> None:
        engines, grpc, health, metrics, listen, admin = free_ports(6)
        folder = self.stack.folder
        self.fleet = Fleet(self.stack, engines)
        await self.fleet.start(MEMBERS)
        shipped = resources.files("llmd_sched").joinpath("local.yaml")
        config = Path(self.args.config) if self.args.config else shipped
        (folder / "config.yaml").write_text(config.read_text())
        self.outcomes = folder / "outcomes.jsonl"
        self.scheduler = await self.stack.start_llmd(
            "scheduler", "serve", "--config-file", str(folder / "config.yaml"), "--host", "127.0.0.1",
            "--endpoints-file", str(self.fleet.file), "--secure-serving=false", "--grpc-port", str(grpc),
            "--grpc-health-port", str(health), "--metrics-port", str(metrics), "--drain-timeout", "1s",
            "--outcome-log", str(self.outcomes), "--seed", str(self.args.seed),
        )  # fmt: skip
        self.metrics_url = f"http://127.0.0.1:{metrics}/metrics"
        await wait_http(self.metrics_url, self.scheduler)
        settings = EnvoySettings(
            path="lean", listen_host="127.0.0.1", listen_port=listen, admin_port=admin, scheduler_port=grpc
        )
        self.envoy = await self.stack.start_envoy(render(settings))
        self.admin_url = f"http://127.0.0.1:{admin}"
        await wait_http(f"{self.admin_url}/ready", self.envoy)
        self.url = f"http://127.0.0.1:{listen}"

    async def run(self) -> Run:
        steps = plan(self.args.seed, self.seconds, MEMBERS, self.args.every)
        cpu, self.began_s = CpuMeter(self.scheduler.pid), time.time()
        psutil.cpu_times_percent()
        load = replay(
            self.url, self._items(), model="stub", headers={}, timeout_s=TIMEOUT_S,
            concurrency_limit=CONCURRENCY_LIMIT, on_result=self.results.append, stop=asyncio.Event(),
        )  # fmt: skip
        async with asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(self._watch())
            following = tasks.create_task(self.fleet.follow(steps))
            await load
            await following
            own_s, trainer_s = cpu.read()
            idle_cpu_pct = float(psutil.cpu_times_percent().idle)
            quiet_after_s = await self._quiet()
            watching.cancel()
        told = self._told()
        n = len(self.results)
        return Run(
            steps=steps,
            account=account(self.results, told, self.fleet.lives, self.began_s),
            samples=self.samples,
            cpu_ms=(own_s * 1e3 / n, trainer_s * 1e3 / n),
            results=self.results,
            metrics={**await self._metrics(), **await self._envoy_counts()},
            complaints=self._complaints(),
            idle_cpu_pct=idle_cpu_pct,
            quiet_after_s=quiet_after_s,
        )

    def _items(self) -> Iterator[Item]:
        """Asked for the first just after the replay began, from when it counts."""
        self.began_s = time.time()
        yield from items(self.args.seed, self.args.rate, self.seconds)

    async def _watch(self) -> None:
        """Samples, and the bar. Raises StackError when the scheduler or Envoy has died."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("soaking"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[counts]}"))
        with Progress(*columns, console=Console(stderr=True), refresh_per_second=1) as progress:
            bar = progress.add_task("soaking", total=self.seconds, counts="")
            while True:
                self.scheduler.check()
                self.envoy.check()
                self.samples.append(self._sample(time.time() - self.began_s))
                failed = sum(result.error is not None for result in self.results)
                counts = f"{len(self.results)} done, {failed} failed, {self.samples[-1].scheduler:.0f} MiB"
                progress.update(bar, completed=min(self.seconds, self.samples[-1].at_s), counts=counts)
                await asyncio.sleep(SAMPLE_S)

    def _sample(self, at_s: float) -> Sample:
        scheduler = psutil.Process(self.scheduler.pid)
        trainer = sum(_rss_mib(child) for child in scheduler.children(recursive=True))
        return Sample(at_s, _rss_mib(scheduler), trainer, _rss_mib(psutil.Process(self.envoy.pid)))

    async def _quiet(self) -> float:
        began_s = time.monotonic()
        while True:
            metrics = await self._metrics()
            waited_s = time.monotonic() - began_s
            if waited_s > QUIET_WAIT_S or not any(metrics[name] for name in ZERO_IN_THE_END):
                return waited_s
            await asyncio.sleep(0.1)

    async def _metrics(self) -> dict[str, float]:
        page = await _get(self.metrics_url)
        lines = page.splitlines()
        found = {name: _total(lines, f"llm_d_epp_{name}") for name in (*ZERO_IN_THE_END, *COUNTED)}
        return {**found, "metrics_page_bytes": float(len(page))}

    async def _envoy_counts(self) -> dict[str, float]:
        """Of Envoy's own counters those that explain a request or an outcome gone astray."""
        lines = (await _get(f"{self.admin_url}/stats")).splitlines()
        values = dict(line.split(": ", 1) for line in lines if ": " in line)
        return {f"envoy_{name}": float(values.get(stat, 0)) for name, stat in ENVOY_COUNTS.items()}

    def _complaints(self) -> list[str]:
        """What the scheduler logged that was more than information, its first lines."""
        lines = self.scheduler.log.read_text(errors="replace").splitlines()
        return [line for line in lines if not _INFORMATION.match(line)][:COMPLAINTS]

    def _told(self) -> list[Told]:
        lines = [line for file in (self.outcomes, self.outcomes.with_suffix(".jsonl.1")) if file.exists()
                 for line in file.read_bytes().splitlines()]  # fmt: skip
        return [msgspec.json.decode(line, type=Told) for line in lines]


async def _get(url: str) -> str:
    async with aiohttp.ClientSession() as session, session.get(url) as reply:
        return await reply.text()


def _rss_mib(process: psutil.Process) -> float:
    """0 for one that is gone."""
    try:
        return float(process.memory_info().rss) / MIB
    except psutil.NoSuchProcess:
        return 0.0


def _total(lines: Sequence[str], name: str) -> float:
    """Sum over the samples of one name."""
    split = (line.rpartition(" ") for line in lines if line.startswith(name))
    return sum(float(value) for sample, _, value in split if sample.partition("{")[0] == name)


async def soak(args: argparse.Namespace, folder: Path) -> Run:
    async with Stack(folder) as stack:
        one = Soak(stack, args)
        await one.start()
        return await one.run()


def main() -> None:
    import uvloop

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=10.0)
    p.add_argument("--rate", type=float, default=200.0, help="requests/s (%(default)s)")
    p.add_argument("--every", type=float, default=3.0, metavar="S", help="mean time between steps (%(default)s)")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--config", metavar="FILE", help="EndpointPickerConfig; by default latency prediction")
    p.add_argument("--json", metavar="OUT")
    p.add_argument("--plot", metavar="PNG")
    args = p.parse_args()
    with tempfile.TemporaryDirectory(prefix="llmd-soak-") as folder:
        run = uvloop.run(soak(args, Path(folder)))
    found = figures(run, args.minutes * 60.0)
    table(found)
    for line in (*run.account.examples, *run.complaints):
        print(line)
    if args.plot:
        plot(run, args.plot)
    if args.json:
        config = {"minutes": args.minutes, "rate_per_s": args.rate, "every_s": args.every, "config": args.config}
        write_json(args.json, config, args.seed, found)


if __name__ == "__main__":
    main()
