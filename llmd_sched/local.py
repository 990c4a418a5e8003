"""``llmd-sched up``: model servers, the scheduler and a real Envoy on this machine, a workload, a report.

Started in this order, each waited for: engines, scheduler, Envoy, batchgw. Stopped in the reverse order, whatever
happened. Everything listens on loopback, on ports that were free. The report compares what the scheduler predicted
with what came, from the scheduler's own outcome log.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import math
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
import yaml

from llmd_sched import tiny_vllm
from llmd_sched.errors import ConfigError
from llmd_sched.extproc.envoy import EnvoySettings, render
from llmd_sched.load import report
from llmd_sched.load.client import replay
from llmd_sched.load.report import Result
from llmd_sched.load.traces import read_trace
from llmd_sched.load.workload import Item, chat
from llmd_sched.sim.steptime import PRESETS
from llmd_sched.stack import Child, CpuMeter, Stack, StackError, free_ports, wait_http

DEFAULT_PRESET = "llama-3-8b-h100"
OUTCOME_WAIT_S = 2.0
"""How long the report waits for the last access-log entries."""
CONCURRENCY_LIMIT = 2000
REQUEST_TIMEOUT_S = 300.0
WINDOW_S = 10.0
VLLM_START_S = 240.0
VLLM_CONTEXT_TOKENS = 16384
BATCH_PRODUCER = "batch-headroom-producer"
MAX_BATCH_LINES = 50_000
"""As many as the API takes in one file."""

DEMO_AT = 0.2
"""When the demo batch is submitted, as a share of the load's duration."""

DEMO_WAIT_S = 120.0
"""How long a demo batch may go on after the load."""


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--engines", type=int, default=4, metavar="N", help="model servers (%(default)s)")
    p.add_argument("--engine", choices=("sim", "vllm"), default="sim", help="simulated or real vLLM (%(default)s)")
    p.add_argument("--preset", choices=sorted(PRESETS), default=DEFAULT_PRESET, help="simulated hardware (%(default)s)")
    p.add_argument("--speedup", type=float, default=1.0, help="run simulated engines faster (%(default)s)")
    p.add_argument("--noise", type=float, default=0.05, help="sigma of simulated step times (%(default)s)")
    p.add_argument("--path", choices=("lean", "duplex"), default="lean", help="Envoy data path (%(default)s)")
    p.add_argument("--config-file", help="EndpointPickerConfig; by default latency prediction")
    p.add_argument("--batch", action="store_true", help="also run batchgw, which uses what the load leaves")
    p.add_argument("--batch-lines", type=int, default=0, metavar="N",
                   help="submit a batch of N lines during the load; implies --batch (%(default)s: none)")  # fmt: skip
    p.add_argument("--trace", metavar="FILE", help="Azure LLM CSV or Mooncake JSONL; by default generated chat")
    p.add_argument("--speed", type=float, default=1.0, help="replay a trace this much faster (%(default)s)")
    p.add_argument("--rate", type=float, default=30.0, help="requests/s of the generated chat (%(default)s)")
    p.add_argument("--duration", type=float, default=60.0, metavar="S", help="seconds of load (%(default)s)")
    p.add_argument("--seed", type=int, default=1, help="of workload, engines and scheduler (%(default)s)")
    p.add_argument("--keep", action="store_true", help="stay up afterwards and print a curl line")
    p.add_argument("--plot", metavar="PNG", help="draw predicted against measured TTFT")
    p.add_argument("--outcomes", metavar="FILE", help="keep the log of predictions and outcomes here")
    p.add_argument("--vllm-python", metavar="PATH", help="interpreter that has vLLM (default: this one)")
    p.add_argument("--json", metavar="FILE", help="also write the figures as JSON")


class Local(msgspec.Struct):
    """What is running."""

    url: str
    model: str
    scheduler: Child
    engines: list[Child]
    outcomes: Path
    metrics_url: str
    batch: Child | None = None
    batch_url: str = ""


def run(args: argparse.Namespace) -> int:
    """0 when every request succeeded. Errors of the user's are raised as SchedError before anything is started."""
    import uvloop

    _check(args)
    args.batch = args.batch or args.batch_lines > 0
    items = workload(args)
    folder = Path(tempfile.mkdtemp(prefix="llmd-sched-"))
    try:
        failed = uvloop.run(_run(args, items, folder))
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    except BaseException:
        sys.stderr.write(f"logs of all processes: {folder}\n")
        raise
    shutil.rmtree(folder)
    return 1 if failed else 0


def _check(args: argparse.Namespace) -> None:
    for flag in ("engines", "speedup", "speed", "rate", "duration"):
        if not getattr(args, flag) > 0:
            raise ConfigError(f"must be positive, not {getattr(args, flag):g}", f"--{flag}")
    if args.engine == "vllm":
        reason = tiny_vllm.available(args.vllm_python)
        if reason:
            raise StackError(reason)
    if not 0 <= args.batch_lines <= MAX_BATCH_LINES:
        raise ConfigError(f"must be from 0 to {MAX_BATCH_LINES}, not {args.batch_lines}", "--batch-lines")
    if (args.batch or args.batch_lines) and importlib.util.find_spec("uvicorn") is None:
        raise StackError("batchgw's packages are missing; install the extra: pip install 'llmd-sched[batch]'")
    if args.batch_lines and importlib.util.find_spec("openai") is None:
        raise StackError("OpenAI's client is missing; install the extra: pip install 'llmd-sched[local]'")
    if args.config_file and not Path(args.config_file).is_file():
        raise ConfigError("no such file", args.config_file)


def workload(args: argparse.Namespace) -> Iterator[Item]:
    if args.trace:
        return read_trace(args.trace, args.speed, args.duration)
    return chat(args.seed, args.rate, args.duration)


async def _run(args: argparse.Namespace, items: Iterator[Item], folder: Path) -> int:
    """Number of failed requests; a demo batch that failed counts as one."""
    stop = asyncio.Event()
    task = asyncio.current_task()
    assert task is not None

    def interrupted() -> None:
        """The first Ctrl-C ends the load and still reports; the second cancels."""
        if stop.is_set():
            task.cancel()
        stop.set()

    for sig in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(sig, interrupted)
    async with Stack(folder) as stack:
        local = await start(args, stack)
        cpu = CpuMeter(local.scheduler.pid)
        demo = asyncio.create_task(_demo(args, stack, local, stop))
        try:
            results = await _replay(local, items, args.duration, stop)
        except BaseException:
            demo.cancel()
            raise
        cpu_s = cpu.read()
        outcomes = await _outcomes(local, len(results) + args.batch_lines)
        failed = _report(args, results, outcomes, cpu_s)
        if submitted := await demo:
            failed += await demo_failed(submitted, stop)
        if args.outcomes:
            shutil.copyfile(local.outcomes, args.outcomes)
        if args.keep and not stop.is_set():
            _print_keep(local)
            await stop.wait()
    return failed


async def start(args: argparse.Namespace, stack: Stack) -> Local:
    """Engines, scheduler, Envoy, each answering before the next is started."""
    ports = free_ports(args.engines + 7)
    engine_ports, (grpc, health, metrics, listen, admin, *batch) = ports[: args.engines], ports[args.engines :]
    engines, model = await _start_engines(args, stack, engine_ports)
    named = zip(engines, engine_ports, strict=True)
    endpoints = [{"name": engine.name, "address": "127.0.0.1", "port": port} for engine, port in named]
    (stack.folder / "endpoints.yaml").write_text(yaml.safe_dump({"endpoints": endpoints}))
    outcomes = stack.folder / "outcomes.jsonl"
    config, config_file = _config(args), args.config_file or stack.folder / "config.yaml"
    if not args.config_file:
        config_file.write_text(config)
    scheduler = await stack.start_llmd(
        "scheduler", "serve", "--config-file", str(config_file), "--host", "127.0.0.1",
        "--endpoints-file", str(stack.folder / "endpoints.yaml"), "--secure-serving=false",
        "--grpc-port", str(grpc), "--grpc-health-port", str(health), "--metrics-port", str(metrics),
        "--outcome-log", str(outcomes), "--seed", str(args.seed), "--drain-timeout", "1s",
    )  # fmt: skip
    await wait_http(f"http://127.0.0.1:{metrics}/metrics", scheduler)
    settings = EnvoySettings(
        path=args.path, listen_host="127.0.0.1", listen_port=listen, admin_port=admin, scheduler_port=grpc
    )
    envoy = await stack.start_envoy(render(settings))
    await wait_http(f"http://127.0.0.1:{admin}/ready", envoy)
    local = Local(f"http://127.0.0.1:{listen}", model, scheduler, engines, outcomes, f"http://127.0.0.1:{metrics}")
    if args.batch:
        local.batch_url = f"http://127.0.0.1:{batch[0]}"
        local.batch = await _start_batch(stack, local, BATCH_PRODUCER in config, *batch)
    return local


def _config(args: argparse.Namespace) -> str:
    """With ``--batch`` ours lets requests of that objective come last, and says how many there may be."""
    if args.config_file:
        return Path(args.config_file).read_text()
    text = resources.files("llmd_sched").joinpath("local.yaml").read_text()
    if not args.batch:
        return text
    document = yaml.safe_load(text)
    objectives = {"type": "static-objectives", "parameters": {"objectives": {"batch": -1}}}
    document["plugins"][:0] = [objectives, {"type": BATCH_PRODUCER}, {"type": "batch-headroom-filter"}]
    document["schedulingProfiles"][0]["plugins"].insert(0, {"pluginRef": "batch-headroom-filter"})
    return yaml.safe_dump(document, sort_keys=False)


async def _start_batch(stack: Stack, local: Local, tells_headroom: bool, port: int, ops_port: int) -> Child:
    child = await stack.start_batchgw(local.url, local.metrics_url if tells_headroom else "", port, ops_port)
    await wait_http(f"http://127.0.0.1:{ops_port}/ready", child)
    held = "the scheduler's headroom" if tells_headroom else f"refusals (the configuration has no {BATCH_PRODUCER})"
    _say(f"batch API: {local.batch_url}/v1, held back by {held}")
    return child


async def _demo(args: argparse.Namespace, stack: Stack, local: Local, stop: asyncio.Event) -> Child | None:
    """Submits the demo batch at its time; None without one, or when the load was interrupted before."""
    if not args.batch_lines:
        return None
    with suppress(TimeoutError):
        async with asyncio.timeout(DEMO_AT * args.duration):
            await stop.wait()
            return None
    return await stack.start_batch_demo(local.batch_url, local.model, args.batch_lines)


async def demo_failed(demo: Child, stop: asyncio.Event) -> bool:
    """Waits for the demo batch, unless interrupted, and says what became of it."""
    deadline_s = asyncio.get_running_loop().time() + DEMO_WAIT_S
    while not (over := demo.process.returncode is not None) and not stop.is_set():
        if asyncio.get_running_loop().time() > deadline_s:
            break
        await asyncio.sleep(0.1)
    _say(f"batch submitted beside the load, by OpenAI's own client:\n{demo.last_lines()}")
    if not over:
        _say("  interrupted" if stop.is_set() else f"  not over {DEMO_WAIT_S:g} s after the load")
    return demo.process.returncode != 0 if over else not stop.is_set()


async def _start_engines(args: argparse.Namespace, stack: Stack, ports: list[int]) -> tuple[list[Child], str]:
    _say(f"starting {args.engines} {'vLLM servers' if args.engine == 'vllm' else 'simulated engines'}")
    engines = []
    for i, port in enumerate(ports):
        name = f"engine-{i}"
        if args.engine == "vllm":
            folder = tiny_vllm.make_model_folder(stack.folder / "tiny-model")
            command = tiny_vllm.command(folder, port, max_model_len=VLLM_CONTEXT_TOKENS, python=args.vllm_python)
            engines.append(await stack.start(name, ["nice", "-n", "10", *command], tiny_vllm.environment()))
        else:
            child = await stack.start_llmd(
                name, "sim-engine", "--preset", args.preset, "--port", str(port), "--name", name,
                "--speedup", str(args.speedup), "--noise", str(args.noise), "--seed", str(args.seed + i),
            )  # fmt: skip
            engines.append(child)
    for child, port in zip(engines, ports, strict=True):
        await wait_http(f"http://127.0.0.1:{port}/health", child, VLLM_START_S if args.engine == "vllm" else 60.0)
    return engines, "tiny" if args.engine == "vllm" else PRESETS[args.preset].model


async def _replay(local: Local, items: Iterator[Item], duration_s: float, stop: asyncio.Event) -> list[Result]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    results: list[Result] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[counts]}"))
    with Progress(*columns, transient=False, refresh_per_second=4) as progress:
        bar = progress.add_task("replaying", total=duration_s, counts="")

        load = replay(
            local.url, items, model=local.model, headers={}, concurrency_limit=CONCURRENCY_LIMIT,
            timeout_s=REQUEST_TIMEOUT_S, on_result=results.append, stop=stop,
        )  # fmt: skip
        sending = asyncio.create_task(load)
        began_s = asyncio.get_running_loop().time()
        while not sending.done():
            await asyncio.wait({sending}, timeout=0.25)
            failed = sum(r.error is not None for r in results)
            elapsed_s = asyncio.get_running_loop().time() - began_s
            counts = f"{len(results)} done, {failed} failed" + (", draining" if elapsed_s > duration_s else "")
            progress.update(bar, completed=min(duration_s, elapsed_s), counts=counts)
            for child in (local.scheduler, *local.engines, *([local.batch] if local.batch else [])):
                child.check()
        await sending
    return results


async def _outcomes(local: Local, expected: int) -> list[dict[str, Any]]:
    """The outcome log, once it has everything or OUTCOME_WAIT_S have passed."""
    deadline_s = asyncio.get_running_loop().time() + OUTCOME_WAIT_S
    while True:
        lines = local.outcomes.read_bytes().splitlines() if local.outcomes.exists() else []
        if len(lines) >= expected or asyncio.get_running_loop().time() > deadline_s:
            return [msgspec.json.decode(line) for line in lines]
        await asyncio.sleep(0.1)


def predictions(outcomes: list[dict[str, Any]], target: str) -> list[report.Prediction]:
    """(seconds from the first outcome, predicted ms, measured ms) of every request that has both."""
    first_s = min((o["time_s"] for o in outcomes), default=0.0)
    predicted, measured = f"predicted_{target}_ms", f"{target}_ms"
    return [
        (o["time_s"] - first_s, o[predicted], o[measured])
        for o in outcomes
        if o["status"] == 200 and o[predicted] is not None and o[measured] is not None
    ]


def _report(
    args: argparse.Namespace, results: list[Result], outcomes: list[dict[str, Any]], cpu_s: tuple[float, float]
) -> int:
    shares = Counter(o["endpoint"].partition("/")[2] for o in outcomes)
    share = {name: count / len(outcomes) for name, count in sorted(shares.items())}
    summary = msgspec.structs.replace(report.summarize(results), endpoint_share=share)
    _say(report.render_text(summary, title="replay"))
    ttft, tpot = predictions(outcomes, "ttft"), predictions(outcomes, "tpot")
    if ttft:
        for name, rows in (("TTFT", ttft), ("TPOT", tpot)):
            title = f"{name}: predicted against measured, per {WINDOW_S:g} s"
            _say(report.render_mape(report.mape_by_window(rows, WINDOW_S), title))
    version = max((o["model_version"] or 0 for o in outcomes), default=0)
    learned = sum(bool(o["model_version"]) for o in outcomes)
    _say(f"model version at the end: {version}; {learned} of {len(outcomes)} requests routed by a learned model")
    own, trainer = (s * 1e3 / max(1, len(results), len(outcomes)) for s in cpu_s)
    _say(f"scheduler CPU per request: {own:.2f} ms, and {trainer:.2f} ms of the trainer's (a process of its own)")
    if len(outcomes) < len(results):
        _say(f"outcomes reported to the scheduler: {len(outcomes)} of {len(results)}")
    if args.plot and ttft:
        report.plot(ttft, args.plot)
        _say(f"picture: {args.plot}")
    if args.json:
        figures = {"scheduler_cpu_ms_per_request": own, "trainer_cpu_ms_per_request": trainer, "model_version": version}
        figures |= {f"{name}_mape_pct": _last_mape(rows) for name, rows in (("ttft", ttft), ("tpot", tpot))}
        document = {"summary": msgspec.to_builtins(summary), "figures": figures}
        Path(args.json).write_bytes(msgspec.json.format(msgspec.json.encode(document)))
    return summary.sent - summary.succeeded


def _last_mape(rows: list[report.Prediction]) -> float:
    windows = report.mape_by_window(rows, WINDOW_S)
    return windows[-1].mean_ape_pct if windows else math.nan


def _print_keep(local: Local) -> None:
    body = f'{{"model": "{local.model}", "prompt": "Hello", "max_tokens": 16, "stream": true}}'
    _say(f"still up; metrics at {local.metrics_url}/metrics; Ctrl-C stops it. Try:")
    _say(f"  curl -N {local.url}/v1/completions -H 'content-type: application/json' -d '{body}'")


def _say(text: str) -> None:
    sys.stdout.write(text.rstrip() + "\n")
    sys.stdout.flush()
