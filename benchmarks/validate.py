"""The simulated engine and cluster against published and recorded figures.

    python -m benchmarks.validate [--only llama,qwen,h200,b2b] [--json OUT]

Each anchor is a figure somebody measured, ours for the same load, how far we are off, and the band that holds (which
``tests/sim/test_anchors.py`` asserts). ``benchmarks/README.md`` says what falls short, and why. Everything is
virtual time and seeded, so the figures are the same everywhere.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from benchmarks.results import write_json
from benchmarks.workloads.scenarios import B2B_SAAS, pool
from llmd_sched.sim.cluster import Cluster
from llmd_sched.sim.engine import Engine, EngineConfig, SimRequest
from llmd_sched.sim.scenario import ClusterSpec
from llmd_sched.sim.steptime import PRESETS, Preset

ARMS = Path(__file__).parents[1] / "configs" / "arms"
SEED = 1


class Anchor(NamedTuple):
    """A published figure, or a range of them, and ours. ``within`` is the relative deviation that is asserted."""

    name: str
    low: float
    high: float
    ours: float
    within: float

    @property
    def deviation(self) -> float:
        """Relative to the nearer end of what was published; 0 inside."""
        nearest = min(max(self.ours, self.low), self.high)
        return self.ours / nearest - 1.0

    @property
    def holds(self) -> bool:
        return abs(self.deviation) <= self.within


def anchor(name: str, published: float, ours: float, within: float) -> Anchor:
    return Anchor(name, published, published, ours, within)


class Served:
    """One engine's run to the end: when each request came, began to answer and ended, in seconds by request number."""

    def __init__(
        self, preset: Preset, make: Callable[[int, float], SimRequest], arrivals_s: list[float], total: int = 0
    ) -> None:
        """Requests at ``arrivals_s``; then, up to ``total``, one more whenever one ends."""
        self.arrival_s: dict[int, float] = {}
        self.first_s: dict[int, float] = {}
        self.last_s: dict[int, float] = {}
        self._make = make
        self._engine = Engine(EngineConfig(preset=preset, max_waiting=sys.maxsize))
        for at_s in arrivals_s:
            self._submit(at_s)
        self._run(total)

    def _submit(self, at_s: float) -> None:
        number = len(self.arrival_s)
        self.arrival_s[number] = at_s
        self._engine.submit(self._make(number, at_s))

    def _run(self, total: int) -> None:
        now_s = self._engine.next_ready_s
        while now_s is not None:
            step = self._engine.step(now_s)
            if step is None:
                now_s = self._engine.next_ready_s
                continue
            now_s = step.end_s
            self.first_s |= dict.fromkeys(map(int, step.first), now_s)
            for number in map(int, step.finished):
                self.last_s[number] = now_s
                if len(self.arrival_s) < total:
                    self._submit(now_s)

    def ttft_ms(self, numbers: range) -> float:
        return 1e3 * statistics.fmean(self.first_s[n] - self.arrival_s[n] for n in numbers)

    def tpot_ms(self, numbers: range, output_tokens: int) -> float:
        return 1e3 * statistics.fmean(self.last_s[n] - self.first_s[n] for n in numbers) / (output_tokens - 1)


# Llama-3-8B-Instruct, one H100, vLLM 0.11: inference-perf's demo for KubeCon NA 2025. 10 x 10 prompts of 128 + 76
# tokens in turn, 64 tokens out. Its "constant" load draws exponential gaps scaled to the stage: uniform arrivals.
LLAMA = PRESETS["llama-3-8b-h100"]
PROMPT_TOKENS, OUTPUT_TOKENS, STAGE_S = 204, 64, 60.0
IN_FLIGHT = 440
"""Its client's limit, 44 workers of 10: a saturated stage is a closed loop of so many."""
CLOSED_TOTAL = 3000


class Stage(NamedTuple):
    """One unsaturated row: what was measured, and the bands that hold."""

    cached: bool
    rate_per_s: float
    ttft_ms: float
    tpot_ms: float
    ttft_within: float


class Saturated(NamedTuple):
    """One saturated row; all of it within 8 %."""

    cached: bool
    max_num_seqs: int
    ttft_ms: float
    tpot_ms: float
    output_tokens_per_s: float


STAGES = (
    Stage(False, 1.0, 31.0, 7.13, 0.11),
    Stage(False, 31.2, 30.0, 8.20, 0.11),
    Stage(False, 61.2, 35.0, 10.23, 0.08),
    Stage(False, 91.4, 51.0, 15.41, 0.12),
    Stage(True, 42.9, 27.0, 7.89, 0.08),
    Stage(True, 84.8, 29.0, 8.73, 0.08),
    Stage(True, 126.5, 32.0, 10.06, 0.08),
)
SATURATED = (
    Saturated(False, 128, 2937.0, 19.4, 6324.0),
    Saturated(False, 192, 2110.0, 25.9, 7183.0),
    Saturated(True, 128, 1735.0, 11.5, 10794.0),
)


def _llama_request(cached: bool) -> Callable[[int, float], SimRequest]:
    def make(number: int, at_s: float) -> SimRequest:
        group = number % 100 // 10
        shared, own = 1000 * group, 1_000_000 + 10 * (number % 100)
        hashes = [*range(shared, shared + 8), *range(own, own + 4)]
        return SimRequest(
            id=str(number),
            prompt_tokens=PROMPT_TOKENS,
            output_tokens=OUTPUT_TOKENS,
            arrival_s=at_s,
            block_hashes=hashes if cached else (),
        )

    return make


def llama() -> Iterator[Anchor]:
    """Mean TTFT and time per output token of ten runs, and the throughput of the saturated ones."""
    for stage in STAGES:
        rng = random.Random(SEED)
        # A stage of one request per second is too short for a mean: ours is eight of them.
        length_s = STAGE_S if stage.rate_per_s > 10 else 8 * STAGE_S
        arrivals_s = sorted(rng.random() * length_s for _ in range(int(stage.rate_per_s * length_s)))
        preset = msgspec.structs.replace(LLAMA, max_num_seqs=128)
        served, all_of_it = Served(preset, _llama_request(stage.cached), arrivals_s), range(len(arrivals_s))
        name = f"llama_{'cached' if stage.cached else 'plain'}_{stage.rate_per_s:g}_per_s"
        yield anchor(f"{name}_ttft_ms", stage.ttft_ms, served.ttft_ms(all_of_it), stage.ttft_within)
        yield anchor(f"{name}_tpot_ms", stage.tpot_ms, served.tpot_ms(all_of_it, OUTPUT_TOKENS), 0.08)
    for row in SATURATED:
        yield from _saturated(row)


def _saturated(row: Saturated) -> Iterator[Anchor]:
    rng = random.Random(SEED)
    ramp_s = IN_FLIGHT / (260.0 if row.cached else 153.0)  # at the rate offered
    arrivals_s = sorted(rng.random() * ramp_s for _ in range(IN_FLIGHT))
    preset = msgspec.structs.replace(LLAMA, max_num_seqs=row.max_num_seqs)
    served = Served(preset, _llama_request(row.cached), arrivals_s, CLOSED_TOTAL)
    steady = range(2 * IN_FLIGHT, CLOSED_TOTAL - IN_FLIGHT)
    ends_s = sorted(served.last_s.values())
    per_s = len(steady) * OUTPUT_TOKENS / (ends_s[steady.stop] - ends_s[steady.start])
    name = f"llama_{'cached' if row.cached else 'plain'}_saturated_{row.max_num_seqs}_seqs"
    yield anchor(f"{name}_ttft_ms", row.ttft_ms, served.ttft_ms(steady), 0.08)
    yield anchor(f"{name}_tpot_ms", row.tpot_ms, served.tpot_ms(steady, OUTPUT_TOKENS), 0.08)
    yield anchor(f"{name}_output_tokens_per_s", row.output_tokens_per_s, per_s, 0.08)


def _lone(prompt_tokens: int, output_tokens: int) -> Callable[[int, float], SimRequest]:
    def make(number: int, at_s: float) -> SimRequest:
        return SimRequest(id=str(number), prompt_tokens=prompt_tokens, output_tokens=output_tokens, arrival_s=at_s)

    return make


def qwen() -> Iterator[Anchor]:
    """Qwen3-32B on two H100: llm-d's fit to lone requests of 8k to 155k tokens."""
    for tokens in (8192, 16_384, 32_768, 65_536, 100_000, 155_000):
        fit_ms = 42.5e-3 * tokens + 443e-9 * tokens**2
        served = Served(PRESETS["qwen3-32b-h100x2"], _lone(tokens, 1), [0.0])
        yield anchor(f"qwen_{tokens}_tokens_ttft_ms", fit_ms, served.ttft_ms(range(1)), 0.05)


H200 = PRESETS["qwen3-32b-h200"]
H200_CONTEXT_TOKENS = 300
H200_BUSY_TTFT_MS = {3: 48.3, 10: 51.7, 22: 52.8}
"""Requests running -> median of the recorded TTFT less 98 us per uncached token, nothing waiting: sharegpt rows with 1
to 4, 5 to 14 and 15 to 29 running."""
H200_TPOT_MS = {3: 19.3, 10: 19.7, 22: 20.3}


def h200() -> Iterator[Anchor]:
    """Qwen3-32B on one H200: the idle TTFT line, TTFT beside running requests, and time per token by their number."""
    for tokens in (20, 167, 500, 1000):
        served = Served(H200, _lone(tokens, 1), [0.0])
        yield anchor(f"h200_idle_{tokens}_tokens_ttft_ms", 41.6 + 98e-3 * tokens, served.ttft_ms(range(1)), 0.1)
    for running, ttft_ms in H200_BUSY_TTFT_MS.items():
        yield anchor(f"h200_{running}_running_ttft_ms", ttft_ms + 98e-3 * 167, _busy_ttft_ms(running, 167), 0.1)
    for running, tpot_ms in H200_TPOT_MS.items():
        served = Served(H200, _lone(H200_CONTEXT_TOKENS, 100), [0.0] * running)
        yield anchor(f"h200_{running}_running_tpot_ms", tpot_ms, served.tpot_ms(range(running), 100), 0.1)


def _busy_ttft_ms(running: int, tokens: int, phases: int = 20) -> float:
    """Mean over the moments of a step at which a request can arrive beside so many that decode."""
    step_s = H200.step_s(0, 0.0, running, running * H200_CONTEXT_TOKENS)

    def make(number: int, at_s: float) -> SimRequest:
        prompt_tokens, output_tokens = (H200_CONTEXT_TOKENS, 100) if number < running else (tokens, 1)
        return SimRequest(id=str(number), prompt_tokens=prompt_tokens, output_tokens=output_tokens, arrival_s=at_s)

    def at_phase(phase: int) -> float:
        arrivals_s = [*[0.0] * running, 1.0 + step_s * (phase + 0.5) / phases]
        return Served(H200, make, arrivals_s).ttft_ms(range(running, running + 1))

    return statistics.fmean(at_phase(phase) for phase in range(phases))


# b2b-saas on eight times two H100, at the published knees. inference-perf's throughput is all requests over the time
# from the first request to the last reply, the ramp and the drain included; so is ours.
B2B_STAGE_S = 100.0
B2B = {"affinity-token-load": (38.0, 85e3, 95e3, 0.0), "round-robin": (18.0, 40e3, 50e3, 0.1)}
"""Arm -> requests per second offered, published range of input tokens/s, and how far out of it is asserted."""


def b2b(engines: int = 8) -> Iterator[Anchor]:
    """Input tokens per second. Of fewer engines, scaled up: they get their part of the load and, with affinity, of the
    groups; with round-robin each sees all groups."""
    for arm, (rate_per_s, low, high, within) in B2B.items():
        share = engines / 8
        groups = round(B2B_SAAS.groups * (share if arm == "affinity-token-load" else 1.0))
        workload = msgspec.structs.replace(B2B_SAAS, groups=groups)
        config = (ARMS / f"{arm}.yaml").read_text(encoding="utf-8")
        cluster = Cluster(ClusterSpec(config=config, engines=pool(engines), seed=SEED))
        records = cluster.run(workload.arrivals(rate_per_s * share, B2B_STAGE_S, SEED))
        took_s = max(r.arrival_s + r.e2e_ms / 1e3 for r in records) - min(r.arrival_s for r in records)
        per_s = sum(r.input_tokens for r in records if r.status == 200) / took_s / share
        yield Anchor(f"b2b_{arm.replace('-', '_')}_input_tokens_per_s", low, high, per_s, within)


GROUPS: dict[str, Callable[[], Iterator[Anchor]]] = {"llama": llama, "qwen": qwen, "h200": h200, "b2b": b2b}


def show(one: Anchor) -> None:
    published = f"{one.low:,.6g}" if one.low == one.high else f"{one.low:,.0f}-{one.high:,.0f}"
    verdict = "" if one.holds else "  OUT OF BAND"
    print(
        f"{one.name:<44}  {published:>14}  {one.ours:>10,.5g}  {100 * one.deviation:>+6.1f} %"
        f"  ±{100 * one.within:.0f} %{verdict}",
        flush=True,
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.validate", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default=",".join(GROUPS), help=f"groups, of {', '.join(GROUPS)} (default: all)")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    args = parser.parse_args(arguments)
    names = args.only.split(",")
    unknown = [name for name in names if name not in GROUPS]
    if unknown:
        parser.error(f"--only takes {', '.join(GROUPS)}, not {', '.join(unknown)}")
    print(f"{'anchor':<44}  {'published':>14}  {'ours':>10}  {'off':>8}  asserted")
    figures: dict[str, float] = {}
    held = True
    for name in names:
        for one in GROUPS[name]():
            show(one)
            held = held and one.holds
            figures |= {one.name: one.ours, f"{one.name}_deviation_pct": 100 * one.deviation}
    if args.json:
        write_json(args.json, {"groups": names}, SEED, figures)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
