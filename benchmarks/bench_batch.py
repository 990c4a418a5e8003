"""What batch costs interactive requests and what it harvests, in virtual time.

    python -m benchmarks.bench_batch [--scenario L8A,...] [--laws protect,S6,...] [--seeds 5] [--jobs 2] [--quick]
                                     [--json OUT]

A scenario is an engine and its traffic (``benchmarks.batch_traffic``): by default L8A, L8K, Q32A and Q32K with phases
of 90 s, each also ``-long`` (300 s), ``-four`` (four engines) and ``-irregular`` (a level drawn every 20 s), and
``-deadlines``: 3 x 1000 lines with windows of 30 min, 2 h and 24 h instead of endless batch. A law
(``benchmarks.batch_laws``) says how much batch there may be: S0 none, S1 plain flood, S2 gateway without gating, S3
refusals and AIMD, S4 flow control and AIMD, S5 endpoint scrape, S6 and fixed-5 a fixed number, protect and harvest ours
(-learned: without an operator's bound, -wrong: told of a wrong step model).

Ratios are to S0 with the same arrivals, over requests that arrive in a burst and over all; the first cycle is warm-up.
ITL is a request's mean. Harvest is batch tokens, prompt and output, none counted twice, as a share of what engines do
of batch alone at the best number in flight. Wasted is the share of all computed tokens that were computed again.
``protect`` gets as its bound the ITL p95 of S0 bursts times 1.15, on irregular traffic times 1.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np

from benchmarks.asked import names, positive
from benchmarks.batch_laws import Cap, laws
from benchmarks.batch_sim import BATCH, COMPUTED, INTERACTIVE, LINES, Simulation
from benchmarks.batch_traffic import SCENARIOS, Scenario, batch_lines
from benchmarks.results import write_json

FIRST_SEED = 42
BASES = ("L8A", "L8K", "Q32A", "Q32K")
OURS = ("protect", "protect-learned", "harvest")
RIVALS = ("S1", "S1-priority", "S2", "S3", "S4", "S5", "S6", "fixed-5", "harvest-wrong")
DEADLINES = "-deadlines"
JOB_LINES = 1000
WINDOWS_S = (1800.0, 7200.0, 86400.0)
BOUND_FACTOR = 1.15
ALONE = {"L8": (187, 205, 220, 240), "Q32": (123, 140, 155, 170)}
"""Lines in flight among which the best is sought, by what a scenario's name begins with."""

ALONE_S = (100, 700)
"""From when to when batch alone is measured."""


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One scenario and seed under S0 and then each law; or, without laws, batch alone."""

    scenario: Scenario
    laws: tuple[str, ...]
    seed: int
    deadlines: bool = False

    @property
    def title(self) -> str:
        return f"{self.scenario.name}{DEADLINES * self.deadlines}, seed {self.seed}"


def measure(task: Task) -> dict[str, dict[str, float]]:
    """Law -> figure -> value. Harvests are in tokens per second and engine here."""
    if not task.laws:
        return {"alone": {"tokens_per_s": alone_tokens_per_s(task.scenario, task.seed)}}
    first = figures(run(task, "S0", None))
    bound_ms = first["burst_itl_ms_p95"] * (1.0 if task.scenario.irregular else BOUND_FACTOR)
    found = {"S0": first}
    for name in task.laws:
        simulation = run(task, name, bound_ms)
        found[name] = against(figures(simulation), first)
        if task.deadlines:
            found[name] |= missed(simulation)
    return found


def run(task: Task, name: str, bound_ms: float | None) -> Simulation:
    lines = batch_lines(task.seed, len(WINDOWS_S) * JOB_LINES if task.deadlines else np.inf)
    return Simulation(task.scenario, laws(task.scenario, bound_ms)[name](), task.seed, lines).run()


def alone_tokens_per_s(scenario: Scenario, seed: int) -> float:
    """Of one engine at the best number in flight."""
    begin_s, end_s = ALONE_S
    one = msgspec.structs.replace(scenario, engines=1)
    best = 0.0
    for lines in ALONE["L8" if scenario.name.startswith("L8") else "Q32"]:
        made = Simulation(one, Cap(lines), seed, batch_lines(seed), interactive=False, end_s=end_s).run()
        best = max(best, float(made.bins[begin_s:end_s, BATCH].mean()))
    return best


def figures(simulation: Simulation) -> dict[str, float]:
    """Latencies in ms, harvest in tokens per second and engine, the rest in its unit; NaN where there is nothing."""
    scenario = simulation.scenario
    asked = [one for one in simulation.asked.values() if one.at_s >= scenario.warm_up_s]
    made: dict[str, float] = {}
    for name, group in (("burst", [one for one in asked if scenario.bursting(one.at_s)]), ("all", asked)):
        ttft_ms = [(one.first_s - one.at_s) * 1e3 for one in group]
        itl_ms = [(o.end_s - o.first_s) * 1e3 / (o.output_tokens - 1) for o in group if o.output_tokens > 1]
        for kind, values in (("ttft", ttft_ms), ("itl", itl_ms)):
            for q in (50, 95, 99):
                made[f"{name}_{kind}_ms_p{q}"] = float(np.percentile(values, q)) if values else np.nan
    return made | harvest(simulation)


def harvest(simulation: Simulation) -> dict[str, float]:
    """By phase, and what was wasted."""
    scenario = simulation.scenario
    second = np.arange(int(scenario.warm_up_s), int(scenario.end_s))
    bins = simulation.bins[second]
    bursting = np.array([scenario.bursting(float(s)) for s in second])
    phases = {"idle": ~bursting, "burst": bursting, "total": np.ones(len(second), dtype=bool)}
    made = {
        f"{name}_harvest": float(bins[phase, BATCH].mean()) / scenario.engines if phase.any() else np.nan
        for name, phase in phases.items()
    }
    net = bins[:, (BATCH, INTERACTIVE)].sum()
    made["wasted_tokens_pct"] = max(0.0, 100 * (1 - float(net / bins[:, COMPUTED].sum())))
    made["batch_requests_per_s"] = float(bins[:, LINES].mean())
    made["aborts_per_cycle"] = simulation.aborts / scenario.cycles
    return made


def against(figures: dict[str, float], alone: dict[str, float]) -> dict[str, float]:
    ratios = {
        name.replace("_ms_", "_") + "_ratio": value / alone[name] for name, value in figures.items() if "_ms_" in name
    }
    return ratios | {name: value for name, value in figures.items() if "_ms_" not in name}


def missed(simulation: Simulation) -> dict[str, float]:
    """Percent of each job's lines that miss its window. What is beyond the run goes on at the run's mean rate."""
    done_s = sorted(job.done_s for job in simulation.done if job.done_s is not None)
    per_s = len(done_s) / simulation.end_s
    made = {}
    for number, window_s in enumerate(WINDOWS_S, 1):
        jobs = range((number - 1) * JOB_LINES, number * JOB_LINES)
        in_time = {job.number for job in simulation.done if job.done_s is not None and job.done_s <= window_s}
        late = sum(1 for one in jobs if one not in in_time)
        extra = per_s * max(0.0, window_s - simulation.end_s)
        made[f"job_{number}_missed_pct"] = 100 * max(0.0, late - extra) / JOB_LINES
    return made


# ------------------------------------------------------------------------------------------------------ what was asked


def plan(args: argparse.Namespace) -> list[Task]:
    """ValueError for a scenario or law that is not known."""
    variants = ("",) if args.quick else ("", "-long", "-four", "-irregular", DEADLINES)
    asked = args.scenario or [f"{base}{variant}" for variant in variants for base in BASES]
    seeds = range(FIRST_SEED, FIRST_SEED + (1 if args.quick else args.seeds))
    made, alone = [], {}
    for name in asked:
        base = name.removesuffix(DEADLINES)
        if base not in SCENARIOS:
            raise ValueError(f"unknown scenario {name!r}; known: {', '.join(SCENARIOS)}, and four with {DEADLINES}")
        scenario = _cut(SCENARIOS[base], quick=args.quick, deadlines=name != base)
        chosen = tuple(args.laws or _laws(name))
        for law in chosen:
            if law not in laws(scenario):
                raise ValueError(f"unknown law {law!r}; known: {', '.join(laws(scenario))}")
        alone[scenario.preset.model] = Task(scenario=scenario, laws=(), seed=FIRST_SEED)
        made += [Task(scenario=scenario, laws=chosen, seed=seed, deadlines=name != base) for seed in seeds]
    return [*alone.values(), *made]


def _cut(scenario: Scenario, *, quick: bool, deadlines: bool) -> Scenario:
    if quick:
        return msgspec.structs.replace(scenario, cycles=2)
    return msgspec.structs.replace(scenario, cycles=10) if deadlines else scenario


def _laws(name: str) -> tuple[str, ...]:
    if name in BASES:
        return OURS + RIVALS
    if name.endswith(DEADLINES):
        return ("fixed-5", "S6", "protect", "harvest")
    return ("fixed-5", *OURS)


def run_all(tasks: Sequence[Task], jobs: int, on_done: Callable[[Task], None]) -> list[dict[str, dict[str, float]]]:
    """In the order of the tasks, whoever ran them."""
    found: dict[int, dict[str, dict[str, float]]] = {}
    if jobs == 1:
        for number, task in enumerate(tasks):
            found[number] = measure(task)
            on_done(task)
    else:
        with ProcessPoolExecutor(min(jobs, len(tasks)), multiprocessing.get_context("spawn")) as pool:
            numbers = {pool.submit(measure, task): number for number, task in enumerate(tasks)}
            for future in as_completed(numbers):
                found[numbers[future]] = future.result()
                on_done(tasks[numbers[future]])
    return [found[number] for number in range(len(tasks))]


@contextmanager
def progress(total: int) -> Iterator[Callable[[Task], None]]:
    """On stderr: a bar on a terminal where rich is installed, else lines."""
    done = itertools.count(1)
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        terminal = False
    else:
        terminal = sys.stderr.isatty()
    if not terminal:
        yield lambda task: print(f"{next(done)} of {total}: {task.title}", file=sys.stderr, flush=True)
        return
    with Progress(console=Console(stderr=True)) as bar:
        row = bar.add_task("simulating", total=total)
        yield lambda task: bar.update(row, advance=1, description=task.title)


# ----------------------------------------------------------------------------------------------------------- reporting

Table = dict[tuple[str, str], dict[str, list[float]]]
"""(scenario, law) -> figure -> a value per seed."""

COLUMNS = (
    ("burst_ttft_p95_ratio", "TTFT95"), ("burst_itl_p95_ratio", "ITL95"), ("all_ttft_p95_ratio", "all TTFT95"),
    ("all_itl_p95_ratio", "all ITL95"), ("idle_harvest_pct", "idle %"), ("burst_harvest_pct", "burst %"),
    ("total_harvest_pct", "total %"), ("wasted_tokens_pct", "wasted %"), ("batch_requests_per_s", "req/s"),
    ("job_1_missed_pct", "job 1 missed %"),
)  # fmt: skip


def gather(tasks: Sequence[Task], found: Sequence[dict[str, dict[str, float]]]) -> Table:
    """Harvests become percent of batch alone."""
    both = list(zip(tasks, found, strict=True))
    alone = {task.scenario.preset.model: one["alone"]["tokens_per_s"] for task, one in both if not task.laws}
    table: Table = {}
    for task, one in both:
        name = task.scenario.name + DEADLINES * task.deadlines
        for law, values in one.items():
            row = table.setdefault((task.scenario.preset.model if law == "alone" else name, law), {})
            for figure, value in values.items():
                share = figure.endswith("_harvest")
                scaled = 100 * value / alone[task.scenario.preset.model] if share else value
                row.setdefault(figure + "_pct" * share, []).append(scaled)
    return table


def flat(table: Table) -> dict[str, float]:
    """Means over the seeds, and of the ratios the worst seed too; what there is nothing of is left out."""
    made = {}
    for (scenario, law), row in table.items():
        for figure, values in row.items():
            name = f"{scenario}_{law}_{figure}".replace("-", "_").replace(" ", "_").replace(",", "").lower()
            if not np.isnan(values).any():
                made[name] = float(np.mean(values))
                if figure.endswith("p95_ratio"):
                    made[name.removesuffix("_ratio") + "_worst_ratio"] = max(values)
    return made


def print_table(table: Table) -> None:
    """A row per scenario and law: means over the seeds."""
    shown = {key: row for key, row in table.items() if key[1] not in ("S0", "alone")}
    print(f"{'scenario':<16}{'law':<16}" + "".join(f"{title:>{max(8, len(title) + 2)}}" for _, title in COLUMNS))
    for (scenario, law), row in shown.items():
        cells = (
            f"{np.mean(row[name]) if name in row else np.nan:>{max(8, len(title) + 2)}.{2 if 'ratio' in name else 1}f}"
            for name, title in COLUMNS
        )
        print(f"{scenario:<16}{law:<16}" + "".join(cells).replace("nan", "  -"))
    for (model, law), row in table.items():
        if law == "alone":
            print(f"batch alone, {model}: {np.mean(row['tokens_per_s']):,.0f} tokens/s")


def main(argv: Sequence[str] | None = None) -> int:
    """0 when everything was measured, whatever it showed."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--scenario", type=names, metavar="A,B")
    p.add_argument("--laws", type=names, metavar="X,Y", help="besides S0, which always runs")
    p.add_argument("--seeds", type=positive, default=5, metavar="N", help="how many (%(default)s)")
    p.add_argument("--jobs", type=positive, default=2, metavar="N", help="processes (%(default)s)")
    p.add_argument("--quick", action="store_true", help="does everything run? one seed, one measured cycle")
    p.add_argument("--json", type=Path, metavar="OUT")
    args = p.parse_args(argv)
    try:
        tasks = plan(args)
    except ValueError as error:
        p.error(str(error))
    with progress(len(tasks)) as on_done:
        found = run_all(tasks, args.jobs, on_done)
    table = gather(tasks, found)
    print_table(table)
    if args.json:
        config = {name: value for name, value in vars(args).items() if name not in ("json", "jobs")}
        write_json(args.json, config, FIRST_SEED, flat(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
