"""What a replay showed: results in, figures, tables and one picture out. Pure but for the file `plot` writes."""

from __future__ import annotations

import io
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import RenderableType

TABLE_WIDTH = 110


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """How one request went. Times in seconds; None = not observed."""

    request_id: str
    session: str
    at_s: float
    """When the workload wanted it sent, from the start of the replay; `sent_s` is when it was."""
    sent_s: float
    schedule_delay_s: float
    """``sent_s - at_s``: what the generator itself came late, mostly by waiting for a free slot."""
    e2e_s: float
    """From sending to the end of the reply, or until the failure was noticed (a stream that breaks off: up to half a
    second late)."""
    input_tokens: int
    """As the workload counts them, as `output_tokens` are those it asked for; `prompt_tokens`, `cached_tokens` and
    `completion_tokens` are the server's word."""
    output_tokens: int
    streaming: bool
    ttft_s: float | None = None
    """From sending to the first byte of the reply's body."""
    chunks: int = 0
    """Events of the stream that carry tokens: neither the usage event nor the end mark. Of a failed one, those read."""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    status: int | None = None
    error: str | None = None
    """``kind`` or ``kind: detail``; None when all is well."""
    endpoint: str = ""
    """The server that replied, as it names itself."""

    @property
    def tpot_s(self) -> float | None:
        """(e2e - ttft) / (tokens - 1); None for failures, whole replies and replies of one token."""
        tokens = self.completion_tokens or self.chunks
        if self.error or not self.streaming or self.ttft_s is None or tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (tokens - 1)


class Spread(NamedTuple):
    """Percentiles of one time in ms, and how many values they are of."""

    p50: float
    p95: float
    p99: float
    samples: int


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one replay. A spread is None when no request could be measured."""

    sent: int
    succeeded: int
    failures: Mapping[str, int]
    """Kind of error -> requests."""
    wall_s: float
    """From the first request sent to the last reply's end."""
    offered_rate_per_s: float
    """Requests sent over the time it took to send them."""
    achieved_rate_per_s: float
    """Successful requests over `wall_s`."""
    output_tokens_per_s: float
    cached_tokens_share: float | None
    """Of the prompt tokens of the servers that tell, those that were cached."""
    schedule_delay_ms_p99: float
    ttft_ms: Spread | None
    tpot_ms: Spread | None
    e2e_ms: Spread | None
    endpoint_share: Mapping[str, float]
    """Server -> its share of the successful requests that name one, by name."""


class Window(NamedTuple):
    """The absolute percentage errors of the predictions made in one window."""

    start_s: float
    mean_ape_pct: float
    median_ape_pct: float
    samples: int


Prediction = tuple[float, float, float]
"""(time_s, predicted_ms, actual_ms). Rows whose actual value is not positive have no percentage error: left out."""


def summarize(results: Sequence[Result]) -> Summary:
    """The figures of these results, in any order; ValueError when there are none."""
    if not results:
        raise ValueError("no request was sent, so there is nothing to report")
    good = [result for result in results if result.error is None]
    first_s = min(result.sent_s for result in results)
    wall_s = max(result.sent_s + result.e2e_s for result in results) - first_s
    sending_s = max(result.sent_s for result in results) - first_s
    return Summary(
        sent=len(results),
        succeeded=len(good),
        failures=dict(Counter(result.error.partition(":")[0] for result in results if result.error).most_common()),
        wall_s=wall_s,
        offered_rate_per_s=_per(len(results) - 1, sending_s),
        achieved_rate_per_s=_per(len(good), wall_s),
        output_tokens_per_s=_per(sum(result.completion_tokens or result.chunks for result in good), wall_s),
        cached_tokens_share=_cached_share(good),
        schedule_delay_ms_p99=float(np.percentile([result.schedule_delay_s for result in results], 99)) * 1e3,
        ttft_ms=_spread(result.ttft_s for result in good),
        tpot_ms=_spread(result.tpot_s for result in good),
        e2e_ms=_spread(result.e2e_s for result in good),
        endpoint_share=_shares(result.endpoint for result in good if result.endpoint),
    )


def mape_by_window(rows: Iterable[Prediction], window_s: float = 10.0) -> list[Window]:
    """Errors of the predictions per window of ``window_s`` from time 0, in order; empty windows are left out."""
    errors = sorted((time_s // window_s * window_s, _ape_pct(p, a)) for time_s, p, a in rows if a > 0)
    return [
        _window(start_s, [ape_pct for _, ape_pct in group])
        for start_s, group in itertools.groupby(errors, key=lambda error: error[0])
    ]


def render_text(summary: Summary, title: str = "Replay") -> str:
    """The summary as two tables for a terminal. Needs rich (extra ``local``)."""
    from rich.table import Table

    times = Table("", "p50", "p95", "p99", "requests", title=f"{title}: times in ms")
    for name, spread in (("TTFT", summary.ttft_ms), ("TPOT", summary.tpot_ms), ("E2E", summary.e2e_ms)):
        cells = [f"{value:,.1f}" for value in spread[:3]] + [f"{spread.samples:,}"] if spread else ["-"] * 4
        times.add_row(name, *cells)
    figures = Table("", "", title=f"{title}: requests", show_header=False)
    for name, value in _figures(summary):
        figures.add_row(name, value)
    return _to_text(times, figures)


def render_mape(windows: Sequence[Window], title: str) -> str:
    """Prediction errors over time as a table for a terminal. Needs rich (extra ``local``)."""
    from rich.table import Table

    table = Table("from s", "mean error %", "median error %", "requests", title=title)
    for window in windows:
        errors = (f"{window.mean_ape_pct:.1f}", f"{window.median_ape_pct:.1f}")
        table.add_row(f"{window.start_s:,.0f}", *errors, f"{window.samples:,}")
    return _to_text(table)


def plot(rows: Sequence[Prediction], path_png: str | Path, title: str = "TTFT", window_s: float = 10.0) -> None:
    """Writes a picture: predicted against actual, and the error over time. Needs matplotlib (extra ``local``)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    FigureCanvasAgg(figure)
    scatter, timeline = figure.subplots(1, 2)
    _plot_scatter(scatter, [row for row in rows if row[1] > 0 and row[2] > 0], title)
    _plot_errors(timeline, mape_by_window(rows, window_s), title, window_s)
    figure.savefig(path_png, dpi=110)


def _plot_scatter(axes: Axes, rows: Sequence[Prediction], title: str) -> None:
    if rows:
        _, predicted, actual = zip(*rows, strict=True)
        ends = [min(predicted + actual), max(predicted + actual)]
        axes.plot(ends, ends, color="0.6", linewidth=1, label="exact")
        axes.scatter(actual, predicted, s=6, alpha=0.35, linewidths=0, label="one request")
        axes.set(xscale="log", yscale="log")
        axes.legend()
    axes.set(title=f"{title}: predicted against actual", xlabel="actual, ms", ylabel="predicted, ms")


def _plot_errors(axes: Axes, windows: Sequence[Window], title: str, window_s: float) -> None:
    times_s = [window.start_s + window_s / 2 for window in windows]
    axes.plot(times_s, [window.mean_ape_pct for window in windows], marker="o", markersize=3, label="mean")
    axes.plot(times_s, [window.median_ape_pct for window in windows], marker="o", markersize=3, label="median")
    axes.set(title=f"{title}: error per {window_s:g} s", xlabel="time, s", ylabel="absolute error, %")
    axes.set_ylim(bottom=0)
    axes.legend()


def _figures(summary: Summary) -> list[tuple[str, str]]:
    cached = "-" if summary.cached_tokens_share is None else f"{summary.cached_tokens_share:.1%}"
    return [
        ("sent", f"{summary.sent:,} in {summary.wall_s:,.1f} s"),
        ("succeeded", f"{summary.succeeded:,}"),
        *((f"failed: {kind}", f"{count:,}") for kind, count in summary.failures.items()),
        ("offered rate", f"{summary.offered_rate_per_s:,.2f} /s"),
        ("achieved rate", f"{summary.achieved_rate_per_s:,.2f} /s"),
        ("output tokens", f"{summary.output_tokens_per_s:,.0f} /s"),
        ("prompt tokens from cache", cached),
        ("schedule delay p99", f"{summary.schedule_delay_ms_p99:,.1f} ms"),
        *((f"share of {name}", f"{share:.1%}") for name, share in summary.endpoint_share.items()),
    ]


def _to_text(*tables: RenderableType) -> str:
    from rich.console import Console

    text = io.StringIO()
    Console(file=text, width=TABLE_WIDTH, color_system=None).print(*tables, sep="\n")
    return text.getvalue()


def _spread(values_s: Iterable[float | None]) -> Spread | None:
    known_ms = [value_s * 1e3 for value_s in values_s if value_s is not None]
    if not known_ms:
        return None
    p50, p95, p99 = (float(value) for value in np.percentile(known_ms, (50, 95, 99)))
    return Spread(p50, p95, p99, len(known_ms))


def _shares(names: Iterable[str]) -> dict[str, float]:
    counts = Counter(names)
    return {name: count / counts.total() for name, count in sorted(counts.items())}


def _cached_share(results: Iterable[Result]) -> float | None:
    told = [(r.cached_tokens, r.prompt_tokens) for r in results if r.cached_tokens is not None and r.prompt_tokens]
    return sum(cached for cached, _ in told) / sum(prompt for _, prompt in told) if told else None


def _per(count: int, time_s: float) -> float:
    return count / time_s if time_s > 0 else 0.0


def _ape_pct(predicted: float, actual: float) -> float:
    return abs(predicted - actual) / actual * 100


def _window(start_s: float, errors_pct: Sequence[float]) -> Window:
    return Window(start_s, float(np.mean(errors_pct)), float(np.median(errors_pct)), len(errors_pct))
