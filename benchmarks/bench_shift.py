"""How predictions hold when the load triples, and in a pool of unequal engines.

    python -m benchmarks.bench_shift [--json OUT] [--plot FILE] [--seed N]

Both parts run the router of ``configs/predicted-latency.yaml`` over simulated engines in virtual time (`sim.cluster`):
lean path, trainer in line, built-in chat whose reply lengths the router is not told. Every figure is a function of
the seed. Error means |predicted - measured| / measured; a request counts at the time it arrived.

Tripled: four equal engines, 120 s at one rate and 120 s at three times that. Chat: more users of the same applications,
most of each prompt cached; the default ends at 120 requests/s, where 150 are served steadily and at 180 queues grow.
Documents: one prompt of about 1,500 tokens each, never seen before, and 150 tokens of reply. Steady is the second half
of each, less the last 10 s before the shift, whose replies live through it; for the same reason the load goes on for
10 s after the measurement. Recovery is the time after the shift from which on the mean TTFT error over the last 10 s,
looked at every second, stays under 10 %; the whole 120 s when it does not come to that.

Unequal: 8B engines on three H100, one more that is 1.5 times slower though its label says nothing of it, three A100,
and two L40S that join half way. Figures are of the last third.

``phase_floor`` stands beside TTFT errors: a request waits for the end of the step under way, S long, and nobody tells
the router how far that is; |wait - S/2| is S/4 in the mean. So the mean of (TPOT / 4) / TTFT is about what would
remain of the error if all else were known, even who arrives next (on the tripled load it is within 0.2 % of what the
steps themselves give).
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from benchmarks.results import table, write_json
from llmd_sched.load.report import Prediction, mape_by_window
from llmd_sched.load.workload import Item, Span, chat
from llmd_sched.sim.cluster import Cluster
from llmd_sched.sim.engine import EngineConfig
from llmd_sched.sim.scenario import Arrival, ClusterSpec, EngineSpec, Join, Record, arrival, columns
from llmd_sched.sim.steptime import PRESETS, Preset
from llmd_sched.types import Array, Endpoint

CONFIG = Path(__file__).parents[1] / "configs" / "predicted-latency.yaml"
HALF_S = 120.0
END_S = 2 * HALF_S
TRAILING_S = 10.0
LOAD_ENDS_S = END_S + TRAILING_S
GOOD_PCT = 10.0
NOISE_SIGMA = 0.05
HIDDEN_SLOWDOWN = 1.5
TARGETS = ("ttft", "tpot")

# Llama-3-8B. The H100's numbers are the preset's. A100: base, per token, per sequence and overhead as published in the
# linear fits of inference-sim for llama-3.1-8b on one A100 (commit 638a7d33, defaults.yaml); attention in the ratio of
# the prefill coefficients; KV read of 131,072 B per token at 2.039 TB/s.
# L40S: no fit is public. Weight and KV reads at its 0.864 TB/s in place of the H100's 3.35, prefill by peak FLOPs times
# utilisation (362 x 0.32 for 989 x 0.45 TFLOPS), blocks by what 48 GiB leave beside the weights. Derived, not measured.
H100 = PRESETS["llama-3-8b-h100"]
A100 = msgspec.structs.replace(
    H100,
    step_base_s=16.44e-3,
    prefill_token_s=47.8e-6,
    attention_pair_s=1.64e-9,
    sequence_s=18.2e-6,
    decode_context_token_s=0.064e-6,
    request_overhead_s=7.7e-3,
)
L40S = msgspec.structs.replace(
    H100,
    step_base_s=26.2e-3,
    prefill_token_s=73e-6,
    attention_pair_s=2.5e-9,
    decode_context_token_s=0.152e-6,
    kv_blocks=11_100,
)


# ------------------------------------------------------------------------------------------------- the two scenarios


def tripled_documents(preset: Preset, rate_per_s: float, seed: int) -> tuple[ClusterSpec, Iterator[Arrival]]:
    engines = [_engine(i, "engine", preset) for i in range(4)]
    return _spec(engines, seed), _arrivals(documents(seed, rate_per_s))


def documents(seed: int, rate_per_s: float) -> Iterator[Item]:
    """Poisson arrivals until LOAD_ENDS_S, three times as many from HALF_S on; lengths are lognormal."""
    rng, at_s = np.random.default_rng(seed), 0.0
    for number in itertools.count():
        at_s += rng.exponential(1.0 / (rate_per_s * (3.0 if at_s >= HALF_S else 1.0)))
        if at_s >= LOAD_ENDS_S:
            return
        prompt, reply = (int(np.clip(rng.lognormal(np.log(m), 0.6), 16, 8 * m)) for m in (1500, 150))
        span = Span(f"document-{seed}-{number}", prompt)
        yield Item(at_s=at_s, session=str(number), prompt=(span,), output_tokens=reply)


def tripled_chat(preset: Preset, rate_per_s: float, seed: int) -> tuple[ClusterSpec, Iterator[Arrival]]:
    engines = [_engine(i, "engine", preset) for i in range(4)]
    before = chat(seed, rate_per_s, LOAD_ENDS_S)
    more = _later(chat(seed + 1, 2 * rate_per_s, LOAD_ENDS_S - HALF_S), HALF_S, seed)
    return _spec(engines, seed), _arrivals(heapq.merge(before, more, key=lambda item: item.at_s))


def unequal(rate_per_s: float, seed: int) -> tuple[ClusterSpec, Iterator[Arrival]]:
    members = [("h100", H100, "H100")] * 3 + [("a100", A100, "A100")] * 3 + [("l40s", L40S, "L40S")] * 2
    *engines, one, other = (_engine(i, *member) for i, member in enumerate(members))
    slow = _engine(len(members), "hidden_slow_endpoint", H100, "H100")
    engines.append(msgspec.structs.replace(slow, slowdown=HIDDEN_SLOWDOWN))
    joins = [Join(HALF_S, one), Join(HALF_S, other)]
    return _spec(engines, seed, joins), _arrivals(chat(seed, rate_per_s, LOAD_ENDS_S))


def _spec(engines: Sequence[EngineSpec], seed: int, events: Sequence[Join] = ()) -> ClusterSpec:
    return ClusterSpec(config=CONFIG.read_text(encoding="utf-8"), engines=engines, events=events, seed=seed)


def _engine(number: int, group: str, preset: Preset, accelerator: str = "") -> EngineSpec:
    """Its name says the group, for our own book-keeping; its label says the accelerator."""
    labels = {"llm-d.ai/accelerator": accelerator} if accelerator else {}
    endpoint = Endpoint(f"{group}-{number}", f"10.0.0.{number + 1}", 8000, labels=labels)
    return EngineSpec(endpoint=endpoint, engine=EngineConfig(preset=preset, noise_sigma=NOISE_SIGMA))


def _later(items: Iterable[Item], by_s: float, seed: int) -> Iterator[Item]:
    """The items ``by_s`` later, as if of the applications of the chat with this seed: with its system prompts."""
    for item in items:
        system, *rest = item.prompt
        group = system.key.rpartition("-")[2]
        prompt = (system._replace(key=f"chat-{seed}-system-{group}"), *rest)
        yield msgspec.structs.replace(item, at_s=item.at_s + by_s, prompt=prompt)


def _arrivals(items: Iterable[Item]) -> Iterator[Arrival]:
    for item in items:
        yield arrival(item.at_s, b"".join(span.text() for span in item.prompt), item.output_tokens)


# --------------------------------------------------------------------------------------------------- what to say of it


class Errors(NamedTuple):
    """One target's predictions that have a measurement, as aligned arrays (n,), by arrival."""

    at_s: Array
    endpoint: NDArray[Any]
    predicted_ms: Array
    measured_ms: Array

    def between(self, from_s: float, to_s: float) -> Errors:
        return self.where((self.at_s >= from_s) & (self.at_s < to_s))

    def of(self, group: str) -> Errors:
        return self.where(np.char.startswith(self.endpoint, f"{group}-"))

    def where(self, mask: NDArray[np.bool_]) -> Errors:
        return Errors(*(column[mask] for column in self))

    @property
    def mape_pct(self) -> float:
        """NaN without any."""
        return _mean_pct(np.abs(self.predicted_ms - self.measured_ms) / self.measured_ms)

    def rows(self) -> list[Prediction]:
        return list(zip(self.at_s.tolist(), self.predicted_ms.tolist(), self.measured_ms.tolist(), strict=True))


def errors_of(records: Sequence[Record], target: str) -> Errors:
    arrays = columns(sorted(records, key=lambda record: record.arrival_s))
    predicted_ms, measured_ms = arrays[f"predicted_{target}_ms"], arrays[f"{target}_ms"]
    all_of_them = Errors(arrays["arrival_s"], arrays["endpoint"], predicted_ms, measured_ms)
    finished = (arrays["end"] == "finished") & (arrays["status"] == 200)
    return all_of_them.where(finished & np.isfinite(predicted_ms) & np.isfinite(measured_ms))


def recovery_s(errors: Errors, shift_s: float, end_s: float) -> float:
    """From ``shift_s`` until the trailing error is under GOOD_PCT for good; ``end_s - shift_s`` when it never is."""
    looks_s = np.arange(shift_s, end_s + 0.5)
    bad = [not errors.between(at_s - TRAILING_S, at_s).mape_pct < GOOD_PCT for at_s in looks_s]
    good_from = len(bad) - bad[::-1].index(True) if True in bad else 0
    return float(min(good_from, len(bad) - 1))


def phase_floor_pct(records: Sequence[Record], from_s: float, to_s: float, group: str = "") -> float:
    """See the top of this file."""
    chosen = [r for r in records if from_s <= r.arrival_s < to_s and r.endpoint.startswith(group) and r.tpot_ms > 0]
    return _mean_pct(np.array([r.tpot_ms / 4 / r.ttft_ms for r in chosen]))


def _mean_pct(shares: Array) -> float:
    return float(100 * shares.mean()) if len(shares) else math.nan


def tripled_figures(records: Sequence[Record], load: str) -> dict[str, float]:
    steady = {"before": (HALF_S / 2, HALF_S - TRAILING_S), "after": (1.5 * HALF_S, END_S)}
    errors = {target: errors_of(records, target) for target in TARGETS}
    figures = {}
    for target in TARGETS:
        for when, (from_s, to_s) in steady.items():
            figures[f"{target}_mape_{load}_steady_{when}_pct"] = errors[target].between(from_s, to_s).mape_pct
        first = errors[target].between(HALF_S, HALF_S + TRAILING_S)
        figures[f"{target}_mape_{load}_first_10_s_after_pct"] = first.mape_pct
    figures[f"ttft_recovery_{load}_s"] = recovery_s(errors["ttft"], HALF_S, END_S)
    for when, (from_s, to_s) in steady.items():
        figures[f"ttft_phase_floor_{load}_steady_{when}_pct"] = phase_floor_pct(records, from_s, to_s)
        ttft_ms, tpot_ms = (errors[target].between(from_s, to_s).measured_ms for target in TARGETS)
        figures[f"ttft_{load}_{when}_ms_p50"], figures[f"ttft_{load}_{when}_ms_p99"] = map(
            float, np.percentile(ttft_ms, (50, 99))
        )
        figures[f"tpot_{load}_{when}_ms_p50"] = float(np.median(tpot_ms))
    return figures


def unequal_figures(records: Sequence[Record]) -> dict[str, float]:
    from_s, to_s = 2 / 3 * END_S, END_S
    figures = {}
    for group in _groups(records):
        for target in TARGETS:
            errors = errors_of(records, target).between(from_s, to_s).of(group)
            figures[f"{target}_mape_{group}_pct"] = errors.mape_pct
        figures[f"ttft_phase_floor_{group}_pct"] = phase_floor_pct(records, from_s, to_s, group)
        figures[f"served_by_{group}_requests"] = float(len(errors.at_s))
    return figures


def _groups(records: Sequence[Record]) -> list[str]:
    return sorted({record.endpoint.rpartition("-")[0] for record in records})


def print_windows(records: Sequence[Record], title: str) -> None:
    """Mean errors per 10 s of arrivals."""
    ttft, tpot = (mape_by_window(errors_of(records, target).rows(), TRAILING_S) for target in TARGETS)
    tpot_at = {window.start_s: window.mean_ape_pct for window in tpot}
    print(f"\n{title}\nfrom s  TTFT error %  TPOT error %  requests")
    for window in ttft:
        tpot_pct = tpot_at.get(window.start_s, math.nan)
        print(f"{window.start_s:6.0f}  {window.mean_ape_pct:12.1f}  {tpot_pct:12.1f}  {window.samples:8d}")


def plot(parts: dict[str, list[Record]], path: Path) -> None:
    """Errors per 10 s: one column per part, TTFT above TPOT, one line per group. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(len(TARGETS), len(parts), sharex=True, squeeze=False)
    for across, (title, records) in enumerate(parts.items()):
        for down, target in enumerate(TARGETS):
            here = axes[down, across]
            for group in _groups(records):
                windows = mape_by_window(errors_of(records, target).of(group).rows(), TRAILING_S)
                here.plot([w.start_s for w in windows], [w.mean_ape_pct for w in windows], label=group, marker=".")
            here.axvline(HALF_S, color="0.7", linewidth=1)
            here.axhline(GOOD_PCT, color="0.7", linewidth=1, linestyle="--")
            here.set(title=f"{title}: {target.upper()}", xlabel="arrival, s", ylabel="mean error, %", ylim=(0, 60))
            here.legend()
    figure.savefig(path, dpi=110)


# ------------------------------------------------------------------------------------------------------------- running


def simulate(spec: ClusterSpec, arrivals: Iterator[Arrival], title: str) -> list[Record]:
    began_s = time.perf_counter()
    records = Cluster(spec).run(_with_progress(arrivals, title))
    print(f"{title}: {len(records)} requests simulated in {time.perf_counter() - began_s:.0f} s", file=sys.stderr)
    return records


def _with_progress(arrivals: Iterator[Arrival], title: str) -> Iterator[Arrival]:
    """The arrivals, under a progress bar of virtual time where rich is installed (extra ``local``)."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield from arrivals
        return
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(title, total=LOAD_ENDS_S)
        for one in arrivals:
            progress.update(bar, completed=one.at_s)
            yield one


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", default="llama-3-8b-h100", choices=sorted(PRESETS), help="of the tripled load's engines")
    p.add_argument("--rate", type=float, default=40.0, help="chat requests/s before the load triples")
    p.add_argument("--documents-rate", type=float, default=15.0, help="documents/s before the load triples")
    p.add_argument("--unequal-rate", type=float, default=60.0, help="requests/s of the unequal pool")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--json", metavar="OUT")
    p.add_argument("--plot", metavar="FILE", type=Path, help="a picture of the errors over time")
    args = p.parse_args()
    parts = {
        name: simulate(*scenario(PRESETS[args.preset], rate_per_s, args.seed), name)
        for name, scenario, rate_per_s in (
            ("tripled documents", tripled_documents, args.documents_rate),
            ("tripled chat", tripled_chat, args.rate),
        )
    }
    parts |= {
        "unequal engines": simulate(*unequal(args.unequal_rate, args.seed), "unequal engines"),
    }
    for title, records in parts.items():
        print_windows(records, title)
    print()
    figures = {
        **tripled_figures(parts["tripled documents"], "documents"),
        **tripled_figures(parts["tripled chat"], "chat"),
        **unequal_figures(parts["unequal engines"]),
    }
    table(figures)
    if args.plot:
        plot(parts, args.plot)
    if args.json:
        config = {
            "preset": args.preset,
            "chat_rate_per_s": args.rate,
            "documents_rate_per_s": args.documents_rate,
            "unequal_rate_per_s": args.unequal_rate,
        }
        known = {name: value for name, value in figures.items() if not math.isnan(value)}
        write_json(args.json, config, args.seed, known)


if __name__ == "__main__":
    main()
