"""Who asks what, when: the engines, interactive arrivals and batch lines of ``benchmarks.bench_batch``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from random import Random

import msgspec

from llmd_sched.headroom.steps import StepModel
from llmd_sched.sim.engine import EngineConfig, Policy
from llmd_sched.sim.kvcache import BLOCK_TOKENS
from llmd_sched.sim.steptime import Preset

L8 = Preset(
    model="Llama-3-8B, one H100",
    step_base_s=6.9e-3,
    prefill_token_s=19.7e-6,
    attention_pair_s=0.65e-9,
    sequence_s=24e-6,
    decode_context_token_s=0.055e-6,
    request_overhead_s=17e-3,
    kv_blocks=467_000 // BLOCK_TOKENS,
)
Q32 = Preset(
    model="Qwen3-32B, two H100",
    step_base_s=14.0e-3,
    prefill_token_s=50e-6,
    attention_pair_s=1.6e-9,
    sequence_s=27e-6,
    decode_context_token_s=0.055e-6,
    request_overhead_s=17e-3,
    kv_blocks=307_000 // BLOCK_TOKENS,
)
STEP_NOISE = 0.05
LONGEST_TOKENS = 8192
IDLE_PER_S = 1.0
LEVELS_PER_S = (1.0, 2.0, 4.0, 7.0, 11.0, 15.0)
LEVEL_S = 20.0


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """Idle, then burst, again and again; or with ``irregular`` a level drawn every 20 s. Lengths as (mean, sd)."""

    name: str
    preset: Preset
    itl_ms: float
    """The operator's bound in ``protect``: ITL p95 of bursts without batch, as measured beforehand."""
    burst_per_s: float = 15.0
    prompt: tuple[float, float] = (500, 400)
    output: tuple[float, float] = (150, 100)
    engines: int = 1
    phase_s: float = 90.0
    cycles: int = 5
    """The first is warm-up."""
    irregular: bool = False

    @property
    def warm_up_s(self) -> float:
        return 2 * self.phase_s

    @property
    def end_s(self) -> float:
        return 2 * self.phase_s * self.cycles

    def bursting(self, at_s: float) -> bool:
        return self.irregular or at_s % (2 * self.phase_s) >= self.phase_s

    def engine(self, policy: Policy = Policy.PRIORITY) -> EngineConfig:
        return EngineConfig(preset=self.preset, policy=policy, noise_sigma=STEP_NOISE, max_waiting=1_000_000)

    def levels(self, seed: int) -> Iterator[tuple[float, float, float]]:
        """From, to, requests/s of all engines together."""
        rng = Random(f"{seed} levels")
        part_s = LEVEL_S if self.irregular else self.phase_s
        for number in range(math.ceil(self.end_s / part_s)):
            level = rng.choice(LEVELS_PER_S) if self.irregular else (IDLE_PER_S, self.burst_per_s)[number % 2]
            yield number * part_s, min((number + 1) * part_s, self.end_s), level * self.engines

    def arrivals(self, seed: int) -> Iterator[tuple[float, int, int]]:
        """Time, prompt tokens, output tokens; Poisson within a level."""
        rng = Random(f"{seed} interactive {self.name}")
        for from_s, to_s, per_s in self.levels(seed):
            at_s = from_s + rng.expovariate(per_s)
            while at_s < to_s:
                yield at_s, lognormal(rng, *self.prompt), lognormal(rng, *self.output)
                at_s += rng.expovariate(per_s)


def lognormal(rng: Random, mean: float, sd: float, longest: int = LONGEST_TOKENS) -> int:
    """Tokens, 1 to ``longest``, by mean and standard deviation before clipping."""
    variance = math.log1p((sd / mean) ** 2)
    return min(max(round(rng.lognormvariate(math.log(mean) - variance / 2, math.sqrt(variance))), 1), longest)


def batch_lines(seed: int, count: float = math.inf) -> Iterator[tuple[int, int]]:
    """Prompt and output tokens of the harness's batch."""
    rng, made = Random(f"{seed} batch"), 0
    while made < count:
        yield lognormal(rng, 1500, 1200, 4096), lognormal(rng, 500, 400, 2048)
        made += 1


def prior(preset: Preset) -> StepModel:
    """What the scheduler is told of an engine."""
    return StepModel(
        base_s=preset.step_base_s,
        prefill_token_s=preset.prefill_token_s,
        sequence_s=preset.sequence_s,
        context_token_s=preset.decode_context_token_s,
    )


_FOUR = (
    Scenario(name="L8A", preset=L8, itl_ms=11.2),
    Scenario(name="L8K", preset=L8, itl_ms=23.8, prompt=(1000, 600), output=(250, 150)),
    Scenario(name="Q32A", preset=Q32, itl_ms=37.0),
    Scenario(name="Q32K", preset=Q32, itl_ms=63.9, burst_per_s=20.0),
)
_variant = msgspec.structs.replace
SCENARIOS: dict[str, Scenario] = {
    one.name: one
    for base in _FOUR
    for one in (
        base,
        _variant(base, name=f"{base.name}-long", phase_s=300.0, cycles=3),
        _variant(base, name=f"{base.name}-four", engines=4),
        _variant(base, name=f"{base.name}-irregular", irregular=True),
    )
}
"""``-long``: phases of 300 s. ``-four``: four engines, four times the traffic. ``-irregular``: levels 1 to 15."""
