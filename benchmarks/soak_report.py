"""What the soak showed: figures and one picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from benchmarks.soak_plan import KINDS, Account, Step
from llmd_sched.load.report import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SETTLED_AFTER_S = 60.0
"""Memory should be flat from here on; half of the time in a run of less than two minutes."""


class Sample(NamedTuple):
    """Resident memory in MiB, ``at_s`` after the load began."""

    at_s: float
    scheduler: float
    trainer: float
    envoy: float


class Run(msgspec.Struct, kw_only=True):
    """All that was measured."""

    steps: list[Step]
    account: Account
    samples: list[Sample]
    cpu_ms: tuple[float, float]
    """Per request, of the scheduler and of the trainer."""
    results: list[Result]
    metrics: dict[str, float]
    complaints: list[str]
    """Lines of the scheduler's log."""
    idle_cpu_pct: float
    """Of the whole machine; near 0 the times say nothing."""
    quiet_after_s: float
    """From the last reply's end until the scheduler had no open request."""


def figures(run: Run, seconds: float) -> dict[str, float]:
    """Names end in the unit."""
    told = run.account
    e2e_ms = sorted(result.e2e_s * 1e3 for result in run.results if result.error is None)
    out = {
        "sent_requests": float(len(run.results)),
        "completed_requests": float(told.completed),
        "failed_on_killed_requests": float(told.on_killed),
        "lost_requests": float(told.lost.total()),
        **{f"lost_{why}_requests": float(count) for why, count in told.lost.items()},
        "sent_to_left_requests": float(told.to_left),
        "sent_to_frozen_requests": float(told.to_frozen),
        "untold_requests": float(told.untold),
        "told_twice_requests": float(told.told_twice),
        **{f"end_{end}_requests": float(count) for end, count in sorted(told.ends.items())},
        **{f"{kind}_steps": float(sum(s.kind == kind for s in run.steps)) for kind in KINDS},
        **{f"e2e_ms_p{q}": e2e_ms[min(len(e2e_ms) - 1, len(e2e_ms) * q // 100)] for q in (50, 99, 100) if e2e_ms},
        "schedule_delay_ms_max": 1e3 * max((r.schedule_delay_s for r in run.results), default=0.0),
        "machine_idle_cpu_pct": run.idle_cpu_pct,
        "scheduler_cpu_ms_per_request": run.cpu_ms[0],
        "trainer_cpu_ms_per_request": run.cpu_ms[1],
    }
    return out | memory(run.samples, seconds) | {"quiet_after_s": run.quiet_after_s} | run.metrics


def memory(samples: Sequence[Sample], seconds: float) -> dict[str, float]:
    out = {}
    settled = [s for s in samples if min(SETTLED_AFTER_S, seconds / 2) <= s.at_s <= seconds]
    for name in ("scheduler", "trainer", "envoy"):
        values = [(s.at_s, float(getattr(s, name))) for s in settled]
        if values:
            out[f"{name}_rss_settled_mib"], out[f"{name}_rss_end_mib"] = values[0][1], values[-1][1]
            out[f"{name}_rss_max_mib"] = max(value for _, value in values)
            out[f"{name}_rss_slope_mib_per_min"] = slope_per_min(values)
    return out


def plot(run: Run, path: str) -> None:
    """Memory above, failures below, over time; needs matplotlib (extra ``local``)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    FigureCanvasAgg(figure)
    memory, failures = figure.subplots(2, 1, sharex=True)
    at_s = [sample.at_s for sample in run.samples]
    for name in ("scheduler", "trainer", "envoy"):
        memory.plot(at_s, [getattr(sample, name) for sample in run.samples], label=name)
    memory.set(title="Resident memory", ylabel="MiB")
    memory.set_ylim(bottom=0)
    memory.legend()
    _plot_failures(failures, run, at_s[-1])
    figure.savefig(path, dpi=110)


def _plot_failures(axes: Axes, run: Run, end_s: float) -> None:
    told, seconds = run.account, range(int(end_s) + 2)
    axes.hist([told.on_killed_at_s, told.lost_at_s], bins=seconds, stacked=True, label=["on a killed one", "lost"])
    for kind, color in (("join", "tab:green"), ("leave", "tab:blue"), ("freeze", "tab:cyan"), ("kill", "tab:red")):
        times_s = [step.at_s for step in run.steps if step.kind == kind]
        axes.plot(times_s, [-1.0] * len(times_s), "|", color=color, markersize=12, label=kind)
    axes.set(title="Failed requests per second, and what was done to endpoints", xlabel="s", ylabel="requests")
    axes.legend(loc="upper right")


def slope_per_min(samples: Sequence[tuple[float, float]]) -> float:
    """Least squares through (s, value), in value per minute; 0 for fewer than two moments."""
    n = len(samples)
    mean_s = sum(s for s, _ in samples) / max(n, 1)
    mean = sum(value for _, value in samples) / max(n, 1)
    spread = sum((s - mean_s) ** 2 for s, _ in samples)
    return 60.0 * sum((s - mean_s) * (value - mean) for s, value in samples) / spread if spread else 0.0
