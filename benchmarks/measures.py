"""What a run showed: records in, figures out. Pure.

Latencies are of the requests that arrived in the measured window (``Window``) and were answered in full, however late
the answer came. Rates count what ended in the window, whenever it had arrived: that is what the pool served, and it
does not flatter an arm that finishes its backlog after the load has ended. Every request of the window is counted, and
one that was refused, broken off or lost has failed.

- TTFT, TPOT, E2E: as ``Record`` has them; NTPOT: E2E / output tokens, which prices the wait in the tokens waited for.
- Percentiles: linear interpolation between the two nearest of the sorted values (type 7 of Hyndman and Fan).
- Goodput: answered requests that kept every limit, their own where they carry one, else the benchmark's; a time that
  a request does not have (the TPOT of a reply of one token) breaks none.
- Kept up: what was answered from the window's begin + L to its end + L, of what arrived in the window; L is the mean
  E2E of the requests of the window's first quarter. 100 % in any steady state, and where E2E grows with time the rate
  served over the rate offered.
- Hit rate: share of the prompt tokens of the answered requests that the engines found in their caches.
- Imbalance: request-seconds of the busiest endpoint over the mean of all. 1 is even; the number of endpoints is one
  busy and the others idle. Requests count, not tokens: on unequal engines an even number of tokens is a bad balance.
- Prediction error: mean of |predicted - measured| / measured of the answered requests that were predicted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmd_sched.sim.scenario import Record, columns
from llmd_sched.types import Array

TIMES = ("ttft", "tpot", "ntpot", "e2e")
PERCENTILES = (50, 90, 95, 99)
TARGETS = ("ttft", "tpot")
"""What is predicted."""
REPORT_PERCENTILES = (0.1, 1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9)

Mask: TypeAlias = NDArray[np.bool_]
Limits: TypeAlias = Mapping[str, float]
"""``ttft_ms``, ``tpot_ms``, ``ntpot_ms``, ``e2e_ms`` -> the most a good request may take."""
OwnLimits: TypeAlias = Mapping[str, Limits]
"""Request id -> the limits it carries."""


class Window(NamedTuple):
    """Measured are the requests that arrive in ``[from_s, to_s)``."""

    from_s: float
    to_s: float

    @property
    def length_s(self) -> float:
        return self.to_s - self.from_s

    def holds(self, at_s: Array) -> Mask:
        return np.logical_and(at_s >= self.from_s, at_s < self.to_s)


class Sheet:
    """One run's records as aligned columns (n,), and which of them count for what. ``own``: request id -> the limits
    that the request carries."""

    def __init__(
        self, records: Sequence[Record], window: Window, limits: Limits | None = None, own: OwnLimits | None = None
    ) -> None:
        self.window = window
        self.columns = c = columns(records)
        self.answered: Mask = (c["end"] == "finished") & (c["status"] == 200)
        self.arrived_in = window.holds(c["arrival_s"])
        self.ended_s: Array = c["arrival_s"] + c["e2e_ms"] / 1e3
        self.ended_in = window.holds(self.ended_s)
        self.times_ms: dict[str, Array] = {name: c[f"{name}_ms"] for name in ("ttft", "tpot", "e2e")}
        self.times_ms["ntpot"] = c["e2e_ms"] / np.maximum(c["output_tokens"], 1)
        self.measured: Mask = self.arrived_in & self.answered
        self.failed: Mask = self.arrived_in & ~self.answered
        self.good = self.answered & self._kept(limits or {}, own or {})

    def _kept(self, limits: Limits, own: OwnLimits) -> Mask:
        made = np.ones(len(self.answered), dtype=bool)
        for name in {*limits, *(name for carried in own.values() for name in carried)}:
            usual_ms = limits.get(name, math.inf)
            most_ms = [own.get(request_id, {}).get(name, usual_ms) for request_id in self.columns["request_id"]]
            made &= ~(self.times_ms[name.removesuffix("_ms")] > np.array(most_ms))
        return made

    def __getitem__(self, name: str) -> NDArray[Any]:
        """The column, of the answered requests of the window."""
        return self.columns[name][self.measured]

    def time_ms(self, name: str) -> Array:
        """Of the answered requests of the window that have this time."""
        values_ms = self.times_ms[name][self.measured]
        return values_ms[np.isfinite(values_ms)]

    def per_s(self, amounts: NDArray[Any], mask: Mask) -> float:
        """What ended in the window of these, per second of it."""
        return float(amounts[mask & self.ended_in].sum()) / self.window.length_s


def figures(sheet: Sheet, endpoints: Iterable[str]) -> dict[str, float]:
    """Flat names that end in their unit. What nothing was measured of is left out. ``endpoints``: all that there were,
    by name, so that one without requests counts too."""
    window, ones = sheet.window, np.ones(len(sheet.answered))
    made = {
        "offered_requests_per_s": float(sheet.arrived_in.sum()) / window.length_s,
        "served_requests_per_s": sheet.per_s(ones, sheet.answered),
        "goodput_requests_per_s": sheet.per_s(ones, sheet.good),
        "goodput_pct": _pct(float((sheet.good & sheet.arrived_in).sum()), float(sheet.arrived_in.sum())),
        "input_tokens_per_s": sheet.per_s(sheet.columns["input_tokens"], sheet.answered),
        "output_tokens_per_s": sheet.per_s(sheet.columns["output_tokens"], sheet.answered),
        "kept_up_pct": kept_up_pct(sheet),
        "hit_rate_pct": _pct(float(sheet["cached_tokens"].sum()), float(sheet["input_tokens"].sum())),
        "imbalance_ratio": imbalance(sheet["endpoint"], sheet["e2e_ms"], endpoints),
        "measured_requests": float(sheet.measured.sum()),
        "failed_requests": float(sheet.failed.sum()),
    }
    for name in TIMES:
        made |= _spread(name, sheet.time_ms(name))
    made |= {f"{target}_mape_pct": mape_pct(*_pairs(sheet, target)) for target in TARGETS}
    return {name: value for name, value in made.items() if math.isfinite(value)}


def _spread(name: str, values_ms: Array) -> dict[str, float]:
    if not len(values_ms):
        return {}
    percentiles = zip(PERCENTILES, np.percentile(values_ms, PERCENTILES).tolist(), strict=True)
    return {f"{name}_mean_ms": float(values_ms.mean()), **{f"{name}_p{p}_ms": value for p, value in percentiles}}


def kept_up_pct(sheet: Sheet) -> float:
    """See the top of this file; NaN when nothing arrived in the window, or nothing of its first quarter was served."""
    from_s, to_s = sheet.window
    first = sheet.answered & Window(from_s, from_s + sheet.window.length_s / 4).holds(sheet.columns["arrival_s"])
    if not first.any():
        return math.nan
    late_s = float(sheet.times_ms["e2e"][first].mean()) / 1e3
    served = sheet.answered & Window(from_s + late_s, to_s + late_s).holds(sheet.ended_s)
    return _pct(float(served.sum()), float(sheet.arrived_in.sum()))


def imbalance(served_by: NDArray[Any], e2e_ms: Array, endpoints: Iterable[str]) -> float:
    """See the top of this file; NaN when nothing was served."""
    busy_ms = dict.fromkeys(endpoints, 0.0)
    for name, time_ms in zip(served_by.tolist(), e2e_ms.tolist(), strict=True):
        busy_ms[name] = busy_ms.get(name, 0.0) + time_ms
    total_ms = sum(busy_ms.values())
    return max(busy_ms.values()) * len(busy_ms) / total_ms if total_ms > 0 else math.nan


def mape_pct(predicted_ms: Array, measured_ms: Array) -> float:
    """Of aligned (n,); NaN for none."""
    errors = np.abs(predicted_ms - measured_ms) / measured_ms
    return float(100 * errors.mean()) if len(errors) else math.nan


def _pairs(sheet: Sheet, target: str) -> tuple[Array, Array]:
    """Predicted and measured."""
    predicted_ms, measured_ms = sheet[f"predicted_{target}_ms"], _since_sent(sheet, target)
    both = np.isfinite(predicted_ms) & (measured_ms > 0)
    return predicted_ms[both], measured_ms[both]


def _since_sent(sheet: Sheet, target: str) -> Array:
    """What was to be predicted: without the wait in the router."""
    return sheet["ttft_ms"] - sheet["queue_wait_ms"] if target == "ttft" else sheet["tpot_ms"]


class Slice(NamedTuple):
    """Means of the predicted requests that arrived in one stretch of time."""

    from_s: float
    predicted_ms: float
    measured_ms: float
    requests: int


def timeline(records: Sequence[Record], target: str, slice_s: float = 5.0) -> list[Slice]:
    """Predicted against measured from the first request on, warm-up too; empty slices are left out."""
    sheet = Sheet(records, Window(0.0, math.inf))
    arrival_s, predicted_ms = sheet["arrival_s"], sheet[f"predicted_{target}_ms"]
    measured_ms = _since_sent(sheet, target)
    both = np.isfinite(predicted_ms) & (measured_ms > 0)
    number = (arrival_s[both] // slice_s).astype(int)
    counts, predicted, measured = (
        np.bincount(number, weights).tolist() for weights in (None, predicted_ms[both], measured_ms[both])
    )
    rows = enumerate(zip(counts, predicted, measured, strict=True))
    return [Slice(i * slice_s, p / n, m / n, n) for i, (n, p, m) in rows if n]


# -------------------------------------------------------------------------------------------- in inference-perf's shape


def lifecycle_report(sheet: Sheet, rate_per_s: float, delays_s: Sequence[float] = ()) -> dict[str, Any]:
    """The window's requests as inference-perf's stage_N_lifecycle_metrics.json has them: seconds, and rates over the
    time from the first request to the last reply. ``delays_s``: by how much each was sent late, none in virtual time.
    The arrivals of single tokens are not recorded, so inter_token_latency is null."""
    arrival_s = sheet.columns["arrival_s"][sheet.arrived_in]
    ended_s = sheet.ended_s[sheet.arrived_in]
    began_s = float(arrival_s.min()) if len(arrival_s) else 0.0
    sending_s = float(arrival_s.max()) - began_s if len(arrival_s) else 0.0
    total_s = max([sending_s, *(ended_s[np.isfinite(ended_s)] - began_s).tolist()])
    return {
        "benchmark_time_seconds": total_s,
        "load_summary": {
            "count": len(arrival_s),
            "schedule_delay": _summary(delays_s or [0.0] * len(arrival_s)),
            "send_duration": sending_s,
            "requested_rate": rate_per_s,
            "achieved_rate": len(arrival_s) / sending_s if sending_s else 0.0,
        },
        "successes": _successes(sheet, total_s),
        "failures": _failures(sheet),
    }


def _successes(sheet: Sheet, total_s: float) -> dict[str, Any]:
    count, input_tokens, output_tokens = len(sheet["status"]), sheet["input_tokens"], sheet["output_tokens"]
    cached, good = int(sheet["cached_tokens"].sum()), int((sheet.good & sheet.arrived_in).sum())
    amounts = {"input_tokens": int(input_tokens.sum()), "output_tokens": int(output_tokens.sum()), "requests": count}
    amounts["total_tokens"] = amounts["input_tokens"] + amounts["output_tokens"]
    latency = {
        "request_latency": "e2e",
        "normalized_time_per_output_token": "ntpot",
        "time_per_output_token": "tpot",
        "time_to_first_token": "ttft",
    }
    return {
        "count": count,
        "latency": {
            **{key: _summary(sheet.time_ms(name) / 1e3) for key, name in latency.items()},
            "inter_token_latency": None,
        },
        "throughput": {f"{key}_per_sec": amount / total_s if total_s else 0.0 for key, amount in amounts.items()},
        "prompt_len": _summary(input_tokens),
        "output_len": _summary(output_tokens),
        "prompt_tokens": {"total": amounts["input_tokens"], "cached": cached},
        "goodput_metrics": {
            "goodput_percentage": _pct(good, count) if count else 0.0,
            "request_goodput": good / total_s if total_s else 0.0,
            "good_requests": good,
            "total_requests": count,
        },
    }


def _failures(sheet: Sheet) -> dict[str, Any]:
    failed = {name: sheet.columns[name][sheet.failed] for name in ("end", "status", "e2e_ms")}
    labels = Counter(f"{end} {status}" for end, status in zip(failed["end"], failed["status"], strict=True))
    lasted_ms = failed["e2e_ms"]
    return {
        "count": labels.total(),
        "request_latency": _summary(lasted_ms[np.isfinite(lasted_ms)] / 1e3),
        "by_label": {label: {"count": count} for label, count in labels.most_common()},
    }


def _summary(values: Sequence[float] | NDArray[Any]) -> dict[str, float] | None:
    if not len(values):
        return None
    at = zip(REPORT_PERCENTILES, np.percentile(values, REPORT_PERCENTILES).tolist(), strict=True)
    named = {"median" if p == 50 else f"p{p:g}": value for p, value in at}
    return {"mean": float(np.mean(values)), "min": float(np.min(values)), **named, "max": float(np.max(values))}


def _pct(part: float, whole: float) -> float:
    return 100 * part / whole if whole > 0 else math.nan
