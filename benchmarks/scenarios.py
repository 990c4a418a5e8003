"""How routing policies compare: every scenario at every load under every arm, in virtual time.

    python -m benchmarks.scenarios [--scenario A,B] [--arms X,Y] [--rates 5,10] [--seeds 3] [--jobs 2] [--quick]
                                   [--json OUT] [--plots DIR] [--runs DIR]

A scenario (``benchmarks.workloads``) is a workload, a pool of simulated engines, what happens to it, and the loads at
which to look; by default run all that no policy may be tuned on. An arm is an EndpointPickerConfig, one of
``configs/arms`` by its name or any file ending in ``.yaml``. Only ``clairvoyant`` is none: it knows what no policy can
know, shows how much there is to gain (``benchmarks.clairvoyant``), and is not among ``all``. All arms see the same
requests, and each run is a function of scenario, load, arm and seed, so the figures do not depend on ``--jobs``.
``benchmarks.measures`` says what every figure means, ``benchmarks.comparison`` what is made of them. Figures are means
over the seeds, ± half a 95 % confidence interval.

A row of the tables is one arm at one load: values, and after the slash the ratio to the best arm there. The knee is the
highest rate up to which the mean E2E stays within ``--knee-factor`` of the best arm's at the lowest rate while the arm
keeps up. The summary is over all loads: worst ratio and geometric mean of the ratios. An arm that fails requests looks
better than it is in all of these; the column ``failed`` says how many.

With ``--runs`` finished runs are kept in a folder and not made again: what was interrupted goes on, and a further arm,
seed or scenario costs only its own runs. ``commits`` in the JSON tells which code the runs are of.

``--quick`` is for checking that everything still runs: few loads, one seed, seconds of load, in which engines are still
filling up, so its knees mean nothing. A flag given beside it wins. A shorter ``--duration`` moves the scenario's events
forward in proportion, but not what its workload does over time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from benchmarks import clairvoyant, comparison, measures
from benchmarks.asked import (
    DEFAULT_LIMITS,
    above_0,
    arm_texts,
    asked_for,
    known_arms,
    limits,
    measured_window,
    names,
    positive,
    rates,
    told,
)
from benchmarks.comparison import Step
from benchmarks.kept import Kept
from benchmarks.measures import TARGETS, Sheet, Slice, Window
from benchmarks.results import commit, host
from benchmarks.workloads import SCENARIOS, Scenario
from llmd_sched.errors import ConfigError
from llmd_sched.sim.cluster import Cluster
from llmd_sched.sim.scenario import Arrival, ClusterSpec, Join

QUICK_SCENARIOS = ("D5", "hsg150", "slowing")
DEFAULT_ARMS = ("ours", "round-robin", "load-prefix-322", "llmd-predicted-latency")
QUICK_WINDOW = Window(5.0, 30.0)
DEFAULT_SEEDS = 3
FIRST_SEEDS = {"tuning": 1, "report": 11}
"""What is reported is not on the seeds that policies were tuned on."""


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One run. ``config`` is the arm's text."""

    scenario: Scenario
    step: Step
    arm: str
    config: str
    seed: int
    window: Window
    limits: dict[str, float]

    @property
    def title(self) -> str:
        return f"{self.scenario.name} at {self.step.name}, {self.arm}, seed {self.seed}"


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """What one task gave. All but ``cpu_s`` is a function of the task and the commit."""

    figures: dict[str, float] = {}
    report: dict[str, Any] = {}
    timelines: dict[str, list[Slice]] = {}
    """Target -> predicted against measured; empty without predictions."""
    cpu_s: float = 0.0
    commit: str | None = None
    """Of the code that made it."""
    error: str = ""
    """Why there are no figures."""


def measure(task: Task) -> Run:
    """One simulation. What goes wrong in it is its result: one broken run must not cost the others."""
    began_s = time.process_time()
    try:
        made = _measure(task)
    except Exception as error:
        made = Run(error=f"{type(error).__name__}: {error}")
    return msgspec.structs.replace(made, cpu_s=time.process_time() - began_s, commit=commit())


def _measure(task: Task) -> Run:
    scenario, window = task.scenario, task.window
    shrink = window.to_s / scenario.duration_s
    events = [msgspec.structs.replace(event, at_s=event.at_s * shrink) for event in scenario.events]
    spec = ClusterSpec(config=task.config, engines=scenario.engines, events=events, seed=task.seed)
    slos: dict[str, dict[str, float]] = {}
    arrivals = scenario.workload.arrivals(task.step.rate_per_s, window.to_s, task.seed)
    cluster = clairvoyant.Clairvoyant(spec) if task.arm == clairvoyant.NAME else Cluster(spec)
    records = cluster.run(_noting(arrivals, slos))
    sheet = Sheet(records, window, task.limits, slos)
    joining = [event.spec for event in events if isinstance(event, Join) and event.at_s < window.to_s]
    names = [one.endpoint.name for one in (*scenario.engines, *joining)]
    timelines = {target: measures.timeline(records, target) for target in TARGETS}
    return Run(
        figures=measures.figures(sheet, names),
        report=measures.lifecycle_report(sheet, task.step.rate_per_s),
        timelines={target: slices for target, slices in timelines.items() if slices},
    )


def _noting(arrivals: Iterator[Arrival], slos: dict[str, dict[str, float]]) -> Iterator[Arrival]:
    """The arrivals; ``slos`` gets the limits of those that carry any, which records do not tell."""
    for one in arrivals:
        carried = {"ttft_ms": one.request.ttft_slo_ms, "tpot_ms": one.request.tpot_slo_ms}
        if any(carried.values()):
            slos[one.request.id] = {name: limit_ms for name, limit_ms in carried.items() if limit_ms}
        yield one


def run_all(
    tasks: Sequence[Task], jobs: int, on_done: Callable[[Task], None], kept: Kept[Run] | None = None
) -> list[Run]:
    """In the order of the tasks; those that are ``kept`` already are not run, and those that are run are kept."""
    runs = {i: run for i, task in enumerate(tasks) if kept is not None and (run := kept.find(task)) is not None}
    for i in runs:
        on_done(tasks[i])
    for i, run in _run([(i, task) for i, task in enumerate(tasks) if i not in runs], jobs):
        runs[i] = run
        if kept is not None and not run.error:
            kept.keep(tasks[i], run)
        on_done(tasks[i])
    return [runs[i] for i in range(len(tasks))]


def _run(numbered: Sequence[tuple[int, Task]], jobs: int) -> Iterator[tuple[int, Run]]:
    """As they end, whoever ran them. New processes rather than forks: nothing is inherited that a run
    could depend on. The most requests go first, so that the last process to finish is not far behind."""
    if jobs == 1 or not numbered:
        yield from ((i, measure(task)) for i, task in numbered)
        return
    order = sorted(numbered, key=lambda one: -one[1].step.rate_per_s * one[1].window.to_s)
    with ProcessPoolExecutor(min(jobs, len(order)), multiprocessing.get_context("spawn")) as pool:
        numbers = {pool.submit(measure, task): i for i, task in order}
        try:
            for future in as_completed(numbers):
                yield numbers[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def document(
    tasks: Sequence[Task], runs: Sequence[Run], figures: Mapping[str, float], config: Mapping[str, object]
) -> dict[str, Any]:
    """What ``--json`` writes. ``cost`` is the only part that differs from one time to the next."""
    done = [(task, run) for task, run in zip(tasks, runs, strict=True) if not run.error]
    where = [
        {"scenario": t.scenario.name, "step": t.step.name, "arm": t.arm, "seed": t.seed, "report": run.report}
        for t, run in done
    ]
    return {
        "commit": commit(),
        "commits": sorted({run.commit for _, run in done if run.commit}),
        "config": config,
        "seeds": sorted({task.seed for task in tasks}),
        "host": host(),
        "figures": figures,
        "reports": where,
        "broken": {task.title: run.error for task, run in zip(tasks, runs, strict=True) if run.error},
        "cost": {f"{task.title}, cpu_s": run.cpu_s for task, run in zip(tasks, runs, strict=True)},
    }


def first_timelines(done: Sequence[tuple[Task, Run]]) -> dict[str, dict[Step, dict[str, dict[str, list[Slice]]]]]:
    """Scenario -> step -> arm that predicts -> its timelines, of the first seed."""
    made: dict[str, dict[Step, dict[str, dict[str, list[Slice]]]]] = {}
    for task, run in done:
        if run.timelines:
            arms = made.setdefault(task.scenario.name, {}).setdefault(task.step, {})
            arms.setdefault(task.arm, run.timelines)
    return made


def cpu_s_per_run(tasks: Sequence[Task], runs: Sequence[Run]) -> dict[str, float]:
    """Of each arm."""
    spent: dict[str, list[float]] = {}
    for task, run in zip(tasks, runs, strict=True):
        spent.setdefault(task.arm, []).append(run.cpu_s)
    return {arm: sum(cpu_s) / len(cpu_s) for arm, cpu_s in spent.items()}


# ------------------------------------------------------------------------------------------------------ what was asked


def plan(args: argparse.Namespace) -> list[Task]:
    """Scenario by scenario, from the lowest rate up, arm by arm; ConfigError for what cannot be run."""
    quick = args.quick
    asked = args.scenario or (
        QUICK_SCENARIOS if quick else [name for name, one in SCENARIOS.items() if one.role == "report"]
    )
    texts = arm_texts(list(known_arms()) if args.arms == ["all"] else args.arms or DEFAULT_ARMS)
    count = args.seeds or (1 if quick else DEFAULT_SEEDS)
    tasks = []
    for scenario, steps in map(asked_for, asked):
        window = measured_window(args, QUICK_WINDOW if quick else Window(scenario.warm_up_s, scenario.duration_s))
        first = args.first_seed or FIRST_SEEDS[scenario.role]
        if args.rates:
            steps = [Step(rate, f"{rate:g}_per_s") for rate in sorted(args.rates)]
        tasks += [
            Task(scenario=scenario, step=step, arm=arm, config=text, seed=seed, window=window, limits=args.slo)
            for step in steps
            for arm, text in texts.items()
            for seed in range(first, first + count)
        ]
    return list({task.title: task for task in tasks}.values())  # a run that counted twice would narrow the intervals


def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--scenario", type=names, metavar="A,B", help="or single steps of theirs; by default all to report")
    p.add_argument(
        "--arms", type=names, metavar="X,Y", help=f"or all, or {clairvoyant.NAME}; by default {', '.join(DEFAULT_ARMS)}"
    )
    p.add_argument("--rates", type=rates, metavar="R,S", help="requests/s, instead of each scenario's own")
    p.add_argument("--seeds", type=positive, metavar="N", help=f"how many (default {DEFAULT_SEEDS})")
    p.add_argument("--first-seed", type=positive, metavar="N", help="the others follow it (1, and 11 to report)")
    p.add_argument("--duration", type=above_0, metavar="S", help="seconds of load, instead of each scenario's own")
    p.add_argument("--warm-up", type=float, metavar="S", help="seconds not measured, instead of each scenario's own")
    p.add_argument("--slo", type=limits, default=DEFAULT_LIMITS, help=f"for goodput (default {told(DEFAULT_LIMITS)})")
    p.add_argument("--knee-factor", type=above_0, default=3.0, metavar="F", help="default %(default)s")
    p.add_argument("--jobs", type=positive, default=2, metavar="N", help="processes (%(default)s)")
    p.add_argument("--quick", action="store_true", help="does everything run? under 2 minutes on 2 cores")
    p.add_argument("--runs", type=Path, metavar="DIR", help="keep finished runs here and do not run them again")
    p.add_argument("--json", type=Path, metavar="OUT")
    p.add_argument("--plots", type=Path, metavar="DIR", help="PNG pictures; needs matplotlib")
    return p


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[Task], None]]:
    """Tells stderr how far it is: as a bar where that is a terminal and rich is installed (extra ``local``), else in
    lines."""
    done = itertools.count(1)
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as TimeRemaining
    except ImportError:
        terminal = False
    else:
        terminal = sys.stderr.isatty()
    if not terminal:
        yield lambda task: print(f"{title}: {next(done)} of {total}: {task.title}", file=sys.stderr, flush=True)
        return
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemaining())
    with Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True)) as bar:
        row = bar.add_task("", total=total)
        yield lambda task: bar.update(row, advance=1, description=task.title)


def main(argv: Sequence[str] | None = None) -> int:
    """0 when everything was measured, whatever it showed; 1 when a run broke."""
    p = arguments()
    args = p.parse_args(argv)
    try:
        tasks = plan(args)
    except ConfigError as error:
        p.error(str(error))
    with progress("simulating", len(tasks)) as on_done:
        runs = run_all(tasks, args.jobs, on_done, Kept(args.runs, Run) if args.runs else None)
    done = [(task, run) for task, run in zip(tasks, runs, strict=True) if not run.error]
    ladders = comparison.ladders((task.scenario.name, task.step, task.arm, run.figures) for task, run in done)
    comparison.print_tables(ladders, args.knee_factor)
    if args.plots:
        from benchmarks import plots

        plots.write(ladders, first_timelines(done), args.plots)
    if args.json:
        config = {key: value for key, value in vars(args).items() if key not in ("json", "plots", "jobs", "runs")}
        made = document(tasks, runs, comparison.flat(ladders, args.knee_factor), config)
        args.json.write_text(json.dumps(made, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    spent = (f"{arm} {cpu_s:.1f}" for arm, cpu_s in cpu_s_per_run(tasks, runs).items())
    print(f"\nCPU s per run: {', '.join(spent)}")
    broken = [f"{task.title}: {run.error}" for task, run in zip(tasks, runs, strict=True) if run.error]
    for line in broken:
        print(f"broke: {line}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
