"""The scenarios' workloads against a real server: any URL that speaks the OpenAI API, open loop.

    python -m benchmarks.live --url http://127.0.0.1:8080 --model M --scenario A --rate 10 [--duration 60] [--json OUT]

Sends the very requests that ``benchmarks.scenarios`` simulates, each at its time however many are outstanding, and
reports the same figures. Engines and what happens to them are whatever stands behind the URL. Latencies count from
sending; ``schedule_delay`` tells how late that was, so judge no run in which its p99 is not small. What the scheduler
predicted is not known here (``llmd-sched serve --outcome-log`` writes it), and the imbalance is over the endpoints that
name themselves in a reply, as simulated engines do. A conversation's history holds the workload's placeholders for the
replies, as in simulation; what a request says beside its prompt and lengths (SLOs, fairness ids) is not sent.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import measures
from benchmarks.asked import DEFAULT_LIMITS, above_0, asked_for, limits, measured_window, positive, told
from benchmarks.measures import Sheet, Window
from benchmarks.results import commit, host, table
from llmd_sched.errors import ConfigError
from llmd_sched.load.client import replay
from llmd_sched.load.report import Result
from llmd_sched.load.workload import Item
from llmd_sched.sim.scenario import Arrival, Record
from llmd_sched.types import End

CONCURRENCY_LIMIT = 2000
TIMEOUT_S = 600.0


class Sent(Item, frozen=True, kw_only=True):
    """An arrival of a workload as an item of the replay: its prompt is bytes, not spans."""

    arrival: Arrival

    @property
    def input_tokens(self) -> int:
        return self.arrival.request.input_tokens

    def _prompt_json(self) -> bytes:
        prompt = b"".join(self.arrival.request.prompts)
        return b'"prompt": ' + json.dumps(_text_or_ids(prompt)).encode()


def _text_or_ids(prompt: bytes) -> str | list[int]:
    """Token ids are little-endian uint32 below 2^24, so their every fourth byte is 0; text has no such byte."""
    if prompt[3::4].strip(b"\0"):
        return prompt.decode(errors="replace")
    return list(struct.unpack(f"<{len(prompt) // 4}I", prompt))


def sent(one: Arrival) -> Sent:
    request = one.request
    return Sent(
        at_s=one.at_s,
        session=request.id,
        prompt=(),
        output_tokens=one.output_tokens,
        streaming=request.streaming,
        arrival=one,
    )


def record(result: Result) -> Record:
    """As the cluster would have recorded it. Without the server's word: tokens as asked for, and none cached."""
    failure = (result.error or "").partition(":")[0]
    return Record(
        request_id=result.request_id,
        arrival_s=result.sent_s,
        endpoint=result.endpoint,
        model_version=-1,
        predicted_ttft_ms=math.nan,
        predicted_tpot_ms=math.nan,
        ttft_ms=_ms(result.ttft_s if result.streaming else None),
        tpot_ms=_ms(result.tpot_s),
        e2e_ms=_ms(result.e2e_s),
        end=failure or End.FINISHED.value,
        status=result.status or 0,
        input_tokens=result.prompt_tokens or result.input_tokens,
        cached_tokens=result.cached_tokens or 0,
        output_tokens=0 if failure else result.completion_tokens or result.chunks or result.output_tokens,
    )


def _ms(value_s: float | None) -> float:
    return math.nan if value_s is None else value_s * 1e3


async def drive(
    url: str,
    arrivals: Iterable[Arrival],
    *,
    model: str,
    concurrency_limit: int,
    timeout_s: float,
    on_result: Callable[[Result], None],
) -> list[Result]:
    """Until all have ended, in the order in which they did."""
    results: list[Result] = []

    def keep(result: Result) -> None:
        results.append(result)
        on_result(result)

    await replay(
        url, map(sent, arrivals), model=model, headers={}, concurrency_limit=concurrency_limit, timeout_s=timeout_s,
        on_result=keep, stop=asyncio.Event(),
    )  # fmt: skip
    return results


def summary(
    results: Sequence[Result], window: Window, rate_per_s: float, of_limits: measures.Limits
) -> tuple[dict[str, float], dict[str, Any]]:
    """Figures, and the report in inference-perf's shape."""
    ordered = sorted(results, key=lambda result: result.at_s)
    records = [record(result) for result in ordered]
    endpoints = sorted({one.endpoint for one in records if one.endpoint})
    sheet = Sheet(records, window, of_limits)
    figures = measures.figures(sheet, endpoints)
    delays_s = [result.schedule_delay_s for result in ordered if window.from_s <= result.sent_s < window.to_s]
    if delays_s:
        figures["schedule_delay_p50_ms"], figures["schedule_delay_p99_ms"] = (
            float(value) * 1e3 for value in np.percentile(delays_s, (50, 99))
        )
    return figures, measures.lifecycle_report(sheet, rate_per_s, delays_s)


@contextmanager
def progress(duration_s: float) -> Iterator[Callable[[Result], None]]:
    """A bar over the load's time on stderr where rich is installed (extra ``local``)."""
    counts = {"done": 0, "failed": 0}

    def count(result: Result) -> str:
        counts["done"] += 1
        counts["failed"] += result.error is not None
        return ", ".join(f"{number} {name}" for name, number in counts.items())

    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield lambda result: None
        return
    columns = (TextColumn("sending"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        row = bar.add_task("", total=duration_s)
        yield lambda result: bar.update(
            row, completed=min(duration_s, result.sent_s + result.e2e_s), description=count(result)
        )


def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--url", required=True, help="scheme, host and port")
    p.add_argument("--model", required=True, help="as the server names it")
    p.add_argument("--scenario", required=True, metavar="A", help="whose workload; or a step of one")
    p.add_argument(
        "--rate", type=above_0, metavar="R", help="requests/s; by default the step's, or the scenario's lowest"
    )
    p.add_argument("--duration", type=above_0, metavar="S", help="seconds of load, instead of the scenario's")
    p.add_argument("--warm-up", type=float, metavar="S", help="seconds not measured, instead of the scenario's")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--slo", type=limits, default=DEFAULT_LIMITS, help=f"for goodput (default {told(DEFAULT_LIMITS)})")
    p.add_argument("--concurrency-limit", type=positive, default=CONCURRENCY_LIMIT, help="outstanding (%(default)s)")
    p.add_argument("--timeout", type=above_0, default=TIMEOUT_S, metavar="S", help="of one request (%(default)s)")
    p.add_argument("--json", type=Path, metavar="OUT")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """0 when it measured, whatever it showed; 1 when no request was answered."""
    import uvloop

    p = arguments()
    args = p.parse_args(argv)
    try:
        scenario, steps = asked_for(args.scenario)
        window = measured_window(args, Window(scenario.warm_up_s, scenario.duration_s))
    except ConfigError as error:
        p.error(str(error))
    rate_per_s = args.rate or min(steps).rate_per_s
    arrivals = scenario.workload.arrivals(rate_per_s, window.to_s, args.seed)
    with progress(window.to_s) as on_result:
        load = drive(
            args.url, arrivals, model=args.model, concurrency_limit=args.concurrency_limit, timeout_s=args.timeout,
            on_result=on_result,
        )  # fmt: skip
        results = uvloop.run(load)
    figures, report = summary(results, window, rate_per_s, args.slo)
    table(figures)
    if args.json:
        config = {key: value for key, value in vars(args).items() if key != "json"}
        made = {"commit": commit(), "config": config, "seeds": [args.seed], "host": host(), "figures": figures}
        args.json.write_text(
            json.dumps({**made, "reports": [report]}, indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )
    for label, failed in report["failures"]["by_label"].items():
        print(f"failed, {label}: {failed['count']}", file=sys.stderr)
    return 0 if figures["measured_requests"] else 1


if __name__ == "__main__":
    sys.exit(main())
