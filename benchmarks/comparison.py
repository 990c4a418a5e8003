"""How arms compare over rates, scenarios and seeds: figures of runs in, intervals, knees, ratios and tables out.

An arm that fails requests looks better than it is in every ratio; the tables say how many it failed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from scipy import stats

from benchmarks.measures import TARGETS

COMPARED = ("e2e_mean_ms", "ttft_p90_ms", "ntpot_p90_ms")
"""What arms are ranked by."""
CONFIDENCE = 0.95
KEPT_UP_PCT = 90.0
"""An arm keeps up from this ``kept_up_pct`` on."""


class Estimate(NamedTuple):
    """The mean over the seeds and half the width of its confidence interval; that is NaN with fewer than two."""

    mean: float
    half_width: float = math.nan


def estimate(values: Sequence[float]) -> Estimate:
    """By Student's t with n - 1 degrees of freedom: the seeds are independent and few. NaN without values."""
    n = len(values)
    mean = float(np.mean(values)) if n else math.nan
    if n < 2:
        return Estimate(mean)
    return Estimate(mean, float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * np.std(values, ddof=1)) / math.sqrt(n))


def over_seeds(runs: Sequence[Mapping[str, float]]) -> dict[str, Estimate]:
    """Each figure over the runs that have it."""
    names = dict.fromkeys(name for run in runs for name in run)
    return {name: estimate([run[name] for run in runs if name in run]) for name in names}


def knee_per_s(ladder: Mapping[float, Mapping[str, float]], reference_ms: float, factor: float) -> float:
    """The highest rate of the ladder (rate -> figures) up to which, at it and every lower one, the mean E2E is at most
    ``factor`` times ``reference_ms`` and the arm keeps up (KEPT_UP_PCT). ``reference_ms`` is the best arm's mean E2E at
    the lowest rate, so that a bad start lifts no arm's knee. 0 when the lowest rate is already too much."""
    knee = 0.0
    for rate_per_s in sorted(ladder):
        row = ladder[rate_per_s]
        in_time = row.get("e2e_mean_ms", math.inf) <= factor * reference_ms
        if not in_time or row.get("kept_up_pct", 0.0) < KEPT_UP_PCT:
            break
        knee = rate_per_s
    return knee


def ratios(values: Mapping[str, float]) -> dict[str, float]:
    """Arm -> its value over the best (smallest) one; infinite for an arm that has none, and empty when none has."""
    known = [value for value in values.values() if 0 < value < math.inf]
    if not known:
        return {}
    return {arm: value / min(known) if value in known else math.inf for arm, value in values.items()}


class Standing(NamedTuple):
    """An arm's ratios to the best over all rows."""

    worst: float
    geometric_mean: float


def standing(of_rows: Sequence[float]) -> Standing:
    """NaN without rows."""
    if not of_rows:
        return Standing(math.nan, math.nan)
    return Standing(max(of_rows), float(np.exp(np.mean(np.log(of_rows)))))


# ---------------------------------------------------------------------------------------------------- rate by arm


class Step(NamedTuple):
    """One load of a scenario; ``name`` is what its results are quoted under."""

    rate_per_s: float
    name: str


Ladder: TypeAlias = dict[Step, dict[str, dict[str, Estimate]]]
"""Step -> arm -> figure -> over the seeds."""
OneRun: TypeAlias = tuple[str, Step, str, Mapping[str, float]]
"""Scenario, step, arm, figures."""


def ladders(runs: Iterable[OneRun]) -> dict[str, Ladder]:
    """Scenario -> its figures over the seeds."""
    seeds: dict[str, dict[Step, dict[str, list[Mapping[str, float]]]]] = {}
    for name, step, arm, figures in runs:
        seeds.setdefault(name, {}).setdefault(step, {}).setdefault(arm, []).append(figures)
    return {
        name: {step: {arm: over_seeds(found) for arm, found in arms.items()} for step, arms in steps.items()}
        for name, steps in seeds.items()
    }


def means(figures: Mapping[str, Estimate]) -> dict[str, float]:
    return {name: found.mean for name, found in figures.items()}


def row_ratios(arms: Mapping[str, Mapping[str, Estimate]], figure: str) -> dict[str, float]:
    """Arm -> this figure over the best arm's."""
    return ratios({arm: found[figure].mean if figure in found else math.inf for arm, found in arms.items()})


def knees(ladder: Ladder, factor: float) -> dict[str, float]:
    """Arm -> knee, requests/s."""
    lowest = ladder[min(ladder)].values()
    reference_ms = min((found["e2e_mean_ms"].mean for found in lowest if "e2e_mean_ms" in found), default=math.nan)
    arms = dict.fromkeys(arm for row in ladder.values() for arm in row)
    return {
        arm: knee_per_s(
            {at.rate_per_s: means(row[arm]) for at, row in ladder.items() if arm in row}, reference_ms, factor
        )
        for arm in arms
    }


def standings(of_scenarios: Mapping[str, Ladder]) -> dict[str, dict[str, Standing]]:
    """Arm -> compared figure -> its ratios over all rows."""
    ratios: dict[str, dict[str, list[float]]] = {}
    for ladder in of_scenarios.values():
        for row in ladder.values():
            for figure in COMPARED:
                for arm, ratio in row_ratios(row, figure).items():
                    ratios.setdefault(arm, {}).setdefault(figure, []).append(ratio)
    return {arm: {figure: standing(of_rows) for figure, of_rows in found.items()} for arm, found in ratios.items()}


def flat(of_scenarios: Mapping[str, Ladder], factor: float) -> dict[str, float]:
    """``scenario.step.arm.figure``, each with its ``ci95_figure`` (half the interval), then knees and the summary."""
    made: dict[str, float] = {}
    for name, ladder in of_scenarios.items():
        for step, row in ladder.items():
            for arm, found in row.items():
                place = f"{name}.{step.name}.{arm}"
                made |= {f"{place}.{figure}": value.mean for figure, value in found.items()}
                made |= {f"{place}.ci95_{figure}": value.half_width for figure, value in found.items()}
        made |= {f"{name}.{arm}.knee_per_s": knee for arm, knee in knees(ladder, factor).items()}
    for arm, compared in standings(of_scenarios).items():
        for figure, (worst, geometric_mean) in compared.items():
            stem = f"summary.{arm}.{figure.rpartition('_')[0]}"
            made |= {f"{stem}_worst_ratio": worst, f"{stem}_geometric_mean_ratio": geometric_mean}
    return {name: value for name, value in made.items() if math.isfinite(value)}


HEADS = [
    "load, arm",
    "E2E mean s",
    "TTFT p90 ms",
    "NTPOT p90 ms",
    "TTFT p50 ms",
    "TPOT p90 ms",
    "out tok/s",
    "in tok/s",
    "goodput %",
    "hit %",
    "imbalance",
    "MAPE ttft, tpot %",
    "failed",
]


def print_tables(of_scenarios: Mapping[str, Ladder], factor: float) -> None:
    for name, ladder in of_scenarios.items():
        print_scenario(name, ladder, factor)
    print_summary(of_scenarios)


def print_scenario(name: str, ladder: Ladder, factor: float) -> None:
    label = max(len(step.name) for step in ladder)
    width = max(len(arm) for row in ladder.values() for arm in row)
    widths = [label + 1 + width, *(max(len(head), 18 if i < 3 else 9) for i, head in enumerate(HEADS[1:]))]
    print(f"\n{name}\n" + _line(HEADS, widths))
    for step, row in sorted(ladder.items()):
        ratios = {figure: row_ratios(row, figure) for figure in COMPARED}
        for arm, found in row.items():
            of_arm = {figure: of_row.get(arm, math.nan) for figure, of_row in ratios.items()}
            print(_line([f"{step.name:>{label}} {arm}", *_cells(found, of_arm)], widths))
    top = max(ladder).rate_per_s
    told = (f"{arm} {'≥ ' * (knee >= top)}{knee:.4g}" for arm, knee in knees(ladder, factor).items())
    print(f"knee, requests/s (E2E within {factor:g} times): {', '.join(told)}")


def _cells(found: Mapping[str, Estimate], ratios: Mapping[str, float]) -> list[str]:
    compared = [
        f"{_cell(found, 'e2e_mean_ms', 1e-3)} /{ratios['e2e_mean_ms']:5.2f}",
        f"{_cell(found, 'ttft_p90_ms')} /{ratios['ttft_p90_ms']:5.2f}",
        f"{_cell(found, 'ntpot_p90_ms')} /{ratios['ntpot_p90_ms']:5.2f}",
    ]
    names = "ttft_p50_ms tpot_p90_ms output_tokens_per_s input_tokens_per_s goodput_pct hit_rate_pct imbalance_ratio"
    plain = [_cell(found, figure, interval=False) for figure in names.split()]
    errors = ", ".join(_cell(found, f"{target}_mape_pct", interval=False) for target in TARGETS)
    return [*compared, *plain, errors, _cell(found, "failed_requests", interval=False)]


def _cell(found: Mapping[str, Estimate], figure: str, scale: float = 1.0, *, interval: bool = True) -> str:
    if figure not in found:
        return "-"
    mean, half_width = (value * scale for value in found[figure])
    text = f"{mean:,.3g}" if abs(mean) < 1000 else f"{mean:,.0f}"
    return f"{text} ±{half_width:.2g}" if interval and math.isfinite(half_width) else text


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = cells
    return "  ".join([f"{first:<{widths[0]}}", *(f"{cell:>{w}}" for cell, w in zip(rest, widths[1:], strict=True))])


def print_summary(of_scenarios: Mapping[str, Ladder]) -> None:
    """Best geometric mean of the first compared figure first."""
    found = standings(of_scenarios)
    widths = [max(map(len, [*found, "ratio to the best arm: worst / geometric mean"])), *(18 for _ in COMPARED)]
    print("\n" + _line(["ratio to the best arm: worst / geometric mean", *COMPARED], widths))
    none = Standing(math.nan, math.nan)
    for arm, of_arm in sorted(found.items(), key=lambda one: one[1].get(COMPARED[0], none).geometric_mean):
        cells = [of_arm.get(figure, none) for figure in COMPARED]
        print(_line([arm, *(f"{worst:.2f} / {mean:.3f}" for worst, mean in cells)], widths))
