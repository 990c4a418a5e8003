"""Pictures of a comparison. Needs matplotlib (extra ``local``), which is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from benchmarks.comparison import Estimate, Ladder, Step
from benchmarks.measures import TARGETS, Slice

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = (
    ("ttft_p90_ms", "TTFT p90, ms", "log"),
    ("e2e_mean_ms", "mean E2E, ms", "log"),
    ("ntpot_p90_ms", "NTPOT p90, ms", "log"),
    ("tpot_p90_ms", "TPOT p90, ms", "linear"),
    ("output_tokens_per_s", "output tokens/s", "linear"),
    ("input_tokens_per_s", "input tokens/s", "linear"),
    ("goodput_pct", "requests within the limits, %", "linear"),
    ("hit_rate_pct", "prompt tokens from cache, %", "linear"),
    ("imbalance_ratio", "busiest endpoint over the mean", "linear"),
)
"""Figure, what its axis says, its scale."""
ACROSS = 3
PANEL_INCHES = (5.2, 3.6)
MARKERS = "osv^D<>PXd*h"
DPI = 100

Timelines: TypeAlias = Mapping[str, Sequence[Slice]]
"""Target -> predicted against measured, by time."""
PlacedTimelines: TypeAlias = Mapping[str, Mapping[Step, Mapping[str, Timelines]]]
"""Scenario -> step -> arm -> timelines of one seed."""


def write(ladders: Mapping[str, Ladder], timelines: PlacedTimelines, folder: Path) -> list[Path]:
    """``SCENARIO.png``: each metric against the rate, one line per arm, the confidence interval as a band.
    ``SCENARIO-predictions.png``: predicted and measured over time at the middle rate, one row per predicting arm."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, ladder in ladders.items():
        made.append(_save(draw_ladder(name, ladder), folder / f"{name}.png"))
        steps = sorted(timelines.get(name, {}))
        if steps:
            step = steps[len(steps) // 2]
            picture = draw_timelines(f"{name} at {step.rate_per_s:.4g} requests/s", timelines[name][step])
            made.append(_save(picture, folder / f"{name}-predictions.png"))
    return made


def draw_ladder(name: str, ladder: Ladder) -> Figure:
    arms = list(dict.fromkeys(arm for row in ladder.values() for arm in row))
    down = -(-len(PANELS) // ACROSS)
    picture = _figure(ACROSS, down)
    picture.suptitle(name)
    panels: Any = picture.subplots(down, ACROSS, squeeze=False)
    for axes, (figure, title, scale) in zip(panels.flat, PANELS, strict=True):
        axes.set_yscale(scale)
        for number, arm in enumerate(arms):
            _line(axes, ladder, arm, figure, number)
        shown = axes.get_ylim()
        for number, arm in enumerate(arms):
            _band(axes, ladder, arm, figure, number)
        axes.set_ylim(shown)  # a band of two seeds may be many times as high as the lines are apart
        axes.set(xlabel="requests/s", ylabel=title)
        axes.grid(alpha=0.3)
    picture.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(len(arms), 6))
    return picture


def _known(ladder: Ladder, arm: str, figure: str) -> tuple[list[float], list[Estimate]]:
    found = [(step.rate_per_s, row[arm][figure]) for step, row in sorted(ladder.items()) if figure in row.get(arm, {})]
    return [rate for rate, _ in found], [value for _, value in found]


def _line(axes: Axes, ladder: Ladder, arm: str, figure: str, number: int) -> None:
    """Also an arm without a value has its entry in the legend and its colour."""
    rates, values = _known(ladder, arm, figure)
    axes.plot(
        rates,
        [value.mean for value in values],
        color=f"C{number % 10}",
        linestyle="-" if number < 10 else "--",
        marker=MARKERS[number % len(MARKERS)],
        markersize=4,
        linewidth=1.4,
        label=arm,
    )


def _band(axes: Axes, ladder: Ladder, arm: str, figure: str, number: int) -> None:
    rates, values = _known(ladder, arm, figure)
    low, high = ([value.mean + sign * value.half_width for value in values] for sign in (-1, 1))
    axes.fill_between(rates, low, high, color=f"C{number % 10}", alpha=0.12, linewidth=0)


def draw_timelines(title: str, arms: Mapping[str, Timelines]) -> Figure:
    picture = _figure(len(TARGETS), len(arms))
    picture.suptitle(f"{title}: predicted and measured, means by time of arrival")
    rows: Any = picture.subplots(len(arms), len(TARGETS), squeeze=False, sharex=True)
    for row, (arm, timelines) in zip(rows, arms.items(), strict=True):
        for axes, target in zip(row, TARGETS, strict=True):
            slices = timelines.get(target, ())
            times_s = [one.from_s for one in slices]
            axes.plot(times_s, [one.measured_ms for one in slices], color="0.3", marker=".", label="measured")
            axes.plot(times_s, [one.predicted_ms for one in slices], color="C1", marker=".", label="predicted")
            axes.set(title=arm, xlabel="arrival, s", ylabel=f"{target.upper()}, ms")
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
    rows[0, 0].legend()
    return picture


def _figure(across: int, down: int) -> Figure:
    """One of its own, without pyplot: nothing is shown, and no state is shared."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, height = PANEL_INCHES
    picture = Figure(figsize=(width * across, height * down + 1), layout="constrained")
    FigureCanvasAgg(picture)
    return picture


def _save(picture: Figure, path: Path) -> Path:
    picture.savefig(path, dpi=DPI)
    return path
